"""The methods of a program: their graphs, ports and caches, and what a client computes for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from lobit.errors import BundleError
from lobit.export.composed import ropes, windows
from lobit.export.qnn.builder import QnnBuilder
from lobit.export.qnn.encodings import hidden, read_encodings
from lobit.export.qnn.graph import Graph, Value, Weights
from lobit.export.qnn.ops import HtpBuilder, HtpOps
from lobit.export.qnn.weights import HtpLinear, table_bits
from lobit.export.target import Spec
from lobit.export.walk import walk
from lobit.model import Config, Transformer, replace_layers, twin
from lobit.quant_recipes.apply import layer_plans
from lobit.quant_recipes.integer import IntegerLinear
from lobit.runtime.manifest import ClientInputs, Lookup, Mask, Method, Port, Rotary, State
from lobit.runtime.qnn_ports import EMBEDDINGS, LAST, LOGITS, cache_names, is_cache, mask_name, rotary_names

SOCS = ("SM8650", "SM8450", "SM8550", "SM8750", "SM8850")
"""Chips that programs are compiled for; the first is the default. The others of ExecuTorch's list fail or were not tried."""
WITHOUT_HALF = ("SM8350", "QCM6490")
"""Chips without half floats, for programs of integers alone."""
NARROW = ("SM8450", *WITHOUT_HALF)
"""Chips that multiply integers of 16 bits with 8 bits, and not with 16: caches of a program of integers have 8 bits."""
TABLE_FILE = "embedding.safetensors"
HIDDEN = -10_000.0
"""What masks of half floats add to the score of an entry that a token must not see."""


def soc_of(spec: Spec) -> str:
    """The chip that a program is compiled for."""
    return spec.soc or SOCS[0]


def is_narrow(spec: Spec) -> bool:
    """Whether caches have 8 bits."""
    return spec.activations == "int16" and soc_of(spec) in NARROW


def graphs(model: Transformer, spec: Spec) -> dict[str, Graph]:
    """The graphs of the methods, which share their weights; those of integers have encodings where the spec knows them."""
    model, shared = _prepared(model, spec), Weights()
    encodings = None if spec.encodings is None else read_encodings(spec.encodings)
    found = {}
    for name, tokens in _rooms(spec).items():
        found[name] = Graph(shared, encodings)
        build = cast(HtpBuilder[Value], QnnBuilder(found[name], is_narrow(spec)))  # it has what these operations need
        walk(model, HtpOps(build, model.config, spec.context, tokens, spec.all_logits))
        _check_encodings(found[name])
    return found


def _check_encodings(graph: Graph) -> None:
    """Refuses encodings of another model, which leave values between operators without one.

    Raises:
        BundleError: there are such values.
    """
    if graph.encodings is None:
        return
    inside = [name for operator in graph.operators if operator.kind != "Dequantize" for name in operator.outputs]
    without = [name for name in (*inside, *filter(is_cache, graph.inputs)) if name not in graph.encodings]
    if without:
        told = f"{len(without)} values have no encoding ({without[0]}, …)"
        raise BundleError(f"{told}: give the model that the bundle was made from, or export it again")


def _prepared(model: Transformer, spec: Spec) -> Transformer:
    """The model with its products as the HTP has them."""
    model = twin(model).eval()
    replace_layers(model, IntegerLinear, HtpLinear)
    if spec.activations == "int16":
        replace_layers(model, nn.Linear, HtpLinear)
    return model


def _rooms(spec: Spec) -> dict[str, int]:
    """Names of the methods, and the tokens that each has room for."""
    return {"prefill": spec.chunk, "decode": 1} if spec.chunk > 1 else {"decode": 1}


def methods(graphs: Mapping[str, Graph]) -> list[Method]:
    """The methods with their ports, in the order in which the program takes and gives them."""

    def port(graph: Graph, name: str) -> Port:
        role = "logits" if name == LOGITS else "state" if is_cache(name) else "client"
        return Port(name, role, [*graph.shape(name)], graph.dtype(name))

    return [
        Method(name, name, [port(graph, each) for each in graph.inputs], [port(graph, each) for each in graph.outputs])
        for name, graph in graphs.items()
    ]


def states(graphs: Mapping[str, Graph], spec: Spec, config: Config) -> list[State]:
    """Keys and values [1, K, slots, E] of every layer, of which a call gives its own rows."""
    dtype = graphs["decode"].dtype
    return [
        State(before, rows, dtype(before), [1, config.kv_heads, slots, config.head_dim], 2, config.layers[layer].window, False, True)
        for layer, slots in enumerate(config.cache_slots(spec.context))
        for before, rows in cache_names(layer)
    ]


def client(graphs: Mapping[str, Graph], spec: Spec, config: Config) -> ClientInputs:
    """What the client computes for a call."""
    row = next(row for row in layer_plans(config, spec.recipe) if row.name == "embedding")
    rotary = []
    for index, rope in enumerate(ropes(config)):
        frequencies, factor = rope.frequencies()
        rotary.append(Rotary(*rotary_names(index), frequencies.tolist(), float(factor)))
    encodings = graphs["decode"].encodings
    masks = []
    for index, window in enumerate(windows(config)):
        name = mask_name(index)
        masks.append(Mask(name, window, HIDDEN if encodings is None else hidden(encodings, name)))
    lookup = Lookup(EMBEDDINGS, TABLE_FILE, table_bits(row), float(config.embedding_scale))
    return ClientInputs(lookup, rotary, masks, None if spec.all_logits or spec.chunk == 1 else LAST)
