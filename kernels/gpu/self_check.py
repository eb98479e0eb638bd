"""Whether Triton serves an operator on a device: chosen by ``QLORALAB_GPU``, checked at first use.

=========  ============================================================================================================
auto       the kernel where it compiles and passes the check; otherwise one warning that says why, and plain PyTorch
triton     the kernel, or ``NotServedError``
reference  plain PyTorch; Triton is not even imported
=========  ============================================================================================================

**The check.** The tests run the kernels in Triton's interpreter, which is a model of a GPU and no GPU: layouts, the
order of threads and the compiler itself are not in it. So the first call of an operator on a device computes a small
weight twice, by the kernel and by the definition in ``nf4/``, and the kernel serves only if no bit differs. That takes
one compilation, which the program needs anyway, and some milliseconds. What failed is not tried again. The products of
an adapter are checked on whole numbers, whose sums are the same in any order.

The check waits for the device, which is not allowed while a CUDA graph is captured: a first call within a capture
raises ``NotServedError``. Graphs ask for a call before the capture anyway: kernels are loaded at their first call.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from qloralab.lora.dropout import keep_mask
from qloralab.nf4 import blockwise, double_quant
from qloralab.nf4.codebook import codebook_values

from ..dispatch import warn

VARIABLE = "QLORALAB_GPU"
MODES = ("auto", "triton", "reference")
SHAPE = (67, 127)  # of the weight of the check: an odd count, blocks that cross rows, a short last block
BLOCK_SIZE = 64
RANK, DROPOUT = 3, 0.3  # of the adapter of the check
MODULES = {
    "quantize_blockwise": "quantize",
    "quantize_scales": "quantize",
    "dequantize": "dequantize",
    "project": "adapter",
    "grad_A": "adapter",
    "masked_low_rank": "adapter",
}

_lock = threading.RLock()
_passed: dict[tuple[str, torch.device], str] = {}  # why it does not serve, "" where it does
_warned: set[str] = set()


class NotServedError(RuntimeError):
    """``QLORALAB_GPU=triton`` and no kernel that may serve, or a first call within a capture. The message says why."""


def mode() -> str:
    """The choice: auto, triton or reference.

    Raises:
        ValueError: QLORALAB_GPU is something else.
    """
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in MODES:
        raise ValueError(f"{VARIABLE} is one of {', '.join(MODES)}, not {choice!r}")
    return choice


def kernel(name: str, device: torch.device) -> Callable[..., Any] | None:
    """The launcher of an operator's kernel, or None where the reference is to run.

    Args:
        name: one of MODULES.
        device: of the operands.

    Raises:
        ValueError: QLORALAB_GPU is none of the three.
        NotServedError: the choice is triton, and the kernel does not serve; or this is the first call, in a capture.
    """
    choice = mode()
    if choice == "reference":
        return None
    why = reason(name, device)
    if not why:
        return _launcher(name)
    if choice == "triton":
        raise NotServedError(f"{VARIABLE}=triton, and {name} is not served on {device}: {why}")
    _warn_once(name, why)
    return None


def reason(name: str, device: torch.device) -> str:
    """Why the kernel of an operator does not serve on a device; empty where it does. Checks it, the first time.

    Raises:
        NotServedError: the first time is within the capture of a CUDA graph.
    """
    found = _passed.get((name, device))
    if found is not None:
        return found
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise NotServedError(f"the first call of {name} on {device} is within the capture of a graph; call it before")
    with _lock:
        if (name, device) not in _passed:
            _passed[name, device] = _failure(name, device)
        return _passed[name, device]


def _failure(name: str, device: torch.device) -> str:
    try:
        same = CHECKS[name](_launcher(name), device)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # whatever Triton, its compiler or the driver raise
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return "" if same else f"its result differs from the definition's on {device}"


def _launcher(name: str) -> Callable[..., Any]:
    return getattr(import_module(f".{MODULES[name]}", __package__), name)


def _warn_once(name: str, why: str) -> None:
    with _lock:
        first = name not in _warned
        _warned.add(name)
    if first:
        note = f"It runs in plain PyTorch, many times slower. {VARIABLE}=reference asks for that silently."
        warn(f"qloralab's GPU kernel of {name} is not in use: {why}\n{note}")


def _weight(device: torch.device) -> Tensor:
    """Numbers of many magnitudes, the same every time and without the user's random generator; a block of zeros."""
    n = torch.arange(math.prod(SHAPE), dtype=torch.float64, device=device)
    weight = (n * 0.7390851).sin() * (n * 0.0123).cos().exp() * 0.02
    weight[2 * BLOCK_SIZE : 3 * BLOCK_SIZE] = 0
    return weight.bfloat16().view(SHAPE)


def _check_quantize_blockwise(launch: Callable[..., Any], device: torch.device) -> bool:
    weight, values = _weight(device), codebook_values("nf4").to(device)
    return _same(launch(weight, values, BLOCK_SIZE), blockwise.quantize_blockwise(weight, values, BLOCK_SIZE))


def _check_quantize_scales(launch: Callable[..., Any], device: torch.device) -> bool:
    absmax = _weight(device).float().abs().flatten()
    return _same(launch(absmax), double_quant.quantize_scales(absmax))


def _check_dequantize(launch: Callable[..., Any], device: torch.device) -> bool:
    weight, values = _weight(device), codebook_values("nf4").to(device)
    packed, absmax = blockwise.quantize_blockwise(weight, values, BLOCK_SIZE)
    codes, absmax2, offset = double_quant.quantize_scales(absmax)
    decoded = double_quant.dequantize_scales(codes, absmax2, offset)
    expected = blockwise.dequantize_blockwise(packed, decoded, values, BLOCK_SIZE, weight.numel()).bfloat16()
    result = launch(packed, codes, absmax2, offset, values, SHAPE, BLOCK_SIZE, torch.bfloat16)
    return _same((result,), (expected.view(SHAPE),))


def _whole(rows: int, columns: int, device: torch.device) -> Tensor:
    """A few whole numbers, the same every time: float32 [rows, columns]."""
    n = torch.arange(rows * columns, dtype=torch.float32, device=device)
    return (n * 0.7390851).sin().mul(4).round().view(rows, columns)


def _adapter(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x bfloat16, G bfloat16, A float32, a seed, and x without what its mask drops."""
    x, G, A = _whole(*SHAPE, device), _whole(SHAPE[0], RANK, device), _whole(RANK, SHAPE[1], device)
    seed = torch.tensor(0x0123456789ABCDEF, device=device)
    kept = torch.where(keep_mask(seed, *SHAPE, DROPOUT), x, 0)
    return x.bfloat16(), G.bfloat16(), A, seed, kept


def _check_project(launch: Callable[..., Any], device: torch.device) -> bool:
    x, _, A, seed, kept = _adapter(device)
    expected = _product(kept, A.T).mul(0.5).bfloat16()
    return _same((launch(x, A, seed, DROPOUT, 0.5),), (expected,))


def _check_grad_A(launch: Callable[..., Any], device: torch.device) -> bool:
    x, G, _, seed, kept = _adapter(device)
    return _same((launch(G, x, seed, DROPOUT),), (_product(G.T.float(), kept),))


def _check_masked_low_rank(launch: Callable[..., Any], device: torch.device) -> bool:
    _, G, A, seed, _ = _adapter(device)
    expected = torch.where(keep_mask(seed, *SHAPE, DROPOUT), _product(G.float(), A), 0)
    return _same((launch(G, A, seed, DROPOUT),), (expected.bfloat16(),))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b, exactly: whole numbers in float64, whatever the user allows for products in float32. float32."""
    return (a.double() @ b.double()).float()


CHECKS: dict[str, Callable[[Callable[..., Any], torch.device], bool]] = {
    "quantize_blockwise": _check_quantize_blockwise,
    "quantize_scales": _check_quantize_scales,
    "dequantize": _check_dequantize,
    "project": _check_project,
    "grad_A": _check_grad_A,
    "masked_low_rank": _check_masked_low_rank,
}


def _same(result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Whether shapes, dtypes and bits are the same."""
    return len(result) == len(expected) and all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in zip(result, expected, strict=True)
    )
