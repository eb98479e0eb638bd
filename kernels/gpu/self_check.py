"""Whether Triton serves an operator on a device: chosen by ``QLORALAB_GPU``, checked at first use.

=========  ============================================================================================================
auto       the kernel where it compiles and passes the check; otherwise one warning that says why, and plain PyTorch
triton     the kernel, or ``NotServedError``
reference  plain PyTorch; Triton is not even imported
=========  ============================================================================================================

**The check.** The tests run the kernels in Triton's interpreter, which is a model of a GPU and no GPU: layouts, the
order of threads and the compiler itself are not in it. So the first call of a kernel on a device computes something
small twice, by the kernel and by the definition in ``nf4/``, and the kernel serves only if no bit differs. A dtype, a
block size or a number of levels of scales is another compilation, and has a check of its own at its first call: a
variant. That takes the compilation, which the program needs anyway, and some milliseconds. What failed is not tried
again. Sums are checked on whole numbers, which are the same in any order. Each kernel's file has its check: ``CHECKS``,
by name, functions from the launcher, a device and a variant to what the kernel computes and what the definition does.

The variable is read at the first call of a variant on a device; what serves there then, goes on to.

The check waits for the device, which is not allowed while a CUDA graph is captured: a first call within a capture
raises ``NotServedError``. Graphs ask for a call before the capture anyway: kernels are loaded at their first call.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..dispatch import warn
from .case import CUDA_FILES, FILES

VARIABLE = "QLORALAB_GPU"
MODES = ("auto", "triton", "reference")
SHAPE = (67, 127)  # of the weight of a check: an odd count, blocks that cross rows, a short last block
BLOCK_SIZE = 64

Check = Callable[..., tuple[Sequence[Tensor], Sequence[Tensor]]]

_lock = threading.RLock()
_passed: dict[tuple[Any, ...], str] = {}  # by name, device and variant: why it does not serve, "" where it does
_serving: dict[tuple[Any, ...], Callable[..., Any]] = {}  # the launchers that a call has got
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


def kernel(name: str, device: torch.device, *variant: Any) -> Callable[..., Any] | None:
    """The launcher of a kernel, one of ``case.FILES`` or ``CUDA_FILES``, or None where the reference is to run.

    Args:
        name: of the kernel.
        device: of the tensors.
        variant: what its check takes besides; none: the usual one.

    Raises:
        ValueError: QLORALAB_GPU is none of the three.
        NotServedError: the choice is triton, and the kernel does not serve; or this is the first call, in a capture.
    """
    found = _serving.get((name, device, *variant))
    if found is not None:
        return found
    choice = mode()
    if choice == "reference":
        return None
    why = reason(name, device, *variant)
    if not why:
        return _serving.setdefault((name, device, *variant), _launcher(name))
    if choice == "triton":
        raise NotServedError(f"{VARIABLE}=triton, and {name} is not served on {device}: {why}")
    note = f"It runs in plain PyTorch, many times slower. {VARIABLE}=reference asks for that silently."
    warn_once(name, why, note)
    return None


def reason(name: str, device: torch.device, *variant: Any) -> str:
    """Why a kernel does not serve on a device; empty where it does. Checks it, the first time.

    Raises:
        NotServedError: the first time is within the capture of a CUDA graph.
    """
    key = name, device, *variant
    found = _passed.get(key)
    if found is not None:
        return found
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise NotServedError(f"the first call of {name} on {device} is within the capture of a graph; call it before")
    with _lock:
        if key not in _passed:
            _passed[key] = _failure(*key)
        return _passed[key]


def warn_once(name: str, why: str, note: str) -> None:
    """Warn that a kernel is not in use; `note` says what is instead."""
    with _lock:
        first = name not in _warned
        _warned.add(name)
    if first:
        warn(f"qloralab's GPU kernel of {name} is not in use: {why}\n{note}")


def _failure(name: str, device: torch.device, *variant: Any) -> str:
    try:
        is_same = same(*_check(name)(_launcher(name), device, *variant))
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # whatever Triton, its compiler or the driver raise
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    for_ = f" for {', '.join(map(str, variant))}" if variant else ""
    return "" if is_same else f"its result differs from the definition's on {device}{for_}"


def _launcher(name: str) -> Callable[..., Any]:
    return getattr(_module(name), name)


def _check(name: str) -> Check:
    return _module(name).CHECKS[name]


def _module(name: str) -> Any:
    return import_module(f".{(FILES | CUDA_FILES)[name]}", __package__)


def same(result: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether shapes, dtypes and bits are the same."""
    return len(result) == len(expected) and all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in zip(result, expected, strict=True)
    )


def weight(device: torch.device) -> Tensor:
    """Numbers of many magnitudes, the same every time and without the user's random generator; a block of zeros."""
    n = torch.arange(math.prod(SHAPE), dtype=torch.float64, device=device)
    numbers = (n * 0.7390851).sin() * (n * 0.0123).cos().exp() * 0.02
    numbers[2 * BLOCK_SIZE : 3 * BLOCK_SIZE] = 0
    return numbers.bfloat16().view(SHAPE)


def whole(rows: int, columns: int, device: torch.device) -> Tensor:
    """A few whole numbers, the same every time: float32 [rows, columns]."""
    n = torch.arange(rows * columns, dtype=torch.float32, device=device)
    return (n * 0.7390851).sin().mul(4).round().view(rows, columns)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, exactly: whole numbers in float64, whatever the user allows for products in float32. float32."""
    return (a.double() @ b.double()).float()
