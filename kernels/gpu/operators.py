"""The operators of ``nf4/ops.py`` on NVIDIA GPUs: which kernel serves which case, and the reference for the rest.

Importing this module registers them for CUDA tensors, and does not import Triton: that happens when the first CUDA
tensor arrives.

==============================  ====================================================================================
quantize_blockwise              ``quantize.py``, one pass
quantize_scales                 ``quantize.py``
dequantize                      ``dequantize.py``, both levels of scales in one launch
linear, linear_grad_input       ``two_pass.py``: the kernel above, then cuBLAS; or fused, see below
adapted_linear and its backward ``adapter.py``, and the products above with the adapter's term inside
dropout                         the reference, on any device
==============================  ====================================================================================

They serve what ``quantize`` makes and files hold: codes of 4 bits; float32, bfloat16 and float16; blocks of 32 to
4,096. Codes of other widths, and operands that do not fit together, go to the reference, which says what is wrong.

Each kernel serves on a device only after it has passed a check there (``self_check.py``); ``QLORALAB_GPU`` chooses.

**The fused products** (``tile_cache.py``) serve where ``choice.py`` has measured that they take less time, and after a
check on the device. All other products are two-pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.library import impl

from qloralab.nf4 import ops, reference
from qloralab.nf4.adapter import rate
from qloralab.nf4.autocast import without_autocast
from qloralab.nf4.blockwise import BLOCK_SIZES
from qloralab.nf4.double_quant import BLOCK_SIZE

from . import choice, self_check

if TYPE_CHECKING:
    from .adapter_operands import LowRank, MaskedLowRank

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What each operator needs from ``first_use``; the products are built on dequantize.
KERNELS = {
    "quantize_blockwise": ("quantize_blockwise",),
    "quantize_scales": ("quantize_scales",),
    "dequantize": ("dequantize",),
    "linear": ("dequantize",),
    "linear_grad_input": ("dequantize",),
    "adapted_linear": ("dequantize", "project"),
    "adapted_linear_backward": ("dequantize", "grad_A", "masked_low_rank"),
}

Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Sequence[int], int]
_P = ParamSpec("_P")
_R = TypeVar("_R")


def _serves(
    name: str,
) -> Callable[[Callable[Concatenate[Tensor, _P], _R]], Callable[Concatenate[Tensor, _P], _R]]:
    """Register a function as CUDA's implementation of an operator, and run it with its tensors' device current.

    PyTorch does that for its own operators; a kernel of Triton's is launched on whichever device is current.
    """
    assert hasattr(ops, name)

    def register(function: Callable[Concatenate[Tensor, _P], _R]) -> Callable[Concatenate[Tensor, _P], _R]:
        @functools.wraps(function)
        def on_its_device(first: Tensor, *args: _P.args, **kwargs: _P.kwargs) -> _R:
            if not first.is_cuda:  # in the interpreter
                return function(first, *args, **kwargs)
            with torch.cuda.device(first.device):
                return function(first, *args, **kwargs)

        impl(f"qloralab::{name}", "CUDA", on_its_device)
        return on_its_device

    return register


@_serves("quantize_blockwise")
def quantize_blockwise(weight: Tensor, values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """``quantize.py``."""
    fits = weight.dtype in DTYPES and weight.numel() > 0 and _is_block_size(block_size) and _is_codebook(values, weight)
    launch = self_check.kernel("quantize_blockwise", weight.device) if fits else None
    if launch is None:
        return reference.quantize_blockwise(weight, values, block_size)
    return launch(weight.contiguous(), values, block_size)


@_serves("quantize_scales")
def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``quantize.py``."""
    fits = absmax.dtype == torch.float32 and absmax.dim() == 1 and len(absmax) > 0
    launch = self_check.kernel("quantize_scales", absmax.device) if fits else None
    return reference.quantize_scales(absmax) if launch is None else launch(absmax.contiguous())


@_serves("dequantize")
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
    """``dequantize.py``."""
    operands = packed, scales, absmax2, offset, values, shape, block_size
    launch = self_check.kernel("dequantize", packed.device) if _is_weight(operands, dtype) else None
    return (launch or reference.dequantize)(*operands, dtype)


@_serves("linear")
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
    """``two_pass.py``, or fused."""
    operands = packed, scales, absmax2, offset, values, shape, block_size
    if not _multiplies(x, operands, 1) or not _are_served("linear", x.device):
        return reference.linear(x, *operands, bias)
    return _linear(x, operands, bias)


@_serves("linear_grad_input")
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
    """``two_pass.py``, or fused."""
    operands = packed, scales, absmax2, offset, values, shape, block_size
    if not _multiplies(grad, operands, 0) or not _are_served("linear_grad_input", grad.device):
        return reference.linear_grad_input(grad, *operands)
    return _linear_grad_input(grad, operands)


@_serves("adapted_linear")
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
    """``adapter.project``, then a product with h B' inside."""
    operands = packed, scales, absmax2, offset, values, shape, block_size
    if (
        not _multiplies(x, operands, 1)
        or not _is_bias(bias, x, shape)
        or not _is_adapter(A, B, seed, x, shape)
        or not _are_served("adapted_linear", x.device)
    ):
        return reference.adapted_linear(x, *operands, bias, A, B, scaling, p, seed)
    from .adapter import project
    from .adapter_operands import LowRank

    h = project(_rows(x), A, seed, p, scaling / (1 - rate(p)))
    return _linear(x, operands, bias, LowRank(h, B)), h


@_serves("adapted_linear_backward")
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
    """cuBLAS, ``adapter.grad_A``, then a product with keep∘(G A) inside."""
    operands = packed, scales, absmax2, offset, values, shape, block_size
    if (
        not _multiplies(x, operands, 1)
        or not (grad.dtype == h.dtype == x.dtype and grad.device == h.device == x.device)
        or grad.shape != (*x.shape[:-1], shape[0])
        or not _is_adapter(A, B, seed, x, shape)
        or h.shape != (math.prod(x.shape[:-1]), len(A))
        or not _are_served("adapted_linear_backward", x.device)
    ):
        return reference.adapted_linear_backward(grad, x, h, *operands, A, B, scaling, p, seed, needs_input)
    from .adapter import grad_A
    from .adapter_operands import MaskedLowRank

    g = _rows(grad)
    G = torch.empty_like(h)
    torch.addmm(G, g, B.to(x.dtype), beta=0, alpha=scaling / (1 - rate(p)), out=G)  # beta 0: what G holds is not read
    dA, dB = grad_A(G, _rows(x), seed, p), (g.T @ h).to(B.dtype)
    if not needs_input:
        return x.new_empty(0), dA, dB
    return _linear_grad_input(grad, operands, MaskedLowRank(G, A, seed, p)), dA, dB


def _linear(x: Tensor, operands: Operands, bias: Tensor | None, adapter: LowRank | None = None) -> Tensor:
    """x W' + bias, plus h B' of an adapter."""
    from . import tile_cache, two_pass

    y = tile_cache.linear(x, operands, bias, adapter)
    return two_pass.linear(x, operands, bias, adapter) if y is None else y


def _linear_grad_input(grad: Tensor, operands: Operands, adapter: MaskedLowRank | None = None) -> Tensor:
    """grad W, plus keep∘(G A) of an adapter."""
    from . import tile_cache, two_pass

    dx = tile_cache.linear_grad_input(grad, operands, adapter)
    return two_pass.linear_grad_input(grad, operands, adapter) if dx is None else dx


def report(names: Sequence[str], device: torch.device | None) -> list[dict[str, str]]:
    """What serves these operators on CUDA, and why: dictionaries with operator, device, implementation, why.

    Compiles and checks the kernels, as the first call of an operator would, but neither warns nor raises.

    Args:
        names: of operators.
        device: or None where there is none.

    Raises:
        ValueError: QLORALAB_GPU is none of its three words.
    """
    mode = self_check.mode()
    rows = []
    for name in names:
        kernels = KERNELS.get(name, ())
        if device is None:
            implementation, why = "none", "there is no GPU: torch.cuda.is_available() is False"
        elif mode == "reference":
            implementation, why = "reference", f"it was asked for ({self_check.VARIABLE}=reference)"
        elif not kernels:
            implementation, why = "reference", "there is no Triton kernel for it"
        elif failed := next(filter(None, (self_check.reason(kernel, device) for kernel in kernels)), ""):
            implementation, why = "none" if mode == "triton" else "reference", failed
        elif kernels == (name,):
            implementation, why = "triton", "it agrees with the definition on this device, bit for bit"
        else:
            implementation = "two-pass"
            why = f"Triton's {', '.join(kernels)}, then cuBLAS; "
            why += choice.summary(choice.architecture(device))
        rows.append({"operator": name, "device": "cuda", "implementation": implementation, "why": why})
    return rows


def _is_weight(operands: Operands, dtype: torch.dtype) -> bool:
    """Whether the kernels, which check nothing, may run on a weight: it is what ``quantize`` makes and files hold."""
    packed, scales, absmax2, offset, values, shape, block_size = operands
    if dtype not in DTYPES or not _is_block_size(block_size) or not _is_codebook(values, packed):
        return False
    numel = math.prod(shape)
    blocks = -(-numel // block_size)
    if (
        numel == 0
        or packed.dtype != torch.uint8
        or packed.numel() != (numel + 1) // 2
        or scales.dtype != (torch.float32 if absmax2 is None else torch.uint8)
        or scales.numel() != blocks
        or scales.device != packed.device
        or not (packed.is_contiguous() and scales.is_contiguous())
    ):
        return False
    return absmax2 is None or (
        offset is not None
        and absmax2.dtype == offset.dtype == torch.float32
        and absmax2.device == offset.device == packed.device
        and offset.numel() == 1
        and absmax2.numel() == -(-blocks // BLOCK_SIZE)
        and absmax2.is_contiguous()
    )


def _multiplies(x: Tensor, operands: Operands, axis: int) -> bool:
    """Whether x [..., size] meets a weight [N, K] along this axis of it."""
    shape = operands[5]
    return (
        len(shape) == 2
        and x.shape[-1:] == (shape[axis],)
        and x.device == operands[0].device
        and _is_weight(operands, x.dtype)
    )


def _are_served(name: str, device: torch.device) -> bool:
    """Whether all kernels that an operator needs may run on a device."""
    return all(self_check.kernel(kernel, device) is not None for kernel in KERNELS[name])


def _is_bias(bias: Tensor | None, x: Tensor, shape: Sequence[int]) -> bool:
    return bias is None or (bias.shape == (shape[0],) and bias.dtype == x.dtype and bias.device == x.device)


def _is_adapter(A: Tensor, B: Tensor, seed: Tensor, x: Tensor, shape: Sequence[int]) -> bool:
    """Whether A and B are a float32 adapter of a weight of this shape; the reference takes other dtypes too."""
    N, K = shape
    return (
        A.dtype == B.dtype == torch.float32
        and A.shape[1:] == (K,)
        and len(A) > 0
        and B.shape == (N, len(A))
        and (seed.dtype, seed.numel()) == (torch.int64, 1)
        and A.device == B.device == seed.device == x.device
    )


def _rows(x: Tensor) -> Tensor:
    """[..., K] -> [tokens, K]."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _is_block_size(block_size: int) -> bool:
    return block_size in BLOCK_SIZES


def _is_codebook(values: Tensor, beside: Tensor) -> bool:
    return (
        values.dtype == torch.float32
        and values.numel() == 16
        and values.is_contiguous()
        and values.device == beside.device
    )
