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
None       that it is; in the place of a tensor
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

_signatures: dict[Any, _Signature] = {}  # by function
_compiled: dict[tuple[Any, ...], Any] = {}


class _Signature:
    """The parameters of a kernel: their names, and what they are, as its first call has them."""

    def __init__(self, kernel: Any, values: Sequence[Any]):
        self.constants, self.tensors, self.numbers, self.sizes, self.others = (list[int]() for _ in range(5))
        for index, (parameter, value) in enumerate(zip(kernel.params, values, strict=True)):
            if parameter.is_constexpr:
                self.constants.append(index)
            elif value is None or isinstance(value, Tensor):
                self.tensors.append(index)
            elif isinstance(value, float):
                self.others.append(index)
            else:
                (self.sizes if parameter.do_not_specialize else self.numbers).append(index)

    def kinds(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """What these arguments are compiled for."""
        tensors = [values[i] for i in self.tensors]
        numbers = [values[i] for i in self.numbers]
        return (
            *[values[i] for i in self.constants],
            *[None if one is None else (one.dtype, not one.data_ptr() % 16) for one in tensors],
            *[(one == 1, not one % 16, one > _LARGEST) for one in numbers],
            *[values[i] > _LARGEST for i in self.sizes],
            *[type(values[i]) for i in self.others],
        )


_LARGEST = 2**31 - 1


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
    hooks: Any = knobs.runtime
    if INTERPRETED.value or torch.version.hip or hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
        kernel[grid](*arguments, **more, num_warps=num_warps, num_stages=num_stages)
        return
    values = [*arguments, *[more[name] for name in kernel.arg_names[len(arguments) :]]]
    signature = _signatures.get(kernel.fn) or _signatures.setdefault(kernel.fn, _Signature(kernel, values))
    active: Any = driver.active
    device = active.get_current_device()
    key = (kernel.fn, device, num_warps, num_stages, *signature.kinds(values))
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*values, num_warps=num_warps, num_stages=num_stages)
        return
    stream = active.get_current_stream(device)
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)
