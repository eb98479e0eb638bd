"""The operators on CPUs: which C function serves which case, and the reference for the rest.

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
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qloralab.lora import ops as lora_ops
from qloralab.lora.dropout import rate, seed_of, threshold
from qloralab.nf4 import ops
from qloralab.nf4.packed import BLOCK_SIZES, DTYPES, SCALES_PER_BLOCK, Packed, has_16_values
from qloralab.nf4.processor import emulates
from qloralab.nf4.product import without_autocast

from .. import dispatch
from ..operands import is_adapted, is_product
from .library import FEW_TOKENS, Library, Weight, has_matrix_unit, weight_of

PANEL_BYTES = 4 << 20
ONE_PASS = FEW_TOKENS // 2  # few_tokens.c goes twice over the weight for more
LARGE = 1 << 22  # weights


@ops.quantize_blockwise.on("CPU")
def quantize_blockwise(weight: Tensor, values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """``quantize.c``."""
    library = dispatch.native()
    if library is None or weight.dtype not in DTYPES or block_size not in BLOCK_SIZES or not has_16_values(values):
        return ops.quantize_blockwise.reference(weight, values, block_size)
    numel = weight.numel()
    packed = torch.empty((numel + 1) // 2, 1, dtype=torch.uint8, device="cpu")
    absmax = torch.empty(-(-numel // block_size), dtype=torch.float32, device="cpu")
    library.quantize(weight.contiguous(), values, block_size, packed, absmax)
    return packed, absmax


@ops.quantize_scales.on("CPU")
def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``quantize.c``. The mean is torch's, so that it is the reference's to the last bit."""
    library = dispatch.native()
    if library is None or not len(absmax):
        return ops.quantize_scales.reference(absmax)
    offset = absmax.double().mean().float()
    codes = torch.empty(len(absmax), dtype=torch.uint8, device="cpu")
    absmax2 = torch.empty(-(-len(absmax) // SCALES_PER_BLOCK), dtype=torch.float32, device="cpu")
    library.quantize_scales(absmax.contiguous(), offset.item(), codes, absmax2)
    return codes, absmax2, offset


@ops.dequantize.on("CPU")
def dequantize(weight: Packed, dtype: torch.dtype) -> Tensor:
    """``dequantize.c``."""
    library = dispatch.native()
    if library is None or not weight.is_regular(dtype):
        return ops.dequantize.reference(*weight, dtype)
    out = torch.empty(tuple(weight.shape), dtype=dtype, device="cpu")
    W = weight_of(weight)
    library.dequantize(W, range(W.rows), range(W.columns), out)
    return out


@lora_ops.dropout.on("CPU")
def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """``dropout.c``."""
    library = dispatch.native()
    if library is None or x.dtype not in DTYPES:
        return lora_ops.dropout.reference(x, seed, p)
    out = x.new_empty(x.shape)
    library.dropout(_rows(x), int(seed), threshold(p), 1 / (1 - rate(p)), out)
    return out


@ops.linear.on("CPU")
def linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """``few_tokens.c``, ``product.h``, or panels."""
    library = dispatch.native()
    if library is None or not is_product(x, weight, bias):
        return ops.linear.reference(x, *weight, bias)
    (N, K), tokens = weight.shape, math.prod(x.shape[:-1])
    x, W = x.contiguous(), weight_of(weight)
    y = x.new_empty((*x.shape[:-1], N))
    if _is_few(library, x, tokens, N * K):
        library.linear_few(W, x, _contiguous(bias), y)
    elif _is_for_torch(library, x):
        _linear_by_panels(x.view(tokens, K), library, W, bias, y.view(tokens, N))
    else:
        library.adapted_linear(W, x.view(tokens, K), _contiguous(bias), y)
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


@ops.linear_grad_input.on("CPU", without_autocast)
def linear_grad_input(grad: Tensor, weight: Packed) -> Tensor:
    """``product.h``, or panels of columns, whose sums are whole."""
    library = dispatch.native()
    if library is None or not weight.meets(grad, 0):
        return ops.linear_grad_input.reference(grad, *weight)
    N, K = weight.shape
    packed, rows = weight_of(weight), _rows(grad)
    dx = grad.new_empty((*grad.shape[:-1], K))
    if not _is_for_torch(library, grad):
        library.adapted_linear_backward(packed, rows, dx)
        return dx
    for panel in _panels(K, N * grad.itemsize):
        W = grad.new_empty(N, len(panel))
        library.dequantize(packed, range(N), panel, W)
        dx.view(len(rows), K)[:, panel.start : panel.stop] = rows @ W
    return dx


@lora_ops.adapted_linear.on("CPU")
def adapted_linear(
    x: Tensor, weight: Packed, bias: Tensor | None, A: Tensor, B: Tensor, *dropout: Any
) -> tuple[Tensor, Tensor]:
    """``product.h``; otherwise the reference, on the operators above."""
    library = dispatch.native()
    if library is None or _is_for_torch(library, x) or not is_adapted(x, weight, A, B, bias):
        return lora_ops.adapted_linear.reference(x, *weight, bias, A, B, *dropout)
    rows = _rows(x)
    y, h = x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty(len(rows), len(A))
    matrices = A.contiguous(), B.contiguous(), h
    library.adapted_linear(weight_of(weight), rows, _contiguous(bias), y, *matrices, *_dropout_arguments(*dropout))
    return y, h


@lora_ops.adapted_linear_backward.on("CPU")
def adapted_linear_backward(
    grad: Tensor, x: Tensor, h: Tensor, weight: Packed, A: Tensor, B: Tensor, scaling: float, p: float,
    seed: Tensor | None, needs_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``product.h``; otherwise the reference, on the operators above."""
    library = dispatch.native()
    if library is None or _is_for_torch(library, x) or not is_adapted(x, weight, A, B, grad=grad, h=h):
        return lora_ops.adapted_linear_backward.reference(grad, x, h, *weight, A, B, scaling, p, seed, needs_input)
    A, B = A.contiguous(), B.contiguous()
    dx = x.new_empty(x.shape if needs_input else 0)
    dA, dB = torch.empty_like(A), torch.empty_like(B)
    library.adapted_linear_backward(
        weight_of(weight), _rows(grad), dx if needs_input else None, _rows(x), h.contiguous(), A, B, dA, dB,
        *_dropout_arguments(scaling, p, seed),
    )  # fmt: skip
    return dx, dA, dB


def _is_few(library: Library, x: Tensor, tokens: int, numel: int) -> bool:
    """Whether ``few_tokens.c`` is the faster for a weight of this size; see the top of this file."""
    twice = numel >= LARGE and x.dtype == torch.bfloat16 and library.has_bf16_product
    return 0 < tokens <= (FEW_TOKENS if twice else ONE_PASS)


def _is_for_torch(library: Library, x: Tensor) -> bool:
    """Whether torch multiplies x in hardware that the C does not use: bfloat16 on a matrix unit, or on Arm."""
    return x.dtype == torch.bfloat16 and (has_matrix_unit() or not library.has_bf16_product) and not emulates(x)


def _dropout_arguments(scaling: float, p: float, seed: Tensor | None) -> tuple[float, int, int]:
    """The factor of h, the threshold and the seed."""
    seed = seed_of(seed, p)
    return scaling / (1 - rate(p)), threshold(p), 0 if seed is None else int(seed)


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
