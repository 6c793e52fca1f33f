"""The report's data: reads and checks the JSON that the other verbs write, and groups it by bundle."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lobit.errors import InputError, LobitError, listed
from lobit.runtime.manifest import Manifest

LARGEST_RESULT = 64 << 20
"""Bytes that a file may have; a larger one is not read."""
COLOURS = 8
"""Number of bundles that have a colour of their own; the ninth has the first one's again."""
ACCEPTED = (
    "the JSON of `lobit parity`, `lobit bench`, `lobit eval`, `lobit verify` and `lobit export`, and a bundle's "
    "manifest.json"
)

_BUNDLE = {"name": str, "target": str, "recipe": object}
_METRICS = {"kl_mean": float, "kl_p99": float, "top1_agreement": float, "perplexity": float}
_COUNTS = {"integers": int, "differing_integers": int, "scales": int, "differing_scales": int, "floats?": int, "differing_floats?": int}
_PHASE = {**_METRICS, "kl_se?": float, "tokens?": int, "positions?": int}
_STATE = {"battery_celsius?": float, "battery_percent?": float, "thermal_status?": int, "frequencies_khz?": [object]}
_ROW = {
    "model": str, "target": str, "recipe": object, "bundle?": str, "test": str, "tokens?": int, "depth?": int, "threads?": int,
    "samples_ns": [float], "tokens_per_second": float, "stddev?": float, "first_token_ms?": float, "load_seconds?": float,
    "model_bytes?": int, "params?": int, "peak_rss_bytes?": int, "base_rss_bytes?": int, "kv_cache_bytes?": int,
    "gigabytes_per_second?": float, "bandwidth_share?": float, "before?": _STATE, "after?": _STATE,
}  # fmt: skip
_FIGURE = {"value": float, "se": float}
SHAPES: dict[str, dict[str, Any]] = {
    "parity": {
        "bundle": _BUNDLE, "model": str, "text?": object, "tokens": int, "positions?": int, "reference_perplexity": float,
        "stages": [{"name": str, **_METRICS, "kl_se?": float, "kl_step?": float}],
        "beside?": [{"name": str, **_METRICS, "kl_se?": float, "kl_step?": float}],
        "phases": {"prefill?": _PHASE, "decode?": _PHASE, "wrapped?": _PHASE},
        "limits": {"*": {"limit": float, "reason": str}}, "passed": bool, "entropy?": {"nats_per_token": float, "what": str},
        "parts?": {"tokens": int, "faults": [str], "worst": [str], "nearest": float, "all": [{"name": str}]},
        "warnings?": [{"what": str, "advice": str}],
    },
    "bench": {
        "rows": [_ROW], "device": object, "versions": {"*": object}, "memory_bandwidth_gb_s?": float, "cpu?": {"*": object},
        "what?": object, "skipped?": [object], "sustained?": [{"model": str, "seconds": float, "samples": [[float]]}],
    },
    "compiled": {
        "rows": [{"model": str, "target": str, "recipe": object, "soc?": str, "method": str, "tokens": int, "read_bytes?": int,
                  "operators": int, "delegates": int, "program_bytes": int, "cache_bytes": int}],
        "device": str, "what": str,
    },
    "verify": {
        "bundle": _BUNDLE, "tensors": int, **_COUNTS, "checkpoint_matches?": bool, "layers": [{"name": str, **_COUNTS}], "passed": bool,
        "compiled?": [{"file": str, "bytes": int, "differing_bytes": int}],
    },
    "eval": {
        "context": int, "columns": [{"name": str, "stage": str, "target": str, "recipe": str}], "shots?": int, "averages": [_FIGURE],
        "tasks": [{"name": str, "type": str, "items": int, "chance?": float}],
        "rows": [{"task": str, "column": int, "items": int, "cut": int, "metrics": {"*": _FIGURE}}],
        "pairs": [{"task": str, "metric": str, "base": int, "other": int, "lost": int, "gained": int, "p": float, "difference": float,
                   "se": float}],
    },
    "build": {"bundle": str, "command": str, "stages": [{"name": str, "seconds": float, "peak_rss_bytes?": int}]},
}  # fmt: skip
"""The shape of each kind of result: a type, a list of one shape, or keys with shapes. `?`: the key may be absent or null; `*`: any key."""


@dataclass(frozen=True)
class Result:
    """A file that was read."""

    file: str
    kind: str
    values: Any
    """A `Manifest`, or the JSON of another kind."""


@dataclass(frozen=True)
class Speed:
    """A row of `bench`."""

    phase: str
    """`prefill`, `decode`, or empty where the test has another name."""
    tokens: int
    depth: int
    device: str
    threads: int | None
    mean: float
    """Tokens a second."""
    samples: list[float]
    """Tokens a second of each run."""
    row: dict[str, Any]


@dataclass
class Results:
    """All that is known of one bundle."""

    name: str
    target: str
    recipe: str
    colour: str
    manifest: Manifest | None = None
    parity: dict[str, Any] | None = None
    verify: dict[str, Any] | None = None
    build: dict[str, Any] | None = None
    speeds: list[Speed] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    """Rows of `bench` for the methods of a program that is not timed."""
    told: str = ""
    """What `bench` says of them."""
    sustained: list[tuple[str, list[tuple[float, float]]]] = field(default_factory=list)
    """Of each sustained run, the device, and tokens a second by the seconds since it began."""
    evals: list[dict[str, Any]] = field(default_factory=list)
    """Each evaluation that the bundle was in."""
    files: dict[str, str] = field(default_factory=dict)
    """Name of the file of each kind of result but `bench`."""

    @property
    def verdict(self) -> str:
        """`pass`, `fail`, or `open` where nothing was compared with the trained model."""
        passed = [result["passed"] for result in (self.parity, self.verify) if result]
        return "fail" if not all(passed) else "pass" if self.parity else "open"

    @property
    def last(self) -> dict[str, Any] | None:
        """The last stage of parity, which is nearest to the phone."""
        return self.parity["stages"][-1] if self.parity and self.parity["stages"] else None

    @property
    def steps(self) -> list[tuple[str, float]]:
        """The stages and the KL that each adds, in nats a token; empty where that of any stage is unknown."""
        steps = [(stage["name"], stage.get("kl_step")) for stage in self.parity["stages"]] if self.parity else []
        known = [(name, max(0.0, step)) for name, step in steps if step is not None and math.isfinite(step)]
        return known if len(known) == len(steps) else []

    @property
    def phases(self) -> list[tuple[str, dict[str, Any]]]:
        """The phases that were measured."""
        return [(name, phase) for name, phase in self.parity["phases"].items() if phase] if self.parity else []

    def limit(self, name: str) -> float | None:
        """Parity's limit on a figure of its last stage."""
        found = self.parity["limits"].get(name) if self.parity else None
        return None if found is None else float(found["limit"])

    @property
    def model(self) -> str:
        """The trained model as parity names it; of a long path only the end."""
        name = str(self.parity["model"]) if self.parity else ""
        parts = re.split(r"[/\\]", name.rstrip("/\\"))
        return name if len(parts) < 3 else "/".join(parts[-2:])

    @property
    def limits(self) -> list[tuple[str, float | None, dict[str, Any], bool | None]]:
        """Each limit: its name, the measured figure, the limit with its reason, and whether it is kept."""
        rows = []
        for name, entry in (self.parity["limits"] if self.parity else {}).items():
            phase, _, figure = name.rpartition(".")
            source = self.parity["phases"].get(phase) if phase and self.parity else self.last
            measured = source.get(figure) if source else None
            holds = None if measured is None else measured >= entry["limit"] if "top1" in figure else measured <= entry["limit"]
            rows.append((name, measured, entry, holds))
        return rows

    @property
    def file_bytes(self) -> int | None:
        """Bytes of the program's files."""
        return (self.manifest.program_bytes if self.manifest else 0) or self._largest("model_bytes")

    @property
    def peak_bytes(self) -> int | None:
        """The most resident memory that a benchmark measured."""
        return self._largest("peak_rss_bytes")

    @property
    def base_bytes(self) -> int | None:
        """Resident memory of the process with `peak_bytes`, before the model was loaded."""
        return next((speed.row.get("base_rss_bytes") for speed in self.speeds if speed.row.get("peak_rss_bytes") == self.peak_bytes), None)

    @property
    def cache_bytes(self) -> int | None:
        """Bytes of the key-value cache: keys, values and their scales."""
        return self.manifest.cache.bytes if self.manifest else self._largest("kv_cache_bytes")

    def _largest(self, key: str) -> int | None:
        return max((speed.row[key] for speed in self.speeds if speed.row.get(key) is not None), default=None)

    def fastest(self, phase: str) -> Speed | None:
        """The best row of a phase at the least depth."""
        return min((speed for speed in self.speeds if speed.phase == phase), key=lambda speed: (speed.depth, -speed.mean), default=None)

    @property
    def on_delegate(self) -> tuple[int, int] | None:
        """Number of operators on the delegate, and of all operators."""
        if not self.manifest:
            return None
        delegated = sum(self.manifest.delegation.delegated.values())
        return delegated, delegated + sum(self.manifest.delegation.left.values())


def read(paths: Sequence[Path]) -> list[Result]:
    """Reads the results in files.

    Raises:
        InputError: files are no results; all of them are named.
    """
    results, problems = [], []
    for path in paths:
        try:
            results.append(_read(path))
        except OSError as error:
            problems.append(f"{path} cannot be read ({error.strerror})")
        except (LobitError, ValueError, RecursionError) as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise InputError(listed(problems, f"these files cannot be reported; what can is {ACCEPTED}:"))
    return results


def _read(path: Path) -> Result:
    if path.stat().st_size > LARGEST_RESULT:
        raise ValueError(f"{path.stat().st_size} bytes, at most {LARGEST_RESULT} are read")
    data = path.read_bytes()
    values = json.loads(data)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    if "schema_version" in values:
        return Result(path.name, "manifest", Manifest.from_json(data))
    kind = values.get("kind")
    if kind not in list(SHAPES):
        raise ValueError(f"kind {kind!r} is none of {', '.join(SHAPES)}, and it is no manifest")
    problem = _problem(values, SHAPES[kind], kind) or (_odd_columns(values) if kind == "eval" else None)
    if problem:
        raise ValueError(problem)
    return Result(path.name, kind, values)


def _odd_columns(values: dict[str, Any]) -> str | None:
    """A message where an evaluation speaks of a column that it does not have, or None."""
    named = [row["column"] for row in values["rows"]] + [pair[key] for pair in values["pairs"] for key in ("base", "other")]
    count = len(values["columns"])
    return f"eval speaks of column {max(named)} of {count}" if max(named, default=-1) >= count else None


def _problem(value: Any, shape: Any, where: str) -> str | None:
    """A message about the first place where a value does not have its shape, or None."""
    if isinstance(shape, list):
        parts = [(item, shape[0], f"{where}[{i}]") for i, item in enumerate(value)] if isinstance(value, list) else None
    elif isinstance(shape, dict):
        parts = _members(value, shape, where) if isinstance(value, dict) else None
    else:
        kinds = (int, float) if shape is float else shape
        fits = isinstance(value, kinds) and (shape in (bool, object) or not isinstance(value, bool))
        if fits and isinstance(value, int) and (abs(value) >= 1 << 63 or (shape is int and value < 0)):
            return f"{where} is {str(value)[:30]}, which is out of range"
        parts = [] if fits else None
    if parts is None:
        wanted = "a list" if isinstance(shape, list) else "an object" if isinstance(shape, dict) else shape.__name__
        return f"{where} should be {wanted} and is {str(value)[:60]!r}"
    return next((problem for part in parts if (problem := _problem(*part))), None)


def _members(value: dict[str, Any], shape: dict[str, Any], where: str) -> list[tuple[Any, Any, str]]:
    if "*" in shape:
        return [(item, shape["*"], f"{where}.{key}") for key, item in value.items()]
    names = [(key.rstrip("?"), inner, key.endswith("?")) for key, inner in shape.items()]
    missing = [name for name, _, optional in names if not optional and name not in value]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    return [(value[name], inner, f"{where}.{name}") for name, inner, optional in names if not (optional and value.get(name) is None)]


def name_of(recipe: Any) -> str:
    """A recipe's name, given its name or the recipe itself."""
    return str(recipe.get("name", "unnamed")) if isinstance(recipe, dict) else str(recipe)


def group(results: Sequence[Result]) -> list[Results]:
    """Groups results by bundle, in the order in which the files name the bundles.

    Raises:
        InputError: two files of one kind for one bundle differ, or files disagree on its target or recipe.
    """
    bundles: dict[str, Results] = {}
    for result in results:
        if result.kind == "eval":
            _place_eval(bundles, result.values)
        elif result.kind == "compiled":
            _place_calls(bundles, result.values)
        elif result.kind != "bench":
            _place(bundles, result)
    benches = [result.values for result in results if result.kind == "bench"]
    kinds = {(row["model"], row["target"], name_of(row["recipe"])) for bench in benches for row in bench["rows"]}
    models = [model for model, _, _ in sorted(kinds)]
    crowded = {model for model in models if models.count(model) > 1}
    for bench in benches:
        device, placed = text_of(bench["device"]), {}
        for row in bench["rows"]:
            placed[row["model"]] = one = _bundle_of(bundles, row, crowded)
            one.speeds.append(_speed(row, device))
        for run in bench.get("sustained") or ():
            one = placed.get(run["model"]) or _bundle(bundles, run["model"])
            one.sustained.append((device, [(sample[0], sample[1]) for sample in run["samples"] if len(sample) == 2]))
    return list(bundles.values())


def _bundle(bundles: dict[str, Results], name: str, target: str = "", recipe: str = "") -> Results:
    colour = f"bundle-{len(bundles) % COLOURS}"
    one = bundles.setdefault(name, Results(name, target, recipe, colour))
    for key, value in (("target", target), ("recipe", recipe)):
        if value and getattr(one, key) not in ("", value):
            raise InputError(f"bundle {name} has {key} {getattr(one, key)!r} in one file and {value!r} in another: report them apart")
        setattr(one, key, value or getattr(one, key))
    return one


def _place(bundles: dict[str, Results], result: Result) -> None:
    values = result.values
    if result.kind == "manifest":
        one = _bundle(bundles, values.name, values.target, name_of(values.recipe))
    elif result.kind == "build":
        one = _bundle(bundles, values["bundle"])
    else:
        one = _bundle(bundles, values["bundle"]["name"], values["bundle"]["target"], name_of(values["bundle"]["recipe"]))
    if result.kind in one.files and getattr(one, result.kind) != values:
        both = f"{one.files[result.kind]} and {result.file}"
        raise InputError(f"{both} are both the {result.kind} of bundle {one.name}, and differ: leave one of them out")
    one.files[result.kind] = result.file
    setattr(one, result.kind, values)


def _place_calls(bundles: dict[str, Results], values: dict[str, Any]) -> None:
    """Gives each bundle the rows of its methods, the first time that they are told."""
    for row in values["rows"]:
        one = _bundle(bundles, row["model"], row["target"], name_of(row["recipe"]))
        one.told = values["what"]
        one.calls += [row] if row not in one.calls else []


def _place_eval(bundles: dict[str, Results], values: dict[str, Any]) -> None:
    """Gives an evaluation to each bundle in it, or to its models where no bundle is in it."""
    columns = values["columns"]
    for column in [column for column in columns if column["stage"] == "artifact"] or columns:
        is_bundle = column["stage"] == "artifact"
        one = _bundle(bundles, column["name"], *((column["target"], column["recipe"]) if is_bundle else ()))
        one.evals += [] if values in one.evals else [values]


def _bundle_of(bundles: dict[str, Results], row: dict[str, Any], crowded: set[str]) -> Results:
    """Finds the bundle of a row of `bench` by its name, or by target, recipe and model; makes a new one where none fits."""
    name, key = row.get("bundle") or row["model"], (row["target"], name_of(row["recipe"]))
    alike = [one.name for one in bundles.values() if (one.target, one.recipe) == key and _same_model(one, row)]
    if name not in bundles and len(alike) == 1:
        name = alike[0]
    elif name in crowded and not row.get("bundle"):
        name = f"{name} {key[1]} {key[0]}"
    return _bundle(bundles, name, *key)


def _same_model(one: Results, row: dict[str, Any]) -> bool:
    parameters = one.manifest.model.parameters if one.manifest else None
    return (one.parity is not None and one.parity["model"] == row["model"]) or (parameters is not None and parameters == row.get("params"))


def _speed(row: dict[str, Any], device: str) -> Speed:
    found = re.fullmatch(r"(pp|tg)(\d{1,9})(?:@d(\d{1,9}))?", row["test"])
    phase = {"pp": "prefill", "tg": "decode"}[found[1]] if found else ""
    tokens = row.get("tokens") or (int(found[2]) if found else 0)
    depth = row.get("depth") if row.get("depth") is not None else int(found[3] or 0) if found else 0
    samples = [tokens * 1e9 / sample for sample in row["samples_ns"] if sample > 0]
    return Speed(phase, tokens, int(depth or 0), device, row.get("threads"), row["tokens_per_second"], samples, row)


def text_of(value: Any) -> str:
    """A JSON value of any kind as one line of text for people."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {text_of(item)}" for key, item in value.items() if item not in (None, "", [], {}))
    return ", ".join(map(text_of, value)) if isinstance(value, list) else "" if value is None else str(value)
