"""Results as tables for people; `--json` has all of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from lobit.export.plan import Plan
    from lobit.quant_recipes.apply import Fate
    from lobit.quant_recipes.recipe import Recipe
    from lobit.runtime.manifest import Manifest

WIDTH_WITHOUT_TERMINAL = 160


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # a reader that has enough is no error: rich would exit with 1


def show(table: Table, error: bool = False) -> None:
    """Prints a table to stdout, or to stderr."""
    stream = sys.stderr if error else sys.stdout
    _Console(file=stream, width=None if stream.isatty() else WIDTH_WITHOUT_TERMINAL, highlight=False, markup=False).print(table)


def _table(title: str, *columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def megabytes(count: float) -> str:
    """Bytes as MB (10^6 bytes), three digits."""
    value = count / 1e6
    return f"{value:.2f} MB" if value < 10 else f"{value:.1f} MB" if value < 100 else f"{value:.0f} MB"


def recipes(found: Sequence[Recipe]) -> Table:
    """The catalogue."""
    table = _table("", "recipe", "what", "source")
    for recipe in found:
        table.add_row(recipe.name, recipe.summary, recipe.source)
    return table


def fates(rows: Sequence[Fate]) -> Table:
    """What happens to each layer; layers of the same kind, shape and fate share a row."""
    table = _table("layer by layer", "layers", "shape", "parameters", "weights", "activations", right=("parameters",))
    grouped: dict[tuple[str, tuple[int, int], str, str], list[Fate]] = {}
    for fate in rows:
        parts = fate.name.split(".")
        name = ".".join("*" if part.isdigit() else part for part in parts)
        weights = f"shared with {fate.shared_with}" if fate.shared_with else fate.why if fate.rule else f"float ({fate.why})"
        activations = "int8 per token" if fate.rule and fate.rule.activation_bits and fate.name != "embedding" else "float"
        grouped.setdefault((name, fate.shape, weights, activations), []).append(fate)
    for (name, shape, weights, activations), members in grouped.items():
        count = f"{name} (x{len(members)})" if len(members) > 1 else name
        parameters = 0 if members[0].shared_with else len(members) * shape[0] * shape[1]
        table.add_row(count, f"{shape[0]} x {shape[1]}", f"{parameters:,}", weights, activations)
    return table


def plan(found: Plan) -> Table:
    """An export before it is made."""
    table = _table("", "plan", "" if found.problems else "nothing speaks against it")
    scales = f" + {megabytes(found.cache.scale_bytes)} of scales" if found.cache.scale_bytes else ""
    rows = [
        ("parameters", f"{found.parameters:,}"),
        ("program", f"{megabytes(found.file_bytes)}, {found.bits_per_weight:.2f} bits a weight"),
        *((f"  {group.kind}", f"{group.format}, {megabytes(group.bytes)}") for group in found.weights),
        ("KV cache", f"{found.cache.dtype}, {megabytes(found.cache.value_bytes)}{scales} for {found.context} tokens"),
        ("memory to run", f"{megabytes(found.device_peak_bytes)} with a full context, prefill in chunks of up to {found.chunk}"),
        ("memory to export", megabytes(found.host_peak_bytes)),
        ("time to export", f"{found.export_seconds:.0f} s on two cores"),
        *(("impossible", problem) for problem in found.problems),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table


def manifest(found: Manifest) -> Table:
    """A bundle at a glance."""
    table = _table("", "bundle", found.name)
    program = found.file("program")
    rows = [
        ("target, recipe", f"{found.target}, {found.recipe['name']}"),
        ("model", f"{found.model.family}, {found.model.parameters:,} parameters, {found.model.layers} layers"),
        ("program", f"{program.path}, {megabytes(program.bytes)}"),
        ("context", f"{found.context} tokens, prefill in chunks of up to {found.chunk}"),
        ("KV cache", _cache(found)),
        ("delegation", f"{found.delegation.partitions} partitions on {found.delegation.backend}"),
        ("", f"{sum(found.delegation.delegated.values())} operators on it, {sum(found.delegation.left.values())} left behind"),
    ]
    rows += [(f"  {group.kind}", f"{group.format}, {megabytes(group.bytes)}") for group in found.weights]
    for name, value in rows:
        table.add_row(name, value)
    return table


def _cache(found: Manifest) -> str:
    scales = f" + {megabytes(found.cache.scale_bytes)} of scales" if found.cache.scale_bytes else ""
    return f"{found.cache.dtype}, {megabytes(found.cache.value_bytes)}{scales}"


def verify(result: dict[str, Any]) -> Table:
    """The verdict and every layer that differs."""
    table = _table(f"verify: {_verdict(result)}", "", "compared", "differing", right=("compared", "differing"))
    for kind in ("integers", "scales", "floats"):
        table.add_row(kind, f"{result[kind]:,}", f"{result[f'differing_{kind}']:,}")
    if result["checkpoint_matches"] is False:
        table.add_row("the whole checkpoint, norms and biases too", "sha256", "another")
    for row in result["layers"]:
        differing = sum(row[f"differing_{kind}"] for kind in ("integers", "scales", "floats"))
        if differing:
            table.add_row(f"  {row['name']}", f"{sum(row[kind] for kind in ('integers', 'scales', 'floats')):,}", f"{differing:,}")
    return table


def _verdict(result: dict[str, Any]) -> str:
    return "passed" if result["passed"] else "FAILED"


def parity(result: dict[str, Any]) -> Table:
    """Stages, phases and limits."""
    title = f"parity: {_verdict(result)} ({result['positions']} positions, reference perplexity {result['reference_perplexity']:.3f})"
    columns = ("KL mean", "KL p99", "KL of this step", "top-1", "perplexity")
    table = _table(title, "against the float model", *columns, right=columns)
    rows = [(row["name"], row) for row in result["stages"]]
    rows += [(f"  {name}", row) for name, row in result["phases"].items() if row]
    for name, row in rows:
        figures = [f"{row[key]:.2e}" for key in ("kl_mean", "kl_p99", "kl_step")]
        table.add_row(name, *figures, f"{row['top1_agreement']:.2%}", f"{row['perplexity']:.3f}")
    artifact = result["stages"][-1]
    for metric, limit in result["limits"].items():
        kept = "kept" if artifact[metric] <= limit["limit"] else "EXCEEDED"
        table.add_row(f"limit on {metric}", f"{limit['limit']:g}", "", "", kept)
    return table


def bench(result: dict[str, Any]) -> Table:
    """llama-bench's table."""
    from lobit.runtime.bench import bench_table

    return bench_table(result)


def speed(stats: dict[str, Any]) -> str:
    """One line on a generation."""
    return (
        f"prefill {stats['prompt_tokens']} tokens at {stats['prefill_tokens_per_second']:.0f} t/s, first token after "
        f"{stats['first_token_seconds'] * 1e3:.1f} ms, decode {stats['decode_steps']} tokens at {stats['decode_tokens_per_second']:.1f} t/s"
    )


def doctor(result: dict[str, Any]) -> Table:
    """What is there and what is missing."""
    table = _table("", "for", "part", "found", "way out")
    for row in result["parts"]:
        table.add_row(row["for"], row["part"], row["found"] or "missing", "" if row["found"] else row["way_out"])
    return table
