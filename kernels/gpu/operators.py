"""The operators on NVIDIA GPUs: which kernel serves which case, and the reference for the rest.

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

**The fused products** (``fused.py``) serve where ``choice.py`` says so, and after a check on the device. All other
products are two-pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qloralab.lora import ops as lora_ops
from qloralab.lora.dropout import rate
from qloralab.nf4 import ops
from qloralab.nf4.packed import BLOCK_SIZES, DTYPES, Packed, has_16_values
from qloralab.nf4.product import rows, without_autocast

from ..operands import is_adapted
from . import choice, self_check
from .replay import replayed

if TYPE_CHECKING:
    from .adapter_operands import LowRank, MaskedLowRank

# What each operator needs from ``self_check``; the products are built on dequantize.
KERNELS = {
    "quantize_blockwise": ("quantize_blockwise",),
    "quantize_scales": ("quantize_scales",),
    "dequantize": ("dequantize",),
    "linear": ("dequantize",),
    "linear_grad_input": ("dequantize",),
    "adapted_linear": ("dequantize", "project"),
    "adapted_linear_backward": ("dequantize", "grad_A", "grad_B", "masked_low_rank"),
}
FUSED = ("linear", "linear_grad_input")  # the kernels of the fused products


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run an implementation with its tensors' device current, and without autocast.

    PyTorch does the first for its own operators; a kernel of Triton's is launched on whichever device is current.
    """
    function = without_autocast(function)

    @functools.wraps(function)
    def run(first: Tensor, *args: Any) -> Any:
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():  # not so in the interpreter
            return function(first, *args)
        with torch.cuda.device(first.device):
            return function(first, *args)

    return run


def _replayed(before: int | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The same, or a replay of what it launched before.

    Args:
        before: arguments in front of the weight, where kernels take the table of its codebook; None: none does.
    """
    codebook = 0 if before is None else before + Packed._fields.index("values")
    return lambda function: replayed(function.__name__, _on_its_device(function), codebook)


@ops.quantize_blockwise.on("CUDA", _on_its_device)
def quantize_blockwise(weight: Tensor, values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """``quantize.py``."""
    fits = (
        weight.dtype in DTYPES
        and weight.numel() > 0
        and block_size in BLOCK_SIZES
        and has_16_values(values)
        and values.device == weight.device
    )
    launch = self_check.kernel("quantize_blockwise", weight.device, weight.dtype, block_size) if fits else None
    if launch is None:
        return ops.quantize_blockwise.reference(weight, values, block_size)
    return launch(weight.contiguous(), values, block_size)


@ops.quantize_scales.on("CUDA", _on_its_device)
def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``quantize.py``."""
    fits = absmax.dtype == torch.float32 and absmax.dim() == 1 and len(absmax) > 0
    launch = self_check.kernel("quantize_scales", absmax.device) if fits else None
    return ops.quantize_scales.reference(absmax) if launch is None else launch(absmax.contiguous())


@ops.dequantize.on("CUDA", _replayed())
def dequantize(weight: Packed, dtype: torch.dtype) -> Tensor:
    """``dequantize.py``."""
    fits = _is_weight(weight, dtype)
    launch = self_check.kernel("dequantize", weight.packed.device, *_variant(weight, dtype)) if fits else None
    return (launch or ops.dequantize.reference)(*weight, dtype)


@ops.linear.on("CUDA", _replayed(1))
def linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """``two_pass.py``, or fused."""
    fits = weight.meets(x, 1) and _on(x.device, *weight.tensors)
    if not fits or not _are_served("linear", weight, x):
        return ops.linear.reference(x, *weight, bias)
    return _product("linear", x, weight, bias)


@ops.linear_grad_input.on("CUDA", _replayed(1))
def linear_grad_input(grad: Tensor, weight: Packed) -> Tensor:
    """``two_pass.py``, or fused."""
    fits = weight.meets(grad, 0) and _on(grad.device, *weight.tensors)
    if not fits or not _are_served("linear_grad_input", weight, grad):
        return ops.linear_grad_input.reference(grad, *weight)
    return _product("linear_grad_input", grad, weight)


@lora_ops.adapted_linear.on("CUDA", _replayed(1))
def adapted_linear(
    x: Tensor, weight: Packed, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``adapter.project``, then a product with h B' inside."""
    if not _is_adapted(x, weight, A, B, seed, bias=bias) or not _are_served("adapted_linear", weight, x):
        return lora_ops.adapted_linear.reference(x, *weight, bias, A, B, scaling, p, seed)
    gpu = _modules()
    h = gpu.adapter.project(rows(x), A, seed, p, scaling / (1 - rate(p)))
    return _product("linear", x, weight, bias, adapter=gpu.adapter_operands.LowRank(h, B)), h


@lora_ops.adapted_linear_backward.on("CUDA", _replayed(3))
def adapted_linear_backward(
    grad: Tensor, x: Tensor, h: Tensor, weight: Packed, A: Tensor, B: Tensor, scaling: float, p: float,
    seed: Tensor | None, needs_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``grad_B.grad_B``, ``adapter.grad_A``, then a product with keep∘(G A) inside."""
    fits = _is_adapted(x, weight, A, B, seed, grad=grad, h=h)
    if not fits or not _are_served("adapted_linear_backward", weight, x):
        return lora_ops.adapted_linear_backward.reference(grad, x, h, *weight, A, B, scaling, p, seed, needs_input)
    gpu = _modules()
    G, dB = gpu.grad_B.grad_B(rows(grad), h, B, scaling / (1 - rate(p)))
    dA = gpu.adapter.grad_A(G, rows(x), seed, p)
    if not needs_input:
        return x.new_empty(0), dA, dB
    return (
        _product("linear_grad_input", grad, weight, adapter=gpu.adapter_operands.MaskedLowRank(G, A, seed, p)),
        dA,
        dB,
    )


def _product(
    operation: str, x: Tensor, weight: Packed, *bias: Tensor | None, adapter: LowRank | MaskedLowRank | None = None
) -> Tensor:
    """x W' + bias or grad W, plus the term of an adapter: fused where ``choice.py`` says so, else two-pass."""
    gpu = _modules()
    y = getattr(gpu.fused, operation)(x, weight, *bias, adapter=adapter)
    return getattr(gpu.two_pass, operation)(x, weight, *bias, adapter=adapter) if y is None else y


@functools.cache
def _modules() -> SimpleNamespace:
    """Those that import Triton, at the first call. (An import statement in each call is a microsecond.)"""
    names = ("adapter", "adapter_operands", "fused", "grad_B", "two_pass")
    return SimpleNamespace(**{name: import_module(f".{name}", __package__) for name in names})


def _are_served(name: str, weight: Packed, x: Tensor) -> bool:
    """Whether all kernels that a product needs may run on its operands' device."""
    device, dtype = x.device, x.dtype
    return all(
        self_check.kernel(kernel, device, *(_variant(weight, dtype) if kernel == "dequantize" else (dtype,)))
        is not None
        for kernel in KERNELS[name]
    )


def _is_weight(weight: Packed, dtype: torch.dtype) -> bool:
    """Whether a kernel may run on a weight."""
    return weight.is_regular(dtype) and _on(weight.packed.device, *weight.tensors)


def _variant(weight: Packed, dtype: torch.dtype) -> tuple[torch.dtype, int, int]:
    """Which dequantization it is: to what, the block size, the levels of scales."""
    return dtype, weight.block_size, 1 if weight.absmax2 is None else 2


def _is_adapted(x: Tensor, weight: Packed, A: Tensor, B: Tensor, seed: Tensor | None, **others: Tensor | None) -> bool:
    """Whether kernels may run on operands of an adapted product: bias, or grad and h, are the others."""
    return (
        is_adapted(x, weight, A, B, **others)
        and len(A) > 0
        and (seed is None or (seed.dtype, seed.numel()) == (torch.int64, 1))
        and _on(x.device, A, B, seed, *others.values(), *weight.tensors)
    )


def _on(device: torch.device, *tensors: Tensor | None) -> bool:
    """Whether all tensors are on a device."""
    return all(tensor is None or tensor.device == device for tensor in tensors)


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
            implementation, why = _product_report(kernels, device)
        rows.append({"operator": name, "device": "cuda", "implementation": implementation, "why": why})
    return rows


def _product_report(kernels: Sequence[str], device: torch.device) -> tuple[str, str]:
    """Which ways a product takes on a device, and why."""
    from . import few_tokens  # imports Triton

    two_pass = f"Triton's {', '.join(kernels)}, then cuBLAS"
    found = choice.device(device)
    summary = choice.summary(found)
    if choice.is_exact() or not choice.fused_up_to(1 << 20, found):
        return "two-pass", f"{two_pass}; {summary}"
    for name in FUSED:
        if failed := self_check.reason(name, device):
            return "two-pass", f"{two_pass}; not fused: {failed}"
    few = few_tokens.reason(device) if device.type == "cuda" else ""
    return "fused, two-pass", f"{summary}{f' (1 to 16 in Triton: {few})' if few else ''}; else {two_pass}"
