"""Ten thousand tokens through wrapped rings: the program stays with the reference, and memory stays where it is."""

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import pytest

from lobit import verbs
from lobit.checkpoint import load_model
from lobit.demo import FOLDER, held_out_text
from lobit.quant_recipes.apply import convert
from lobit.runtime.bundle import open_bundle
from lobit.runtime.engine import Engine, Logits, open_engine
from lobit.runtime.parity import kl_divergence, log_softmax
from lobit.runtime.reference import ReferenceEngine
from lobit.tokenizer import Tokenizer

TOKENS = 10_000
CONTEXT = 10_240
EVERY = 500
"""Tokens between two looks at the memory."""
COMPARED = 200
"""Tokens at the beginning, in the middle and at the end whose logits are compared."""
KL = 1e-3
"""Nats, mean: as where a bundle is compared with the reference over its first tokens."""
FLAT = 1 << 20
"""Bytes that the process may grow by while no more of the caches is read than before: allocators keep some of what is freed."""
LAST_BOUND = 8192
"""From this position on every call reads the whole context."""
WORKSPACE = 12 * CONTEXT * 2 * 32 * 4
"""Bytes: keys and values of the whole context as floats, at each step of their way into the products; 2 heads of 32."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, allowed to go on for longer than it was trained to."""
    folder = Path(shutil.copytree(FOLDER, tmp_path_factory.mktemp("long") / "model"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}), encoding="utf-8")
    return folder


def logits_at(engine: Engine, tokens: list[int], start: int) -> Logits:
    """Logits after each of `COMPARED` tokens that are decoded one by one from a position on."""
    engine.reset()
    if start:
        engine.prefill(tokens[:start])
    return np.stack([engine.decode(token) for token in tokens[start : start + COMPARED]])


def decode_all(bundle: Path, tokens: list[int], starts: Sequence[int]) -> tuple[dict[int, Logits], list[int]]:
    """Decodes one by one: the logits after `COMPARED` tokens from each start on, and the process's memory after each `EVERY` tokens."""
    engine = open_engine(open_bundle(bundle), 1)
    kept: dict[int, list[Logits]] = {start: [] for start in starts}
    memory: list[int] = []
    for position, token in enumerate(tokens):
        row = engine.decode(token)
        for start in starts:
            if start <= position < start + COMPARED:
                kept[start].append(row)
        if position % EVERY == EVERY - 1:
            memory.append(psutil.Process().memory_info().rss)
    return {start: np.stack(rows) for start, rows in kept.items()}, memory


def test_ten_thousand_tokens_stay_with_the_reference_in_the_same_memory(model: Path, tmp_path: Path) -> None:
    recipe = verbs.choose_recipe("8da4w-g32")
    verbs.export(str(model), "xnnpack", tmp_path / "bundle", recipe=recipe, context=CONTEXT, chunk=128)
    tokens = Tokenizer.from_folder(FOLDER).encode(held_out_text(400))[:TOKENS]
    assert len(tokens) == TOKENS
    assert 0 < open_bundle(tmp_path / "bundle").manifest.model.largest_window < TOKENS / 100, "rings wrap hundreds of times"
    starts = (0, TOKENS // 2, TOKENS - COMPARED)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:  # what this process frees and takes meanwhile is not counted
        kept, memory = alone.submit(decode_all, tmp_path / "bundle", tokens, starts).result()
    reference = ReferenceEngine(convert(load_model(model), recipe), recipe, CONTEXT)
    for start in starts:
        expected = logits_at(reference, tokens, start)
        assert kl_divergence(log_softmax(expected), log_softmax(kept[start])).mean() < KL, f"from {start} on"
    assert memory[-1] - memory[LAST_BOUND // EVERY] < FLAT, memory
    assert memory[-1] - memory[0] < WORKSPACE + 4 * FLAT, memory
