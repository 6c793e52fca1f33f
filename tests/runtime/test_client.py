"""What a client computes for programs of fixed shapes, against the plainest way to say it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lobit.errors import BundleError
from lobit.export.qnn.weights import table_bits, write_table
from lobit.quant_recipes.apply import LayerPlan
from lobit.quant_recipes.integer import IntegerEmbedding, quantize_linear
from lobit.quant_recipes.recipe import Rule, WeightGrid
from lobit.rope import LongRopeScaling, Rope
from lobit.runtime.client import CachedProgram, Table, hidden, tables
from lobit.runtime.manifest import ClientInputs, Lookup, Mask, Method, Port, Rotary, State

HIDDEN = -10_000.0


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 6), st.one_of(st.none(), st.integers(1, 9)))
def test_a_mask_shows_what_a_ring_holds_and_a_window_reaches(position: int, slots: int, tokens: int, window: int | None) -> None:
    held = {j: max((p for p in range(position) if p % slots == j), default=None) for j in range(slots)}
    keys = [*held.values(), *range(position, position + tokens)]
    found = hidden(Mask("mask", window, HIDDEN), slots, position, tokens)
    assert found.shape == (1, 1, tokens, slots + tokens)
    for row, query in enumerate(range(position, position + tokens)):
        for column, key in enumerate(keys):
            seen = key is not None and query - key >= 0 and (window is None or query - key < window)
            assert found[0, 0, row, column] == (0 if seen else HIDDEN), (query, key)


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 12))
def test_rows_go_to_their_position_modulo_the_slots_and_the_last_one_stays(position: int, slots: int, tokens: int) -> None:
    state = State("k", "k_rows", "float16", [1, 2, slots, 3], 2, None, False, True)
    ports = [Port("x", "client", [1, tokens, 4], "float16"), Port("k", "state", [1, 2, slots, 3], "float16")]
    outputs = [Port("k_rows", "state", [1, 2, tokens, 3], "float16"), Port("logits", "logits", [1, 1, 5], "float16")]
    role = "decode" if tokens == 1 else "prefill"
    rows = np.arange(6 * tokens, dtype=np.float16).reshape(1, 2, tokens, 3)
    client = ClientInputs(Lookup("x", "table", 16, 1.0), [], [], None)
    given_out = {"k_rows": rows, "logits": np.zeros((1, 1, 5), np.float16)}
    program = CachedProgram([Method(role, role, ports, outputs)], [state], client, lambda _: np.zeros(4, np.float32), lambda *_: given_out)
    program.step([0] * tokens, position)
    expected = np.zeros((1, 2, slots, 3), np.float16)
    for index in range(tokens):
        expected[:, :, (position + index) % slots] = rows[:, :, index]
    assert np.array_equal(program.caches["k"], expected)


def test_rotary_tables_are_those_of_the_rope() -> None:
    rope = Rope(10_000.0, 8, LongRopeScaling((1.0, 2.0, 3.0, 4.0), 1.25))
    frequencies, factor = rope.frequencies()
    found = tables(Rotary("cos", "sin", frequencies.tolist(), factor), np.arange(70, 75))
    angles = torch.arange(70, 75).float()[:, None] * frequencies
    assert found["cos"].shape == (1, 5, 1, 4)
    assert np.allclose(found["cos"][0, :, 0], (angles.cos() * factor).numpy(), atol=1e-6)
    assert np.allclose(found["sin"][0, :, 0], (angles.sin() * factor).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    "grid", [WeightGrid(4, None), WeightGrid(4, 16), WeightGrid(3, None), WeightGrid(8, None), WeightGrid(2, None), None]
)
def test_a_row_of_the_table_is_the_embedding(grid: WeightGrid | None, tmp_path: Path) -> None:
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    rule = grid and Rule(("embedding",), grid)
    embedding = (
        nn.Embedding(24, 32, _weight=weight.half().float())
        if rule is None
        else IntegerEmbedding(*quantize_linear(weight, rule.weights), rule)
    )
    bits = table_bits(LayerPlan("embedding", (24, 32), rule, ""))
    write_table(embedding, tmp_path / "table", bits)
    table = Table(tmp_path / "table", Lookup("x", "table", bits, 3.0))
    for token in (0, 7, 23):
        expected = embedding(torch.tensor([token]))[0].float().detach().numpy() * np.float32(3)
        assert np.array_equal(table.row(token), expected)


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table").write_bytes(b"no safetensors")
    with pytest.raises(BundleError, match="cannot be read"):
        Table(tmp_path / "table", Lookup("x", "table", 16, 1.0))
