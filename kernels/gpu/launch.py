"""Launching a kernel of Triton's without asking its compiler again.

``kernel[grid](...)`` is a question to the just-in-time compiler: it binds the arguments to names, looks at each of them
for what it compiles differently for, makes a text of that and looks it up, 40 microseconds for a kernel of 25
arguments. Here the answer is kept: the first launch goes that way and gives a ``CompiledKernel``, which later ones of
the same kind use as it is, for about 10 microseconds.

**Of the same kind** is what Triton compiles one kernel for: the device, the constants, the warps and stages, and of
each argument

=========  ==================================================================================================
a tensor   its dtype, and whether its address is a multiple of 16
a number   whether it is 1, a multiple of 16, and fits into 32 bits; of one that is not to be specialized, the last
None       that it is
=========  ==================================================================================================

In Triton's interpreter, on GPUs that are not NVIDIA's (where Triton looks at more), and while a profiler has hooks on
launches, each launch goes the long way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from .interpreter import INTERPRETED

_parameters: dict[Any, tuple[list[bool], list[str]]] = {}  # by function
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
    """Run a kernel on the current stream of the current device.

    Args:
        kernel: a function under ``@triton.jit``, its constants after its other parameters.
        grid: of programs, three numbers at most.
        arguments: of the kernel, by position.
        options: its constants, ``num_warps`` and ``num_stages``, by name.
    """
    grid = (*grid, 1, 1)[:3]
    if INTERPRETED.value or torch.version.hip or knobs.runtime.launch_enter_hook or knobs.runtime.launch_exit_hook:
        kernel[grid](*arguments, **options)
        return
    active: Any = driver.active
    device = active.get_current_device()
    specialized, names = _parameters.get(kernel.fn) or _parameters.setdefault(kernel.fn, _of(kernel))
    key = (kernel.fn, device, *options.values(), *map(_kind, arguments, specialized))
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*arguments, **options)
        return
    constants = [options[name] for name in names]
    compiled[grid](*arguments, *constants, stream=active.get_current_stream(device))


def _of(kernel: Any) -> tuple[list[bool], list[str]]:
    """Of each parameter of a kernel, whether Triton compiles for its value; and the names of the constants."""
    constants = [parameter.name for parameter in kernel.params if parameter.is_constexpr]
    return [not parameter.do_not_specialize for parameter in kernel.params], constants


def _kind(argument: Any, specialized: bool) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if argument is None or isinstance(argument, float):
        return type(argument)
    small = -(2**31) <= argument < 2**31
    return (argument == 1, argument % 16 == 0, small) if specialized else small
