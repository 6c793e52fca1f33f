"""The shipped ternary checkpoint: small, and what its record says."""

import json

import pytest
import torch

from lobit.checkpoint import load_model
from lobit.demo import FOLDER, TERNARY_FOLDER, held_out_text
from lobit.demo.stories import training_text
from lobit.quant_recipes.catalog import find_recipe
from lobit.quant_recipes.corpus import pack
from lobit.quant_recipes.metrics import figures
from lobit.quant_recipes.quantized import integer_layers, load_checkpoint
from lobit.tokenizer import Tokenizer

MOST_BYTES = 1_000_000
pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_is_small_and_every_linear_layer_is_ternary() -> None:
    assert sum(path.stat().st_size for path in TERNARY_FOLDER.iterdir()) < MOST_BYTES
    model, recipe = load_checkpoint(TERNARY_FOLDER)
    assert recipe == find_recipe("bitnet")
    layers = list(integer_layers(model))
    assert len(layers) == 7 * len(model.layers)
    for name, integers, scale, _ in layers:
        assert set(integers.unique().tolist()) <= {-1, 0, 1}, name
        assert len(scale.unique()) == 1, f"{name}: one scale for the matrix"


def test_it_tells_the_stories_of_the_float_model() -> None:
    record = json.loads((TERNARY_FOLDER / "training.json").read_text(encoding="utf-8"))
    assert not any(value.startswith("/") for value in record["settings"]["command"].split()), "paths inside of the project"
    (model, recipe), reference = load_checkpoint(TERNARY_FOLDER), load_model(FOLDER)
    tokenizer = Tokenizer.from_folder(TERNARY_FOLDER)
    corpus = pack([tokenizer.encode(held_out_text(30))], 256, bos=tokenizer.bos)
    found = figures(model, corpus, recipe, reference)
    assert found.kl is not None and found.kl < 2 * record["kl"], "other stories, the same distance"
    assert found.top1 is not None and found.top1 > 0.9


def test_its_first_token_is_as_good_as_the_rest() -> None:
    """A model that is trained on cut sequences alone forgets what position 0 is for."""
    (model, _), reference = load_checkpoint(TERNARY_FOLDER), load_model(FOLDER)
    tokens = torch.tensor([Tokenizer.from_folder(TERNARY_FOLDER).encode("Once")])
    kl = torch.nn.functional.kl_div(model(tokens).log_softmax(-1), reference(tokens).log_softmax(-1), log_target=True, reduction="none")
    assert kl.sum(-1).max() < 0.2


def test_training_text_is_the_seeds_and_is_not_held_out() -> None:
    assert training_text(5, 0) == training_text(5, 0) != training_text(5, 1)
    assert training_text(5, 0) != held_out_text(5)
