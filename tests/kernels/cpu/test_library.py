"""The C, function by function and for each instruction set: the bits of the reference, and no byte too far.

Where an operation is a look-up or a rounding, the reference in ``nf4/`` is matched bit for bit. Products are matched
bit for bit too, on whole numbers (see ``conftest.py``), and within ``TOLERANCE`` on others.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qloralab.kernels.adamw import DTYPES as PARAMETER_DTYPES
from qloralab.kernels.adamw import Rates, adamw_rounded_
from qloralab.kernels.adamw_8bit import adamw_8bit_reference_
from qloralab.kernels.cpu import library as module
from qloralab.kernels.cpu.library import DTYPES, FEW_TOKENS, Library, weight_of
from qloralab.lora import ops as lora_ops
from qloralab.lora.dropout import keep_mask, rate, threshold
from qloralab.nf4 import blockwise, ops
from qloralab.nf4.codebook import dynamic_map, fp4, fp4_e3m0, int4, normal_float, thresholds
from qloralab.nf4.packed import BLOCK_SIZES, Packed

pytestmark = pytest.mark.compiler

ROOT = Path(__file__).resolve().parents[3]
NF4 = normal_float(4)
Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Sequence[int], int]  # what weight_of takes
ADAMW = Rates(lr=3e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
PROT_NONE = 0  # of <sys/mman.h>
TINY = torch.finfo(torch.float32).tiny  # 2**-126

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
block_sizes = pytest.mark.parametrize("block_size", BLOCK_SIZES)
double_quants = pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])

# Root-mean-square error relative to float64 with the same weights and adapter of the dtype. A rounding to bfloat16 is
# off by at most 2**-8 of the number, evenly spread: 2**-8 / sqrt(3) = 2.3e-3 if every mantissa were 1.0, 1.65e-3
# measured; to float16, an eighth of that. A float32 sum of n products is off by about sqrt(n) * 2**-24; here n is up to
# 5000.
SUMS = 5e-6
ROUNDED = {torch.float32: 0.0, torch.bfloat16: 2e-3, torch.float16: 2.5e-4}
ULP = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of a number, at most
TOLERANCE = {  # roundings to the dtype
    "y": 1,  # the adapter's product is added to the base's in float32. h is given.
    "h": 1,
    "dB": 0,  # float32 sums of products of what is given
    "dA": 1,  # G is rounded, then float32 sums
    "dx": 1.25,  # G is rounded, and the sum of both products
}

NOISE = 2e-5  # of the terms' magnitudes: what a float32 sum of 5000 terms in 16 parts may lose at most, 320 * 2**-24


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors hold the same bits; any NaN is as good as another."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.itemsize]
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    nan = expected.isnan()
    return torch.equal(found.isnan(), nan) and torch.equal(
        found.view(integer).masked_fill(nan, 0), expected.view(integer).masked_fill(nan, 0)
    )


def any_weight(shape: Sequence[int], block_size: int = 64, double_quant: bool = True) -> Operands:
    """Any codes at all, and scales of either sign. The operands of a weight."""
    numel = math.prod(shape)
    blocks = -(-numel // block_size)
    packed = torch.randint(256, ((numel + 1) // 2, 1), dtype=torch.uint8)
    if not double_quant:
        return packed, torch.randn(blocks), None, None, NF4, torch.Size(shape), block_size
    codes = torch.randint(256, (blocks,), dtype=torch.uint8)
    return packed, codes, torch.rand(-(-blocks // 256)), torch.randn(()), NF4, torch.Size(shape), block_size


def dequantized(library: Library, operands: Operands, dtype: torch.dtype, empty=torch.empty) -> Tensor:
    weight = weight_of(Packed(*operands))
    out = empty(weight.rows, weight.columns, dtype=dtype)
    library.dequantize(weight, range(weight.rows), range(weight.columns), out)
    return out.view(tuple(operands[5]))


# Rows that begin in the middle of a byte and of a block, less than a vector, more than a task (32,768 weights).
SHAPES = [
    (1,),
    (2,),
    (31,),
    (1, 1),
    (3, 5, 7),
    (17, 31),
    (31, 33),
    (63, 65),
    (16, 64),
    (3, 4097),
    (300, 129),
    (70_001,),
]


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
            library.dequantize(weight_of(Packed(*operands)), rows, columns, out)
            expected = whole[rows.start : rows.stop, columns.start : columns.stop].contiguous()
            assert same_bits(out, expected), (rows, columns)


@dtypes
def test_each_byte_is_two_codes_the_first_in_the_high_nibble(library, dtype):
    packed = torch.arange(256, dtype=torch.uint8)[:, None]
    for first in (0, 1):  # codes at even places, and at odd ones
        operands = packed, torch.ones(512 // 32), None, None, torch.arange(16.0), torch.Size((1, 512)), 32
        out = torch.empty(1, 512 - first, dtype=dtype)
        library.dequantize(weight_of(Packed(*operands)), range(1), range(first, 512), out)
        expected = [code for byte in range(256) for code in (byte >> 4, byte & 15)][first:]
        assert out.tolist() == [expected]


@dtypes
@pytest.mark.parametrize(
    "scale", [0.0, -0.0, -1.5, 1e-45, 1e-40, 3e-38, 1e-8, 6e-5, 65519.9, 65520.0, 1e6, 3e38, -3.4e38]
)
def test_weights_at_the_ends_of_the_range(library, dtype, scale):
    """Zero, negative, results that are subnormal, and results that are infinite in float16 or bfloat16."""
    packed = torch.arange(256, dtype=torch.uint8)[:, None]
    operands = packed, torch.full((16,), scale), None, None, NF4, torch.Size((512,)), 32
    found = dequantized(library, operands, dtype)
    assert same_bits(found, ops.dequantize.reference(*operands, dtype))
    assert not (found.signbit() & (found.float() * 2.0**100 == 0) & (abs(scale) < 1e-45)).any()  # +0.0, never -0.0


def test_a_decoded_scale_is_a_product_and_a_sum_each_rounded(library):
    """With one rounding for both, as a fused multiply-add has, some of these would differ."""
    blocks = 256 * 40
    codes, absmax2, offset = torch.arange(256, dtype=torch.uint8).repeat(40), torch.rand(40), torch.tensor(0.7)
    packed = torch.full((blocks * 16, 1), 0xFF, dtype=torch.uint8)
    operands = packed, codes, absmax2, offset, NF4, torch.Size((blocks * 32,)), 32
    product = dynamic_map()[codes.int()] * absmax2.repeat_interleave(256)
    fused = (dynamic_map()[codes.int()].double() * absmax2.repeat_interleave(256).double() + 0.7).float()
    expected = product + offset
    assert not torch.equal(fused, expected)
    assert same_bits(dequantized(library, operands, torch.float32)[::32].contiguous(), expected)


def rounded_once(library: Library, x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 x [n] -> dtype [n], by a weight of ones with x as its scales."""
    packed = torch.full((len(x) * 16, 1), 0xFF, dtype=torch.uint8)
    operands = packed, x, None, None, NF4, torch.Size((len(x) * 32,)), 32
    return dequantized(library, operands, dtype)[::32].contiguous()


def neighbours(x: np.ndarray) -> np.ndarray:
    """Each float32 with the one below and the one above it."""
    return np.concatenate([np.nextafter(x, np.float32(-np.inf)), x, np.nextafter(x, np.float32(np.inf))])


def test_every_boundary_of_rounding_to_float16(library):
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)  # all finite ones from 0
    middles = (halves + np.append(halves[1:], np.float32(65536))) / 2  # exact
    x = np.concatenate([neighbours(halves[1:]), neighbours(middles)]).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    for sign in (1, -1):
        found = rounded_once(library, torch.from_numpy(sign * x), torch.float16)
        assert same_bits(found, torch.from_numpy(sign * expected))


def test_every_boundary_of_rounding_to_bfloat16(library):
    middles = (np.arange(0x7F80, dtype=np.uint32) << 16 | 0x8000).view(np.float32)  # the last one rounds to infinity
    x = torch.from_numpy(neighbours(middles))
    for sign in (1, -1):
        assert same_bits(rounded_once(library, sign * x, torch.bfloat16), (sign * x).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_every_number_of_16_bits_is_read_and_written(library, dtype, empty):
    """Dropout that drops nothing is a copy, through float32."""
    x = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype)[None]
    out = empty(1, 65536, dtype=dtype)
    library.dropout(x, 0, 0, 1.0, out)
    assert same_bits(out, x)


@pytest.mark.parametrize("scale", [1 / 3, 0.05, 1 + 2**-11, 1e-6, 7e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_every_number_of_16_bits_times_a_factor(library, dtype, scale):
    x = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype)[None]
    out = torch.empty_like(x)
    library.dropout(x, 0, 0, scale, out)
    assert same_bits(out, (x.float() * torch.tensor(scale)).to(dtype))


def quantized(library: Library, x: Tensor, block_size: int, values: Tensor = NF4, empty=torch.empty):
    numel = x.numel()
    packed = empty((numel + 1) // 2, 1, dtype=torch.uint8)
    absmax = empty(-(-numel // block_size), dtype=torch.float32)
    library.quantize(x, values, block_size, packed, absmax)
    return packed, absmax


def assert_quantized(found: tuple[Tensor, Tensor], x: Tensor, block_size: int, values: Tensor = NF4) -> None:
    packed, absmax = blockwise.quantize_blockwise(x, values, block_size)
    assert same_bits(found[1], absmax)
    assert torch.equal(found[0], packed)


@dtypes
@block_sizes
def test_quantize_gives_the_bits_of_the_reference(library, dtype, block_size, empty):
    for numel in [1, 2, 31, 33, 64, 4095, 4097, 12_289, 40_001]:  # a task is 16,384 weights
        x = (torch.randn(numel) * torch.randn(numel).exp()).to(dtype)
        assert_quantized(quantized(library, x, block_size, empty=empty), x, block_size)


CODEBOOKS = {
    "ascending": torch.linspace(-1.5, 1.5, 16) ** 3,
    "fp4": fp4(),  # two codes for 0, no order
    "fp4_e3m0": fp4_e3m0(),
    "int4": int4(),
    "repeated": torch.tensor([3.0, -1.0, 3.0, 0.5] * 4),  # three values; 0 is none of them
    "one": torch.full((16,), 0.5),
}


@dtypes
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("numel", [1, 1000, 20_001])
def test_quantize_with_another_codebook(library, dtype, codebook, numel, empty):
    values, x = CODEBOOKS[codebook], torch.randn(numel).to(dtype)
    x[: numel // 2 : 3] = 0
    assert_quantized(quantized(library, x, 64, values, empty), x, 64, values)


@pytest.mark.parametrize("codebook", ["fp4", "fp4_e3m0", "int4"])
def test_ties_between_values_in_any_order_go_to_the_lower_value(library, codebook):
    values = CODEBOOKS[codebook]
    x = torch.cat([torch.ones(1), torch.from_numpy(neighbours(thresholds(values.unique()).numpy()))])
    found = quantized(library, x, 64, values)
    assert_quantized(found, x, 64, values)
    below, on, _ = values[blockwise.unpack(found[0], len(x))[1:].int()].view(3, -1)
    assert torch.equal(below, on)


@dtypes
@pytest.mark.parametrize("absmax", [1.0, 2.0**-20, 0.75])
def test_ties_go_to_the_lower_code(library, dtype, absmax):
    limits = neighbours(thresholds(NF4).numpy())
    x = torch.cat([torch.tensor([1.0, -1.0]), torch.from_numpy(limits)]).mul(absmax).to(dtype)
    found = quantized(library, x, 64)
    assert_quantized(found, x, 64)
    if dtype == torch.float32 and absmax == 1.0:
        codes = blockwise.unpack(found[0], 47)[2:].view(3, 15)  # below, on, and above each threshold
        assert codes.tolist() == [list(range(15)), list(range(15)), list(range(1, 16))]


# Scales: zero, subnormal, on either side of where the product with the reciprocal gives way to the quotient, and large.
EXTREMES = [
    0.0, 1e-45, 1e-40, 2.0**-128, 2.0**-127 * 1.7, TINY * (1 - 2**-23), TINY, TINY * (1 + 2**-23), 2.0**126,
    2.0**126 * (1 + 2**-23), 2.0**126 * 1.7, 2.0**127 * 1.1, 3.3e38, 3.4e38,
]  # fmt: skip


def on_thresholds(values: Tensor, largest: float) -> Tensor:
    """The numbers nearest to each threshold times `largest`, and those beside them; there a quotient's bits matter."""
    return torch.from_numpy(neighbours(thresholds(values).double().mul(largest).float().numpy()))


@pytest.mark.parametrize("largest", EXTREMES)
@pytest.mark.parametrize("block_size", [32, 64])
def test_blocks_at_the_ends_of_the_range(library, largest, block_size):
    inner = on_thresholds(NF4, largest)
    blocks = [torch.cat([torch.tensor([largest]), part]) for part in inner.split(block_size - 1)]
    padded = [blockwise.in_blocks(block, block_size)[0] for block in blocks]
    x = torch.cat([torch.randn(block_size), *padded, torch.zeros(block_size), torch.full((7,), largest)])
    assert_quantized(quantized(library, x, block_size), x, block_size)


def test_signed_zeros_have_the_code_of_zero(library):
    x = torch.tensor([0.0, -0.0] * 33)
    packed, absmax = quantized(library, x, 32)
    assert packed.flatten().tolist() == [0x77] * 33
    assert not absmax.signbit().any()
    assert absmax.tolist() == [0, 0, 0]


@dtypes
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_the_scale_of_its_block(library, dtype, bad):
    for place in [0, 15, 40, 96, 100]:
        x = torch.randn(101).to(dtype)
        x[place] = bad
        _, absmax = quantized(library, x, 32)
        assert absmax.isfinite().tolist() == [block != place // 32 for block in range(4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_every_number_of_16_bits_is_quantized(library, dtype):
    x = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype)
    x = x[x.isfinite()]
    assert_quantized(quantized(library, x, 32), x, 32)
    packed, absmax = quantized(library, x.view(-1, 1).repeat(1, 32).flatten(), 32)  # each alone: it is the scale
    assert same_bits(absmax, x.float().abs())
    assert packed.shape == (len(x) * 16, 1)


def scales_expected(absmax: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    residual = blockwise.in_blocks(absmax - torch.tensor(offset), 256)
    absmax2 = residual.abs().amax(dim=1)
    codes = blockwise.nearest(blockwise.divide(residual, absmax2[:, None]), dynamic_map())
    return codes.flatten()[: len(absmax)], absmax2


def scales_quantized(library: Library, absmax: Tensor, offset: float, empty=torch.empty) -> tuple[Tensor, Tensor]:
    codes, absmax2 = empty(len(absmax), dtype=torch.uint8), empty(-(-len(absmax) // 256), dtype=torch.float32)
    library.quantize_scales(absmax, offset, codes, absmax2)
    return codes, absmax2


def assert_scales(library: Library, absmax: Tensor, offset: float, empty=torch.empty) -> None:
    found, expected = scales_quantized(library, absmax, offset, empty), scales_expected(absmax, offset)
    assert same_bits(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000, 5120])
def test_quantize_scales_gives_the_bits_of_the_reference(library, count, empty):
    absmax = torch.randn(count).abs() * torch.randn(count).exp()
    assert_scales(library, absmax, absmax.double().mean().float().item(), empty)


def test_scales_on_every_threshold_go_to_the_lower_code(library):
    below, on, above = np.split(neighbours(thresholds(dynamic_map()).numpy()), 3)
    for values, first in [(below, 0), (on, 0), (above, 1)]:
        absmax = torch.cat([torch.ones(1), torch.from_numpy(values)])  # 256: one block, its largest is 1
        codes, absmax2 = scales_quantized(library, absmax, 0.0)
        assert absmax2.tolist() == [1]
        assert codes.tolist() == [255, *range(first, first + 255)]


@pytest.mark.parametrize("largest", EXTREMES)
def test_scales_at_the_ends_of_the_range(library, largest):
    parts = on_thresholds(dynamic_map(), largest).split(255)
    absmax = torch.cat([torch.cat([torch.tensor([largest]), part]) for part in parts])
    assert_scales(library, torch.cat([absmax, torch.rand(100)]), 0.0)


@dtypes
@pytest.mark.parametrize("p", [0.0, 1 / 65536, 0.05, 0.5, 0.9, 65535 / 65536])
def test_dropout_gives_the_bits_of_the_reference(library, dtype, p, empty):
    for seed in (0, 20230523, -1, 2**63 - 1, -(2**63)):
        for shape in [(1, 1), (3, 31), (9, 33), (17, 64), (40, 100)]:
            x = torch.randn(shape).to(dtype)
            x[0, 0] = math.nan
            out = empty(*shape, dtype=dtype)
            library.dropout(x, seed, threshold(p), 1 / (1 - rate(p)), out)
            assert same_bits(out, lora_ops.dropout.reference(x, torch.tensor(seed), p)), (seed, shape)


def whole(*shape: int, most: int = 3) -> Tensor:
    """float32 whole numbers, of a magnitude up to `most`."""
    return torch.randint(-most, most + 1, shape).float()


def exact_weight(operands: Operands, dtype: torch.dtype) -> Tensor:
    return ops.dequantize.reference(*operands, dtype).double()


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """A float64 whole number below 2**24, rounded once."""
    assert (exact.abs() < 2**24).all()
    return exact.to(dtype)


# N and K: multiples of everything; of 64 but not of a block; of 32 alone; of nothing, so that rows begin inside bytes
# and blocks; more than one stretch or panel of 4096; empty.
WEIGHTS = [
    (64, 128), (16, 4096), (48, 192), (33, 96), (7, 160), (31, 33), (17, 64), (1, 1), (2, 31), (5, 1001), (35, 4160),
    (3, 8192), (18, 4129), (4130, 40), (4129, 33), (8224, 32), (6, 0), (0, 6),
]  # fmt: skip
weights = pytest.mark.parametrize("shape", WEIGHTS, ids=str)


@dtypes
@pytest.mark.parametrize("shape", [shape for shape in WEIGHTS if shape[1]], ids=str)
def test_few_tokens(library, shape, dtype, whole_weight, empty):
    N, K = shape
    for block_size, double_quant in itertools.product((32, 64, 128, 4096), (False, True)):
        operands = whole_weight(shape, block_size, double_quant)
        W = exact_weight(operands, dtype)
        for tokens in range(1 + double_quant, FEW_TOKENS + 1, 2):
            x = whole(tokens, K).to(dtype)
            bias = whole(N, most=200).to(dtype) if tokens % 4 < 2 else None
            y = empty(tokens, N, dtype=dtype)
            library.linear_few(weight_of(Packed(*operands)), x, bias, y)
            exact = x.double() @ W.T + (0 if bias is None else bias.double())
            assert torch.equal(y, rounded(exact, dtype)), (tokens, block_size)


class Layer:
    """An adapted layer, and what the C makes of it. `draw` gives its numbers; A and B are not yet of 16 bits."""

    def __init__(
        self, operands: Operands, tokens: int, r: int, scale: float, threshold: int, bias: bool, dtype, draw=whole
    ):
        self.operands, self.scale, self.threshold, self.seed = operands, scale, threshold, -12345
        self.dtype = dtype
        N, K = operands[5]
        self.x, self.grad = draw(tokens, K).to(dtype), draw(tokens, N).to(dtype)
        self.bias = draw(N).to(dtype) if bias else None
        self.A, self.B = draw(r, K), draw(N, r)
        if dtype != torch.float32:
            self.A, self.B = self.A * (1 + 2**-12), self.B * (1 - 2**-12)

    def run(self, library: Library, empty=torch.empty, needs_input: bool = True) -> dict[str, Tensor]:
        """y, h, dA, dB, and dx if it is wanted."""
        weight, (N, K), r, tokens = weight_of(Packed(*self.operands)), self.operands[5], len(self.A), len(self.x)
        low = {"dtype": self.dtype}
        y, h, dx = empty(tokens, N, **low), empty(tokens, r, **low), empty(tokens, K, **low)
        dA, dB = empty(r, K), empty(N, r)
        options = {"scale": self.scale, "threshold": self.threshold, "seed": self.seed}
        A, B = (self.A, self.B) if r else (None, None)
        library.adapted_linear(weight, self.x, self.bias, y, A, B, h, **options)
        library.adapted_linear_backward(
            weight, self.grad, dx if needs_input else None, self.x, h, A, B, dA, dB, **options
        )
        results = {"y": y, "h": h, "dA": dA, "dB": dB}
        return results | {"dx": dx} if needs_input else results

    def float64(self) -> tuple[Tensor, ...]:
        """x, kept x, the mask, grad, bias, W, A and B: what the sums are made of."""
        tokens, K = self.x.shape
        keep = keep_mask(torch.tensor(self.seed), tokens, K, self.threshold / 65536)
        x, bias = self.x.double(), torch.zeros(()) if self.bias is None else self.bias.double()
        A, B = self.A.to(self.dtype).double(), self.B.to(self.dtype).double()
        return x, x * keep, keep, self.grad.double(), bias, exact_weight(self.operands, self.dtype), A, B

    def check_whole(self, found: dict[str, Tensor]) -> None:
        """The results of whole numbers are exact, but for the roundings: of y and dx, and of h and G before."""
        x, kept, keep, grad, bias, W, A, B = self.float64()
        h, G = rounded(self.scale * kept @ A.T, self.dtype), rounded(self.scale * grad @ B, self.dtype).double()
        exact = {
            "y": rounded(x @ W.T + h.double() @ B.T + bias, self.dtype),
            "h": h,
            "dx": rounded(grad @ W + keep * (G @ A), self.dtype),
            "dA": (G.T @ kept).float(),
            "dB": (grad.T @ h.double()).float(),
        }
        for name, tensor in found.items():
            assert torch.equal(tensor, exact[name]), name


# Every height of a tile of tokens (1 to 12), one and several tiles, odd counts; every way that r is no multiple of 32.
TOKENS = [*range(1, 14), 24, 25, 37, 0]
RANKS = [0, 1, 2, 7, 12, 13, 16, 31, 32, 33, 64]


@weights
@double_quants
def test_adapted_products_of_any_weight(product, shape, double_quant, whole_weight, empty):
    library, dtype = product
    for block_size, (tokens, r) in zip(
        (32, 64, 128, 1024, 4096), [(9, 5), (14, 16), (25, 33), (1, 1), (6, 0)], strict=True
    ):
        operands = whole_weight(shape, block_size, double_quant)
        layer = Layer(operands, tokens, r, 0.5, 20_000 * (tokens % 2), r % 2 == 0, dtype)
        layer.check_whole(layer.run(library, empty))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("threshold", [0, 13_000], ids=["plain", "dropout"])
def test_adapted_products_of_any_number_of_tokens(product, tokens, threshold, whole_weight, empty):
    library, dtype = product
    for shape in [(40, 96), (33, 65)]:
        for r in (0, 7, 33):
            layer = Layer(whole_weight(shape, 32), tokens, r, 2.0, threshold, True, dtype)
            layer.check_whole(layer.run(library, empty))


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("threshold", [0, 13_000], ids=["plain", "dropout"])
def test_adapted_products_of_any_rank(product, r, threshold, whole_weight, empty):
    library, dtype = product
    for shape in [(64, 64), (31, 67), (520, 1030)]:  # a packing task is 512 long
        for tokens in (5, 26):
            layer = Layer(whole_weight(shape, 64), tokens, r, 1.0, threshold, False, dtype)
            layer.check_whole(layer.run(library, empty))


def test_the_gradient_of_the_input_may_be_left_out(product, whole_weight, empty):
    library, dtype = product
    for r, tokens in [(5, 9), (33, 26)]:
        layer = Layer(whole_weight((37, 70)), tokens, r, 1.0, 9_000, False, dtype)
        layer.check_whole(layer.run(library, empty, needs_input=False))


@pytest.mark.parametrize("threshold", [1, 32_767, 32_768, 65_535])
def test_thresholds_are_unsigned(product, threshold, whole_weight, empty):
    library, dtype = product
    layer = Layer(whole_weight((16, 1000)), 20, 8, 1.0, threshold, False, dtype)
    layer.check_whole(layer.run(library, empty))


def assert_near(name: str, found: Tensor, exact: Tensor, magnitude: Tensor, dtype: torch.dtype) -> None:
    """Within TOLERANCE altogether, and no element off by more than its own rounding and a share of its terms.

    `magnitude` is the sum of the terms without their signs.
    """
    error = found.double() - exact
    assert found.isfinite().all(), name
    allowed = SUMS + TOLERANCE[name] * ROUNDED[dtype]
    assert error.norm() <= allowed * exact.norm(), (name, (error.norm() / exact.norm()).item())
    assert (error.abs() <= ULP[found.dtype] * exact.abs() + NOISE * magnitude).all(), name


@pytest.mark.parametrize("shape", [(320, 512), (67, 4997), (200, 129)], ids=str)
@dtypes
def test_few_tokens_on_any_numbers(library, shape, dtype):
    N, K = shape
    for block_size in (32, 64, 4096):
        operands = normal_weight(shape, block_size)
        W = exact_weight(operands, dtype)
        for tokens in (1, 3, 8):
            x, bias = torch.randn(tokens, K).to(dtype), torch.randn(N).to(dtype)
            y = torch.empty(tokens, N, dtype=dtype)
            library.linear_few(weight_of(Packed(*operands)), x, bias, y)
            exact, magnitude = x.double() @ W.T + bias, x.double().abs() @ W.abs().T
            assert_near("y", y, exact, magnitude, dtype)


@pytest.mark.parametrize("shape", [(320, 512), (67, 4997), (4997, 129)], ids=str)
@pytest.mark.parametrize("threshold", [0, 6_554], ids=["plain", "dropout"])
def test_adapted_products_on_any_numbers(product, shape, threshold):
    library, dtype = product
    layer = Layer(normal_weight(shape, 64, True), 33, 16, 0.03, threshold, True, dtype, torch.randn)
    found = layer.run(library)
    x, kept, keep, grad, bias, W, A, B = layer.float64()
    h, G = found["h"].double(), layer.scale * grad @ B
    assert_near("h", found["h"], layer.scale * kept @ A.T, layer.scale * kept.abs() @ A.abs().T, dtype)
    assert_near("y", found["y"], x @ W.T + h @ B.T + bias, x.abs() @ W.abs().T + h.abs() @ B.abs().T, dtype)
    assert_near("dB", found["dB"], grad.T @ h, grad.abs().T @ h.abs(), dtype)
    off = ULP[dtype] / NOISE * G.abs() + layer.scale * grad.abs() @ B.abs()  # what G's rounding and its sum add
    assert_near("dA", found["dA"], G.T @ kept, (G.abs() + off).T @ kept.abs(), dtype)
    terms = grad.abs() @ W.abs() + keep * ((G.abs() + off) @ A.abs())
    assert_near("dx", found["dx"], grad @ W + keep * (G @ A), terms, dtype)


def normal_weight(shape: Sequence[int], block_size: int = 64, double_quant: bool = True) -> Operands:
    """The operands of a weight of normal numbers, as `quantize` makes them."""
    packed, absmax = ops.quantize_blockwise.reference(torch.randn(tuple(shape)) / shape[1] ** 0.5, NF4, block_size)
    scales, absmax2, offset = ops.quantize_scales.reference(absmax) if double_quant else (absmax, None, None)
    return packed, scales, absmax2, offset, NF4, torch.Size(shape), block_size


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything(library: Library) -> list[Tensor]:
    """The results of every function on the same numbers; enough of them for several tasks each."""
    torch.manual_seed(5)
    x = torch.randn(150, 1000)
    packed, absmax = quantized(library, x, 64)
    results = [packed, absmax, *scales_quantized(library, torch.rand(3000), 0.5)]
    operands = normal_weight((260, 1088))  # few_tokens.c leaves less than 2**18 weights to one thread
    results += [dequantized(library, operands, dtype) for dtype in DTYPES]
    dropped, few = torch.empty_like(x), [torch.empty(5, 260, dtype=dtype) for dtype in DTYPES]
    library.dropout(x, 7, 30_000, 2.0, dropped)
    for y in few:
        library.linear_few(weight_of(Packed(*operands)), torch.randn(5, 1088).to(y.dtype), None, y)
    wide, narrow = segments([50_000, 200_000, 7]), segments([50_000, 20_000, 7], torch.bfloat16, bits=8)
    library.adamw(*wide, [3, 4, 5], ADAMW)  # pyright: ignore[reportCallIssue]
    library.adamw_8bit(*narrow, [3, 4, 5], ADAMW)  # pyright: ignore[reportCallIssue]
    results += [dropped, *few, *(tensor for some in (*wide, *narrow) for tensor in some)]
    for dtype in DTYPES:
        results += Layer(operands, 50, 70, 0.1, 5_000, True, dtype, torch.randn).run(library).values()
    return results


def test_the_number_of_threads_changes_no_bit(library, set_threads):
    set_threads(1)
    alone = everything(library)
    for threads in (1, 2, 3, 2):
        set_threads(threads)
        for index, (one, other) in enumerate(zip(everything(library), alone, strict=True)):
            assert torch.equal(one, other), (threads, index)


def test_without_a_pool_the_calling_thread_does_it_all(library):
    expected = everything(library)
    library._c.qloralab_set_pool(None)
    try:
        found = everything(library)
    finally:
        library._c.qloralab_set_pool(library.pool.parallel if library.pool else None)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def segments(sizes: Sequence[int], dtype: torch.dtype = torch.float32, bits: int = 32, put=Tensor.clone):
    """p, g, m and v, and with 8 bits the scales of m and v: a list for each, with a tensor for each segment."""
    lists = [[put(torch.randn(n).to(dtype)) for n in sizes] for _ in range(2)]
    if bits == 32:
        return [*lists, *([put(torch.rand(n)) for n in sizes] for _ in range(2))]
    lists += [[put(torch.randint(256, (n,), dtype=torch.uint8)) for n in sizes] for _ in range(2)]
    return [*lists, *([put(torch.rand(-(-n // 256))) for n in sizes] for _ in range(2))]


@pytest.mark.parametrize("dtype", PARAMETER_DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("sizes", [[1], [7, 0, 33], [65_536, 255, 1], [100_001, 512]], ids=str)
def test_adamw_rounds_every_step_of_its_formula_to_float32(library, sizes, dtype, empty):
    def put(tensor: Tensor) -> Tensor:
        return empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)

    found, steps = segments(sizes, dtype, put=put), [1, 1000, 3][: len(sizes)]
    expected = [[tensor.clone() for tensor in some] for some in found]
    library.adamw(*found, steps, ADAMW)
    for p, g, m, v, step in zip(*expected, steps, strict=True):
        adamw_rounded_(p, g, m, v, step, ADAMW)
    for one, other in zip(found, expected, strict=True):
        assert all(same_bits(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", PARAMETER_DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("sizes", [[1], [7, 0, 33], [65_536, 255, 1], [10_001, 512]], ids=str)
def test_adamw_8bit_gives_the_bits_of_the_reference(library, sizes, dtype, empty):
    def put(tensor: Tensor) -> Tensor:
        return empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)

    found, steps = segments(sizes, dtype, bits=8, put=put), [1, 1000, 3][: len(sizes)]
    p, g, m, v, m_absmax, v_absmax = ([tensor.clone() for tensor in some] for some in found)
    library.adamw_8bit(*found, steps, ADAMW)
    adamw_8bit_reference_(p, g, m, v, m_absmax, v_absmax, steps, ADAMW)
    for one, other in zip(found, [p, g, m, v, m_absmax, v_absmax], strict=True):
        assert all(same_bits(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("features", "expected"),
    [("avx512f amx_bf16 amx_tile", True), ("avx512f avx512_bf16 amx_tile", False), ("", False)],
)
def test_a_matrix_unit_is_one_for_bfloat16(features, expected, monkeypatch):
    monkeypatch.setattr(module, "cpu_features", lambda: features)
    assert module.has_matrix_unit.__wrapped__() is expected  # without its cache


def test_nothing_is_touched_beyond_its_ends(library):
    """Every operand lies between two pages that may not be touched, against the one, then against the other.

    A step too far ends the process, so it is another one.
    """
    command = [sys.executable, __file__, library.isa, *library.extra]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONWARNINGS": "ignore"}, capture_output=True, text=True
    )
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"status {done.returncode} after {last}\n{done.stderr}"
    assert last == ["done"]


def fenced(tensor: Tensor, at_end: bool) -> Tensor:
    """A copy whose last byte is before, or whose first byte is after, a page that may not be touched."""
    if not tensor.numel():
        return tensor
    size, page = tensor.nbytes, mmap.PAGESIZE
    inside = -(-size // page) * page
    memory = mmap.mmap(-1, inside + 2 * page)
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for fence in (address, address + page + inside):
        if libc.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(page), PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = page + (inside - size if at_end else 0)
    out = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start)
    return out.copy_(tensor.contiguous().view(-1).view(torch.uint8)).view(tensor.dtype).view(tensor.shape)


def run_between_fences(isa: str, *extra: str) -> None:
    """Every function on odd and small shapes; prints what it is about to do."""
    library = Library(isa, extra)
    torch.set_num_threads(1)
    shapes = [(1, 1), (1, 31), (3, 5), (17, 33), (16, 32), (2, 64), (5, 96), (33, 128), (3, 4097), (34, 65)]
    for at_end in (True, False):

        def new(*shape: int, dtype: torch.dtype = torch.float32, at_end: bool = at_end) -> Tensor:
            return fenced(torch.zeros(shape, dtype=dtype), at_end)

        def put(tensor: Tensor, at_end: bool = at_end) -> Tensor:
            return fenced(tensor, at_end)

        for shape in shapes:
            for block_size, double_quant in [(32, True), (64, False), (4096, True)]:
                case = f"{shape} {block_size=} {double_quant=} {at_end=}"
                between_fences(library, shape, block_size, double_quant, case, put, new)
    print("done", flush=True)


def between_fences(library: Library, shape: tuple[int, int], block_size: int, double_quant: bool, case: str, put, new):
    """Every function on one shape, its operands allocated by `put` and `new`."""
    packed, scales, absmax2, offset, values, size, _ = any_weight(shape, block_size, double_quant)
    if absmax2 is not None and offset is not None:
        absmax2, offset = put(absmax2), put(offset)
    values = put(values)
    operands = put(packed), put(scales), absmax2, offset, values, size, block_size
    weight, (N, K) = weight_of(Packed(*operands)), shape
    for dtype in DTYPES:
        print("dequantize, quantize, dropout", dtype, case, flush=True)
        library.dequantize(weight, range(N), range(K), new(N, K, dtype=dtype))
        library.dequantize(weight, range(N - 1, N), range(K // 2, K), new(1, K - K // 2, dtype=dtype))
        x = put(torch.randn(shape).to(dtype))
        quantized(library, x, block_size, values, new)
        library.dropout(x, 3, 30_000, 2.0, new(N, K, dtype=dtype))
    print("quantize_scales, adamw", case, flush=True)
    scales_quantized(library, put(torch.rand(N)), 0.5, new)
    for dtype in DTYPES:
        library.adamw(*segments([N * K, 3, K], dtype, put=put), [1, 2, 3], ADAMW)  # pyright: ignore[reportCallIssue]
        library.adamw_8bit(*segments([N * K, 3, K], dtype, 8, put), [1, 2, 3], ADAMW)  # pyright: ignore[reportCallIssue]
    for dtype in DTYPES:
        bias = put(torch.randn(N).to(dtype))
        for tokens in (1, 2, 3, 8, 9):
            print("linear_few", dtype, tokens, case, flush=True)
            x = put(torch.randn(tokens, K).to(dtype))
            library.linear_few(weight, x, bias, new(tokens, N, dtype=dtype))
        for tokens, r in [(1, 1), (13, 7), (9, 33), (14, 34), (2, 0)]:
            print("adapted_linear", dtype, tokens, r, case, flush=True)
            layer = Layer(operands, tokens, r, 1.0, 10_000 * (r % 2), True, dtype)
            layer.x, layer.grad, layer.bias = put(layer.x), put(layer.grad), bias
            layer.A, layer.B = put(layer.A), put(layer.B)
            layer.run(library, new)


if __name__ == "__main__":
    run_between_fences(*sys.argv[1:])
