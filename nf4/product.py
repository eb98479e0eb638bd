"""Products of matrices as PyTorch takes them; in float32, rounded once, where it would emulate their dtype.

On a processor that multiplies bfloat16 PyTorch adds the products up in float32 and rounds the sum. On one that does
not, it does the same, 10 to 70 times slower than in float32 (``processor.py``). There the matrices are widened, which
is exact, multiplied in float32 and rounded once: the same result but for the order of the sums.

The products are taken in the dtype of the operands under ``torch.autocast`` too: a quantized layer has a compute dtype
of its own, and the operators promise results and gradients of it.

Each raises RuntimeError where PyTorch does: for sizes and dtypes that do not fit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .processor import emulates

_P = ParamSpec("_P")
_R = TypeVar("_R")


def without_autocast(function: Callable[Concatenate[Tensor, _P], _R]) -> Callable[Concatenate[Tensor, _P], _R]:
    """Run a function with autocast off for the device of its first argument, a tensor."""

    @functools.wraps(function)
    def run(x: Tensor, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # which meta tensors do not know
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return run


@without_autocast
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """A b, in the dtype of both: [..., m, k] and [k, n] -> [..., m, n]."""
    if not emulates(a):
        return a @ b
    wide_a, wide_b = _widened(a, b)
    return (wide_a @ wide_b).to(a.dtype)


@without_autocast
def linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """X W' + bias, all of one dtype: [..., K] and [N, K] -> [..., N]."""
    if not emulates(x):
        y = F.linear(x, W, bias)
        return reshaped(y, y.shape)
    return F.linear(*_widened(x, W, *([] if bias is None else [bias]))).to(x.dtype)


@without_autocast
def addmm(y: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """Y + alpha * a b, all of one dtype: [m, n], [m, k] and [k, n] -> [m, n]."""
    if not emulates(y):
        return y.addmm(a, b, alpha=alpha)
    wide_y, wide_a, wide_b = _widened(y, a, b)
    return wide_y.addmm_(wide_a, wide_b, alpha=alpha).to(y.dtype)


def rows(x: Tensor) -> Tensor:
    """[..., K] -> [tokens, K]; tokens is the product of the sizes before K."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def reshaped(y: Tensor, shape: Sequence[int]) -> Tensor:
    """``y.view(shape)``, for the result of an operator: autograd refuses to change a view that one made in place, as
    ``nn.ReLU(inplace=True)`` does, and takes this for a tensor of its own."""
    return torch.ops.aten._unsafe_view(y, shape)


def _widened(*tensors: Tensor) -> Iterator[Tensor]:
    dtypes = [tensor.dtype for tensor in tensors]
    if len(set(dtypes)) > 1:
        raise RuntimeError(f"a product takes tensors of the same dtype, not {', '.join(map(str, dtypes))}")
    return (tensor.float() for tensor in tensors)
