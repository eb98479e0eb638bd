"""``dequantize.c``, for each instruction set: the bits of the reference, and no byte too far."""

from __future__ import annotations

import pytest
import torch
from cases import (
    NF4,
    any_weight,
    block_sizes,
    dequantized,
    double_quants,
    dtypes,
    dtypes_of_16_bits,
    neighbours,
    same_bits,
)  # fmt: skip

from qloralab.kernels.cpu.library import weight_of
from qloralab.nf4 import ops
from qloralab.nf4.codebook import dynamic_map
from qloralab.nf4.packed import Packed

pytestmark = pytest.mark.compiler

# Rows that begin in the middle of a byte and of a block, less than a vector, more than a task (32,768 weights).
SHAPES = [
    (1,), (2,), (31,), (1, 1), (3, 5, 7), (17, 31), (31, 33), (63, 65), (16, 64), (3, 4097), (300, 129), (70_001,),
]  # fmt: skip


@dtypes
@block_sizes
@double_quants
def test_dequantize_gives_the_bits_of_the_reference(library, dtype, block_size, double_quant, empty):
    for shape in SHAPES:
        operands = any_weight(shape, block_size, double_quant)
        found = dequantized(library, operands, dtype, empty)
        assert same_bits(found, ops.dequantize.reference(*operands, dtype)), shape


@dtypes
@double_quants
@pytest.mark.parametrize("shape", [(37, 65), (40, 96), (5, 4099)], ids=str)
def test_dequantize_a_part(library, dtype, double_quant, shape, empty):
    operands = any_weight(shape, 32, double_quant)
    whole, (N, K) = ops.dequantize.reference(*operands, dtype), shape
    for rows in [range(N), range(1), range(N - 1, N), range(2, N - 1), range(3, 3)]:
        for columns in [range(K), range(1), range(K - 1, K), range(1, K), range(31, K - 1), range(32, 64), range(7, 7)]:
            out = empty(len(rows), len(columns), dtype=dtype)
            library.dequantize(weight_of(operands), rows, columns, out)
            expected = whole[rows.start : rows.stop, columns.start : columns.stop].contiguous()
            assert same_bits(out, expected), (rows, columns)


@dtypes
def test_each_byte_is_two_codes_the_first_in_the_high_nibble(library, dtype):
    packed = torch.arange(256, dtype=torch.uint8)[:, None]
    for first in (0, 1):  # codes with even indices, and with odd ones
        operands = Packed(packed, torch.ones(512 // 32), None, None, torch.arange(16.0), torch.Size((1, 512)), 32)
        out = torch.empty(1, 512 - first, dtype=dtype)
        library.dequantize(weight_of(operands), range(1), range(first, 512), out)
        expected = [code for byte in range(256) for code in (byte >> 4, byte & 15)][first:]
        assert out.tolist() == [expected]


@dtypes
@pytest.mark.parametrize(
    "scale", [0.0, -0.0, -1.5, 1e-45, 1e-40, 3e-38, 1e-8, 6e-5, 65519.9, 65520.0, 1e6, 3e38, -3.4e38]
)
def test_weights_at_the_ends_of_the_range(library, dtype, scale):
    """Zero, negative, results that are subnormal, and results that are infinite in float16 or bfloat16."""
    packed = torch.arange(256, dtype=torch.uint8)[:, None]
    operands = Packed(packed, torch.full((16,), scale), None, None, NF4, torch.Size((512,)), 32)
    found = dequantized(library, operands, dtype)
    assert same_bits(found, ops.dequantize.reference(*operands, dtype))
    assert not (found.signbit() & (found.float() * 2.0**100 == 0) & (abs(scale) < 1e-45)).any()  # +0.0, never -0.0


def test_a_decoded_scale_is_a_product_and_a_sum_each_rounded(library):
    """With one rounding for both, as a fused multiply-add has, some of these would differ."""
    blocks = 256 * 40
    codes, absmax2, offset = torch.arange(256, dtype=torch.uint8).repeat(40), torch.rand(40), torch.tensor(0.7)
    packed = torch.full((blocks * 16, 1), 0xFF, dtype=torch.uint8)
    operands = Packed(packed, codes, absmax2, offset, NF4, torch.Size((blocks * 32,)), 32)
    product = dynamic_map()[codes.int()] * absmax2.repeat_interleave(256)
    fused = (dynamic_map()[codes.int()].double() * absmax2.repeat_interleave(256).double() + 0.7).float()
    expected = product + offset
    assert not torch.equal(fused, expected)
    assert same_bits(dequantized(library, operands, torch.float32)[::32].contiguous(), expected)


@dtypes_of_16_bits
def test_every_boundary_of_rounding_to_16_bits(library, dtype):
    end, beyond = (0x7C00, 2.0**16) if dtype == torch.float16 else (0x7F80, 2.0**128)  # the last middle is rounded up
    numbers = torch.arange(end, dtype=torch.int16).view(dtype).double()
    middles = (numbers + torch.cat([numbers[1:], torch.tensor([beyond])])) / 2
    x = torch.cat([neighbours(numbers.float()), neighbours(middles.float())])
    for sign in (1, -1):  # x is rounded as the scales of a weight of ones
        packed = torch.full((len(x) * 16, 1), 0xFF, dtype=torch.uint8)
        operands = Packed(packed, sign * x, None, None, NF4, torch.Size((len(x) * 32,)), 32)
        found = dequantized(library, operands, dtype)[::32].contiguous()
        assert same_bits(found, (sign * x + 0.0).to(dtype))
