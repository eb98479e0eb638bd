"""The operators of ``nf4/ops.py`` on CPUs: which C function serves which case, and the reference for the rest.

Importing this module registers them. Nothing is compiled before the first call.

============================  =======================================================================================
up to 8 or 16 tokens          ``few_tokens.c``: each packed byte is read once, nothing is written
more tokens, bfloat16         ``product_bf16.c`` where there is AVX512-BF16
more tokens                   ``product_f32.c``: widened, multiplied in float32, rounded once
bfloat16 on a matrix unit     panels of at most 4 MB, dequantized by ``dequantize.c`` and multiplied by torch
                              (oneDNN): AMX, and Arm's BF16
quantize, dequantize, dropout ``quantize.c``, ``dequantize.c``, ``dropout.c``
============================  =======================================================================================

So no product of 16 bits goes to torch where torch would emulate it.

The switch from the first to the others was measured on two threads, as time of ``few_tokens.c`` over that of the
product. It goes twice over the weight for more than 8 tokens, which pays where the weight is large and the product is
in bfloat16:

===================  ===========  ======  ======  ======  =======
..                   weight       1       8       12      16 tokens
===================  ===========  ======  ======  ======  =======
Zen 4, bfloat16      4096 x 4096  0.40    0.68    0.80    0.83
..                   4096 x 1024  0.51    0.63    0.82    0.93
..                   2048 x 2048  0.43    0.79    0.95    1.07
..                   1536 x 576   0.61    0.89    1.14    1.18
Zen 3, AVX2:         4096 x 4096  0.51    0.98    1.32    1.42
float32              1536 x 576   1.19    0.83    1.28    1.15
Zen 3, AVX2:         4096 x 4096  0.41    0.80    1.18    1.23
bfloat16, widened    1536 x 576   0.81    0.75    1.08    1.10
===================  ===========  ======  ======  ======  =======

``benchmarks/cpu.py`` measures what is chosen against its peers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.library import impl
from torch.nn import functional as F

from qloralab.nf4 import ops, reference
from qloralab.nf4.adapter import rate
from qloralab.nf4.autocast import without_autocast
from qloralab.nf4.blockwise import BLOCK_SIZES
from qloralab.nf4.double_quant import BLOCK_SIZE
from qloralab.nf4.processor import emulates

from .. import dispatch
from .library import DTYPES, FEW_TOKENS, Library, Weight, has_matrix_unit, weight_of

PANEL_BYTES = 4 << 20
ONE_PASS = FEW_TOKENS // 2  # few_tokens.c goes twice over the weight for more
LARGE = 1 << 22  # weights
_P = ParamSpec("_P")
_R = TypeVar("_R")


def _serves(name: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Register a function as the CPU's implementation of an operator.

    Directly, not by the operator's own ``register_kernel``, which looks at every call whether a result is an argument:
    that takes as long as a small product.
    """
    assert hasattr(ops, name)

    def register(function: Callable[_P, _R]) -> Callable[_P, _R]:
        impl(f"qloralab::{name}", "CPU", function)
        return function

    return register


@_serves("quantize_blockwise")
def quantize_blockwise(weight: Tensor, values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """``quantize.c``."""
    library = dispatch.native()
    if library is None or weight.dtype not in DTYPES or block_size not in BLOCK_SIZES or not _is_codebook(values):
        return reference.quantize_blockwise(weight, values, block_size)
    numel = weight.numel()
    packed = torch.empty((numel + 1) // 2, 1, dtype=torch.uint8, device="cpu")
    absmax = torch.empty(-(-numel // block_size), dtype=torch.float32, device="cpu")
    library.quantize(weight.contiguous(), values, block_size, packed, absmax)
    return packed, absmax


@_serves("quantize_scales")
def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``quantize.c``. The mean is torch's, so that it is the reference's to the last bit."""
    library = dispatch.native()
    if library is None or not len(absmax):
        return reference.quantize_scales(absmax)
    offset = absmax.double().mean().float()
    codes = torch.empty(len(absmax), dtype=torch.uint8, device="cpu")
    absmax2 = torch.empty(-(-len(absmax) // BLOCK_SIZE), dtype=torch.float32, device="cpu")
    library.quantize_scales(absmax.contiguous(), offset.item(), codes, absmax2)
    return codes, absmax2, offset


@_serves("dequantize")
def dequantize(
    packed: Tensor,
    scales: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    values: Tensor,
    shape: Sequence[int],
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """``dequantize.c``."""
    operands = packed, scales, absmax2, offset, values, shape, block_size
    library = dispatch.native()
    weight = _weight(operands, dtype) if library else None
    if library is None or weight is None:
        return reference.dequantize(*operands, dtype)
    out = torch.empty(tuple(shape), dtype=dtype, device="cpu")
    library.dequantize(weight, range(weight.rows), range(weight.columns), out)
    return out


@_serves("dropout")
def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """``dropout.c``."""
    library = dispatch.native()
    if library is None or x.dtype not in DTYPES:
        return reference.dropout(x, seed, p)
    out = x.new_empty(x.shape)
    library.dropout(_rows(x), int(seed), _threshold(p), 1 / (1 - rate(p)), out)
    return out


@_serves("linear")
def linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    values: Tensor,
    shape: Sequence[int],
    block_size: int,
    bias: Tensor | None,
) -> Tensor:
    """``few_tokens.c``, ``product.h``, or panels."""
    operands = packed, scales, absmax2, offset, values, shape, block_size
    library = dispatch.native()
    weight = _weight(operands, x.dtype) if library else None
    if library is None or weight is None or len(shape) != 2 or not _fits(x, shape[1], bias, shape[0]):
        return reference.linear(x, *operands, bias)
    N, K = shape
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], N))
    tokens = math.prod(x.shape[:-1])
    if _is_few(library, x, tokens, N * K):
        library.linear_few(weight, x, _contiguous(bias), y)
    elif _is_for_torch(library, x):
        _linear_by_panels(x.view(tokens, K), library, weight, bias, y.view(tokens, N))
    else:
        library.adapted_linear(weight, x.view(tokens, K), _contiguous(bias), y)
    return y


@without_autocast
def _linear_by_panels(x: Tensor, library: Library, weight: Weight, bias: Tensor | None, y: Tensor) -> None:
    """x [tokens, K] -> y [tokens, N]."""
    K = x.shape[1]
    for panel in _panels(y.shape[1], K * x.itemsize):
        W = x.new_empty(len(panel), K)
        library.dequantize(weight, panel, range(K), W)
        part = slice(panel.start, panel.stop)
        y[:, part] = F.linear(x, W, None if bias is None else bias[part])


@_serves("linear_grad_input")
@without_autocast
def linear_grad_input(
    grad: Tensor,
    packed: Tensor,
    scales: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    values: Tensor,
    shape: Sequence[int],
    block_size: int,
) -> Tensor:
    """``product.h``, or panels of columns, whose sums are whole."""
    operands = packed, scales, absmax2, offset, values, shape, block_size
    library = dispatch.native()
    weight = _weight(operands, grad.dtype) if library else None
    if library is None or weight is None or len(shape) != 2 or not _fits(grad, shape[0]):
        return reference.linear_grad_input(grad, *operands)
    rows = _rows(grad)
    dx = grad.new_empty((*grad.shape[:-1], shape[1]))
    if not _is_for_torch(library, grad):
        library.adapted_linear_backward(weight, rows, dx)
    else:
        for panel in _panels(shape[1], shape[0] * grad.itemsize):
            W = grad.new_empty(shape[0], len(panel))
            library.dequantize(weight, range(shape[0]), panel, W)
            dx.view(len(rows), shape[1])[:, panel.start : panel.stop] = rows @ W
    return dx


@_serves("adapted_linear")
def adapted_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    values: Tensor,
    shape: Sequence[int],
    block_size: int,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    p: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    """``product.h``; otherwise the reference, on the operators above."""
    operands = packed, scales, absmax2, offset, values, shape, block_size
    library = dispatch.native()
    weight = _weight(operands, x.dtype) if library else None
    if (
        library is None
        or weight is None
        or _is_for_torch(library, x)
        or not _fits(x, shape[1], bias, shape[0])
        or not _is_adapter(A, B, shape)
    ):
        return reference.adapted_linear(x, *operands, bias, A, B, scaling, p, seed)
    rows = _rows(x)
    y, h = x.new_empty((*x.shape[:-1], shape[0])), x.new_empty(len(rows), len(A))
    library.adapted_linear(
        weight, rows, _contiguous(bias), y.view(len(rows), shape[0]), A.contiguous(), B.contiguous(), h,
        *_dropout_arguments(scaling, p, seed),
    )  # fmt: skip
    return y, h


@_serves("adapted_linear_backward")
def adapted_linear_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    packed: Tensor,
    scales: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    values: Tensor,
    shape: Sequence[int],
    block_size: int,
    A: Tensor,
    B: Tensor,
    scaling: float,
    p: float,
    seed: Tensor,
    needs_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``product.h``; otherwise the reference, on the operators above."""
    operands = packed, scales, absmax2, offset, values, shape, block_size
    library = dispatch.native()
    weight = _weight(operands, x.dtype) if library else None
    if (
        library is None
        or weight is None
        or _is_for_torch(library, x)
        or not _fits(x, shape[1])
        or not _is_adapter(A, B, shape)
        or not (grad.dtype == h.dtype == x.dtype and grad.shape == (*x.shape[:-1], shape[0]))
        or h.shape != (math.prod(x.shape[:-1]), len(A))
    ):
        return reference.adapted_linear_backward(grad, x, h, *operands, A, B, scaling, p, seed, needs_input)
    rows = _rows(x)
    A, B = A.contiguous(), B.contiguous()
    dx = x.new_empty(x.shape if needs_input else 0)
    dA, dB = torch.empty_like(A), torch.empty_like(B)
    library.adapted_linear_backward(
        weight, _rows(grad), dx if needs_input else None, rows, h.contiguous(), A, B, dA, dB,
        *_dropout_arguments(scaling, p, seed),
    )  # fmt: skip
    return dx, dA, dB


Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Sequence[int], int]


def _weight(operands: Operands, dtype: torch.dtype) -> Weight | None:
    """The weight as the C takes it, or None when it is not what ``quantize`` makes and files hold.

    The C itself checks nothing. (This runs for every layer and token, hence ``numel`` and no loops.)
    """
    packed, scales, absmax2, offset, values, shape, block_size = operands
    numel = math.prod(shape)
    blocks = -(-numel // block_size)
    if (
        dtype not in DTYPES
        or block_size not in BLOCK_SIZES
        or not _is_codebook(values)
        or numel == 0
        or packed.dtype != torch.uint8
        or packed.numel() != (numel + 1) // 2
        or scales.dtype != (torch.float32 if absmax2 is None else torch.uint8)
        or scales.numel() != blocks
        or not (packed.is_contiguous() and scales.is_contiguous())
    ):
        return None
    if absmax2 is not None and (
        offset is None
        or not (absmax2.dtype == offset.dtype == torch.float32)
        or offset.numel() != 1
        or absmax2.numel() != -(-blocks // BLOCK_SIZE)
        or not absmax2.is_contiguous()
    ):
        return None
    return weight_of(packed, scales, absmax2, offset, values, shape, block_size)


def _is_codebook(values: Tensor) -> bool:
    return values.dtype == torch.float32 and values.numel() == 16 and values.is_contiguous()


def _fits(x: Tensor, width: int, bias: Tensor | None = None, length: int = 0) -> bool:
    """Whether x is [..., width] and the bias, of the dtype of x, [length]. If not, the reference says what is wrong."""
    return x.shape[-1:] == (width,) and (bias is None or (bias.shape == (length,) and bias.dtype == x.dtype))


def _is_adapter(A: Tensor, B: Tensor, shape: Sequence[int]) -> bool:
    """Whether A and B are a float32 adapter of a weight of this shape; the reference takes other dtypes too."""
    N, K = shape
    return A.dtype == B.dtype == torch.float32 and A.shape[1:] == (K,) and B.shape == (N, len(A))


def _is_few(library: Library, x: Tensor, tokens: int, numel: int) -> bool:
    """Whether ``few_tokens.c`` is the faster for a weight of this size; see the top of this file."""
    twice = numel >= LARGE and x.dtype == torch.bfloat16 and library.has_bf16_product
    return 0 < tokens <= (FEW_TOKENS if twice else ONE_PASS)


def _is_for_torch(library: Library, x: Tensor) -> bool:
    """Whether torch multiplies x in hardware that the C does not use: bfloat16 on a matrix unit, or on Arm."""
    return x.dtype == torch.bfloat16 and (has_matrix_unit() or not library.has_bf16_product) and not emulates(x)


def _dropout_arguments(scaling: float, p: float, seed: Tensor) -> tuple[float, int, int]:
    """The factor of h, the threshold and the seed."""
    threshold = _threshold(p)
    return scaling / (1 - rate(p)), threshold, int(seed) if threshold else 0


def _threshold(p: float) -> int:
    return round(rate(p) * 65536)


def _panels(length: int, bytes_each: int) -> list[range]:
    """Consecutive rows (or columns) that make at most ``PANEL_BYTES`` together, in multiples of 64 where it can be."""
    most = max(1, PANEL_BYTES // max(1, bytes_each))
    most = most // 64 * 64 or most
    return [range(first, min(length, first + most)) for first in range(0, length, most)]


def _rows(x: Tensor) -> Tensor:
    """[..., K] -> [tokens, K], contiguous."""
    return x.contiguous().view(math.prod(x.shape[:-1]), x.shape[-1])


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
