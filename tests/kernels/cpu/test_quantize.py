"""``quantize.c``, for each instruction set: the bits of the reference, of weights and of their scales."""

from __future__ import annotations

import math

import pytest
import torch
from cases import (
    NF4,
    all_numbers,
    block_sizes,
    dtypes,
    dtypes_of_16_bits,
    neighbours,
    quantized,
    same_bits,
    scales_quantized,
)  # fmt: skip
from torch import Tensor

from qloralab.kernels.cpu.library import Library
from qloralab.nf4 import blockwise
from qloralab.nf4.codebook import dynamic_map, fp4, fp4_e3m0, int4, thresholds

pytestmark = pytest.mark.compiler

TINY = torch.finfo(torch.float32).tiny  # 2**-126
CODEBOOKS = {
    "ascending": torch.linspace(-1.5, 1.5, 16) ** 3,
    "fp4": fp4(),  # two codes for 0, no order
    "fp4_e3m0": fp4_e3m0(),
    "int4": int4(),
    "repeated": torch.tensor([3.0, -1.0, 3.0, 0.5] * 4),  # three values; 0 is none of them
    "one": torch.full((16,), 0.5),
}
# Scales: zero, subnormal, on either side of where the product with the reciprocal gives way to the quotient, and large.
EXTREMES = [
    0.0, 1e-45, 1e-40, 2.0**-128, 2.0**-127 * 1.7, TINY * (1 - 2**-23), TINY, TINY * (1 + 2**-23), 2.0**126,
    2.0**126 * (1 + 2**-23), 2.0**126 * 1.7, 2.0**127 * 1.1, 3.3e38, 3.4e38,
]  # fmt: skip
extremes = pytest.mark.parametrize("largest", EXTREMES)


def check(library: Library, x: Tensor, block_size: int, values: Tensor = NF4, empty=torch.empty) -> Tensor:
    """The packed codes, which are those of the reference, as the scales are."""
    packed, absmax = quantized(library, x, block_size, values, empty)
    expected = blockwise.quantize_blockwise(x, values, block_size)
    assert same_bits(absmax, expected[1])
    assert torch.equal(packed, expected[0])
    return packed


def check_scales(library: Library, absmax: Tensor, offset: float, empty=torch.empty) -> None:
    codes, absmax2 = scales_quantized(library, absmax, offset, empty)
    residual = blockwise.in_blocks(absmax - torch.tensor(offset), 256)
    expected = residual.abs().amax(dim=1)
    nearest = blockwise.nearest(blockwise.divide(residual, expected[:, None]), dynamic_map())
    assert same_bits(absmax2, expected)
    assert torch.equal(codes, nearest.flatten()[: len(absmax)])


def on_thresholds(values: Tensor, largest: float) -> Tensor:
    """The numbers nearest to each threshold times `largest`, and those beside them; there a quotient's bits matter."""
    return neighbours(thresholds(values).double().mul(largest).float())


@dtypes
@block_sizes
def test_quantize_gives_the_bits_of_the_reference(library, dtype, block_size, empty):
    for numel in [1, 2, 31, 33, 64, 4095, 4097, 12_289, 40_001]:  # a task is 16,384 weights
        check(library, (torch.randn(numel) * torch.randn(numel).exp()).to(dtype), block_size, empty=empty)


@dtypes
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("numel", [1, 1000, 20_001])
def test_quantize_with_another_codebook(library, dtype, codebook, numel, empty):
    x = torch.randn(numel).to(dtype)
    x[: numel // 2 : 3] = 0
    check(library, x, 64, CODEBOOKS[codebook], empty)


@pytest.mark.parametrize("codebook", ["fp4", "fp4_e3m0", "int4"])
def test_ties_between_values_in_any_order_go_to_the_lower_value(library, codebook):
    values = CODEBOOKS[codebook]
    x = torch.cat([torch.ones(1), on_thresholds(values.unique(), 1.0)])
    packed = check(library, x, 64, values)
    below, on, _ = values[blockwise.unpack(packed, len(x))[1:].int()].view(3, -1)
    assert torch.equal(below, on)


@dtypes
@pytest.mark.parametrize("absmax", [1.0, 2.0**-20, 0.75])
def test_ties_go_to_the_lower_code(library, dtype, absmax):
    x = torch.cat([torch.tensor([1.0, -1.0]), on_thresholds(NF4, 1.0)]).mul(absmax).to(dtype)
    packed = check(library, x, 64)
    if dtype == torch.float32 and absmax == 1.0:
        codes = blockwise.unpack(packed, 47)[2:].view(3, 15)  # below, on, and above each threshold
        assert codes.tolist() == [list(range(15)), list(range(15)), list(range(1, 16))]


@extremes
@pytest.mark.parametrize("block_size", [32, 64])
def test_blocks_at_the_ends_of_the_range(library, largest, block_size):
    parts = on_thresholds(NF4, largest).split(block_size - 1)
    blocks = [blockwise.in_blocks(torch.cat([torch.tensor([largest]), part]), block_size)[0] for part in parts]
    x = torch.cat([torch.randn(block_size), *blocks, torch.zeros(block_size), torch.full((7,), largest)])
    check(library, x, block_size)


def test_signed_zeros_have_the_code_of_zero(library):
    packed, absmax = quantized(library, torch.tensor([0.0, -0.0] * 33), 32)
    assert packed.flatten().tolist() == [0x77] * 33
    assert same_bits(absmax, torch.zeros(3))


@dtypes
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_the_scale_of_its_block(library, dtype, bad):
    for index in [0, 15, 40, 96, 100]:
        x = torch.randn(101).to(dtype)
        x[index] = bad
        _, absmax = quantized(library, x, 32)
        assert absmax.isfinite().tolist() == [block != index // 32 for block in range(4)]


@dtypes_of_16_bits
def test_every_number_of_16_bits_is_quantized(library, dtype):
    x = all_numbers(dtype)
    x = x[x.isfinite()]
    check(library, x, 32)
    packed, absmax = quantized(library, x.view(-1, 1).repeat(1, 32).flatten(), 32)  # each alone: it is the scale
    assert same_bits(absmax, x.float().abs())
    assert packed.shape == (len(x) * 16, 1)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000, 5120])
def test_quantize_scales_gives_the_bits_of_the_reference(library, count, empty):
    absmax = torch.randn(count).abs() * torch.randn(count).exp()
    check_scales(library, absmax, absmax.double().mean().float().item(), empty)


def test_scales_on_every_threshold_go_to_the_lower_code(library):
    for values, first in zip(on_thresholds(dynamic_map(), 1.0).split(255), (0, 0, 1), strict=True):
        codes, absmax2 = scales_quantized(
            library, torch.cat([torch.ones(1), values]), 0.0
        )  # one block, its largest is 1
        assert absmax2.tolist() == [1]
        assert codes.tolist() == [255, *range(first, first + 255)]


@extremes
def test_scales_at_the_ends_of_the_range(library, largest):
    parts = on_thresholds(dynamic_map(), largest).split(255)
    absmax = torch.cat([torch.cat([torch.tensor([largest]), part]) for part in parts])
    check_scales(library, torch.cat([absmax, torch.rand(100)]), 0.0)
