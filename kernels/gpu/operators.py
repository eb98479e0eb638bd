"""The operators of ``nf4/ops.py`` on NVIDIA GPUs: which kernel serves which case, and the reference for the rest.

Importing this module registers them for CUDA tensors, and does not import Triton: that happens when the first CUDA
tensor arrives.

==============================  ====================================================================================
quantize_blockwise              ``quantize.py``, one pass
quantize_scales                 ``quantize.py``
dequantize                      ``dequantize.py``, both levels of scales in one launch
linear, linear_grad_input       ``two_pass.py``, from the canonical layout: the kernel above, then cuBLAS
dropout                         the reference, on any device
adapted_linear and its backward the reference, on the operators above
==============================  ====================================================================================

They serve what ``quantize`` makes and files hold: codes of 4 bits; float32, bfloat16 and float16; blocks of 32 to
4,096. Codes of other widths, and operands that do not fit together, go to the reference, which says what is wrong.

Each kernel serves on a device only after it has passed a check there (``first_use.py``); ``QLORALAB_GPU`` chooses.

**The fused products** (``fused.py``) stand behind ``choice.py``. They read the weight through inline assembly that only
a GPU can run, so no product is fused before ``benchmarks/gpu.py`` has checked and timed both ways on the device and the
record of it is there. Without one, which is how the library comes, all products are two-pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.library import impl

from qloralab.nf4 import ops, reference
from qloralab.nf4.autocast import without_autocast
from qloralab.nf4.blockwise import BLOCK_SIZES
from qloralab.nf4.double import BLOCK_SIZE

from . import choice, first_use

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What each operator needs from ``first_use``; the two without an entry of their own there are built on dequantize.
KERNELS = {
    "quantize_blockwise": "quantize_blockwise",
    "quantize_scales": "quantize_scales",
    "dequantize": "dequantize",
    "linear": "dequantize",
    "linear_grad_input": "dequantize",
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
    launch = first_use.kernel("quantize_blockwise", weight.device) if fits else None
    if launch is None:
        return reference.quantize_blockwise(weight, values, block_size)
    return launch(weight.contiguous(), values, block_size)


@_serves("quantize_scales")
def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``quantize.py``."""
    fits = absmax.dtype == torch.float32 and absmax.dim() == 1 and len(absmax) > 0
    launch = first_use.kernel("quantize_scales", absmax.device) if fits else None
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
    launch = first_use.kernel("dequantize", packed.device) if _is_weight(operands, dtype) else None
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
    """``two_pass.py``, or ``fused.py``."""
    operands = packed, scales, absmax2, offset, values, shape, block_size
    if not _multiplies(x, operands, 1) or first_use.kernel("dequantize", x.device) is None:
        return reference.linear(x, *operands, bias)
    from . import two_pass

    y = None
    if _is_fused("linear", x, shape):
        from . import fused

        y = fused.linear(x, operands, bias)
    return two_pass.linear(x, operands, bias) if y is None else y


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
    """``two_pass.py``, or ``fused.py``."""
    operands = packed, scales, absmax2, offset, values, shape, block_size
    if not _multiplies(grad, operands, 0) or first_use.kernel("dequantize", grad.device) is None:
        return reference.linear_grad_input(grad, *operands)
    from . import two_pass

    dx = None
    if _is_fused("linear_grad_input", grad, shape):
        from . import fused

        dx = fused.linear_grad_input(grad, operands)
    return two_pass.linear_grad_input(grad, operands) if dx is None else dx


def report(names: Sequence[str], device: torch.device | None) -> list[dict[str, str]]:
    """What serves these operators on CUDA, and why: dictionaries with operator, device, implementation, why.

    Compiles and checks the kernels, as the first call of an operator would, but neither warns nor raises.

    Args:
        names: of operators.
        device: or None where there is none.

    Raises:
        ValueError: QLORALAB_GPU is none of its three words.
    """
    mode = first_use.mode()
    rows = []
    for name in names:
        kernel = KERNELS.get(name)
        if device is None:
            implementation, why = "none", "there is no GPU: torch.cuda.is_available() is False"
        elif mode == "reference":
            implementation, why = "reference", f"it was asked for ({first_use.VARIABLE}=reference)"
        elif kernel is None:
            implementation, why = "reference", "there is no Triton kernel for it"
        elif failed := first_use.reason(kernel, device):
            implementation, why = "none" if mode == "triton" else "reference", failed
        elif name == kernel:
            implementation, why = "triton", "it agrees with the definition on this device, bit for bit"
        else:
            implementation = "two-pass"
            why = f"Triton's {kernel}, then cuBLAS; fused where a record says that it takes less time ({choice.FILE})"
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


def _is_fused(operation: str, x: Tensor, shape: Sequence[int]) -> bool:
    """Whether the fused kernel was measured to be the faster; whether it can do it, ``fused.py`` knows."""
    N, K = shape
    tokens = math.prod(x.shape[:-1])
    return choice.decide(operation, N, K, tokens, choice.device_name(x.device)).kernel == "fused"


def _is_block_size(block_size: int) -> bool:
    return block_size in BLOCK_SIZES


def _is_codebook(values: Tensor, beside: Tensor) -> bool:
    return (
        values.dtype == torch.float32
        and values.numel() == 16
        and values.is_contiguous()
        and values.device == beside.device
    )
