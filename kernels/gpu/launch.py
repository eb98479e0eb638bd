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

_parameters: dict[Any, list[tuple[str, str]]] = {}  # by function: of each parameter the name, and what counts of it
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any, grid: Sequence[int], *arguments: Any, num_warps: int = 4, num_stages: int = 3, **more: Any
) -> None:
    """Run a kernel on the current stream of the current device.

    Args:
        kernel: a function under ``@triton.jit``.
        grid: of programs, three numbers at most.
        arguments: of the kernel, its first ones.
        num_warps, num_stages: see Triton.
        more: the others, constants too, by name.
    """
    grid = (*grid, 1, 1)[:3]
    if INTERPRETED.value or torch.version.hip or knobs.runtime.launch_enter_hook or knobs.runtime.launch_exit_hook:
        kernel[grid](*arguments, **more, num_warps=num_warps, num_stages=num_stages)
        return
    parameters = _parameters.get(kernel.fn) or _parameters.setdefault(kernel.fn, [*map(_described, kernel.params)])
    values = [*arguments, *(more[name] for name, _ in parameters[len(arguments) :])]
    active: Any = driver.active
    device = active.get_current_device()
    kinds = [_kind(value, what) for value, (_, what) in zip(values, parameters, strict=True)]
    key = (kernel.fn, device, num_warps, num_stages, *kinds)
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*values, num_warps=num_warps, num_stages=num_stages)
    else:
        compiled[grid](*values, stream=active.get_current_stream(device))


def _described(parameter: Any) -> tuple[str, str]:
    what = "constant" if parameter.is_constexpr else "size" if parameter.do_not_specialize else "value"
    return parameter.name, what


def _kind(argument: Any, what: str) -> Any:
    if what == "constant":
        return argument
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if argument is None or isinstance(argument, float):
        return type(argument)
    small = -(2**31) <= argument < 2**31
    return small if what == "size" else (argument == 1, argument % 16 == 0, small)
