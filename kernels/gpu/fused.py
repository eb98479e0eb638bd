"""The fused products behind the operators: which products are, and the rest.

A product that ``choice.py`` wants fused is fused where x is bfloat16, both kernels have passed their check on the
device (``self_check.py``), and the weight fits (``canonical.why_not``). All of that holds for both directions of a
layer or for none. Forward products of 1 to 16 tokens take ``few_tokens.py`` where that serves, which
multiplies by the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qloralab.nf4.packed import Packed

from . import choice, few_tokens, self_check
from .adapter_operands import LowRank, MaskedLowRank
from .canonical import why_not
from .linear import linear as _linear
from .linear_grad_input import linear_grad_input as _linear_grad_input
from .lookup import known


def linear(x: Tensor, operands: Packed, bias: Tensor | None, adapter: LowRank | None = None) -> Tensor | None:
    """``linear.linear`` of x [..., K] and W as the operators of ``nf4/ops.py`` take it; or None: it is two-pass."""
    if not _is_fused(x, operands):
        return None
    if few_tokens.serves(x, math.prod(x.shape[:-1]), operands):
        return few_tokens.few_tokens(x, operands, bias, adapter)
    return _linear(x, operands, bias, adapter=adapter)


def linear_grad_input(grad: Tensor, operands: Packed, adapter: MaskedLowRank | None = None) -> Tensor | None:
    """``linear_grad_input.linear_grad_input`` of grad [..., N], likewise."""
    return _linear_grad_input(grad, operands, adapter=adapter) if _is_fused(grad, operands) else None


def _is_fused(x: Tensor, operands: Packed) -> bool:
    (N, K), M = operands.shape, math.prod(x.shape[:-1])
    if x.dtype != torch.bfloat16 or choice.decide(N, K, M, choice.device(x.device)).kernel != "fused":
        return False
    if x.is_cuda and torch.cuda.is_current_stream_capturing() and known(operands.values) is None:
        return False  # a table and a check wait for the device
    for name in ("linear", "linear_grad_input"):
        if why := self_check.reason(name, x.device):
            self_check.warn_once(name, why, "Its products are two-pass: dequantized, then multiplied by cuBLAS.")
            return False
    return why_not(operands) is None
