"""Target `qnn`: an ExecuTorch program for Qualcomm's neural processor (HTP), compiled and proved without a phone."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from lobit.export.qnn.compiling import compile_variants
from lobit.export.qnn.eager_program import EagerProgram, EagerReader, Moved, found_encodings
from lobit.export.qnn.encodings import write_encodings
from lobit.export.qnn.methods import NARROW, SOCS, TABLE_FILE, WITHOUT_HALF, client, graphs, is_narrow, methods, soc_of, states
from lobit.export.qnn.program import BACKEND, write_pte
from lobit.export.qnn.weights import program_bytes, stored_bits, table_bits, table_bytes, write_table
from lobit.export.size_groups import Tally, stored_as
from lobit.export.stages import Count, halves
from lobit.export.target import Costs, Lowered, Needs, Reader, Spec, float_inputs, foreign_options
from lobit.model import Config, Transformer
from lobit.quant_recipes.apply import LayerPlan, layer_plans
from lobit.quant_recipes.recipe import Recipe
from lobit.quant_recipes.sizes import kind_of, norms_and_biases
from lobit.runtime.manifest import CacheInfo, Delegation, FileEntry, TensorGroup
from lobit.runtime.qnn_libraries import PACKAGE, library_folder
from lobit.stage_cache import StageCache

PROGRAM_FILE, EMULATED_FILE, ENCODINGS_FILE = "model.pte", "emulated.pte", "encodings.json"
DTYPE = "float16"
COSTS = Costs(
    imports_seconds=6.0,
    imports_bytes=2_600_000_000,  # PyTorch and ExecuTorch, and two processes with Qualcomm's compiler
    model_copies=16,  # most of them in the compilers, which are not run side by side where there is too little memory
    head_copies=0,
    seconds_per_parameter={"quantize": 11e-9, "lower": 250e-9, "write": 10e-9},
    seconds_per_part=1.0,
)
PER_OPERATOR, COMPILED_SHARE = 390, 0.0282
"""Bytes of the program that are not weights: for each operator of both methods, and for each byte of weights, fitted to models of 2, 125
and 1 084 million parameters."""
OF_INTEGERS, OPERATOR_OF_INTEGERS, ROW_OF_INTEGERS = 74_000, 140, 9
"""What a program of integers has besides: once, for each operator, and for each row of weights."""
CHUNK = 32
OPERATOR_ERROR = 2e-3
"""Softmax has the largest, 1.1e-3 to 1.5e-3 on the emulator (its shares add up to 0.999); rounding to half floats alone makes 2e-4."""
SLOW_GRAPH = True


def versions() -> dict[str, str]:
    """Versions of ExecuTorch, to whose release a program is tied, and of the package with Qualcomm's compiler.

    Raises:
        MissingPartError: the package is missing, or in a version that does not work.
    """
    library_folder()
    return {name: metadata.version(name) for name in ("executorch", PACKAGE)}


def arithmetic(model: Transformer, spec: Spec) -> tuple[Transformer, Recipe]:
    """See `Target.arithmetic`: inputs are half floats, whatever the recipe rounds them to, as are keys, values and all else.

    A program of integers computes otherwise (`floor`); this is what it is rounded from.
    """
    model, recipe = float_inputs(model, spec.recipe)
    return model, replace(recipe, kv_bits=None if spec.activations else 16, compute_bits=32 if spec.activations else 16)


def check(spec: Spec, config: Config) -> list[str]:
    """Every reason why the HTP cannot hold the model under the recipe."""
    recipe = spec.recipe
    problems = foreign_options(spec, "qnn")
    if soc_of(spec) in WITHOUT_HALF and not spec.activations:
        way = "add --activations int16 --calibration FILE (lobit plan: --activations int16 alone)"
        problems.append(f"{soc_of(spec)} has no half floats: {way}, or choose of {', '.join(SOCS)}")
    elif soc_of(spec) not in (*SOCS, *WITHOUT_HALF):
        problems.append(f"there is no chip {soc_of(spec)!r} here: choose one of {', '.join((*SOCS, *WITHOUT_HALF))}")
    rows = [row for row in layer_plans(config, recipe) if row.rule and row.name != "embedding"]
    grouped = [row for row in rows if row.rule and row.rule.weights.group_size]
    if grouped:
        problems.append(
            f"{len(grouped)} layers have scales for groups of weights ({grouped[0].name}, …), the HTP has one for every row: choose "
            "w4-channel, w4-channel-learned, 8da8w, or a ternary recipe"
        )
    return problems + (_narrow_problems(spec, config) if is_narrow(spec) else [])


def _narrow_problems(spec: Spec, config: Config) -> list[str]:
    """What chips without products of 16 bits and 16 cannot hold, of which 2-bit weights are computed wrongly, without a word."""
    rows = [row for row in layer_plans(config, spec.recipe) if row.name != "embedding"]
    few = [row.name for row in rows if row.rule and stored_bits(row.rule.weights) == 2]
    floats = [row.name for row in rows if row.rule is None]
    newer, found = ", ".join(soc for soc in SOCS if soc not in NARROW), []
    if few:
        found.append(f"{soc_of(spec)} has no products with weights of 2 bits and integers of 16 ({few[0]}, …): choose of {newer}")
    if floats:
        found.append(
            f"{soc_of(spec)} has no products of floats, nor of 16 bits with 16 ({floats[0]}, …): give these layers integers, as with "
            f"--mixed '{floats[0]}=int8', or choose of {newer}"
        )
    return found


def step(spec: Spec) -> int:
    """See `Target.step`: the tokens that `prefill` has room for."""
    return spec.chunk


def options(spec: Spec) -> dict[str, str | int | bool]:
    """See `Target.options`: the chip, which a compiled program does not tell itself."""
    found: dict[str, str | int | bool] = {"soc": soc_of(spec)}
    return found | ({"activations": spec.activations} if spec.activations else {})


def weights(spec: Spec, config: Config) -> list[TensorGroup]:
    """The bytes of each kind of weights: products in the program, the embedding in a file of its own; scales are float32."""
    tally = Tally()
    for row in layer_plans(config, spec.recipe):
        if row.name == "embedding":
            tally.add("embedding", _format(row, table_bits(row)), row.shape[0] * row.shape[1], table_bytes(row))
        else:
            again = row.shared_with is not None
            told = "int16 per channel" if spec.activations and row.rule is None else _format(row, 0)
            tally.add(kind_of(row.name), told, 0 if again else row.shape[0] * row.shape[1], program_bytes(row))
    for kind, count in norms_and_biases(config):
        wide = spec.activations and kind == "biases"
        tally.add(kind, ("int32" if wide else "int16") if spec.activations else DTYPE, count, (4 if wide else 2) * count)
    return tally.groups()


def _format(row: LayerPlan, bits: int) -> str:
    if row.rule is None:
        return DTYPE
    return stored_as(row.rule.weights, bits or stored_bits(row.rule.weights))


def cache(spec: Spec, config: Config) -> CacheInfo:
    """The size of the key-value cache: a layer with a window keeps as many positions as that, the others keep the context."""
    slots, size = config.cache_slots(spec.context), 1 if is_narrow(spec) else 2
    dtype = ("uint8" if is_narrow(spec) else "int16") if spec.activations else DTYPE
    return CacheInfo(dtype, slots, 2 * sum(slots) * config.kv_heads * config.head_dim * size, 0)


def needs(model: Transformer, spec: Spec) -> Needs:
    """What compiling and running the program will take."""
    groups = weights(spec, model.config)
    stored = sum(group.bytes for group in groups)
    compiled = sum(group.bytes for group in groups if group.kind != "embedding")
    operators = sum(len(graph.operators) for graph in graphs(model, spec).values())
    overhead = PER_OPERATOR * operators + round(COMPILED_SHARE * compiled)
    if spec.activations:
        rows = sum(row.shape[0] for row in layer_plans(model.config, spec.recipe) if row.name != "embedding" and not row.shared_with)
        overhead += OF_INTEGERS + OPERATOR_OF_INTEGERS * operators + ROW_OF_INTEGERS * rows
    return Needs(2, overhead, stored + overhead + cache(spec, model.config).bytes)


def graph(model: Transformer, spec: Spec) -> EagerProgram:
    """The program's operators, run by PyTorch one by one in half precision, or rounded to the program's integers."""
    return EagerProgram(model, spec, arithmetic(model, spec)[1])


def floor(model: Transformer, spec: Spec) -> tuple[Reader, Reader] | None:
    """See `Target.floor`: a program of integers rounds every value."""
    if not spec.activations:
        return None
    program = EagerProgram(model, replace(spec, all_logits=True))
    moved = Moved(program, soc_of(spec) in NARROW)
    return EagerReader(program, spec.chunk, program.rounded), EagerReader(program, spec.chunk, moved)


def lower(model: Transformer, spec: Spec, kept: StageCache, count: Count) -> Lowered:
    """Compiles the graphs twice: with weights that the methods share, for a phone, and with a copy for each, for the emulator.

    Raises:
        TargetError: Qualcomm's compiler refuses the graphs.
    """
    config, compiling = model.config, count
    if spec.activations:
        finding, compiling = halves(count)
        spec = replace(spec, encodings=_kept_encodings(model, spec, kept, finding))
    made = graphs(model, spec)
    shared, copied = compile_variants(made, soc_of(spec), kept, compiling)
    told = sum((each.counts() for each in made.values()), Counter[str]())
    read = dict(zip(made, shared.read_bytes, strict=False))
    delegation = Delegation(BACKEND, len(made), dict(sorted(told.items())), {}, read)
    ports = methods(made)
    payload = (shared, copied), model, ports, spec.encodings
    return Lowered(payload, ports, states(made, spec, config), delegation, client(made, spec, config))


def _kept_encodings(model: Transformer, spec: Spec, kept: StageCache, count: Count) -> Path:
    """The file of the encodings, as an earlier run kept it, or made now."""
    finished = kept.has("encodings")
    if finished:
        return finished
    found = found_encodings(model, spec, count)
    with kept.making("encodings") as path:
        write_encodings(found, path)
    return kept.folder / "encodings"


def write(lowered: Lowered, folder: Path, count: Count) -> list[FileEntry]:
    """Writes the program for a phone, its twin for the emulator, the embedding, and what integers stand for."""
    (shared, copied), model, ports, encodings = lowered.payload
    write_pte(ports, shared.context, shared.options, folder / PROGRAM_FILE, lambda done, total: count(done, 3 * total))
    write_pte(ports, copied.context, copied.options, folder / EMULATED_FILE, lambda done, total: count(total + done, 3 * total))
    assert lowered.client is not None
    write_table(model.embedding, folder / TABLE_FILE, lowered.client.embedding.bits)
    roles = {PROGRAM_FILE: "program", EMULATED_FILE: "emulated", TABLE_FILE: "embedding"}
    if encodings:
        shutil.copyfile(encodings, folder / ENCODINGS_FILE)
        roles[ENCODINGS_FILE] = "encodings"
    return [FileEntry.of(folder, name, role) for name, role in roles.items()]
