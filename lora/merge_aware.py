"""Training through the quantizer, so that the merged weight in 4 bits is what was trained.

An adapter's update is small against the steps of a 4-bit codebook. Merged into the base and quantized again, most of it
is gone (docs/merge.md). Here the layer computes with the quantized sum from the first step on::

    P = quantize(W' + s B A)                    in the base's data type; W' is the base, dequantized, in float32
    y = x P' + bias                             [tokens, N]

The gradient passes the quantizer as if it were not there (the straight-through estimator, arXiv 1308.3432)::

    dx = dy P                                   [tokens, K]
    G  = s * dy B                               [tokens, r]
    dA = G' x                                   [r, K]
    dB = s * dy' (x A')                         [N, r]

P is what ``qloralab merge --into 4bit`` writes, bit for bit: the rule is one function, ``merged_quantized``. Where B is
zero, as before the first step, P is the base. P is made at each call, and kept for backward at 4 bits a weight.

There is no dropout: an input that the adapter does not see has no weight to be merged into.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qloralab.nf4 import ops
from qloralab.nf4.ops import over_tokens
from qloralab.nf4.product import matmul, rows
from qloralab.nf4.tensor import QuantizedTensor

from .merged_weight import merged_quantized


class MergeAware(torch.autograd.Function):
    """x [..., K], A float32 [r, K], B float32 [N, r], bias [N] or None -> [..., N] in the dtype of x and bias."""

    @staticmethod
    def forward(
        ctx, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, base: QuantizedTensor, scaling: float
    ) -> Tensor:
        packed = merged_quantized(base, A, B, scaling)
        ctx.save_for_backward(x, A, B)
        ctx.packed, ctx.scaling = packed, scaling
        return ops.linear(x, *packed.operands(), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy,) = grads
        x, A, B = ctx.saved_tensors
        low_A, low_B, grad = A.to(x.dtype), B.to(x.dtype), rows(dy)
        G = matmul(grad, low_B).mul_(ctx.scaling)
        dA = matmul(G.T, rows(x)).to(A.dtype)
        dB = matmul(grad.T, matmul(rows(x), low_A.T).mul_(ctx.scaling)).to(B.dtype)
        dx = ops.linear_grad_input(dy, *ctx.packed.operands()) if ctx.needs_input_grad[0] else None
        dbias = over_tokens(dy) if ctx.needs_input_grad[3] else None
        return dx, dA, dB, dbias, None, None
