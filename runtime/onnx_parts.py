"""What the parts of an ONNX graph hand to each other, read out of runs of the graph with these values as additional outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lobit.errors import BundleError
from lobit.runtime.bundle import Bundle
from lobit.runtime.onnx_ports import LOGITS, TOKENS, cache_names
from lobit.runtime.onnxruntime import GraphFile, at_first, provider_of, session_of
from lobit.runtime.parts import Seen

FOLDER = "session.model_external_initializers_file_folder_path"
"""Setting of a session: the folder with the external data of a graph that is given in memory."""


def room(bundle: Bundle) -> int:
    """See `parts.Reader`. A cache that is full moves its entries, so that the shortest one is the limit."""
    return min(bundle.manifest.cache.slots)


def read_parts(bundle: Bundle, threads: int, calls: Sequence[Sequence[int]]) -> list[Seen]:
    """See `parts.Reader`.

    Raises:
        BundleError: the graph was not written by lobit, or does not run.
    """
    import onnx
    import torch

    manifest, path = bundle.manifest, bundle.path("program")
    graph, layers = GraphFile(path, bundle.path("weights")), len(manifest.cache.slots)
    values = opened(graph.graph, layers)
    graph.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in values.values())
    data = graph.model.SerializeToString()
    session = session_of(data, manifest.states, threads, provider_of(bundle), {FOLDER: str(path.parent)})
    positions = next((port.name for port in manifest.method("step").inputs if port.role == "positions"), None)
    caches = {state.input: at_first(state) for state in manifest.states}
    after = {state.input: state.output for state in manifest.states}
    position, seen = 0, []
    wanted = [*values.values(), LOGITS, *after.values()]
    for tokens in calls:
        end = position + len(tokens)
        given: dict[str, Any] = {TOKENS: np.array([list(tokens)], np.int64), **caches}
        given |= {positions: np.arange(position, end)[None]} if positions else {}
        try:
            found = dict(zip(wanted, session.run(wanted, given), strict=True))
        except Exception as error:  # ONNX Runtime has an exception class for each of its error codes
            raise BundleError(f"ONNX Runtime cannot run the parts of {path} ({error}): export it again") from None
        caches = {name: found[after[name]] for name in caches}
        one = {name: torch.from_numpy(found[value]) for name, value in values.items()} | {"logits": torch.from_numpy(found[LOGITS][:, -1:])}
        for layer in range(layers):
            for side, (past, _) in zip("kv", cache_names(layer), strict=True):
                one[f"{side}.{layer}"] = torch.from_numpy(caches[past][:, :, position:end].copy()).transpose(1, 2)
        seen.append(one)
        position = end
    return seen


def opened(graph: Any, layers: int) -> dict[str, str]:
    """Names of the graph's values that parts hand to each other, by the names that `parts.Seen` has for them."""
    found: dict[str, str] = {}
    for layer in range(layers):
        scope = f"layers.{layer}.attention."
        nodes = [node for node in graph.node if node.name.startswith(scope)]
        if not nodes:
            raise BundleError(f"the graph has no {scope}*: export it again")
        first = nodes[0]
        skipped = first.op_type == "SkipSimplifiedLayerNormalization"
        found[f"x.{layer}"] = first.output[3] if skipped else first.output[0] if layer else first.input[0]
        attends = next((node for node in nodes if node.op_type == "GroupQueryAttention"), None)
        if attends is not None:
            turns = any(attribute.name == "do_rotary" and attribute.i for attribute in attends.attribute)
            found[f"{'q_unturned' if turns else 'q'}.{layer}"] = attends.input[0]
            found[f"y.{layer}"] = attends.output[0]
        else:
            found[f"q.{layer}"] = next(node for node in nodes if node.op_type == "Transpose").input[0]
            found[f"y.{layer}"] = [node for node in nodes if node.op_type == "Reshape"][-1].output[0]
    return found
