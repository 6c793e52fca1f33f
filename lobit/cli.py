"""The command line: each command parses its options, calls the function of the same name in `verbs`, and prints the result.

The result goes to stdout, as a table or with `--json` as one JSON object; progress goes to stderr.
Exit codes: 0, done; 1, a gate failed; 2, a mistake or a missing part, told in one message; 130, interrupted.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import lobit.cli_android
import lobit.cli_eval
import lobit.cli_learn
import lobit.cli_make  # noqa: F401 (imported because it registers its commands)
from lobit.cli_options import (
    BundleArgument,
    Cpu,
    Device,
    Json,
    Threads,
    app,
    numbers,
    print_json,
    read_text,
)
from lobit.errors import InputError
from lobit.exit_messages import MISTAKE, one_message
from lobit.memory import check_address_space

if TYPE_CHECKING:
    from lobit import targets
    from lobit.runtime.generate import Sampling


@app.callback()
def _before() -> None:
    check_address_space()


@app.command(epilog="Example: lobit demo --out demo-out")
def demo(out: Annotated[Path, typer.Option("-o", "--out", help="A new folder.")] = Path("demo-out")) -> None:
    """The shipped models through everything, to report.html."""
    from lobit import tables, verbs
    from lobit.progress import announce
    from lobit.verbs.measure import DEMONSTRATIONS

    with announce() as on_step:
        report_path = verbs.demo(out, on_step=on_step)
    shown = {"verify": tables.verify, "parity": tables.parity, "bench": tables.bench}
    passed = True
    proved = [f"{one.results}{kind}" for one in DEMONSTRATIONS for kind in ("verify", "parity")]
    for name in (*proved, "bench"):
        result = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
        tables.show(shown[name.rpartition("-")[2]](result))
        passed &= result.get("passed", True)
    typer.echo(f"\nreport: {report_path}\nnext:   lobit run {out}/demo-8da4w-g32 --prompt 'Once'")
    if not passed:
        raise typer.Exit(1)


@app.command(epilog="Example: lobit verify bundle checkpoint")
def verify(
    bundle: BundleArgument,
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT|MODEL", help="What the bundle was exported from.")],
    every: Annotated[bool, typer.Option("--all", help="Target qnn: read all integers back from the emulator, not a sample.")] = False,
    as_json: Json = False,
) -> None:
    """Compares a bundle's integers with the checkpoint's.

    Every integer and scale is read back out of the program. A program for target qnn cannot be taken apart: a sample of its layers is read
    back from the emulator, and the model is compiled anew, which must give the same bytes. Exit 1 where something differs.
    """
    from lobit import tables, verbs
    from lobit.progress import bar

    with bar() as shown:
        result = verbs.verify(bundle, checkpoint, every=every, progress=shown.count)
    print_json(result) if as_json else tables.show(tables.verify(result))
    if not result["passed"]:
        raise typer.Exit(1)


@app.command(epilog="Examples: lobit run bundle --prompt 'What is the capital of France?'  |  lobit run bundle   (a chat)")
def run(
    bundle: BundleArgument,
    prompt: Annotated[str | None, typer.Option("--prompt", help="A question, or text to continue; without it: a chat.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, also where the model has a chat template.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Default: 512 of an answer, 128 of text that is continued.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="What the model is told before a chat.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: always the most probable token.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Draw from so many of the likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw from the likeliest tokens that reach this share together.")] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", help="Above 1: tokens that were there before are less likely.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the drawing: the same seed gives the same text.")] = 0,
    threads: Threads = None,
    device: Device = "host",
    cpu: Cpu = None,
    as_json: Json = False,
) -> None:
    """Text from a bundle, and tokens per second: an answer or a chat where the model has a chat template.

    In a chat Ctrl-C stops an answer, /reset begins a new conversation, and the end of the input (Ctrl-D) ends it.
    """
    from lobit import verbs
    from lobit.runtime.generate import Sampling
    from lobit.targets import parse_device

    sampling, where = Sampling(repetition_penalty, temperature, top_k, top_p, seed), parse_device(device, cpu)
    if prompt is None:
        if raw or as_json:
            raise InputError("--raw and --json are for one text: give it with --prompt")
        _chat(bundle, system, max_new_tokens, sampling, threads, where)
        return
    result = verbs.run(
        bundle,
        prompt,
        raw=raw,
        system=system,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        threads=threads,
        device=where,
        on_text=None if as_json else _stream,
        echo=True,
    )
    if as_json:
        print_json(result)
    else:
        typer.echo()
        _aside(_spoken(result["stats"], where))


def _chat(
    bundle: Path, system: str | None, max_new_tokens: int | None, sampling: Sampling, threads: int | None, device: targets.Device
) -> None:
    """Chats with a user at a terminal, or answers the lines of stdin."""
    from lobit import verbs

    typed = sys.stdin.isatty()
    hint = ". Ctrl-C stops an answer, /reset begins anew, Ctrl-D ends" if typed else ""
    verbs.chat(
        bundle,
        _typed_lines() if typed else sys.stdin,
        _stream,
        system=system,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        threads=threads,
        device=device,
        on_load=lambda seconds: _aside(f"{bundle.name}, loaded in {seconds:.1f} s{hint}"),
        on_turn=lambda stats: _aside(_spoken(stats, device)),
        on_problem=(lambda error: _aside(str(error) or "stopped")) if typed else None,
    )


def _spoken(stats: dict[str, Any], device: targets.Device) -> str:
    """What is said of the speed of a generation."""
    from lobit import tables
    from lobit.targets import PHONE

    if stats["emulated"]:
        return f"{device if device.is_emulated else 'emulated'}: how long it takes says nothing of a phone"
    through = ", with the way of every token's logits through adb: `lobit bench` leaves it out" if device.kind == PHONE else ""
    return tables.speed(stats) + through


def _typed_lines() -> Iterator[str]:
    """Yields the lines that are typed at a prompt, until the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives `input` line editing and a history)
    while True:
        try:
            yield input("> ")
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt as error:
            if error.args:  # it was raised for another signal than Ctrl-C's
                raise
            typer.echo()


def _aside(text: str) -> None:
    """Prints a text to stderr, dimmed where that is a terminal."""
    typer.secho(text, err=True, dim=True)


def _stream(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@app.command(epilog="Example: lobit parity bundle --reference ./SmolLM2-135M --text novel.txt --json")
def parity(
    bundle: BundleArgument,
    reference: Annotated[str, typer.Option("--reference", metavar="MODEL", help="The float model.")],
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="What to read.")],
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, help="Of the text, at most; default: 2048, or 256 where an emulator reads them.")
    ] = None,
    checkpoint: Annotated[str | None, typer.Option("--checkpoint", metavar="CKPT", help="Where the model was trained.")] = None,
    stages: Annotated[
        str | None, typer.Option("--stages", help="Of fake_quant, graph, artifact, rounded; default: all that the target has.")
    ] = None,
    threads: Threads = None,
    device: Device = "host",
    cpu: Cpu = None,
    as_json: Json = False,
) -> None:
    """Is what runs there what was trained?

    Distributions against the float model, stage by stage. Exit 1 where a limit is exceeded.
    """
    from lobit import tables, verbs
    from lobit.progress import bar
    from lobit.targets import parse_device

    with bar() as shown:
        result = verbs.parity(
            bundle,
            reference,
            read_text(text),
            tokens=tokens,
            checkpoint=checkpoint,
            stages=stages.split(",") if stages else None,
            threads=threads,
            device=parse_device(device, cpu),
            progress=shown.count,
        )
    result["text"] = text.name
    print_json(result) if as_json else tables.show(tables.parity(result))
    if not result["passed"]:
        raise typer.Exit(1)


@app.command(epilog="Examples: lobit bench bundle -p 128,512 -n 64 -d 0,2048 -t 2  |  lobit bench bundle --device adb --sustained 600")
def bench(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="One or more, measured in turn.")],
    prompts: Annotated[str, typer.Option("-p", "--prompt", help="Tokens to prefill.")] = "128",
    generates: Annotated[str, typer.Option("-n", "--generate", help="Tokens to decode.")] = "64",
    depths: Annotated[str, typer.Option("-d", "--depth", help="Tokens that are in the cache before.")] = "0",
    threads: Threads = None,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1)] = 5,
    device: Annotated[
        str,
        typer.Option(
            "--device", metavar="DEVICE", help="host, adb[:SERIAL] (a phone with lobit's app), emulated-arm64 (counts instructions)."
        ),
    ] = "host",
    cpu: Cpu = None,
    rest: Annotated[int | None, typer.Option("--rest", min=0, help="On a phone: seconds of rest before each row.")] = None,
    cool: Annotated[float | None, typer.Option("--cool", help="On a phone: °C of the battery that each row waits for.")] = None,
    sustained: Annotated[
        int | None, typer.Option("--sustained", min=1, help="On a phone: seconds of decoding at the end, to see how far the speed falls.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Prefill and decode speed, time to first token, memory.

    On this machine each row runs in a process of its own, so that peak memory is honest. A phone is measured in lobit's app, which gets
    the bundles first, with its temperature before and after each row. On emulated-arm64, instructions a token are counted: a figure that
    does not depend on the machine.
    """
    from lobit import tables, verbs
    from lobit.progress import bar
    from lobit.targets import parse_device

    pace = None
    if (rest, cool, sustained) != (None, None, None):
        from lobit.runtime.bench_phone import Pace

        pace = Pace(rest or 0, cool, sustained or 0)
    with bar() as shown:
        result = verbs.bench(
            bundles,
            prompts=numbers(prompts, "-p"),
            generates=numbers(generates, "-n"),
            depths=numbers(depths, "-d", least=0),
            threads=threads,
            repetitions=repetitions,
            device=parse_device(device, cpu),
            pace=pace,
            progress=shown.count,
        )
    table = {"instructions": tables.instructions, "compiled": tables.compiled}.get(result["kind"], tables.bench)
    print_json(result) if as_json else tables.show(table(result))


@app.command(epilog="Example: lobit report bundle/manifest.json parity.json bench.json verify.json -o report.html")
def report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT.json...", help="Of parity, bench, eval, verify; manifests.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The page; replaced where it is there.")] = Path("report.html"),
) -> None:
    """One self-contained page from results."""
    from lobit import verbs

    typer.echo(f"report: {verbs.report(results, out)}")


@app.command(epilog="Examples: lobit doctor  |  lobit doctor android  |  lobit doctor ./SmolLM2-135M")
def doctor(
    what: Annotated[
        str | None, typer.Argument(metavar="[TARGET|MODEL]", help="A target, fetch, android, or a model; default: all Python packages.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What is installed and what is missing; or whether a model is read as transformers reads it."""
    from lobit import tables, verbs

    result = verbs.doctor(what)
    table = tables.installed if "parts" in result else tables.readings
    print_json(result) if as_json else tables.show(table(result))
    if not result["passed"]:
        raise typer.Exit(MISTAKE)


def main() -> None:
    """Runs the command line and exits; a user's mistake is shown as one message."""
    command, code = typer.main.get_command(app), 0
    with one_message():
        try:
            with command.make_context("lobit", sys.argv[1:]) as context:
                command.invoke(context)
        except typer.Exit as end:
            code = end.exit_code
        except Exception as error:
            show = getattr(error, "show", None)  # typer's own messages on wrong options
            if show is None:
                raise
            show()
            code = MISTAKE
    sys.exit(code)


if __name__ == "__main__":
    main()
