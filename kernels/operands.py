"""Which operands a kernel may run on, for it checks nothing. The reference says what is wrong with others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qloralab.nf4.packed import Packed


def is_product(x: Tensor, weight: Packed, bias: Tensor | None = None) -> bool:
    """Whether x [..., K] and the bias, of the dtype of x, [N], are operands of a product with W [N, K]."""
    return weight.meets(x, 1) and (bias is None or (bias.shape == (weight.shape[0],) and bias.dtype == x.dtype))


def is_adapted(
    x: Tensor, weight: Packed, A: Tensor, B: Tensor, bias: Tensor | None = None, grad: Tensor | None = None,
    h: Tensor | None = None,
) -> bool:  # fmt: skip
    """Whether they are operands of ``adapted_linear``; with grad and h, of its backward. A and B are float32."""
    if not is_product(x, weight, bias):
        return False
    N, K = weight.shape
    if not (A.dtype == B.dtype == torch.float32 and A.shape[1:] == (K,) and B.shape == (N, len(A))):
        return False
    return grad is None or h is None or (
        grad.dtype == h.dtype == x.dtype
        and grad.shape == (*x.shape[:-1], N)
        and h.shape == (math.prod(x.shape[:-1]), len(A))
    )  # fmt: skip
