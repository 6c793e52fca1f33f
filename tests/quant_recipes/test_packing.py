"""Integers in bytes: layouts that must never change, and what a damaged file says."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lobit.errors import ModelError
from lobit.quant_recipes import packing
from lobit.quant_recipes.packing import LAYOUTS, Layout, layout_of, pack_int4, unpack_int4

GOLDEN = {
    # Two rows that start with every kind of code and end inside a group.
    "bits-1": ([[1, -1, -1, -1, 1, 1, -1, -1, 1], [-1, -1, -1, -1, -1, -1, -1, 1, -1]], [[0x31, 0xFF], [0x80, 0xFE]]),
    "crumbs-1": ([[-1, 0, 1, 1, 1], [1, -1, -1, -1, -1]], [[0b10100100, 0b01010110], [0b00000010, 0b01010100]]),
    # 0 + 3 + 18 + 0 + 162 and 2 + 3 + 9 + 27 + 81; 2 * 121 and 0 + 3 + 9 + 27 + 81
    "trits-1": ([[-1, 0, 1, -1, 1, 1], [1, 1, 1, 1, 1, -1]], [[183, 122], [242, 120]]),
    # Octal numbers, the last digit first: 0o76543210 of a whole group; then one code alone and the code of 0, 4, behind it.
    "threes-1": (
        [[-4, -3, -2, -1, 0, 1, 2, 3, 3], [3, -4, -4, -4, -4, -4, -4, 1, -4]],
        [[0o76543210 & 255, 0o76543210 >> 8 & 255, 0o76543210 >> 16, 0o47], [7, 0, 0o50000000 >> 16, 0o40]],
    ),
    "nibbles-1": ([[-8, 7, 0, -1, 3], [1, -8, -8, 1, -8]], [[0xF0, 0x78, 0x8B], [0x09, 0x90, 0x80]]),
    # Codes 1, 2, 3, 63, 5 and 0, 0, 0, 32, 6; two codes of the last group are cut off behind the byte that holds 5 or 6.
    "sixes-1": (
        [[-31, -30, -29, 31, -27], [-32, -32, -32, 0, -26]],
        [[0b10_000001, 0b0011_0000, 0b111111_00, 0b00_000101], [0, 0, 0b100000_00, 0b00_000110]],
    ),
}
"""Integers and the bytes of each layout, by hand."""
DENSITY = {"bits-1": 1, "crumbs-1": 2, "trits-1": 1.6, "threes-1": 3, "nibbles-1": 4, "sixes-1": 6}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
shapes = {"rows": st.integers(0, 6), "columns": st.integers(0, 70), "seed": st.integers(0, 2**31)}


def values_of(layout: Layout) -> Tensor:
    return torch.arange(layout.lowest, layout.highest + 1, layout.step).to(torch.int8)


def random_integers(layout: Layout, rows: int, columns: int, seed: int = 0) -> Tensor:
    values = values_of(layout)
    return values[torch.randint(len(values), (rows, columns), generator=torch.Generator().manual_seed(seed))]


@layouts
def test_bytes_of_every_layout_are_those_written_by_hand(layout: Layout) -> None:
    integers, expected = GOLDEN[layout.name]
    packed = layout.pack(torch.tensor(integers, dtype=torch.int8))
    assert packed.tolist() == expected
    assert layout.unpack(packed, len(integers[0])).tolist() == integers


def by_definition(layout: Layout, row: list[int]) -> list[int]:
    """A row's bytes, in Python's own integers, as the module describes them."""
    filler = 1 if layout.name == "bits-1" else 0
    filled = row + [filler] * (-len(row) % layout.group)
    codes = [(q - layout.lowest) // layout.step for q in filled]
    groups = [codes[start : start + layout.group] for start in range(0, len(codes), layout.group)]
    numbers = [sum(code * layout.base**i for i, code in enumerate(group)) for group in groups]
    whole = b"".join(number.to_bytes(layout.size, "little") for number in numbers)
    return list(whole[: layout.width(len(row))])


@layouts
@given(**shapes)
@settings(deadline=None, max_examples=50)
def test_packed_bytes_follow_the_definition_and_unpack_to_the_same_integers(layout: Layout, rows: int, columns: int, seed: int) -> None:
    integers = random_integers(layout, rows, columns, seed)
    packed = layout.pack(integers)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, layout.width(columns))
    assert packed.tolist() == [by_definition(layout, row) for row in integers.tolist()]
    unpacked = layout.unpack(packed, columns)
    assert unpacked.dtype == torch.int8 and torch.equal(unpacked, integers)


@layouts
def test_every_group_of_two_values_survives_at_every_place(layout: Layout) -> None:
    values = values_of(layout)
    pairs = torch.cartesian_prod(values, values)
    for start in range(layout.group - 1):
        rows = torch.full((len(pairs), layout.group), layout.highest, dtype=torch.int8)
        rows[:, start : start + 2] = pairs
        assert torch.equal(layout.unpack(layout.pack(rows), layout.group), rows)


@layouts
def test_layouts_are_as_dense_as_promised(layout: Layout) -> None:
    assert layout.bits_per_weight == DENSITY[layout.name]
    assert layout.pack(random_integers(layout, 3, 240)).numel() * 8 == 3 * 240 * DENSITY[layout.name]


@layouts
def test_a_short_row_takes_no_more_bytes_than_its_bits_need(layout: Layout) -> None:
    for columns in range(70):
        bits = columns * round(10 * layout.bits_per_weight)
        assert layout.width(columns) == -(-bits // 80)


@layouts
def test_rows_that_are_packed_in_slices_are_those_packed_at_once(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    integers = random_integers(layout, 23, 21)
    packed = layout.pack(integers)
    for size in (1, 21, 50, 22 * 21):
        monkeypatch.setattr(packing, "SLICE", size)
        assert torch.equal(layout.pack(integers), packed)
        assert torch.equal(layout.unpack(packed, 21), integers)


@layouts
def test_views_of_other_tensors_are_packed_like_copies(layout: Layout) -> None:
    integers = random_integers(layout, 34, 46)
    for view in (integers.T, integers[::2, 3:40], integers[:, ::3], integers[:1].expand(5, 46)):
        packed = layout.pack(view)
        assert torch.equal(packed, layout.pack(view.contiguous()))
        assert torch.equal(layout.unpack(packed.T.contiguous().T, view.shape[1]), view)
    assert torch.equal(integers, random_integers(layout, 34, 46)), "the input is left as it is"


@layouts
def test_a_tensor_without_memory_is_packed_to_its_shape(layout: Layout) -> None:
    packed = layout.pack(torch.empty(3, 41, dtype=torch.int8, device="meta"))
    assert packed.is_meta and packed.dtype == torch.uint8 and packed.shape == (3, layout.width(41))
    assert layout.unpack(packed, 41).shape == (3, 41)


def test_binary_bytes_are_those_of_numpy() -> None:
    integers = random_integers(LAYOUTS["bits-1"], 9, 64)
    theirs = torch.from_numpy(np.packbits(integers.numpy() > 0, axis=1, bitorder="little"))
    assert torch.equal(LAYOUTS["bits-1"].pack(integers), theirs)


@given(columns=st.integers(1, 70), seed=st.integers(0, 2**31))
@settings(deadline=None)
def test_int4_bytes_are_the_even_element_in_the_low_half(columns: int, seed: int) -> None:
    integers = random_integers(LAYOUTS["nibbles-1"], 3, columns, seed)
    even, odd = (torch.nn.functional.pad(integers, (0, columns % 2))[:, half::2].to(torch.uint8) + 8 for half in (0, 1))
    assert torch.equal(pack_int4(integers), even & 15 | odd << 4)
    assert torch.equal(unpack_int4(pack_int4(integers), columns), integers)


@pytest.mark.parametrize(
    ("name", "packed", "columns", "count"),
    [
        ("crumbs-1", [[0b01010101, 0b11010111]], 8, 2),
        ("crumbs-1", [[0b11111111], [0b01111111]], 1, 7),  # codes behind the row's end count too
        ("trits-1", [[242, 243], [255, 0]], 10, 2),
        ("trits-1", [[byte] for byte in range(256)], 5, 13),
    ],
)
def test_codes_that_mean_nothing_are_counted_and_refused(name: str, packed: list[list[int]], columns: int, count: int) -> None:
    of = len(packed) * columns
    with pytest.raises(ModelError, match=f"^{count} codes of {of} integers in {name} mean nothing: quantize the model again$"):
        LAYOUTS[name].unpack(torch.tensor(packed, dtype=torch.uint8), columns)


def test_codes_that_mean_nothing_are_counted_over_all_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SLICE", 10)
    with pytest.raises(ModelError, match=r"^6 codes of 30 integers in trits-1"):
        LAYOUTS["trits-1"].unpack(torch.full((6, 1), 250, dtype=torch.uint8), 5)


@pytest.mark.parametrize("name", sorted(LAYOUTS.keys() - {"crumbs-1", "trits-1"}))
def test_every_byte_means_something_where_codes_fill_it(name: str) -> None:
    layout = LAYOUTS[name]
    packed = torch.arange(256).repeat(layout.size).reshape(-1, layout.size).to(torch.uint8)
    assert torch.equal(layout.pack(layout.unpack(packed, layout.group)), packed)


@layouts
def test_integers_that_a_layout_does_not_have_are_refused(layout: Layout) -> None:
    for wrong in set(range(-128, 128)) - set(values_of(layout).tolist()):
        integers = random_integers(layout, 3, 17)
        integers[1, 4], integers[2, 16] = wrong, wrong
        told = f"2 of 51 integers are not from {layout.lowest} to {layout.highest} in steps of {layout.step}, which {layout.name} holds"
        with pytest.raises(ModelError, match=f"^{re.escape(told)}: take more bits$"):
            layout.pack(integers)


@layouts
def test_rows_of_another_width_are_refused_with_both_widths(layout: Layout) -> None:
    packed = layout.pack(random_integers(layout, 2, 50))
    for columns in (0, 70):
        told = f"rows of {packed.shape[1]} bytes are not {columns} integers in {layout.name}, which takes {layout.width(columns)}"
        with pytest.raises(ModelError, match=f"^{told}: quantize the model again$"):
            layout.unpack(packed, columns)


def test_layouts_go_by_their_own_names_and_never_change() -> None:
    assert list(LAYOUTS) == list(DENSITY) == list(GOLDEN) == [layout.name for layout in LAYOUTS.values()]
    with pytest.raises(dataclasses.FrozenInstanceError):
        LAYOUTS["bits-1"].lowest = 0  # type: ignore[misc]


def test_bits_of_a_grid_choose_the_layout() -> None:
    chosen = {bits: layout_of(bits) for bits in (1, 2, 3, 4, 6, 8)}
    names = {bits: layout.name if layout else None for bits, layout in chosen.items()}
    assert names == {1: "bits-1", 2: "trits-1", 3: "threes-1", 4: "nibbles-1", 6: "sixes-1", 8: None}


@layouts
def test_the_module_says_in_its_table_what_a_layout_is(layout: Layout) -> None:
    row = next(line for line in (packing.__doc__ or "").splitlines() if line.startswith(f"| {layout.name} "))
    _, _, integers, _, group, size, base, bits, _, _ = (cell.strip() for cell in row.split("|"))
    assert [group, size, base, bits] == [str(layout.group), str(layout.size), str(layout.base), f"{layout.bits_per_weight:g}"]
    numbers = [int(number) for number in re.findall(r"-?\d+", integers)]
    assert (numbers[0], numbers[-1]) == (layout.lowest, layout.highest)
