"""Verify: one integer, one scale, one byte that is not the checkpoint's is found and named; a bundle that is not whole is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lobit import verbs
from lobit.checkpoint import load_model, save_model
from lobit.errors import BundleError
from lobit.quant_recipes.apply import convert
from lobit.quant_recipes.packing import pack_int4
from lobit.quant_recipes.quantized import integer_layers
from lobit.runtime.bundle import open_bundle
from lobit.runtime.engine import open_engine
from lobit.runtime.manifest import FILE_NAME, FileEntry, sealed

Bundles = Any
"""The fixture of tests/conftest.py: `bundles(model, recipe, kv_cache)`."""
Layers = dict[str, tuple[Tensor, Tensor]]
"""Integers and scales by name."""
PROGRAM = "model.pte"


@pytest.fixture(scope="module")
def layers(models: Any, bundles: Bundles) -> Layers:
    """What the checkpoint of mobilellm_p1 under 8da4w-g32 holds."""
    model = convert(load_model(models("mobilellm_p1")), bundles.recipe("mobilellm_p1", "8da4w-g32"))
    return {name: (integers, scale) for name, integers, scale, _ in integer_layers(model)}


@pytest.fixture
def copy(bundles: Bundles, tmp_path: Path) -> Callable[..., Path]:
    """`copy(recipe)`: a bundle of mobilellm_p1 that a test may change."""

    def make(recipe: str = "8da4w-g32") -> Path:
        return Path(shutil.copytree(bundles("mobilellm_p1", recipe), tmp_path / "bundle"))

    return make


def in_file(tensor: Tensor) -> bytes:
    """A tensor's bytes, row by row."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def stored_integers(name: str, integers: Tensor) -> bytes:
    """As the program stores them: the delegate has the even element in the low half, `embedding_4bit` in the high half."""
    packed = pack_int4(integers)
    return in_file(packed << 4 | packed >> 4 if name == "embedding" else packed)


def stored_scales(name: str, scale: Tensor) -> bytes:
    """As the program stores them: float16 for the embedding, bfloat16 in the delegate."""
    return in_file(scale.half() if name == "embedding" else scale.bfloat16())


def change(bundle: Path, wanted: bytes, offset: int, bits: int) -> None:
    """Flips bits of one byte inside a run of bytes that the program has exactly once, and makes the manifest agree."""
    program = bytearray((bundle / PROGRAM).read_bytes())
    assert program.count(wanted) == 1
    program[program.index(wanted) + offset] ^= bits
    (bundle / PROGRAM).write_bytes(program)
    entry = FileEntry.of(bundle, PROGRAM, "program")
    with_manifest(bundle, lambda values: values["files"][0].update(bytes=entry.bytes, sha256=entry.sha256))


def with_manifest(bundle: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrites the manifest."""
    values = json.loads((bundle / FILE_NAME).read_text(encoding="utf-8"))
    edit(values)
    (bundle / FILE_NAME).write_text(sealed(values), encoding="utf-8")


def differing(result: dict[str, Any]) -> dict[str, dict[str, int]]:
    """What differs, layer by layer; the totals are the sums."""
    kinds = ("integers", "scales", "floats")
    for kind in kinds:
        assert result[f"differing_{kind}"] == sum(row[f"differing_{kind}"] for row in result["layers"])
    found = {row["name"]: {kind: row[f"differing_{kind}"] for kind in kinds if row[f"differing_{kind}"]} for row in result["layers"]}
    assert result["passed"] == (not any(found.values()))
    return {name: counts for name, counts in found.items() if counts}


RECIPES = [
    ("stories260k", "fp"),
    ("stories260k", "8da4w-g32"),
    ("stories260k", "8da8w"),
    ("mobilellm_p1", "fp"),
    ("mobilellm_p1", "8da4w-g32"),
    ("mobilellm_p1", "bitnet"),
    pytest.param("mobilellm_p1", "8da8w", marks=pytest.mark.slow),
    pytest.param("demo", "8da4w-g32", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("model", "recipe"), RECIPES)
def test_no_integer_differs_and_every_one_is_compared(model: str, recipe: str, bundles: Bundles, models: Any) -> None:
    result = verbs.verify(bundles(model, recipe), str(models(model)))
    assert differing(result) == {}
    assert result["checkpoint_matches"]
    converted = convert(load_model(models(model)), bundles.recipe(model, recipe))
    rounded = list(integer_layers(converted))
    assert result["integers"] == sum(integers.numel() for _, integers, _, _ in rounded)
    assert result["scales"] == sum(scale.numel() for _, _, scale, _ in rounded)
    norms_and_biases = sum(tensor.ndim == 1 for name, tensor in converted.named_parameters() if "norm" in name or name.endswith("bias"))
    assert result["tensors"] == 2 + 7 * len(converted.config.layers) + norms_and_biases
    assert result["bundle"]["recipe"] == recipe


LAYERS = ["embedding", "layers.0.attention.q", "layers.0.attention.k", "layers.1.mlp.up", "layers.2.mlp.down", "head"]
"""The first and others of a block, either side of the tied table."""


@pytest.mark.parametrize("name", LAYERS[:-1])
def test_one_changed_integer_is_found_and_its_layer_named(name: str, copy: Any, layers: Layers, models: Any) -> None:
    bundle = copy()
    stored = stored_integers(name, layers[name][0])
    change(bundle, stored, len(stored) // 2, 0x10)
    named = [name, "head"] if name == "embedding" else [name]  # one table, in the file once
    assert differing(verbs.verify(bundle, str(models("mobilellm_p1")))) == {one: {"integers": 1} for one in named}


@pytest.mark.parametrize("name", LAYERS)
def test_the_last_bit_of_one_scale_is_found_and_its_layer_named(name: str, copy: Any, layers: Layers, models: Any) -> None:
    bundle = copy()
    stored = stored_scales(name, layers[name][1])
    change(bundle, stored, 4 * (len(stored) // 8), 0x01)
    assert differing(verbs.verify(bundle, str(models("mobilellm_p1")))) == {name: {"scales": 1}}


def test_one_changed_ternary_integer_and_scale_are_found(copy: Any, models: Any, bundles: Bundles) -> None:
    model = convert(load_model(models("mobilellm_p1")), bundles.recipe("mobilellm_p1", "bitnet"))
    found = {name: (integers, scale) for name, integers, scale, _ in integer_layers(model)}
    integers, scale = found["layers.1.mlp.up"]
    bundle = copy("bitnet")
    change(bundle, in_file(pack_int4(integers)), 1000, 0x01)
    change(bundle, in_file(scale), 4 * 7, 0x01)
    changed: dict[str, dict[str, int]] = {name: {"scales": 1} for name, (_, other) in found.items() if torch.equal(other, scale)}
    changed["layers.1.mlp.up"]["integers"] = 1  # the file has equal scales once
    assert differing(verbs.verify(bundle, str(models("mobilellm_p1")))) == changed


def test_the_last_bit_of_one_float_is_found_and_its_layer_named(copy: Any, models: Any) -> None:
    bundle = copy("fp")
    weight = load_model(models("mobilellm_p1")).layers[1].attention.o.weight
    change(bundle, in_file(weight.detach()), 400, 0x01)
    assert differing(verbs.verify(bundle, str(models("mobilellm_p1")))) == {"layers.1.attention.o": {"floats": 1}}


def another(models: Any, folder: Path, edit: Callable[[Any], None]) -> str:
    """mobilellm_p1 with other weights."""
    source = models("mobilellm_p1")
    model = load_model(source)
    edit(model)
    save_model(model, json.loads((source / "config.json").read_text(encoding="utf-8")), folder / "other", torch.float32)
    return str(folder / "other")


def test_one_weight_of_the_checkpoint_that_falls_elsewhere_is_found(bundles: Bundles, models: Any, tmp_path: Path) -> None:
    def edit(model: Any) -> None:
        group = model.layers[1].mlp.down.weight.data[3, :32]
        smallest = group.abs().argmin()  # the group's scale stays
        group[smallest] = 0.9 * group.abs().max()

    result = verbs.verify(bundles("mobilellm_p1", "8da4w-g32"), another(models, tmp_path, edit))
    assert differing(result) == {"layers.1.mlp.down": {"integers": 1}}
    assert not result["checkpoint_matches"]


def test_a_checkpoint_that_differs_in_a_norm_does_not_pass(bundles: Bundles, models: Any, tmp_path: Path) -> None:
    def edit(model: Any) -> None:
        model.layers[1].mlp_norm.weight.data[3] *= 2

    result = verbs.verify(bundles("mobilellm_p1", "8da4w-g32"), another(models, tmp_path, edit))
    assert not result["checkpoint_matches"]
    assert not result["passed"]
    assert differing(result) == {"layers.1.mlp_norm.weight": {"floats": 1}}, "read back out of the program, and named"


@pytest.mark.parametrize("other", ["qwen3", "llama"])
def test_a_checkpoint_of_another_model_is_refused(other: str, bundles: Bundles, models: Any) -> None:
    with pytest.raises(BundleError, match="is it this bundle's checkpoint"):
        verbs.verify(bundles("stories260k", "8da4w-g32"), str(models(other)))


def test_a_model_without_some_of_the_layers_is_refused(bundles: Bundles, models: Any) -> None:
    with pytest.raises(BundleError, match="more weights than the checkpoint"):
        verbs.verify(bundles("llama", "8da4w-g32"), str(_shallow(models, bundles.root)))


def _shallow(models: Any, root: Path) -> Path:
    """llama without its last layer."""
    from lobit.families import read_config
    from lobit.model import Transformer

    values = json.loads((models("llama") / "config.json").read_text(encoding="utf-8")) | {"num_hidden_layers": 1}
    save_model(Transformer(read_config(values)), values, root / "shallow", torch.float32)
    return root / "shallow"


# --- opening a bundle -----------------------------------------------------------------------------------------------------------


def refusal(bundle: Path) -> str:
    """The message with which a bundle is refused, by every verb that reads one."""
    with pytest.raises(BundleError) as error:
        open_bundle(bundle)
    for read in (lambda: verbs.verify(bundle, "demo"), lambda: verbs.run(bundle, "Once"), lambda: verbs.parity(bundle, "demo", "Once")):
        with pytest.raises(BundleError):
            read()
    return str(error.value)


def test_a_changed_byte_is_refused_with_the_files_name(copy: Any) -> None:
    bundle = copy()
    program = bytearray((bundle / PROGRAM).read_bytes())
    program[len(program) // 2] ^= 1
    (bundle / PROGRAM).write_bytes(program)
    assert "model.pte has changed" in refusal(bundle)


def test_files_that_are_missing_short_or_links_out_are_all_named(copy: Any, tmp_path: Path) -> None:
    bundle, outside = copy(), tmp_path / "outside.txt"
    outside.write_text("elsewhere", encoding="utf-8")
    names = ("gone.txt", "short.txt", "link.txt")
    for name in names:
        (bundle / name).write_text("elsewhere", encoding="utf-8")
    entries = [FileEntry.of(bundle, name, "config") for name in names]
    with_manifest(bundle, lambda values: values["files"].extend(vars(entry) for entry in entries))
    open_bundle(bundle)
    (bundle / "gone.txt").unlink()
    (bundle / "short.txt").write_text("else", encoding="utf-8")
    (bundle / "link.txt").unlink()
    (bundle / "link.txt").symlink_to(outside)
    message = refusal(bundle)
    for part in ("gone.txt is missing", "short.txt has 4 bytes instead of 9", "link.txt is a link that leaves the bundle"):
        assert part in message


@pytest.mark.parametrize("path", ["../model.pte", "/etc/hosts", "a/../../b", "C:\\model.pte", "..", ""])
def test_a_path_that_leaves_the_bundle_is_refused(path: str, copy: Any) -> None:
    bundle = copy()
    with_manifest(bundle, lambda values: values["files"][0].update(path=path))
    assert "leaves the bundle" in refusal(bundle)


@pytest.mark.parametrize("version", ["1.0", "3.0", 2, "2", "2.", None])
def test_another_schema_version_is_refused_with_both_numbers(version: Any, copy: Any) -> None:
    bundle = copy()
    with_manifest(bundle, lambda values: values.update(schema_version=version))
    assert f"schema version {version!r}, this lobit reads 2.x" in refusal(bundle)


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a missing field": (lambda values: values.pop("context"), "context"),
    "an unknown field": (lambda values: values.update(surprise=1), "surprise"),
    "a text for a number": (lambda values: values.update(context="128"), "context is '128'"),
    "a negative number": (lambda values: values["cache"]["slots"].__setitem__(1, -16), r"slots[1] is -16"),
    "a truth for a number": (lambda values: values.update(chunk=True), "chunk is True"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_damaged_manifest_is_refused_and_the_message_says_where(name: str, copy: Any) -> None:
    edit, part = EDITS[name]
    bundle = copy()
    with_manifest(bundle, edit)
    assert part in refusal(bundle)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"schema_version": 1}'], ids=lambda content: repr(content[:9])
)
def test_what_is_no_manifest_is_refused(content: bytes, copy: Any) -> None:
    bundle = copy()
    (bundle / FILE_NAME).write_bytes(content)
    assert "export the bundle again" in refusal(bundle)


def test_a_bundle_for_an_unknown_target_is_refused(copy: Any, models: Any) -> None:
    bundle = copy()
    with_manifest(bundle, lambda values: values.update(target="abacus"))
    with pytest.raises(BundleError, match="abacus"):
        open_engine(open_bundle(bundle))
    with pytest.raises(BundleError, match="abacus"):
        verbs.verify(bundle, str(models("mobilellm_p1")))


def test_a_program_of_garbage_is_refused_when_it_is_taken_apart(copy: Any, models: Any) -> None:
    bundle = copy()
    (bundle / PROGRAM).write_bytes(bytes(range(256)) * 64)
    entry = FileEntry.of(bundle, PROGRAM, "program")
    with_manifest(bundle, lambda values: values["files"][0].update(bytes=entry.bytes, sha256=entry.sha256))
    with pytest.raises(BundleError, match=r"model\.pte cannot be taken apart"):
        verbs.verify(bundle, str(models("mobilellm_p1")))


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    assert "is no bundle" in refusal(tmp_path)
    assert "is no bundle" in refusal(tmp_path / "nowhere")
