"""The operators of ``nf4/ops.py`` on CPUs: which C function serves which case, and the reference for the rest.

Importing this module registers them. Nothing is compiled before the first call.

============================  =======================================================================================
up to 8 tokens, bfloat16      ``few_tokens.c``: each packed byte is read once, nothing is written
more tokens, bfloat16         ``product.c`` where there is AVX512-BF16 and no AMX
any other product             panels of at most 4 MB, dequantized by ``dequantize.c`` and multiplied by torch (oneDNN)
quantize, dequantize, dropout ``quantize.c``, ``dequantize.c``, ``dropout.c``
============================  =======================================================================================

``benchmarks/cpu.py`` measures these choices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from qloralab.nf4 import ops, reference
from qloralab.nf4.adapter import rate
from qloralab.nf4.autocast import without_autocast
from qloralab.nf4.blockwise import BLOCK_SIZES
from qloralab.nf4.double import BLOCK_SIZE

from .. import dispatch
from .library import DTYPES, FEW_TOKENS, Library, has_matrix_unit, weight_of

PANEL_BYTES = 4 << 20


@ops.quantize_blockwise.register_kernel("cpu")
def quantize_blockwise(weight: Tensor, values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """``quantize.c``."""
    library = dispatch.native()
    if library is None or weight.dtype not in DTYPES or block_size not in BLOCK_SIZES or len(values) != 16:
        return reference.quantize_blockwise(weight, values, block_size)
    numel = weight.numel()
    packed = torch.empty((numel + 1) // 2, 1, dtype=torch.uint8)
    absmax = torch.empty(-(-numel // block_size), dtype=torch.float32)
    library.quantize(weight.contiguous(), values, block_size, packed, absmax)
    return packed, absmax


@ops.quantize_scales.register_kernel("cpu")
def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``quantize.c``. The mean is torch's, so that it is the reference's to the last bit."""
    library = dispatch.native()
    if library is None or not len(absmax):
        return reference.quantize_scales(absmax)
    offset = absmax.double().mean().float()
    codes = torch.empty(len(absmax), dtype=torch.uint8)
    absmax2 = torch.empty(-(-len(absmax) // BLOCK_SIZE), dtype=torch.float32)
    library.quantize_scales(absmax.contiguous(), offset.item(), codes, absmax2)
    return codes, absmax2, offset


@ops.dequantize.register_kernel("cpu")
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
    if library is None or not _is_served(operands, dtype):
        return reference.dequantize(*operands, dtype)
    weight = weight_of(*operands)
    out = torch.empty(tuple(shape), dtype=dtype)
    library.dequantize(weight, range(weight.rows), range(weight.columns), out)
    return out


@ops.dropout.register_kernel("cpu")
def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """``dropout.c``."""
    library = dispatch.native()
    if library is None or x.dtype not in DTYPES:
        return reference.dropout(x, seed, p)
    rows = _rows(x)
    out = torch.empty_like(rows)
    library.dropout(rows, int(seed), _threshold(p), 1 / (1 - rate(p)), out)
    return out.view(x.shape)


@ops.linear.register_kernel("cpu")
@without_autocast
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
    """``few_tokens.c``, ``product.c``, or panels."""
    operands = packed, scales, absmax2, offset, values, shape, block_size
    library = dispatch.native()
    if library is None or not _is_served(operands, x.dtype) or not _fits(x, shape[1], bias, shape[0]):
        return reference.linear(x, *operands, bias)
    weight, rows = weight_of(*operands), _rows(x)
    y = x.new_empty(len(rows), shape[0])
    if x.dtype == torch.bfloat16 and 0 < len(rows) <= FEW_TOKENS:
        library.linear_few(weight, rows, _contiguous(bias), y)
    elif _has_product(library, x):
        library.adapted_linear(weight, rows, _contiguous(bias), y)
    else:
        for panel in _panels(shape[0], shape[1] * x.itemsize):
            W = x.new_empty(len(panel), shape[1])
            library.dequantize(weight, panel, range(shape[1]), W)
            part = slice(panel.start, panel.stop)
            y[:, part] = F.linear(rows, W, None if bias is None else bias[part])
    return y.view(*x.shape[:-1], shape[0])


@ops.linear_grad_input.register_kernel("cpu")
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
    """``product.c``, or panels of columns, whose sums are whole."""
    operands = packed, scales, absmax2, offset, values, shape, block_size
    library = dispatch.native()
    if library is None or not _is_served(operands, grad.dtype) or not _fits(grad, shape[0]):
        return reference.linear_grad_input(grad, *operands)
    weight, rows = weight_of(*operands), _rows(grad)
    dx = grad.new_empty(len(rows), shape[1])
    if _has_product(library, grad):
        library.adapted_linear_backward(weight, rows, dx)
    else:
        for panel in _panels(shape[1], shape[0] * grad.itemsize):
            W = grad.new_empty(shape[0], len(panel))
            library.dequantize(weight, range(shape[0]), panel, W)
            dx[:, panel.start : panel.stop] = rows @ W
    return dx.view(*grad.shape[:-1], shape[1])


@ops.adapted_linear.register_kernel("cpu")
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
    """``product.c``; otherwise the reference, on the operators above."""
    operands = packed, scales, absmax2, offset, values, shape, block_size
    library = dispatch.native()
    if (
        library is None
        or not _has_product(library, x)
        or not _is_served(operands, x.dtype)
        or not _fits(x, shape[1], bias, shape[0])
        or not _is_adapter(A, B, shape)
    ):
        return reference.adapted_linear(x, *operands, bias, A, B, scaling, p, seed)
    rows = _rows(x)
    y, h = x.new_empty(len(rows), shape[0]), x.new_empty(len(rows), len(A))
    library.adapted_linear(
        weight_of(*operands), rows, _contiguous(bias), y, A.contiguous(), B.contiguous(), h,
        *_dropout_arguments(scaling, p, seed),
    )  # fmt: skip
    return y.view(*x.shape[:-1], shape[0]), h


@ops.adapted_linear_backward.register_kernel("cpu")
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
    """``product.c``; otherwise the reference, on the operators above."""
    operands = packed, scales, absmax2, offset, values, shape, block_size
    library = dispatch.native()
    if (
        library is None
        or not _has_product(library, x)
        or not _is_served(operands, x.dtype)
        or not _fits(x, shape[1])
        or not _is_adapter(A, B, shape)
        or not (grad.dtype == h.dtype == x.dtype and grad.shape == (*x.shape[:-1], shape[0]))
        or h.shape != (math.prod(x.shape[:-1]), len(A))
    ):
        return reference.adapted_linear_backward(grad, x, h, *operands, A, B, scaling, p, seed, needs_input)
    rows = _rows(x)
    A, B = A.contiguous(), B.contiguous()
    dx = torch.empty_like(rows) if needs_input else None
    dA, dB = torch.empty_like(A), torch.empty_like(B)
    library.adapted_linear_backward(
        weight_of(*operands), _rows(grad), dx, rows, h.contiguous(), A, B, dA, dB,
        *_dropout_arguments(scaling, p, seed),
    )  # fmt: skip
    return x.new_empty(0) if dx is None else dx.view(x.shape), dA, dB


Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Sequence[int], int]


def _is_served(operands: Operands, dtype: torch.dtype) -> bool:
    """Whether the C takes this weight as it is: what ``quantize`` makes and files hold. The C itself checks nothing."""
    packed, scales, absmax2, _, values, shape, block_size = operands
    numel = math.prod(shape)
    return (
        dtype in DTYPES
        and block_size in BLOCK_SIZES
        and values.shape == (16,)
        and packed.numel() == (numel + 1) // 2
        and len(scales) == -(-numel // block_size)
        and (absmax2 is None or len(absmax2) == -(-len(scales) // BLOCK_SIZE))
        and all(tensor is None or tensor.is_contiguous() for tensor in operands[:5])
    )


def _fits(x: Tensor, width: int, bias: Tensor | None = None, length: int = 0) -> bool:
    """Whether x is [..., width] and the bias, of the dtype of x, [length]. If not, the reference says what is wrong."""
    return x.shape[-1:] == (width,) and (bias is None or (bias.shape == (length,) and bias.dtype == x.dtype))


def _is_adapter(A: Tensor, B: Tensor, shape: Sequence[int]) -> bool:
    """Whether A and B are a float32 adapter of a weight of this shape; the reference takes other dtypes too."""
    N, K = shape
    return A.dtype == B.dtype == torch.float32 and A.shape[1:] == (K,) and B.shape == (N, len(A))


def _has_product(library: Library, x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and library.has_product and not has_matrix_unit()


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
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
