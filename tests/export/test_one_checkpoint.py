"""One checkpoint on every target: the same integers in all of them, and one report that shows them side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lobit import verbs
from lobit.demo import held_out_text
from lobit.runtime.bundle import open_bundle
from lobit.runtime.manifest import FILE_NAME
from lobit.targets import TARGETS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("qnn_libraries", "one_thread")]
SECTIONS = 3
"""Tables of the report that name every bundle: what was compared, what was read back, sizes."""
CONTEXTS = {"gguf": 32}
"""No architecture of llama.cpp has the demo's windows, so that a file for it holds what one of them does."""
CONTEXT, TOKENS = 128, 120
RECIPE = "8da8w"
"""INT8 with a scale for every row, which each target holds."""


@pytest.fixture(scope="module")
def checkpoint(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checkpoint") / "checkpoint"
    verbs.quantize(str(models("demo")), verbs.choose_recipe(RECIPE), out)
    return out


@pytest.fixture(scope="module")
def bundles(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    for target in TARGETS:
        verbs.export(str(checkpoint), target, folder / target, context=CONTEXTS.get(target, CONTEXT))
    return {target: folder / target for target in TARGETS}


def test_every_target_holds_the_checkpoints_integers(bundles: dict[str, Path], checkpoint: Path) -> None:
    digests = {open_bundle(bundle).manifest.checkpoint_sha256 for bundle in bundles.values()}
    assert len(digests) == 1
    for target, bundle in bundles.items():
        result = verbs.verify(bundle, str(checkpoint))
        assert result["passed"] and result["checkpoint_matches"] and result["integers"] > 0, target


def test_one_report_shows_every_target(bundles: dict[str, Path], checkpoint: Path, tmp_path: Path) -> None:
    files = []
    for target, bundle in bundles.items():
        parity = verbs.parity(bundle, "demo", held_out_text(8), tokens=TOKENS, checkpoint=str(checkpoint))
        assert parity["passed"], (target, parity["limits"])
        for name, values in {"parity": parity, "verify": verbs.verify(bundle, str(checkpoint))}.items():
            files.append(tmp_path / f"{target}.{name}.json")
            files[-1].write_text(json.dumps(values), encoding="utf-8")
        files.append(bundle / FILE_NAME)
    verbs.report(files, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert {target: page.count(f">{target}</") >= SECTIONS for target in TARGETS} == dict.fromkeys(TARGETS, True)
