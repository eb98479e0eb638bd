"""The operators compute in the dtype of their input; under ``torch.autocast`` too.

Inside ``torch.autocast`` PyTorch's own products convert their operands to a lower precision. A quantized layer has a
compute dtype of its own, the operators' fakes promise a result of the input's dtype, and the gradients must be of it.
So the references, whose products are PyTorch's, step out of autocast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


def without_autocast(function: Callable[Concatenate[Tensor, _P], _R]) -> Callable[Concatenate[Tensor, _P], _R]:
    """Run a function with autocast off for the device of its first argument, a tensor."""

    @functools.wraps(function)
    def run(x: Tensor, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not torch.is_autocast_enabled(x.device.type):
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return run
