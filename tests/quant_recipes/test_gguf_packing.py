"""GGUF's ternary blocks, against the gguf package both ways."""

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor

from lobit.errors import ModelError, TargetError
from lobit.quant_recipes import packing
from lobit.quant_recipes.gguf_packing import BLOCK, TQ1_0, TQ2_0, BlockFormat

formats = pytest.mark.parametrize("form", [TQ1_0, TQ2_0], ids=lambda form: form.name)


def type_of(form: BlockFormat) -> GGMLQuantizationType:
    return GGMLQuantizationType[form.name]


def random_scales(rows: int, blocks: int) -> Tensor:
    return (torch.rand(rows, blocks, generator=torch.Generator().manual_seed(1)) + 0.01).half().float()


def random_trits(rows: int, columns: int) -> Tensor:
    return torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(0)).to(torch.int8)


def every_code() -> Tensor:
    """Rows of a block: every byte of TQ1_0 and TQ2_0 takes every combination of its codes, at every place."""
    combinations = torch.cartesian_prod(*[torch.tensor([-1, 0, 1], dtype=torch.int8)] * 5)  # [243, 5]
    planes = [combinations[:, :, None].expand(-1, -1, count).flatten(1) for count in (32, 16)]
    of_tq1_0 = torch.cat([*planes, combinations[:, :4, None].expand(-1, -1, 4).flatten(1)], dim=1)
    of_tq2_0 = combinations[:, 1:, None].expand(-1, -1, 32).flatten(1).repeat(1, 2)
    return torch.cat([of_tq1_0, of_tq2_0])


def dequantized(integers: Tensor, scale: Tensor) -> Tensor:
    return (integers.float().unflatten(1, (-1, BLOCK)) * scale[:, :, None]).flatten(1)


@formats
def test_gguf_reads_our_blocks_as_the_weights_they_stand_for(form: BlockFormat) -> None:
    for integers, blocks in ((random_trits(37, 3 * BLOCK), 3), (every_code(), 1)):
        scale = random_scales(len(integers), blocks)
        packed = form.pack(integers, scale)
        assert np.array_equal(dequantize(packed.numpy(), type_of(form)), dequantized(integers, scale).numpy())


@formats
def test_gguf_writes_the_same_bytes_and_we_read_them(form: BlockFormat) -> None:
    for integers, blocks in ((random_trits(37, 3 * BLOCK), 3), (every_code(), 1)):
        scale = random_scales(len(integers), blocks)
        # gguf takes the block's largest weight as its scale, which is 0 where all weights are.
        scale[~integers.unflatten(1, (-1, BLOCK)).any(dim=2)] = 0
        theirs = torch.from_numpy(quantize(dequantized(integers, scale).numpy(), type_of(form)))
        assert torch.equal(form.pack(integers, scale), theirs)
        read, scales = form.unpack(theirs)
        assert torch.equal(read, integers) and torch.equal(scales, scale)


@formats
def test_blocks_are_as_long_as_gguf_says(form: BlockFormat) -> None:
    assert (BLOCK, form.size) == GGML_QUANT_SIZES[type_of(form)]


def test_blocks_of_minus_one_and_of_one_by_hand() -> None:
    integers = torch.cat([torch.full((1, BLOCK), -1), torch.full((1, BLOCK), 1)]).to(torch.int8)
    scale = torch.tensor([[1.0], [0.5]])
    assert TQ2_0.pack(integers, scale).tolist() == [[0] * 64 + [0x00, 0x3C], [0b10101010] * 64 + [0x00, 0x38]]
    # 242 * 256 / 243 and 240 * 256 / 243, rounded up
    assert TQ1_0.pack(integers, scale).tolist() == [[0] * 52 + [0x00, 0x3C], [255] * 48 + [253] * 4 + [0x00, 0x38]]


@formats
def test_one_scale_of_a_row_is_that_of_all_its_blocks(form: BlockFormat) -> None:
    integers, scale = random_trits(4, 2 * BLOCK), random_scales(4, 1)
    packed = form.pack(integers, scale)
    assert torch.equal(packed, form.pack(integers, scale.repeat(1, 2)))
    assert torch.equal(form.unpack(packed)[1], scale.repeat(1, 2))


@formats
def test_slices_views_and_no_rows_are_packed_like_a_whole(form: BlockFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    integers, scale = random_trits(2 * BLOCK, 9).T, random_scales(9, 2)
    packed = form.pack(integers.contiguous(), scale)
    monkeypatch.setattr(packing, "SLICE", 5 * BLOCK)
    assert torch.equal(form.pack(integers, scale), packed)
    assert torch.equal(form.unpack(packed)[0], integers)
    nothing = form.pack(integers[:0], scale[:0])
    assert nothing.shape == (0, 2 * form.size)
    assert form.unpack(nothing)[0].shape == (0, 2 * BLOCK)


@pytest.mark.parametrize(
    ("form", "place", "byte", "count"),
    [(TQ2_0, 7, 0b01010111, 4), (TQ2_0, 63, 0b11000000, 4), (TQ1_0, 7, 1, 5), (TQ1_0, 51, 1, 4)],
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_bytes_that_no_weights_give_are_refused(form: BlockFormat, place: int, byte: int, count: int) -> None:
    packed = form.pack(random_trits(2, BLOCK), random_scales(2, 1))
    packed[1, place] = byte
    with pytest.raises(ModelError, match=f"^{count} of 512 weights in {form.name} have codes that mean nothing: export the model again$"):
        form.unpack(packed)


def test_tq1_0_has_243_bytes() -> None:
    packed = TQ1_0.pack(torch.zeros(256, BLOCK, dtype=torch.int8), torch.ones(256, 1))
    packed[:, 0] = torch.arange(256, dtype=torch.uint8)
    refused = 0
    for row in packed:
        try:
            TQ1_0.unpack(row[None])
        except ModelError:
            refused += 1
    assert refused == 256 - 243


@formats
def test_what_a_block_does_not_hold_is_refused_with_its_numbers(form: BlockFormat) -> None:
    integers, scale = random_trits(2, BLOCK), random_scales(2, 1)
    with pytest.raises(TargetError, match=f"rows of 255 weights are not whole {form.name} blocks of 256"):
        form.pack(integers[:, 1:], scale)
    with pytest.raises(TargetError, match="1 of 2 scales are not values of float16"):
        form.pack(integers, scale + torch.tensor([[0.0], [1e-5]]))
    for wrong in (-128, -2, 2, 127):
        integers[1, 3] = wrong
        with pytest.raises(TargetError, match=f"1 of 512 integers are not -1, 0 or 1: {form.name} holds no others"):
            form.pack(integers, scale)
    with pytest.raises(ModelError, match=f"rows of 300 bytes are not whole {form.name} blocks of {form.size}"):
        form.unpack(torch.zeros(2, 300, dtype=torch.uint8))
