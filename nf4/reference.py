"""The reference of every operator of ``ops.py``, under the operator's name: plain PyTorch, any device.

This is what an operator does where nothing faster is registered, and what a faster implementation calls for the cases
it leaves out. Quantization is defined in ``blockwise.py`` and ``double_quant.py``, dropout in ``adapter.py``; here are
the products with a packed weight, alone and with an adapter beside it.

A reference that contains another operator calls it as an operator (``torch.ops.qloralab.…``). So a device that has a
fast ``dequantize`` and no ``linear`` of its own uses it in ``linear`` too, and one that has ``linear`` uses that in
``adapted_linear``. Without ``ops.py`` there are no operators, and the references call each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import blockwise, double_quant, product
from .adapter import dropout, kept, mask, rate, rows
from .autocast import without_autocast
from .double_quant import quantize_scales
from .product import addmm, matmul, reshaped

__all__ = [
    "adapted_linear",
    "adapted_linear_backward",
    "dequantize",
    "dropout",
    "linear",
    "linear_grad_input",
    "quantize_blockwise",
    "quantize_scales",
]


_SLAB = 1 << 20  # weights


def quantize_blockwise(weight: Tensor, values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """``blockwise.quantize_blockwise``, one slab of whole blocks and bytes after the other: its intermediate results
    take ten times the memory of a float32 weight."""
    pair = 2 * block_size
    slabs = weight.flatten().split(max(_SLAB // pair, 1) * pair)
    parts = [blockwise.quantize_blockwise(slab, values, block_size) for slab in slabs]
    if len(parts) == 1:
        return parts[0]
    packed, absmax = zip(*parts, strict=True)
    return torch.cat(packed), torch.cat(absmax)


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
    """A packed weight in full: the float32 product of value and scale, rounded once to dtype.

    Args:
        packed: uint8 [(numel + 1) // 2, 1], or [numel, 1]; see ``blockwise.py``.
        scales: float32 [blocks], or uint8 [blocks] with absmax2 and offset.
        absmax2: float32 [ceil(blocks / 256)] or None.
        offset: float32 [] or None.
        values: the codebook, float32 [2**bits].
        shape: of the weight.
        block_size: weights that share a scale.
        dtype: float32, bfloat16 or float16.

    Returns:
        dtype, shape.

    Raises:
        TypeError: dtype is no floating-point one; the weight would be truncated.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"a weight is dequantized to a floating-point dtype, not to {dtype}")
    absmax = scales if absmax2 is None or offset is None else double_quant.dequantize_scales(scales, absmax2, offset)
    weight = blockwise.dequantize_blockwise(packed, absmax, values, block_size, torch.Size(shape).numel())
    return weight.to(dtype).view(shape)


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
    """x W' + bias with a packed weight W (QLoRA, equation 5 without the adapter).

    Args:
        x: float32, bfloat16 or float16 [..., K].
        packed, scales, absmax2, offset, values, block_size: W, see ``dequantize``.
        shape: (N, K).
        bias: the dtype of x, [N], or None.

    Returns:
        the dtype of x, [..., N].
    """
    operands = packed, scales, absmax2, offset, values, shape, block_size
    return product.linear(x, _operator("dequantize")(*operands, x.dtype), bias)


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
    """grad W: the gradient of ``linear`` with respect to its input.

    Args:
        grad: float32, bfloat16 or float16 [..., N].
        packed, scales, absmax2, offset, values, shape, block_size: W [N, K], as in ``linear``.

    Returns:
        the dtype of grad, [..., K].
    """
    operands = packed, scales, absmax2, offset, values, shape, block_size
    return matmul(grad, _operator("dequantize")(*operands, grad.dtype))


@without_autocast
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
    """x W' + bias + h B' with h = scaling / (1 - q) * (x∘keep) A'; W packed, an adapter beside it.

    Args:
        x: float32, bfloat16 or float16 [..., K]; tokens is the product of the sizes before K.
        packed, scales, absmax2, offset, values, block_size: W, see ``dequantize``.
        shape: (N, K).
        bias: the dtype of x, [N], or None.
        A: float32 [r, K].
        B: float32 [N, r].
        scaling: the factor on B A.
        p: dropout probability before the adapter, in [0, 1); 0 is no dropout.
        seed: int64 [] on the device of x; of no effect when p is 0.

    Returns:
        y: the dtype of x, [..., N].
        h: the dtype of x, [tokens, r]; backward takes it.
    """
    y = _operator("linear")(x, packed, scales, absmax2, offset, values, shape, block_size, bias)
    A, B = A.to(x.dtype), B.to(x.dtype)
    h = matmul(kept(rows(x), mask(x, seed, p)), A.T).mul_(scaling / (1 - rate(p)))
    return reshaped(addmm(rows(y), h, B.T), y.shape), h


@without_autocast
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
    """The gradients of ``adapted_linear`` with respect to x, A and B.

    Args:
        grad: of y; the dtype of x, [..., N], any strides.
        x, packed, scales, absmax2, offset, values, shape, block_size, A, B, scaling, p, seed: as in the forward.
        h: the second result of the forward.
        needs_input: whether the first result is wanted.

    Returns:
        dx: the dtype and shape of x; empty, [0], without needs_input.
        dA: float32 [r, K].
        dB: float32 [N, r].
    """
    g, keep = rows(grad), mask(x, seed, p)  # [tokens, N], [tokens, K]
    low_A, low_B = A.to(x.dtype), B.to(x.dtype)
    G = matmul(g, low_B).mul_(scaling / (1 - rate(p)))  # [tokens, r]
    dA, dB = matmul(G.T, kept(rows(x), keep)).to(A.dtype), matmul(g.T, h).to(B.dtype)
    if not needs_input:
        return x.new_empty(0), dA, dB
    dx = _operator("linear_grad_input")(grad, packed, scales, absmax2, offset, values, shape, block_size)
    return dx.add_(kept(matmul(G, low_A), keep).view(x.shape)), dA, dB


def _operator(name: str) -> Callable[..., Any]:
    """The operator, so that what a device registered for it serves; without ``ops.py``, the function here."""
    return getattr(torch.ops.qloralab, name, globals()[name])
