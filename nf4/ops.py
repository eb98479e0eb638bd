"""The operators: names, schemas, shapes and derivatives of what ``reference.py`` computes.

Each is a ``torch.library`` custom operator of the namespace ``qloralab``: a schema, a shape-only "fake" for
``torch.compile``, a derivative, and the reference as its implementation on every device. Faster implementations
register themselves for a device and change nothing else; callers never ask which one serves them.

========================  ==================================================================
quantize_blockwise        weight -> packed codes, scales
quantize_scales           scales -> 8-bit codes, second-level scales, offset
dequantize                packed weight -> weight
linear                    x, packed weight, bias -> x W' + bias
linear_grad_input         gradient of y, packed weight -> gradient of x = grad W
dropout                   x, seed -> x with elements dropped
adapted_linear            x, packed weight, bias, adapter, seed -> x W' + bias + h B', h
adapted_linear_backward   gradient of y, x, h, … -> gradients of x, A and B
========================  ==================================================================

A packed weight travels as the same arguments everywhere: ``packed``, ``scales`` (float32, or uint8 when they are
quantized too), ``absmax2`` and ``offset`` (None, or the second level), ``values`` (the codebook), ``shape`` and
``block_size``; see ``QuantizedTensor``. All tensors of a call are on one device.

The linear operators keep the packed weight for their backward, never the dequantized one, and both directions
dequantize to the dtype of their input by the same operator: the gradient is that of the forward that ran, bit for bit.
(bitsandbytes goes through the weight's original dtype in backward only.) Dropout is a function of a seed, and the seed
is what is kept of it; see ``adapter.py``.

Derivatives are those of reverse mode. Forward-mode differentiation (``torch.func.jvp``, ``torch.autograd.forward_ad``)
raises NotImplementedError: PyTorch would drop the tangents of a custom operator and go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad

from . import double_quant, reference
from .blockwise import packed_bytes


def call(operator: Callable[..., Any], *arguments: Any) -> Any:
    """``operator(*arguments)``; where no argument wants a gradient, past autograd.

    The derivative of a custom operator is reached through Python, and so is its implementation on CPUs. Past autograd
    a call crosses from PyTorch's dispatcher to Python once and not twice.
    """
    if torch.compiler.is_compiling() or _wants_gradient(arguments) or _has_tangent(arguments):
        return operator(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def _wants_gradient(arguments: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


def _has_tangent(arguments: Sequence[Any]) -> bool:
    return forward_ad._current_level >= 0 and any(
        isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in arguments
    )


def _operator(function: Callable[..., Any]) -> CustomOpDef:
    """A custom operator of this name that raises where an argument has a tangent."""
    operator = torch.library.custom_op(f"qloralab::{function.__name__}", function, mutates_args=())
    derivative = make_autograd_impl(operator._opoverload, operator)

    def autograd(keyset, *arguments):
        if _has_tangent(arguments):
            raise NotImplementedError(f"{operator._qualname} has no forward-mode derivative; use reverse mode")
        return derivative(keyset, *arguments)

    for device in ("CPU", "CUDA"):  # in front of what custom_op registered for every device
        operator._lib.impl(operator._name, autograd, f"Autograd{device}", with_keyset=True)
    return operator


@_operator
def quantize_blockwise(weight: Tensor, values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See ``blockwise.quantize_blockwise``."""
    return reference.quantize_blockwise(weight, values, block_size)


@quantize_blockwise.register_fake
def _quantize_blockwise_fake(weight, values, block_size):
    numel = weight.numel()
    packed = weight.new_empty((packed_bytes(numel, values), 1), dtype=torch.uint8)
    return packed, weight.new_empty((numel + block_size - 1) // block_size, dtype=torch.float32)


@_operator
def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ``double_quant.quantize_scales``."""
    return reference.quantize_scales(absmax)


@quantize_scales.register_fake
def _quantize_scales_fake(absmax):
    blocks = absmax.shape[0]
    codes = absmax.new_empty(blocks, dtype=torch.uint8)
    return (
        codes,
        absmax.new_empty((blocks + double_quant.BLOCK_SIZE - 1) // double_quant.BLOCK_SIZE),
        absmax.new_empty(()),
    )


@_operator
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
    """See ``reference.dequantize``."""
    return reference.dequantize(packed, scales, absmax2, offset, values, shape, block_size, dtype)


@dequantize.register_fake
def _dequantize_fake(packed, scales, absmax2, offset, values, shape, block_size, dtype):
    return packed.new_empty(shape, dtype=dtype)


@_operator
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
    """See ``reference.linear``. Differentiable in x and bias, twice."""
    return reference.linear(x, packed, scales, absmax2, offset, values, shape, block_size, bias)


@linear.register_fake
def _linear_fake(x, packed, scales, absmax2, offset, values, shape, block_size, bias):
    return x.new_empty((*x.shape[:-1], shape[0]))


@_operator
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
    """See ``reference.linear_grad_input``. Differentiable in grad."""
    return reference.linear_grad_input(grad, packed, scales, absmax2, offset, values, shape, block_size)


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
        grad_bias = _over_tokens(grad)
    return grad_x, *[None] * 7, grad_bias


def _linear_grad_input_backward(ctx, grad: Tensor):
    # grad W is linear in grad: its derivative is the forward product.
    return linear(grad, *ctx.saved_tensors, ctx.shape, ctx.block_size, None), *[None] * 7


def _over_tokens(grad: Tensor) -> Tensor:
    return grad.sum(tuple(range(grad.dim() - 1))) if grad.dim() > 1 else grad


linear.register_autograd(_linear_backward, setup_context=_keep_weight)
linear_grad_input.register_autograd(_linear_grad_input_backward, setup_context=_keep_weight)


@_operator
def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """See ``adapter.dropout``. Differentiable in x, with the same mask."""
    return reference.dropout(x, seed, p)


@dropout.register_fake
def _dropout_fake(x, seed, p):
    return x.new_empty(x.shape)


def _keep_seed(ctx, inputs, output) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _dropout_backward(ctx, grad: Tensor):
    return dropout(grad, *ctx.saved_tensors, ctx.p), None, None


dropout.register_autograd(_dropout_backward, setup_context=_keep_seed)


@_operator
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
    """See ``adapter.adapted_linear``. The first result is differentiable in x, bias, A and B; the second is not."""
    return reference.adapted_linear(
        x, packed, scales, absmax2, offset, values, shape, block_size, bias, A, B, scaling, p, seed
    )


@adapted_linear.register_fake
def _adapted_linear_fake(x, packed, scales, absmax2, offset, values, shape, block_size, bias, A, B, scaling, p, seed):
    tokens = math.prod(x.shape[:-1])
    return x.new_empty((*x.shape[:-1], shape[0])), x.new_empty((tokens, A.shape[0]))


@_operator
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
    """See ``adapter.adapted_linear_backward``. Has no derivative: a second backward raises RuntimeError."""
    return reference.adapted_linear_backward(
        grad, x, h, packed, scales, absmax2, offset, values, shape, block_size, A, B, scaling, p, seed, needs_input
    )


@adapted_linear_backward.register_fake
def _adapted_linear_backward_fake(
    grad, x, h, packed, scales, absmax2, offset, values, shape, block_size, A, B, scaling, p, seed, needs_input
):
    return x.new_empty(x.shape if needs_input else 0), A.new_empty(A.shape), B.new_empty(B.shape)


def _keep_adapted(ctx, inputs, output) -> None:
    x, *weight, ctx.shape, ctx.block_size, _, A, B, ctx.scaling, ctx.p, seed = inputs
    _, h = output
    ctx.mark_non_differentiable(h)
    ctx.save_for_backward(x, h, *weight, A, B, seed)


def _adapted_linear_backward(ctx, grad: Tensor, _):
    needs_x, needs_bias, needs_A, needs_B = (ctx.needs_input_grad[i] for i in (0, 8, 9, 10))
    dx = dA = dB = None
    if needs_x or needs_A or needs_B:
        x, h, *weight, A, B, seed = ctx.saved_tensors
        dx, dA, dB = adapted_linear_backward(
            grad, x, h, *weight, ctx.shape, ctx.block_size, A, B, ctx.scaling, ctx.p, seed, needs_x
        )
    dbias = _over_tokens(grad) if needs_bias else None
    return dx if needs_x else None, *[None] * 7, dbias, dA, dB, None, None, None


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "qloralab::adapted_linear has a first derivative only; the gradient of its gradient is undefined"
    )


adapted_linear.register_autograd(_adapted_linear_backward, setup_context=_keep_adapted)
adapted_linear_backward.register_autograd(_no_second_derivative)
