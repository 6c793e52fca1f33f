"""`lobit bench --device adb`: measures bundles on a phone, in lobit's app, and makes the table that the bench of this machine makes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import lobit
from lobit.errors import InputError, MissingPartError
from lobit.progress_callback import Progress
from lobit.runtime import bench
from lobit.runtime.adb import Phone, find_phone
from lobit.runtime.bench_row import Answer, Workload
from lobit.runtime.bundle import Bundle, open_bundle
from lobit.runtime.manifest import Manifest
from lobit.runtime.phone import WAY_OUT, PhoneService
from lobit.targets import Device

WHAT = (
    "ppN: a prompt of N tokens is read at once; tgN: N tokens are read one by one; @dD: with D tokens in the cache before. Timed on the "
    "phone: the engine's calls, until the logits are in the app. Not timed: loading, one warm-up, tokenizing, sampling, filling the "
    "cache to its depth. Tokens are pseudo-random and always the same. Bundles were measured one after the other, the rows of each in "
    "one process: peak memory is the highest up to the row's end (base_rss_bytes: before the model was loaded). first_token_ms: from "
    "the start of the prompt until the likeliest token is chosen. before, after: the phone's battery temperature, charge, thermal "
    "status and clock frequencies, null where it does not tell them. sustained: decoding without a pause, tokens a second over time. "
    "gigabytes_per_second: the weights and the filled part of the cache that a token must read, over its time."
)


@dataclass(frozen=True)
class Pace:
    """How the phone is kept cool between rows, and whether its speed is watched until it is hot."""

    rest: int = 0
    """Seconds of rest before each row."""
    cool: float | None = None
    """Battery temperature in °C that a row waits for; None: it does not wait."""
    sustained: int = 0
    """Seconds of decoding without a pause after the rows."""


def bench_phone(
    bundles: Sequence[Path | str],
    device: Device,
    prompts: Sequence[int] = (128,),
    generates: Sequence[int] = (64,),
    depths: Sequence[int] = (0,),
    threads: int | None = None,
    repetitions: int = 5,
    pace: Pace | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Times every bundle on a phone, one after the other.

    Args:
        bundles: the bundles' folders.
        device: kind `adb`, with the phone's serial number.
        prompts: lengths of prompts in tokens, may be empty.
        generates: numbers of generated tokens, may be empty.
        depths: tokens in the cache before the timed ones.
        threads: number of the runtime's threads; None: what each bundle says, or the phone's own choice.
        repetitions: timed samples of each row.
        pace: how the phone is kept cool.
        progress: called while bundles are sent, before each row and at the end.

    Returns:
        What `bench` returns, without this machine's processor and memory bandwidth; rows have `before` and `after`, and there are
        `sustained` and `phone`.

    Raises:
        InputError: a number is out of range, nothing is to be timed, two bundles have the same name, or the phone is not clear.
        BundleError: a bundle is not as export wrote it, or the app refuses it.
        LobitError: the phone is gone, has no space, or a row failed.
        MissingPartError: adb or the app is not installed, or the app is too old.
    """
    pace = pace or Pace()
    bench.workloads(prompts, generates, depths)
    numbers = {"threads": 1 if threads is None else threads, "repetitions": repetitions}
    wrong = [f"{name} {value}" for name, value in numbers.items() if value < 1]
    wrong += [f"{name} {value}" for name, value in (("rest", pace.rest), ("sustained", pace.sustained)) if value < 0]
    if wrong:
        raise InputError(f"{', '.join(wrong)} cannot be: threads and repetitions are at least 1, seconds at least 0")
    opened = [open_bundle(folder) for folder in bundles]
    bench.check_names(opened)
    request = {
        "prompts": list(prompts),
        "generates": list(generates),
        "depths": list(depths),
        "repetitions": repetitions,
        "threads": threads or 0,
        "rest_seconds": pace.rest,
        "cool_celsius": pace.cool,
        "sustained_seconds": pace.sustained,
    }
    phone = find_phone(device.detail)
    result: dict[str, Any] = {"kind": "bench", "rows": [], "skipped": [], "sustained": [], "what": WHAT}
    for number, bundle in enumerate(opened):
        about = _measure(phone, bundle, request, result, _Share(progress, number, len(opened)))
    versions = {"lobit": lobit.__version__, "app": str(about.get("app"))}
    return {**result, "device": device_text(about.get("device")), "phone": about, "versions": versions}


@dataclass(frozen=True)
class _Share:
    """Turns the progress of one bundle into that of all."""

    progress: Progress | None
    number: int
    bundles: int

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.progress:
            self.progress(what, self.number * total + done, self.bundles * total)


def _measure(phone: Phone, bundle: Bundle, request: Mapping[str, Any], result: dict[str, Any], share: _Share) -> dict[str, Any]:
    """Measures one bundle and adds its rows to the result; returns what the app says of the phone."""
    service, name = PhoneService(phone, bundle, int(request["threads"]), share.progress), bundle.manifest.name
    try:
        found = service.service.bench(request, lambda told: share(f"{name} {told['row']}", told["done"], told["total"]))
        service.close()
        result["rows"] += [_row(bundle.manifest, row, int(request["threads"])) for row in found["rows"]]
        result["skipped"] += [{"model": name, "test": left["test"], "why": left["why"]} for left in found["skipped"]]
        result["sustained"] += [{"model": name, **found["sustained"]}] if found["sustained"] else []
    except (KeyError, TypeError, ValueError) as error:
        raise MissingPartError(f"the app on {phone.name} answers what this lobit does not know ({error!r}): {WAY_OUT}") from None
    return service.service.about


def _row(manifest: Manifest, row: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """A row of the result, given the app's. How much of the memory's bandwidth it used is not known, as that is not measured there."""
    answer = Answer(**{field.name: row[field.name] for field in fields(Answer)})
    made = bench.row_of(manifest, Workload(row["phase"], row["tokens"], row["depth"]), answer, threads or manifest.threads, math.inf)
    own = {"threads": made["threads"] or None, "bandwidth_share": None}  # with no number of threads, the phone chooses it
    return {**made, **own, "before": row["before"], "after": row["after"]}


def device_text(device: Any) -> str:
    """What the app says of the phone as a text such as `phone: Google Pixel 8 (Android 15, Tensor G3, 9 cores)`."""
    told = device if isinstance(device, dict) else {}
    name = " ".join(str(told[key]) for key in ("manufacturer", "model") if told.get(key)) or "unknown"
    facts = {"android": "Android {}", "soc": "{}", "cores": "{} cores"}
    known = [text.format(told[key]) for key, text in facts.items() if told.get(key)]
    return f"phone: {name}" + (f" ({', '.join(known)})" if known else "")
