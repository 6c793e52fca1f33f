"""Data that tests share: it lies beside the repository and is not part of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import pytest

if TYPE_CHECKING:
    from lobit.quant_recipes.recipe import Recipe

KVCache = Literal["int8", "float"]

SHARED = Path(os.environ.get("LOBIT_SHARED") or Path(__file__).resolve().parents[2] / "shared")


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared(path)`: a file or folder of ../shared, or of LOBIT_SHARED.

    A test that asks for what is not there is skipped, or fails where LOBIT_REQUIRE_SHARED is set.
    """

    def find(path: str) -> Path:
        found = SHARED / path
        if not found.exists():
            _give_up(f"{path} is not in {SHARED}: set LOBIT_SHARED to the folder that has it")
        return found

    return find


def _give_up(why: str) -> NoReturn:
    (pytest.fail if os.environ.get("LOBIT_REQUIRE_SHARED") else pytest.skip)(why)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, a real chat model, as a Hugging Face folder: fetched once a session, or LOBIT_SMOLLM2. For slow tests.

    Where it cannot be downloaded the test is skipped, or fails where LOBIT_REQUIRE_SHARED is set. Tests must not change it.
    """
    from lobit import verbs
    from lobit.errors import MissingPartError

    if there := os.environ.get("LOBIT_SMOLLM2"):
        return Path(there)
    try:
        return verbs.fetch("smollm2", tmp_path_factory.mktemp("fetched") / "SmolLM2-135M-Instruct")
    except MissingPartError as error:
        _give_up(f"{error}; or set LOBIT_SMOLLM2 to the model's folder")


@pytest.fixture(scope="session")
def android_tools() -> Callable[[str], None]:
    """`android_tools(use)`: the test needs the Debian programs that `android_demo/artifacts.toml` lists for `use`, or is skipped.

    Where LOBIT_REQUIRE_SHARED is set it fails instead. What is fetched and compiled stays in `.android`, or in LOBIT_ANDROID.
    """
    from lobit.android.artifacts import missing_programs

    os.environ.setdefault("LOBIT_ANDROID", str(Path(__file__).parents[1] / ".android"))

    def need(use: str) -> None:
        if missing := [program.name for program in missing_programs(use)]:
            _give_up(f"{', '.join(missing)} not installed: `lobit doctor android` says how to install them")

    return need


@pytest.fixture(scope="session")
def qnn_libraries() -> None:
    """The test needs Qualcomm's libraries for x86-64 Linux, or is skipped; where LOBIT_REQUIRE_SHARED is set it fails instead."""
    from lobit.errors import MissingPartError
    from lobit.runtime.qnn_libraries import library_folder

    try:
        library_folder()
    except MissingPartError as error:
        _give_up(str(error))


@pytest.fixture(scope="session")
def stories(shared: Callable[[str], Path]) -> Path:
    """A real trained Llama of 264 128 parameters, as a Hugging Face folder."""
    return shared("models/stories260k")


EXCLUDED = "layers.*.mlp.down"
"""Stays in floating point where stories260k is quantized in groups: 172 does not divide by 32."""
SMALL_CONFIG: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
"""All widths divide by 32, and the heads together are wider than the stream."""
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "mobilellm_p1": {
        "model_type": "mobilellm_p1",
        "tie_word_embeddings": True,
        "use_qk_norm": True,
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 16,
    },
}
"""What each family has of its own: biases and a head of its own, weighted norms of q and k, windows."""
SIZES = {"stories260k": (192, 64), "demo": (192, 64), "llama": (64, 16), "qwen3": (64, 16), "mobilellm_p1": (128, 32)}
"""Context and chunk of each model's bundles: contexts that a test fills, prefill calls longer than a chunk, chunks longer than a
window."""


@pytest.fixture(scope="session")
def models(shared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`models(name)`: the folder of stories260k, demo, or a random model of each family."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def find(name: str) -> Path:
        if name not in made:
            made[name] = _model(name, shared, root / name)
        return made[name]

    return find


def _model(name: str, shared: Callable[[str], Path], folder: Path) -> Path:
    if name == "stories260k":
        return shared("models/stories260k")
    if name == "demo":
        from lobit.demo import FOLDER

        return Path(shutil.copytree(FOLDER, folder))
    import torch

    from lobit.checkpoint import save_model
    from lobit.families import read_config
    from lobit.model import Transformer

    values = SMALL_CONFIG | RANDOM_MODELS[name]
    model, generator = Transformer(read_config(values)), torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.2 * noise if "norm" in key else 0.15 * noise
    save_model(model, values, folder, torch.float32)
    return folder


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """`small_models(family)`: the folder of a family's small random model, and its oracle. Tests must not change them."""
    from tests.small_models import write_model

    root, made = tmp_path_factory.mktemp("small_models"), {}

    def find(name: str) -> tuple[Path, Any]:
        if name not in made:
            made[name] = root / name, write_model(name, root / name)
        return made[name]

    return find


class Bundles:
    """Exports each bundle once a session, when a test first asks for it."""

    def __init__(self, models: Callable[[str], Path], root: Path) -> None:
        self.models, self.root = models, root
        self._made: dict[tuple[str, str, KVCache | None], Path] = {}

    @staticmethod
    def recipe(model: str, name: str, kv_cache: KVCache | None = None) -> Recipe:
        """The recipe, with what stories260k needs excluded."""
        from lobit import verbs

        exclude = [EXCLUDED] if (model, name) == ("stories260k", "8da4w-g32") else []
        return verbs.choose_recipe(name, exclude, None, kv_cache)

    def __call__(self, model: str, recipe: str, kv_cache: KVCache | None = None) -> Path:
        """The bundle of a model under a recipe. Tests must not change it."""
        from lobit import verbs

        key = (model, recipe, kv_cache)
        if key not in self._made:
            out = self.root / "-".join(filter(None, key))
            context, chunk = SIZES[model]
            chosen = self.recipe(*key)
            verbs.export(str(self.models(model)), "xnnpack", out, recipe=chosen, context=context, chunk=chunk)
            self._made[key] = out
        return self._made[key]


@pytest.fixture(scope="session")
def parts_once() -> Iterator[None]:
    """Each part of a model's program for target xnnpack is lowered once in this process, whatever recipes it is exported under.

    Parts have random weights, always the same ones, so the bytes are those of an export alone (tests that export in processes of their
    own compare them).
    """
    from lobit.export.xnnpack import target as xnnpack
    from lobit.export.xnnpack.lowering import LoweredPart

    made: dict[tuple[Any, ...], bytes] = {}
    keep, lower, programs = xnnpack._kept_part, xnnpack.lower, [""]

    def keep_once(step: Any, parts: Any, chunk: int, methods: dict[str, Any], kept: Any) -> LoweredPart:
        # A part's own description tells the parts of one program from each other, not those of several models.
        key = (programs[-1], parts.part_of(step), str(methods))
        if key not in made:
            made[key] = keep(step, parts, chunk, methods, kept).to_bytes()
        return LoweredPart.from_bytes(made[key])

    def lower_once(model: Any, spec: Any, *rest: Any) -> Any:
        programs.append(f"{model.config} {spec.context} {spec.chunk} {spec.recipe.kv_bits}")
        return lower(model, spec, *rest)

    xnnpack._kept_part, xnnpack.lower = keep_once, lower_once
    yield
    xnnpack._kept_part, xnnpack.lower = keep, lower


@pytest.fixture(scope="session")
def bundles(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, parts_once: None) -> Bundles:
    """`bundles(model, recipe, kv_cache=None)`: a bundle for target xnnpack, exported once a session."""
    return Bundles(models, tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="session")
def another_process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`another_process(code, *arguments, **options)`: Python code in a process of its own, which must not fail.

    `environment` changes variables; other options are those of `subprocess.run`.
    """

    def run(code: str, *arguments: Any, environment: Mapping[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **(environment or {})}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, check=True, env=variables, capture_output=True, text=True, **options)

    return run


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: products this small are slower on more, much slower on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
