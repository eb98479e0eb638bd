"""Dequantization in Triton: the bits of the reference, and no byte too far.

In the interpreter ``fma`` is a product, rounded, and a sum, so these tests cannot see whether the last sum, with 0, is
still there in the compiled code; the budget of the kernel asks for its FADD.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qloralab.kernels.gpu.dequantize import TILE, dequantize
from qloralab.nf4 import double_quant, ops
from qloralab.nf4.codebook import codebook_values, custom, dynamic_map
from qloralab.nf4.packed import DTYPES

from ..cpu.cases import NF4, any_weight, block_sizes, double_quants, dtypes, same_bits
from .conftest import Guarded, Operands

CODEBOOKS = {name: codebook_values(name) for name in ("nf4", "fp4", "fp4_e3m0", "int4")}
CODEBOOKS["custom"] = custom(torch.linspace(-0.3, 1, 16))


def check(operands: Operands, dtype: torch.dtype, guarded: Guarded, offset: int = 0) -> None:
    """Dequantize in guarded memory that begins `offset` elements past an aligned address, and compare the bits."""
    expected = ops.dequantize.reference(*operands, dtype)
    packed, scales, absmax2, second_offset, values, shape, block_size = operands
    tensors: list[Any] = [
        None if one is None else guarded(one, offset=offset * one.itemsize)
        for one in (packed, scales, absmax2, second_offset, values)
    ]
    out = guarded(*shape, dtype=dtype, offset=offset * dtype.itemsize)
    found = dequantize(*tensors, shape, block_size, dtype, out=out)  # pyright: ignore[reportCallIssue]
    assert found is out
    assert same_bits(found.cpu(), expected)


@dtypes
@double_quants
@pytest.mark.parametrize(
    "shape",
    [(1,), (2,), (3, 21), (63, 1000), (TILE,), (TILE + 1,), (2, TILE - 1), (3, 5, 7, 64)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_bits_of_the_reference(shape, double_quant, dtype, guarded):
    check(any_weight(shape, 64, double_quant), dtype, guarded)


@double_quants
@block_sizes
def test_block_sizes(block_size, double_quant, guarded):
    """Of rows that are no multiple of a block, more than 256 blocks of the smaller sizes, the last one short."""
    check(any_weight((41, 451), block_size, double_quant), torch.bfloat16, guarded)


@pytest.mark.parametrize("values", CODEBOOKS.values(), ids=CODEBOOKS)
def test_every_byte(values, guarded):
    packed = torch.arange(256, dtype=torch.uint8)[:, None]
    check((packed, torch.randn(16), None, None, values, (512,), 32), torch.float32, guarded)


def test_second_level_of_several_programs(guarded):
    """Each 256 scales have their own absmax2, whatever part of them a program has."""
    check(any_weight((5 * TILE + 77,), 32), torch.float32, guarded)
    check(any_weight((5 * TILE + 77,), 256), torch.float32, guarded)


def test_scales_are_rounded_twice(guarded):
    """Product and sum, where one rounding of both would make others of them."""
    operands = any_weight((64 * 512,), 64)
    codes, absmax2, offset = operands[1:4]
    assert absmax2 is not None
    assert offset is not None
    rounded_once = dynamic_map()[codes.int()].double() * absmax2.double().repeat_interleave(256) + offset.double()
    assert (rounded_once.float() != double_quant.dequantize_scales(codes, absmax2, offset)).sum() > 10
    check(operands, torch.float32, guarded)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter's numpy, at NaN and infinity
@dtypes
def test_rounding_of_any_float32(dtype, guarded):
    """Through the code of 1: the weight is the scale, any bit pattern, and those half way between two results."""
    ones = torch.full((1, 16 * 4096), 0xFF, dtype=torch.uint8)
    bits = torch.randint(-(2**31), 2**31, (3072,), dtype=torch.int64).int()
    half_way = torch.randint(-(2**15), 2**15, (512,)).int() << 16 | 0x8000  # of two bfloat16
    beside = half_way + torch.tensor([-1, 1], dtype=torch.int32).repeat(256)
    scales = torch.cat([bits, half_way, beside]).view(torch.float32)
    check((ones.view(-1, 1), scales, None, None, NF4, (4096, 32), 32), dtype, guarded)


def test_small_products_and_zeros(guarded):
    """Subnormal, and +0.0 where the product is a negative zero or rounds to one."""
    scales = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 4e-45, 1e-41, -1e-39, 1.2e-38, -1.0])
    operands = (torch.randint(256, (9 * 16, 1), dtype=torch.uint8), scales, None, None, NF4, (9, 32), 32)
    zeros = ops.dequantize.reference(*operands, torch.float32)
    assert (zeros == 0).sum() > 64
    assert not zeros[zeros == 0].signbit().any()
    for dtype in DTYPES:
        check(operands, dtype, guarded)


@double_quants
def test_nothing_is_aligned(double_quant, guarded):
    check(any_weight((63, 1000), 64, double_quant), torch.bfloat16, guarded, offset=1)
    check(any_weight((TILE // 2 + 5,), 128, double_quant), torch.float32, guarded, offset=3)


def test_allocates_its_result(device):
    operands = any_weight((4, 96))
    moved: list[Any] = [one.to(device) if isinstance(one, Tensor) else one for one in operands]
    found = dequantize(*moved, torch.float16)  # pyright: ignore[reportCallIssue]
    assert found.shape == (4, 96)
    assert same_bits(found.cpu(), ops.dequantize.reference(*operands, torch.float16))


def test_an_empty_weight(device):
    nothing = torch.empty(0, 1, dtype=torch.uint8, device=device)
    scales = torch.empty(0, device=device)
    assert dequantize(nothing, scales, None, None, NF4.to(device), (0, 64), 64, torch.bfloat16).shape == (0, 64)


def test_more_than_2_to_the_31_weights(device):
    """Offsets of 64 bits. The ends are compared."""
    if device == "cpu":
        pytest.skip("needs a GPU: 2**31 weights take the interpreter half an hour")
    numel = 2**31 + 2 * TILE + 1
    packed = torch.randint(256, ((numel + 1) // 2, 1), dtype=torch.uint8, device=device)
    scales = torch.randn(-(-numel // 64), device=device)
    found = dequantize(packed, scales, None, None, NF4.to(device), (numel,), 64, torch.bfloat16)
    for first in (0, 2**31 - TILE, 2**31, numel // 64 * 64 - 64):
        part = packed[first // 2 : first // 2 + TILE // 2], scales[first // 64 : (first + TILE) // 64 + 1]
        count = min(TILE, numel - first)
        expected = ops.dequantize.reference(*part, None, None, NF4.to(device), (count,), 64, torch.bfloat16)
        assert torch.equal(found[first : first + count], expected)
