"""Target `xnnpack`: an ExecuTorch program for the CPU, its products on the XNNPACK delegate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from importlib import metadata, resources
from pathlib import Path
from typing import Any, cast

import executorch.exir.passes._quant_patterns_and_replacements
import executorch.kernels.quantized  # noqa: F401 (both register operators of quantized_decomposed)
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from lobit.errors import TargetError, listed
from lobit.export.attention import in_place_caches
from lobit.export.program import Program, fuse, replace_layers
from lobit.export.target import Lowered, Spec
from lobit.model import Config, RMSNorm, Transformer
from lobit.quant_recipes.apply import fates
from lobit.quant_recipes.integer import IntegerEmbedding, IntegerLinear
from lobit.quant_recipes.packing import pack_int4
from lobit.quant_recipes.recipe import Recipe
from lobit.quiet import quiet_python
from lobit.runtime.manifest import Delegation, FileEntry, Port, TensorGroup

PROGRAM_FILE = "model.pte"


class DelegatedLinear(nn.Module):
    """An integer linear layer in the operators that XNNPACK's partitioner takes for one product."""

    integers: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None

    def __init__(self, linear: IntegerLinear) -> None:
        super().__init__()
        grid = linear.rule.weights
        self.grid, self.activation_bits = grid, linear.rule.activation_bits
        scale = linear.scale if grid.group_size else linear.scale[:, 0]
        self.register_buffer("integers", linear.integers)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros(scale.shape, dtype=torch.int64))
        self.register_buffer("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        ops, grid = torch.ops.quantized_decomposed, self.grid
        if self.activation_bits:
            scale, zero_point = ops.choose_qparams_per_token_asymmetric.default(x, torch.int8)
            integers = ops.quantize_per_token.default(x, scale, zero_point, -128, 127, torch.int8)
            x = ops.dequantize_per_token.default(integers, scale, zero_point, -128, 127, torch.int8, torch.float32)
        if grid.group_size:
            weight = ops.dequantize_per_channel_group.default(
                self.integers, self.scale, self.zero_point, grid.q_min, grid.q_max, torch.int8, grid.group_size, torch.float32
            )
        else:
            weight = ops.dequantize_per_channel.default(
                self.integers, self.scale, self.zero_point, 0, grid.q_min, grid.q_max, torch.int8
            )
        return F.linear(x, cast(Tensor, weight), self.bias)


class DelegatedNorm(nn.Module):
    """RMSNorm whose mean of squares is a product with a row of 1 / n, and eps its bias.

    XNNPACK takes no mean over the last axis of a 3-dimensional tensor; left behind, each norm would cut the delegate in two.
    """

    row: Tensor
    eps: Tensor

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight = norm.weight
        self.register_buffer("row", torch.full((1, norm.size), 1 / norm.size))
        self.register_buffer("eps", torch.tensor([norm.eps]))

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(F.linear(x * x, self.row, self.eps))
        return y if self.weight is None else y * self.weight


class PackedEmbedding(nn.Module):
    """An integer embedding in ExecuTorch's `embedding_4bit` (the even element in the high half) or `embedding_byte`."""

    packed: Tensor
    scale: Tensor

    def __init__(self, embedding: IntegerEmbedding) -> None:
        super().__init__()
        self.grid = embedding.rule.weights
        integers = embedding.integers
        if self.grid.bits == 4:
            packed = pack_int4(integers)
            self.register_buffer("packed", (packed << 4) | (packed >> 4))
        else:
            self.register_buffer("packed", integers)
        self.register_buffer("scale", embedding.scale)

    def forward(self, tokens: Tensor) -> Tensor:
        ops = torch.ops.quantized_decomposed
        op = ops.embedding_4bit.default if self.grid.bits == 4 else ops.embedding_byte.default
        return cast(Tensor, op(self.packed, self.scale, None, self.grid.q_min, self.grid.q_max, tokens))


def check(recipe: Recipe, config: Config) -> list[str]:
    """Every reason why XNNPACK through ExecuTorch cannot hold the model under the recipe."""
    problems = []
    rows = [fate for fate in fates(config, recipe) if fate.rule]
    weight_only = [fate.name for fate in rows if fate.rule and not fate.rule.activation_bits and fate.name != "embedding"]
    if weight_only:
        problems.append(
            f"{len(weight_only)} layers have quantized weights and float activations ({weight_only[0]}, …): XNNPACK's int4 and int8 "
            "products need INT8 activations; choose 8da4w-g32 or 8da8w here, or another target for this recipe"
        )
    groups = {fate.rule.weights.group_size for fate in rows if fate.rule} - {None}
    odd = sorted(size for size in groups if size is not None and size % 32)
    if odd:
        problems.append(f"group_size={', '.join(map(str, odd))}: XNNPACK's blockwise INT4 needs a multiple of 32")
    coarse = [fate.name for fate in rows if fate.rule and fate.rule.weights.bits == 4 and fate.rule.weights.group_size is None]
    if coarse and not weight_only:
        problems.append(f"{coarse[0]}: INT4 per channel is not lowered, choose groups of 32")
    wide = [fate.name for fate in rows if fate.rule and fate.rule.weights.bits == 8 and fate.rule.weights.group_size]
    if wide:
        problems.append(f"{wide[0]}: XNNPACK has INT8 per channel only, not in groups")
    if config.attention_softcap is not None:
        problems.append("the model caps its attention scores: ExecuTorch's attention operators cannot")
    return problems


def program(model: Transformer, spec: Spec) -> Program:
    """The model with fused products, packed embedding and caches that are written in place."""
    fuse(model)
    replace_layers(model, IntegerLinear, DelegatedLinear)
    replace_layers(model, IntegerEmbedding, PackedEmbedding)
    replace_layers(model, RMSNorm, DelegatedNorm)
    caches = in_place_caches(spec.recipe.kv_bits)(model.config, spec.context, spec.chunk)
    return Program(model, caches, spec.context, spec.chunk).eval()


def weights(program: nn.Module) -> list[TensorGroup]:
    """The bytes of each kind of weights in the file: blockwise scales are bfloat16 there, others float32."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name, module in program.named_modules():
        size, scale, grid = 0, 0, "float32"
        if isinstance(module, DelegatedLinear):
            size, scale, grid = module.integers.numel(), module.scale.numel() * (2 if module.grid.group_size else 4), str(module.grid)
            size_bytes = size * module.grid.bits // 8
        elif isinstance(module, PackedEmbedding):
            size, scale, grid = module.packed.numel() * 8 // module.grid.bits, module.scale.numel() * 4, str(module.grid)
            size_bytes = module.packed.numel()
        else:
            own = [*module.parameters(recurse=False), *_tables(module)]
            size = sum(tensor.numel() for tensor in own)
            size_bytes = size * 4
        if size:
            group = groups.setdefault((_kind(name), grid), [0, 0])
            group[0] += size
            group[1] += size_bytes + scale
    return [TensorGroup(kind, grid, *sizes) for (kind, grid), sizes in groups.items()]


def _tables(module: nn.Module) -> list[Tensor]:
    """The rotary tables of a program."""
    return [tensor for name, tensor in module.named_buffers(recurse=False) if name.startswith(("cos_", "sin_"))]


def _kind(name: str) -> str:
    """The kind of weights that a module of the program holds."""
    parts = name.split(".")
    if parts[-1] == "norm" or parts[-1].endswith("_norm"):
        return "norms"
    return next((kind for kind in ("embedding", "head", "attention", "mlp") if kind in parts), "tables")


def trace(program: nn.Module, spec: Spec) -> ExportedProgram:
    """The program as a graph for 1 to `chunk` tokens."""
    length = Dim("tokens", min=1, max=spec.chunk)
    example = (torch.zeros(1, min(4, spec.chunk), dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    shapes = {"tokens": {1: length if spec.chunk > 1 else None}, "input_pos": None}
    with quiet_python():
        graph = torch.export.export(program, example, dynamic_shapes=shapes, strict=False)
    _drop_assertions(graph.graph_module)
    return graph


def _drop_assertions(module: torch.fx.GraphModule) -> None:
    """Removes the checks of positions: tracing takes a length of two or more for granted, and the engine checks anyway."""
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def lower(graph: ExportedProgram, spec: Spec) -> Lowered:
    """The graph as an ExecuTorch program, its products on XNNPACK.

    The constant methods are those that ExecuTorch's `TextLLMRunner` reads.

    Raises:
        TargetError: an operator outside the delegate is not in the Android library.
    """
    logits = graph.graph.output_node().args[0][-1].meta["val"]
    vocabulary = int(logits.shape[-1])
    methods = {
        "get_max_seq_len": spec.chunk,
        "get_max_context_len": spec.context,
        "get_vocab_size": vocabulary,
        "get_eos_ids": list(spec.stop),
        "use_kv_cache": True,
        "enable_dynamic_shape": True,
        "use_sdpa_with_kv_cache": True,
    } | ({} if spec.bos is None else {"get_bos_id": spec.bos})
    with quiet_python():
        # to_edge_transform_and_lower decomposes three times to learn what to preserve; here that is known: the products.
        preserved = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True, preserve_ops=[torch.ops.aten.linear.default])
        edge = to_edge(graph, constant_methods=methods, compile_config=preserved).to_backend(_partitioner())
        delegation = _delegation(edge.exported_program())
        executorch = edge.to_executorch(
            ExecutorchBackendConfig(
                extract_delegate_segments=True,
                do_quant_fusion_and_const_prop=True,
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
                sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
            )
        )
    plan = executorch.executorch_program.execution_plan[0]
    check_operators(f"{op.name}.{op.overload}" if op.overload else op.name for op in plan.operators)
    inputs = [Port("tokens", [1, f"1..{spec.chunk}"], "int64"), Port("input_pos", [1], "int64")]
    outputs = [Port("logits", [1, 1, vocabulary], "float32")]
    return Lowered(executorch, inputs, outputs, delegation, {"executorch": metadata.version("executorch")})


def _partitioner() -> XnnpackPartitioner:
    """XNNPACK's partitioner, told to run only the one of its seventeen passes that finds something in these graphs.

    The others (batch norms, convolutions, upsampling, …) retrace every partition for nothing: a third of the lowering's time.
    """
    partitioner = XnnpackPartitioner()
    partitioner.delegation_spec = DelegationSpec(XnnpackBackend.__name__, [CompileSpec("dqlinear_partitioner", b"")])
    return partitioner


def write(lowered: Lowered, folder: Path) -> list[FileEntry]:
    """Writes `model.pte`."""
    with (folder / PROGRAM_FILE).open("wb") as file:
        lowered.payload.write_to_file(file)
    return [FileEntry.of(folder, PROGRAM_FILE, "program")]


def android_operators() -> set[str]:
    """The operators that ExecuTorch's Android library registers, from `android_operators.txt`."""
    text = (resources.files("lobit.export") / "android_operators.txt").read_text(encoding="utf-8")
    return {line for line in text.splitlines() if line and not line.startswith("#")}


def check_operators(names: Iterable[str]) -> None:
    """Refuses a program that a phone could not load.

    Raises:
        TargetError: with every operator that is missing there.
    """
    missing = sorted(set(names) - android_operators())
    if missing:
        raise TargetError(listed(missing, f"the Android library of ExecuTorch 1.3 lacks {len(missing)} operators of this program:"))


def _delegation(edge: ExportedProgram) -> Delegation:
    """Operators on the delegate and left behind, counted in the lowered graph."""
    module = edge.graph_module
    left: Counter[str] = Counter()
    delegated: Counter[str] = Counter()
    partitions = 0
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if getattr(node.target, "__name__", "") == "executorch_call_delegate":
            partitions += 1
            lowered = getattr(module, node.args[0].target)
            delegated.update(_operator_names(lowered.original_module.graph_module))
        else:
            left.update(_operator_name(node))
    return Delegation("XnnpackBackend", partitions, dict(sorted(delegated.items())), dict(sorted(left.items())))


def _operator_names(module: torch.fx.GraphModule) -> Counter[str]:
    counted: Counter[str] = Counter()
    for node in module.graph.nodes:
        if node.op == "call_function":
            counted.update(_operator_name(node))
    return counted


def _operator_name(node: torch.fx.Node) -> list[str]:
    """The operator's name, or nothing for arithmetic on shapes and the like."""
    target: Any = node.target
    if target is torch.ops.higher_order.auto_functionalized_v2:
        target = node.args[0]
    name = target.name() if hasattr(target, "name") and callable(target.name) else ""
    return [name.split(".")[0]] if "::" in name else []

