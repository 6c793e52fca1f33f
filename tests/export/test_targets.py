"""What all targets promise, besides what `export.target.Target` says of types."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lobit import verbs
from lobit.export.target import Spec, find_target
from lobit.stage_cache import StageCache
from lobit.targets import TARGETS
from lobit.verbs.make import converted


@pytest.mark.parametrize("recipe", ["int4", "bitnet"])
@pytest.mark.parametrize("name", TARGETS)
def test_a_model_is_the_same_after_every_verb_of_a_target(name, recipe, models, tmp_path: Path):
    """One converted model serves the export, parity's stages and whatever comes next."""
    chosen = recipe if recipe != "int4" else "w4-channel" if name == "qnn" else "8da4w-g32"
    model, used = converted(models("llama"), verbs.choose_recipe(chosen))
    before = {path: (module, vars(module).get("rule")) for path, module in model.named_modules()}
    digests = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    spec, target = Spec(used, 64, 16), find_target(name)
    target.arithmetic(model, spec)
    target.graph(model, spec)
    target.needs(model, spec)
    lowered = target.lower(model, spec, StageCache(tmp_path / "kept"), lambda *_: None)
    (tmp_path / "bundle").mkdir()
    target.write(lowered, tmp_path / "bundle", lambda *_: None)
    after = {path: (module, vars(module).get("rule")) for path, module in model.named_modules()}
    assert after.keys() == before.keys()
    assert all(after[path][0] is before[path][0] and after[path][1] == before[path][1] for path in before)
    assert all(torch.equal(tensor, digests[path]) for path, tensor in model.state_dict().items())
