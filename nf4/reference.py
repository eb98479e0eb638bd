"""The reference of every operator of ``ops.py``, under the operator's name: plain PyTorch, any device.

This is what an operator does where nothing faster is registered, and what a faster implementation calls for the cases
it leaves out. Quantization is defined in ``blockwise.py`` and ``double.py``, the adapter and its dropout in
``adapter.py``; here are the three products with a packed weight alone.

A reference that contains another operator calls it as an operator (``torch.ops.qloralab.…``). So a device that has a
fast ``dequantize`` and no ``linear`` of its own uses it in ``linear`` too, and one that has ``linear`` uses that in
``adapted_linear``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import blockwise, double, product
from .adapter import adapted_linear, adapted_linear_backward, dropout
from .autocast import without_autocast
from .double import quantize_scales

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
    """
    absmax = scales if absmax2 is None or offset is None else double.dequantize_scales(scales, absmax2, offset)
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
    return product.linear(x, torch.ops.qloralab.dequantize(*operands, x.dtype), bias)


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
    return product.matmul(grad, torch.ops.qloralab.dequantize(*operands, grad.dtype))
