"""What the tests of the C share: weights, layers, calls of one function each, and comparisons.

**Exact sums.** The rounding of a float32 sum depends on its order, so a test of a product usually allows for an error,
and a small mistake hides in it. Here the codebook, the scales, x and the adapter are small whole numbers: every partial
sum is a whole number below 2**24, exact in float32 in any order, on any path. What is left is the one rounding at the
end, and results are compared bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qloralab.kernels.cpu.library import DTYPES, Library, weight_of
from qloralab.lora.dropout import keep_mask
from qloralab.nf4 import ops
from qloralab.nf4.codebook import dynamic_map, normal_float
from qloralab.nf4.packed import BLOCK_SIZES, Packed

NF4 = normal_float(4)
WHOLE = torch.tensor([-8.0, -7, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8])  # no two codes mean the same
ZERO, ONE = 127, 255  # where the dynamic map has 0 and 1

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
dtypes_of_16_bits = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
block_sizes = pytest.mark.parametrize("block_size", BLOCK_SIZES)
double_quants = pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
thresholds = pytest.mark.parametrize("threshold", [0, 13_000], ids=["plain", "dropout"])

# N and K: multiples of everything; of 64 but not of a block; of 32 alone; of nothing, so that rows begin inside bytes
# and blocks; more than one stretch or panel of 4096; empty.
WEIGHTS = [
    (64, 128), (16, 4096), (48, 192), (33, 96), (7, 160), (31, 33), (17, 64), (1, 1), (2, 31), (5, 1001), (35, 4160),
    (3, 8192), (18, 4129), (4130, 40), (4129, 33), (8224, 32), (6, 0), (0, 6),
]  # fmt: skip

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


def assert_near(name: str, found: Tensor, exact: Tensor, magnitude: Tensor, dtype: torch.dtype) -> None:
    """Within TOLERANCE altogether, and no element off by more than its own rounding and a share of its terms.

    `magnitude` is the sum of the terms without their signs.
    """
    error = found.double() - exact
    assert found.isfinite().all(), name
    allowed = SUMS + TOLERANCE[name] * ROUNDED[dtype]
    assert error.norm() <= allowed * exact.norm(), (name, (error.norm() / exact.norm()).item())
    assert (error.abs() <= ULP[found.dtype] * exact.abs() + NOISE * magnitude).all(), name


def all_numbers(dtype: torch.dtype) -> Tensor:
    """Every number of a dtype of 16 bits."""
    return torch.arange(-32768, 32768, dtype=torch.int16).view(dtype)


def neighbours(x: Tensor) -> Tensor:
    """The float32 below each number, the numbers, and those above."""
    infinity = torch.tensor(math.inf)
    return torch.cat([x.nextafter(-infinity), x, x.nextafter(infinity)])


def any_weight(shape: Sequence[int], block_size: int = 64, double_quant: bool = True) -> Packed:
    """Any codes at all, and scales of either sign."""
    numel = math.prod(shape)
    blocks = -(-numel // block_size)
    packed = torch.randint(256, ((numel + 1) // 2, 1), dtype=torch.uint8)
    if not double_quant:
        return Packed(packed, torch.randn(blocks), None, None, NF4, torch.Size(shape), block_size)
    codes = torch.randint(256, (blocks,), dtype=torch.uint8)
    return Packed(packed, codes, torch.rand(-(-blocks // 256)), torch.randn(()), NF4, torch.Size(shape), block_size)


def whole_weight(shape: Sequence[int], block_size: int = 64, double_quant: bool = True) -> Packed:
    """Whole numbers from -16 to 16. The scales are 1, 2 or -1, by block."""
    packed, scales, absmax2, *_ = any_weight(shape, block_size, double_quant)
    if absmax2 is None:
        scales = torch.tensor([1.0, 2.0, -1.0])[torch.randint(3, scales.shape)]
        return Packed(packed, scales, None, None, WHOLE, torch.Size(shape), block_size)
    assert dynamic_map()[[ZERO, ONE]].tolist() == [0, 1]
    codes = torch.tensor([ZERO, ONE], dtype=torch.uint8)[torch.randint(2, scales.shape)]
    absmax2 = torch.tensor([1.0, -2.0])[torch.randint(2, absmax2.shape)]
    return Packed(packed, codes, absmax2, torch.tensor(1.0), WHOLE, torch.Size(shape), block_size)


def normal_weight(shape: Sequence[int], block_size: int = 64, double_quant: bool = True) -> Packed:
    """Normal numbers, quantized."""
    packed, absmax = ops.quantize_blockwise.reference(torch.randn(tuple(shape)) / shape[1] ** 0.5, NF4, block_size)
    scales, absmax2, offset = ops.quantize_scales.reference(absmax) if double_quant else (absmax, None, None)
    return Packed(packed, scales, absmax2, offset, NF4, torch.Size(shape), block_size)


def whole(*shape: int, most: int = 3) -> Tensor:
    """float32 whole numbers, of a magnitude up to `most`."""
    return torch.randint(-most, most + 1, shape).float()


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """A float64 whole number below 2**24, rounded once."""
    assert (exact.abs() < 2**24).all()
    return exact.to(dtype)


def dequantized(library: Library, operands: Packed, dtype: torch.dtype, empty=torch.empty) -> Tensor:
    weight = weight_of(operands)
    out = empty(weight.rows, weight.columns, dtype=dtype)
    library.dequantize(weight, range(weight.rows), range(weight.columns), out)
    return out.view(tuple(operands[5]))


def quantized(library: Library, x: Tensor, block_size: int, values: Tensor = NF4, empty=torch.empty):
    """Packed codes and scales."""
    numel = x.numel()
    packed = empty((numel + 1) // 2, 1, dtype=torch.uint8)
    absmax = empty(-(-numel // block_size), dtype=torch.float32)
    library.quantize(x, values, block_size, packed, absmax)
    return packed, absmax


def scales_quantized(library: Library, absmax: Tensor, offset: float, empty=torch.empty) -> tuple[Tensor, Tensor]:
    """Codes and scales of the scales."""
    codes, absmax2 = empty(len(absmax), dtype=torch.uint8), empty(-(-len(absmax) // 256), dtype=torch.float32)
    library.quantize_scales(absmax, offset, codes, absmax2)
    return codes, absmax2


def linear_few(library: Library, operands: Packed, x: Tensor, bias: Tensor | None, empty=torch.empty) -> Tensor:
    y = empty(len(x), operands[5][0], dtype=x.dtype)
    library.linear_few(weight_of(operands), x, bias, y)
    return y


class Layer:
    """An adapted layer, and what the C makes of it. `draw` gives its numbers; A and B are not yet of 16 bits."""

    def __init__(
        self, operands: Packed, tokens: int, r: int, scale: float, threshold: int, bias: bool, dtype, draw=whole
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
        weight, (N, K), r, tokens = weight_of(self.operands), self.operands[5], len(self.A), len(self.x)
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
        W = ops.dequantize.reference(*self.operands, self.dtype).double()
        return x, x * keep, keep, self.grad.double(), bias, W, A, B

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
