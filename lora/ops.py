"""The operators with an adapter beside a packed weight: for each its schema, reference, fake and derivative.

QLoRA, equation 5 (arXiv 2305.14314), with dropout before the adapter as in its experiments. For x [tokens, K], a frozen
W [N, K] in 4 bits, and the float32 matrices A [r, K] and B [N, r] that train::

    h = s * (x∘keep) A'                             [tokens, r]     s = scaling / (1 - q)
    y = x W' + bias + h B'                          [tokens, N]

    G  = s * dy B                                   [tokens, r]
    dB = dy' h                                      [N, r]
    dA = G' (x∘keep)                                [r, K]
    dx = dy W + keep∘(G A)                          [tokens, K]

The formulas say what backward needs: x, which its neighbours in the model keep too, h, and the matrices. It does not
need the dequantized weight, which is made again, nor the mask, which is a function of a seed (``dropout.py``), nor a
dropped-out copy of x. (PEFT keeps a float32 copy of x, a mask, and the dropped-out copy.)

Numbers: the products are taken in the dtype of x, and float32 A and B are rounded to it first. In bfloat16 and float16
this definition rounds h, G, dA, dB, and each of the two terms of y and dx; an implementation may round less often.
"""

from __future__ import annotations

import math

from torch import Tensor

from qloralab.nf4 import ops, packed
from qloralab.nf4.operator import operator
from qloralab.nf4.packed import Packed
from qloralab.nf4.product import addmm, matmul, reshaped, rows

from .dropout import kept, mask, rate


@operator("(Tensor x, Tensor seed, float p) -> Tensor")
def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x∘keep / (1 - q): the elements of ``keep_mask`` scaled, the others zero, whatever they were. Differentiable in x.

    The factor 1 / (1 - q) is rounded to float32, and its product with x once to the dtype of x.

    Args:
        x: float32, bfloat16 or float16 [..., K], seen as a matrix of K columns.
        seed: int64 [] on the device of x.
        p: in [0, 1).

    Returns:
        the dtype and shape of x, contiguous.

    Raises:
        TypeError: x is no floating-point tensor.
    """
    if not x.is_floating_point():
        raise TypeError(f"dropout: x is {x.dtype}; a floating-point tensor is needed")
    return reshaped((kept(rows(x), mask(x, seed, p)) * (1 / (1 - rate(p)))).contiguous(), x.shape)


@dropout.fake
def _dropout_fake(x, seed, p):
    return x.new_empty(x.shape)


def _keep_seed(ctx, output, x, seed, p) -> None:
    ctx.save_for_backward(seed)
    ctx.p = p


def _dropout_backward(ctx, grad: Tensor):
    return dropout(grad, *ctx.saved_tensors, ctx.p), None, None


dropout.derivative(_keep_seed, _dropout_backward)


@operator(
    f"(Tensor x, {packed.SCHEMA}, Tensor? bias, Tensor A, Tensor B, float scaling, float p, Tensor? seed)"
    " -> (Tensor, Tensor)"
)
def adapted_linear(
    x: Tensor, weight: Packed, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x W' + bias + h B'. The first result is differentiable in x, bias, A and B; the second is not.

    Args:
        x: float32, bfloat16 or float16 [..., K]; tokens is the product of the sizes before K.
        weight: [N, K].
        bias: the dtype of x, [N], or None.
        A: float32 [r, K].
        B: float32 [N, r].
        scaling: the factor on B A.
        p: dropout probability before the adapter, in [0, 1); 0 is no dropout.
        seed: int64 [] on the device of x; None will do where p is 0.

    Returns:
        y: the dtype of x, [..., N].
        h: the dtype of x, [tokens, r]; backward takes it.
    """
    y = ops.linear(x, *weight, bias)
    A, B = A.to(x.dtype), B.to(x.dtype)
    h = matmul(kept(rows(x), mask(x, seed, p)), A.T).mul_(scaling / (1 - rate(p)))
    return reshaped(addmm(rows(y), h, B.T), y.shape), h


@adapted_linear.fake
def _adapted_linear_fake(x, weight, bias, A, B, scaling, p, seed):
    tokens = math.prod(x.shape[:-1])
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty((tokens, A.shape[0]))


def _keep_adapted(ctx, output, x, weight, bias, A, B, scaling, p, seed) -> None:
    _, h = output
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)  # of h there is none, and no zeros are to be made for it
    ctx.save_for_backward(x, h, *weight.tensors, A, B, seed)
    ctx.layout, ctx.scaling, ctx.p = weight.layout, scaling, p


def _adapted_linear_backward(ctx, grad: Tensor, _):
    needs_x, *_, needs_bias, needs_A, needs_B, _, _, _ = ctx.needs_input_grad
    dx = dA = dB = None
    if needs_x or needs_A or needs_B:
        x, h, *tensors, A, B, seed = ctx.saved_tensors
        weight = *tensors, *ctx.layout
        dx, dA, dB = adapted_linear_backward(grad, x, h, *weight, A, B, ctx.scaling, ctx.p, seed, needs_x)
    dbias = ops.over_tokens(grad) if needs_bias else None
    return dx if needs_x else None, None, dbias, dA, dB, None, None, None


adapted_linear.derivative(_keep_adapted, _adapted_linear_backward)


@operator(
    f"(Tensor grad, Tensor x, Tensor h, {packed.SCHEMA}, Tensor A, Tensor B, float scaling, float p, Tensor? seed, "
    "bool needs_input) -> (Tensor, Tensor, Tensor)"
)
def adapted_linear_backward(
    grad: Tensor, x: Tensor, h: Tensor, weight: Packed, A: Tensor, B: Tensor, scaling: float, p: float,
    seed: Tensor | None, needs_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of ``adapted_linear`` in x, A and B. A second backward raises RuntimeError.

    Args:
        grad: of y; the dtype of x, [..., N], any strides.
        h: the second result of the forward.
        needs_input: whether the first result is wanted.
        x, weight, A, B, scaling, p, seed: as in the forward.

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
    dx = ops.linear_grad_input(grad, *weight)
    return dx.add_(kept(matmul(G, low_A), keep).view(x.shape)), dA, dB


@adapted_linear_backward.fake
def _adapted_linear_backward_fake(grad, x, h, weight, A, B, scaling, p, seed, needs_input):
    return x.new_empty(x.shape if needs_input else 0), A.new_empty(A.shape), B.new_empty(B.shape)


def _keep_nothing(*_) -> None:
    pass


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "qloralab::adapted_linear has a first derivative only; the gradient of its gradient is undefined"
    )


adapted_linear_backward.derivative(_keep_nothing, _no_second_derivative)
