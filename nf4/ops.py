"""The operators, and their reference implementation.

Each is a ``torch.library`` custom operator of the namespace ``qloralab``: a schema, a shape-only "fake" for
``torch.compile``, a derivative, and the reference as its implementation on every device. Faster implementations
register themselves for a device and change nothing else; callers never ask which one serves them.

========================  ==================================================================
quantize_blockwise        weight -> packed codes, scales
quantize_scales           scales -> 8-bit codes, second-level scales, offset
dequantize                packed weight -> weight
linear                    x, packed weight, bias -> x @ W.T + bias
linear_grad_input         gradient of y, packed weight -> gradient of x = grad @ W
========================  ==================================================================

A packed weight travels as the same arguments everywhere: ``packed``, ``scales`` (float32, or uint8 when they are
quantized too), ``absmax2`` and ``offset`` (None, or the second level), ``values`` (the codebook), ``shape`` and
``block_size``; see ``QuantizedTensor``.

``linear`` keeps the packed weight for its backward, never the dequantized one, and both directions dequantize to the
dtype of their input by the
same operator: the gradient is that of the forward that ran, bit for bit. (bitsandbytes goes through the weight's
original dtype in backward only.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import blockwise, double


@torch.library.custom_op("qloralab::quantize_blockwise", mutates_args=())
def quantize_blockwise(weight: Tensor, values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See ``blockwise.quantize_blockwise``."""
    return blockwise.quantize_blockwise(weight, values, block_size)


@quantize_blockwise.register_fake
def _quantize_blockwise_fake(weight, values, block_size):
    numel = weight.numel()
    packed = weight.new_empty(((numel + 1) // 2, 1), dtype=torch.uint8)
    return packed, weight.new_empty((numel + block_size - 1) // block_size, dtype=torch.float32)


@torch.library.custom_op("qloralab::quantize_scales", mutates_args=())
def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ``double.quantize_scales``."""
    return double.quantize_scales(absmax)


@quantize_scales.register_fake
def _quantize_scales_fake(absmax):
    blocks = absmax.shape[0]
    codes = absmax.new_empty(blocks, dtype=torch.uint8)
    return codes, absmax.new_empty((blocks + double.BLOCK_SIZE - 1) // double.BLOCK_SIZE), absmax.new_empty(())


@torch.library.custom_op("qloralab::dequantize", mutates_args=())
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
        packed: uint8 [(numel + 1) // 2, 1].
        scales: float32 [blocks], or uint8 [blocks] with absmax2 and offset.
        absmax2: float32 [ceil(blocks / 256)] or None.
        offset: float32 [] or None.
        values: the codebook, float32 [16].
        shape: of the weight.
        block_size: weights that share a scale.
        dtype: float32, bfloat16 or float16.

    Returns:
        dtype, shape.
    """
    absmax = scales if absmax2 is None or offset is None else double.dequantize_scales(scales, absmax2, offset)
    weight = blockwise.dequantize_blockwise(packed, absmax, values, block_size, torch.Size(shape).numel())
    return weight.to(dtype).view(shape)


@dequantize.register_fake
def _dequantize_fake(packed, scales, absmax2, offset, values, shape, block_size, dtype):
    return packed.new_empty(shape, dtype=dtype)


@torch.library.custom_op("qloralab::linear", mutates_args=())
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
    """x @ W.T + bias with a packed weight W (equation 5 of the paper without the adapter).

    Args:
        x: float32, bfloat16 or float16 [..., K].
        packed, scales, absmax2, offset, values, block_size: W, see ``dequantize``.
        shape: (N, K).
        bias: the dtype of x, [N], or None.

    Returns:
        the dtype of x, [..., N]. Differentiable in x and bias.
    """
    return F.linear(x, dequantize(packed, scales, absmax2, offset, values, shape, block_size, x.dtype), bias)


@linear.register_fake
def _linear_fake(x, packed, scales, absmax2, offset, values, shape, block_size, bias):
    return x.new_empty((*x.shape[:-1], shape[0]))


@torch.library.custom_op("qloralab::linear_grad_input", mutates_args=())
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
    """grad @ W: the gradient of ``linear`` with respect to its input.

    Args:
        grad: float32, bfloat16 or float16 [..., N].
        packed, scales, absmax2, offset, values, shape, block_size: W [N, K], as in ``linear``.

    Returns:
        the dtype of grad, [..., K]. Differentiable in grad.
    """
    return grad @ dequantize(packed, scales, absmax2, offset, values, shape, block_size, grad.dtype)


@linear_grad_input.register_fake
def _linear_grad_input_fake(grad, packed, scales, absmax2, offset, values, shape, block_size):
    return grad.new_empty((*grad.shape[:-1], shape[1]))


def _keep_weight(ctx, inputs, output) -> None:
    _, *tensors, shape, block_size = inputs[:8]  # both linear operators take x or grad first, then the packed weight
    ctx.save_for_backward(*tensors)
    ctx.shape, ctx.block_size = shape, block_size


def _linear_backward(ctx, grad: Tensor):
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = linear_grad_input(grad, *ctx.saved_tensors, ctx.shape, ctx.block_size)
    if ctx.needs_input_grad[8]:
        grad_bias = grad.sum(tuple(range(grad.dim() - 1))) if grad.dim() > 1 else grad
    return grad_x, *[None] * 7, grad_bias


def _linear_grad_input_backward(ctx, grad: Tensor):
    # grad @ W is linear in grad: its derivative is the forward product.
    return linear(grad, *ctx.saved_tensors, ctx.shape, ctx.block_size, None), *[None] * 7


linear.register_autograd(_linear_backward, setup_context=_keep_weight)
linear_grad_input.register_autograd(_linear_grad_input_backward, setup_context=_keep_weight)
