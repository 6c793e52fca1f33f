"""Bench, report, and the demo, which goes from quantization to a report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobit.errors import InputError
from lobit.progress_callback import Progress
from lobit.targets import EMULATED, PHONE, THIS_MACHINE, Device
from lobit.verbs.make import choose_recipe, export, quantize
from lobit.verbs.prove import parity, verify

if TYPE_CHECKING:
    from lobit.runtime.bench_phone import Pace


def bench(
    bundles: Sequence[Path],
    *,
    prompts: Sequence[int] = (128,),
    generates: Sequence[int] = (64,),
    depths: Sequence[int] = (0,),
    threads: int | None = None,
    repetitions: int = 5,
    device: Device = THIS_MACHINE,
    pace: Pace | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures prefill and decode speed, time to first token and memory: here each row in a process of its own, or on a phone.

    On an emulated arm64 processor, instructions a token are counted instead; programs that only an emulator runs here are not timed, and
    their sizes and the bytes that they read are given.

    Args:
        bundles: the bundles' folders.
        prompts: lengths of prompts in tokens, may be empty.
        generates: numbers of generated tokens, may be empty.
        depths: tokens in the cache before the timed ones.
        threads: of the runtime; None: what each bundle says, or the runtime's own choice.
        repetitions: timed samples of each row.
        device: this machine, a phone or an emulated arm64 processor.
        pace: how a phone is kept cool; None: it does not rest.
        progress: called before each row and at the end, and while bundles are sent to a phone.

    Raises:
        InputError: a number is out of range, or the device is not to be timed.
    """
    tests = {"prompts": tuple(prompts), "generates": tuple(generates), "depths": tuple(depths)}
    common: dict[str, Any] = {**tests, "threads": threads, "repetitions": repetitions, "progress": progress}
    if device.kind == PHONE:
        from lobit.runtime.bench_phone import bench_phone

        return bench_phone(list(bundles), device, pace=pace, **common)
    if pace is not None:
        raise InputError("--rest, --cool and --sustained are for a phone: name it with --device adb, or leave them out")
    if device.kind == EMULATED:
        from lobit.runtime.bench_instructions import bench_instructions

        return bench_instructions(list(bundles), device, **tests, progress=progress)
    if device != THIS_MACHINE:
        raise InputError(f"how long it takes on {device} says nothing of a phone: take --device adb, or leave it out for this machine")
    from lobit.runtime import bench as benchmark
    from lobit.runtime.bench_compiled import bench_compiled, is_compiled

    if any(map(is_compiled, bundles)):
        return bench_compiled(list(bundles))
    return benchmark.bench(list(bundles), **common)


def report(results: Sequence[Path], out: Path) -> Path:
    """Writes one HTML page from the JSON of parity, bench and verify, and from manifests; returns its path."""
    from lobit.runtime import report as page

    return page.report(list(results), out, command=" ".join(sys.argv))


@dataclass(frozen=True)
class Demonstration:
    """One of the demo's bundles."""

    bundle: str
    recipe: str
    target: str
    results: str
    """What the names of its results begin with."""
    export: str
    """What is announced before its export."""


DEMONSTRATIONS = (
    Demonstration("demo-8da4w-g32", "8da4w-g32", "xnnpack", "", "ExecuTorch, XNNPACK (about half a minute)"),
    Demonstration("demo-8da4w-g32-onnx", "8da4w-g32", "onnx", "onnx-", "ONNX Runtime"),
    Demonstration("demo-bitnet", "bitnet", "xnnpack", "ternary-", "ExecuTorch, XNNPACK (about half a minute)"),
    Demonstration("demo-bitnet-onnx", "bitnet", "onnx", "onnx-ternary-", "ONNX Runtime, two bits a weight"),
)


def demo(out: Path, *, on_step: Callable[[str], None] | None = None, repetitions: int = 3) -> Path:
    """Takes the shipped models through quantize, export, verify, parity, bench and report; returns the report's path.

    Two models, each on two targets: the float one under `8da4w-g32`, and the ternary checkpoint that was trained from it.

    Raises:
        BundleError: something is at `out`.
    """
    import json

    from lobit.atomic_folder import Work, new_folder
    from lobit.demo import TERNARY_FOLDER
    from lobit.runtime.manifest import FILE_NAME

    say = on_step or (lambda _: None)
    with new_folder(out, Work("demo", {"repetitions": repetitions})) as folder:
        checkpoints = {"8da4w-g32": folder / "checkpoint", "bitnet": TERNARY_FOLDER}
        say("quantize: INT4 weights in groups of 32")
        quantize("demo", choose_recipe("8da4w-g32"), checkpoints["8da4w-g32"])
        results: dict[str, dict[str, Any]] = {}
        for one in DEMONSTRATIONS:
            results |= _proved(one, folder / one.bundle, checkpoints[one.recipe], say)
        say("bench: prefill and decode, each row in a process of its own")
        bundles = [folder / one.bundle for one in DEMONSTRATIONS]
        results["bench"] = bench(bundles, prompts=(128,), generates=(32,), depths=(0, 256), repetitions=repetitions)
        paths = [bundle / name for bundle in bundles for name in (FILE_NAME, "build.json")]
        for name, result in results.items():
            paths.append(folder / f"{name}.json")
            paths[-1].write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        say("report")
        report(paths, folder / "report.html")
    return out / "report.html"


def _proved(one: Demonstration, bundle: Path, checkpoint: Path, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Exports a checkpoint of the demo model, and returns what verify and parity find, by the names of the results."""
    import json

    from lobit.demo import FOLDER, held_out_text

    say(f"export {one.bundle}: {one.export}")
    export(str(checkpoint), one.target, bundle, context=512, chunk=128, command=["lobit", "demo"])
    say("verify: every integer and scale, read back out of the program")
    verified = verify(bundle, str(checkpoint))
    say("parity: against the float model, on stories it has not seen")
    compared = parity(bundle, str(FOLDER), held_out_text(8), tokens=600, checkpoint=str(checkpoint))
    training = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
    compared["text"] = "held-out stories of the demo's grammar"
    compared["entropy"] = {"nats_per_token": training["entropy"], "what": "the story grammar, exact"}
    return {f"{one.results}verify": verified, f"{one.results}parity": compared}
