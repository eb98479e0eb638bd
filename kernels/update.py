"""The update of segments: C on CPUs, Triton on NVIDIA GPUs, and the formula of the rule where there is neither.

One call is one pass over the memory: in C (``cpu/update.h``) the threads share the segments without regard to where
they end, in Triton (``gpu/segments.py``) they are one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import dispatch
from .gpu import self_check
from .gpu.case import FILES
from .moment_codes import BLOCK_SIZE
from .rule import DTYPES, Rule, Segments

_PLAIN: tuple[Any, ...] = (Tensor, torch.nn.Parameter)  # of these very types it is known


def update_(rule: Rule, segments: Segments, rates: Any) -> None:
    """Update segments and their moments, in place.

    Kernels follow addresses, and nothing is checked here: the caller has made sure that `check` raises nothing.

    Raises:
        BuildError: QLORALAB_CPU=native, and the C does not compile here.
        NotServedError: QLORALAB_GPU=triton, and the kernel does not serve.
    """
    params = segments.params
    launch = kernel(rule, segments.scales is not None, params[0].device) if params else None
    if launch is None:
        rule.apply_(segments, rates)
    else:
        launch(segments, rates)
        increment_version(params)


def kernel(rule: Rule, has_codes: bool, device: torch.device) -> Callable[[Segments, Any], None] | None:
    """What updates segments on a device; None: the formula does.

    Raises:
        BuildError, NotServedError: as for `update_`.
    """
    if rule.kernel is None:
        return None
    name = f"{rule.kernel}_8bit" if has_codes else rule.kernel
    if device.type == "cpu":
        library = dispatch.native()
        return None if library is None else library.update(name)
    if device.type == "cuda":
        return self_check.kernel(name, device) if name in FILES else None
    return None


def check(segments: Segments) -> None:
    """Refuse what no implementation may see.

    Raises:
        TypeError: a tensor has another dtype, or its address does not lead to its elements.
        ValueError: a tensor is not contiguous, not of one dimension, not of its length or not on the device of the
            first one; a step is below 1; or the lists differ in length.
    """
    params = segments.params
    sizes, dtypes = [p.numel() for p in params], [p.dtype for p in params]
    device = params[0].device if params else torch.device("cpu")
    lists = [("params", params, dtypes, sizes), ("grads", segments.grads, dtypes, sizes)]
    moment = torch.float32 if segments.scales is None else torch.uint8
    lists += [(f"moments[{k}]", some, repeat(moment), sizes) for k, some in enumerate(segments.moments)]
    blocks = [-(-n // BLOCK_SIZE) for n in sizes]
    lists += [(f"scales[{k}]", some, repeat(torch.float32), blocks) for k, some in enumerate(segments.scales or ())]
    for name, entries in [*((one[0], one[1]) for one in lists), ("steps", segments.steps)]:
        if len(entries) != len(params):
            raise ValueError(f"{name} has {len(entries)} entries, and params has {len(params)}")
    for i, dtype in enumerate(dtypes):
        if dtype not in DTYPES:
            raise TypeError(f"params[{i}] is {dtype}, not float32, bfloat16 or float16")
    for one in lists:
        _check(*one, device)
    for i, step in enumerate(segments.steps):
        if step < 1:
            raise ValueError(f"steps count from 1; steps[{i}] is {step}")


def _check(
    name: str, tensors: Sequence[Tensor], dtypes: Iterable[torch.dtype], sizes: Sequence[int], device: torch.device
) -> None:
    for i, (tensor, dtype, n) in enumerate(zip(tensors, dtypes, sizes, strict=False)):
        if not has_memory(tensor):
            raise TypeError(f"{name}[{i}] is a {type(tensor).__name__} ({tensor.layout}) without memory of its own")
        if tensor.dtype is not dtype:
            raise TypeError(f"{name}[{i}] is {tensor.dtype}, not {dtype}")
        if tensor.shape != (n,) or not tensor.is_contiguous() or tensor.device != device:
            found = f"{list(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"
            raise ValueError(f"{name}[{i}] is not contiguous [{n}] on {device}, but {found}")


def has_memory(tensor: Tensor) -> bool:
    """Whether the address of a tensor leads to its elements.

    Not so for subclasses that only stand for other tensors (``DTensor``, quantized weights, what is being traced), for
    other layouts than strided, and for views whose memory is still to be negated or filled with zeros.
    """
    kind: Any = type(tensor)
    plain = kind in _PLAIN or kind.__torch_dispatch__ is _PLAIN[0].__torch_dispatch__
    return plain and tensor.layout is torch.strided and not tensor.is_neg() and not tensor._is_zerotensor()
