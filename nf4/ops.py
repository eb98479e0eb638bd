"""The operators on weights: for each its schema, reference, fake and derivative.

======================  ===========================================================
quantize_blockwise      weight -> packed codes, scales
quantize_scales         scales -> 8-bit codes, second-level scales, offset
dequantize              packed weight -> weight
linear                  x, packed weight, bias -> x W' + bias
linear_grad_input       gradient of y, packed weight -> gradient of x = grad W
======================  ===========================================================

Faster implementations register themselves for a device and change nothing else; callers never ask which one serves
them. A reference that contains an operator calls it as one, so a device that has a fast ``dequantize`` and no
``linear`` of its own uses it in ``linear`` too. ``lora/ops.py`` has the operators with an adapter.

For backward the linear operators keep the packed weight itself, never a dequantized one. Both directions dequantize to
the dtype of their input by the same operator: the gradient is that of the forward that ran, bit for bit.
(bitsandbytes goes through the weight's original dtype in backward only.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import blockwise, double_quant, packed, product
from .operator import operator
from .packed import SCALES_PER_BLOCK, Packed

_SLAB = 1 << 20  # weights


@operator("(Tensor weight, Tensor values, SymInt block_size) -> (Tensor, Tensor)")
def quantize_blockwise(weight: Tensor, values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """``blockwise.quantize_blockwise``, one slab of whole blocks and bytes after the other: its intermediate results
    take ten times the memory of a float32 weight."""
    pair = 2 * block_size
    slabs = weight.flatten().split(max(_SLAB // pair, 1) * pair)
    parts = [blockwise.quantize_blockwise(slab, values, block_size) for slab in slabs]
    if len(parts) == 1:
        return parts[0]
    codes, absmax = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(absmax)


@quantize_blockwise.fake
def _quantize_blockwise_fake(weight, values, block_size):
    numel = weight.numel()
    codes = weight.new_empty((blockwise.packed_bytes(numel, values), 1), dtype=torch.uint8)
    return codes, weight.new_empty((numel + block_size - 1) // block_size, dtype=torch.float32)


@operator("(Tensor absmax) -> (Tensor, Tensor, Tensor)")
def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ``double_quant.quantize_scales``."""
    return double_quant.quantize_scales(absmax)


@quantize_scales.fake
def _quantize_scales_fake(absmax):
    blocks = absmax.shape[0]
    second = (blocks + SCALES_PER_BLOCK - 1) // SCALES_PER_BLOCK
    return absmax.new_empty(blocks, dtype=torch.uint8), absmax.new_empty(second), absmax.new_empty(())


@operator(f"({packed.SCHEMA}, ScalarType dtype) -> Tensor")
def dequantize(weight: Packed, dtype: torch.dtype) -> Tensor:
    """A packed weight in full: the float32 product of value and scale, rounded once to dtype.

    Raises:
        TypeError: dtype is no floating-point one; the weight would be truncated.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"a weight is dequantized to a floating-point dtype, not to {dtype}")
    absmax, numel = double_quant.absmax(weight), torch.Size(weight.shape).numel()
    flat = blockwise.dequantize_blockwise(weight.packed, absmax, weight.values, weight.block_size, numel)
    return flat.to(dtype).view(weight.shape)


@dequantize.fake
def _dequantize_fake(weight, dtype):
    return weight.packed.new_empty(weight.shape, dtype=dtype)


@operator(f"(Tensor x, {packed.SCHEMA}, Tensor? bias) -> Tensor")
def linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """x W' + bias with a packed weight W (QLoRA, equation 5 without the adapter). Twice differentiable in x and bias.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        weight: [N, K].
        bias: the dtype of x, [N], or None.

    Returns:
        the dtype of x, [..., N].
    """
    return product.linear(x, dequantize(*weight, x.dtype), bias)


@linear.fake
def _linear_fake(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@operator(f"(Tensor grad, {packed.SCHEMA}) -> Tensor")
def linear_grad_input(grad: Tensor, weight: Packed) -> Tensor:
    """grad W [..., K]: the gradient of ``linear`` in its input from that of its output, [..., N]. Differentiable."""
    return product.matmul(grad, dequantize(*weight, grad.dtype))


@linear_grad_input.fake
def _linear_grad_input_fake(grad, weight):
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


def _keep_weight(ctx, output, x, weight, bias=None) -> None:
    ctx.save_for_backward(*weight.tensors)
    ctx.layout = weight.layout


def _linear_backward(ctx, grad: Tensor):
    needs_x, *_, needs_bias = ctx.needs_input_grad
    grad_x = linear_grad_input(grad, *ctx.saved_tensors, *ctx.layout) if needs_x else None
    return grad_x, None, over_tokens(grad) if needs_bias else None


def _linear_grad_input_backward(ctx, grad: Tensor):
    # grad W is linear in grad: its derivative is the forward product.
    return linear(grad, *ctx.saved_tensors, *ctx.layout, None), None


def over_tokens(grad: Tensor) -> Tensor:
    """The gradient of a bias: [..., N] summed to [N]."""
    return grad.sum(tuple(range(grad.dim() - 1))) if grad.dim() > 1 else grad


linear.derivative(_keep_weight, _linear_backward)
linear_grad_input.derivative(_keep_weight, _linear_grad_input_backward)
