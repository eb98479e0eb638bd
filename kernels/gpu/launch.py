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

**What is noted.** Inside ``noted`` the launches of a thread are also written down, as the driver gets them: for
``replay.py``, which issues them again without any of this. A kernel of Triton's has as parameters its arguments in
order, but for those that are constants to the compiler (None, or the number 1), then two pointers to scratch memory,
null where it needs none. That is checked against the parameters that its PTX declares. A kernel that is not Triton's
goes by ``launch_native``.
"""

from __future__ import annotations

import functools
import re
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from .interpreter import INTERPRETED
from .program import Launch, Program, Slot

_signatures: dict[Any, _Signature] = {}  # by function
_compiled: dict[tuple[Any, ...], Any] = {}
_notes: dict[int, list[Launch | None]] = {}  # by thread


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
LONG_WAY: bool = INTERPRETED.value or torch.version.hip is not None  # of every launch


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
    if _is_watched():
        kernel[grid](*arguments, **more, num_warps=num_warps, num_stages=num_stages)
        _note(None)
        return
    values = [*arguments, *[more[name] for name in kernel.arg_names[len(arguments) :]]]
    signature = _signatures.get(kernel.fn) or _signatures.setdefault(kernel.fn, _Signature(kernel, values))
    active: Any = driver.active
    device = active.get_current_device()
    key = (kernel.fn, device, num_warps, num_stages, *signature.kinds(values))
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = _compiled[key] = kernel[grid](*values, num_warps=num_warps, num_stages=num_stages)
    else:
        stream = active.get_current_stream(device)
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)
    if _notes:
        _note(_described(compiled, grid, values))


def launch_native(
    name: str,
    function: int,
    grid: Sequence[int],
    threads: int,
    shared: int,
    arguments: Sequence[tuple[str, Any]],
    dependent: bool = False,
    depend: bool = False,
) -> None:
    """Run a kernel that is not Triton's on the current stream of the current device.

    Args:
        name: of the kernel, for messages.
        function: the driver's handle.
        grid: of programs, three numbers at most.
        threads: of a program.
        shared: bytes of its dynamic shared memory.
        arguments: see ``program.Launch``.
        dependent: likewise.
        depend: see ``program.Program``.

    Raises:
        NotAProgramError: an argument is not of these types.
        RuntimeError: the driver refused it.
    """
    x, y, z = (*grid, 1, 1)[:3]
    one = Launch(name, function, (x, y, z), threads, shared, tuple(arguments), dependent)
    bases = list[int]()

    def place(tensor: Tensor) -> Slot:
        bases.append(tensor.data_ptr())
        return Slot(len(bases) - 1)

    program, packed = Program([one], place), struct.pack(f"{len(bases)}Q", *bases)
    active: Any = driver.active
    stream = active.get_current_stream(active.get_current_device())
    if not program(packed, stream, depend):
        torch.zeros((), device="cuda")  # gives this thread a context
        if not program(packed, stream, depend):
            raise RuntimeError(f"the launch of {name} failed: this thread has no context of CUDA")
    _note(one)


def stream(device: int) -> int | None:
    """The driver's handle of the current stream; None where launches go the long way, or a device is not the current.

    Args:
        device: its number; -1 for the current one.
    """
    if _is_watched():
        return None
    active: Any = driver.active
    current = active.get_current_device()
    return active.get_current_stream(current) if device in (current, -1) else None


def _is_watched() -> bool:
    """Whether each launch goes the long way."""
    hooks: Any = knobs.runtime
    return bool(LONG_WAY or hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)


@contextmanager
def noted() -> Iterator[list[Launch | None]]:
    """A list of what this thread launches inside the body; None stands for what cannot be launched again like that."""
    thread, notes = threading.get_ident(), list[Launch | None]()
    _notes[thread] = notes
    try:
        yield notes
    finally:
        del _notes[thread]


def _note(one: Launch | None) -> None:
    notes = _notes.get(threading.get_ident())
    if notes is not None:
        notes.append(one)


def _described(compiled: Any, grid: Sequence[int], values: Sequence[Any]) -> Launch | None:
    """A launch of a kernel of Triton's as the driver gets it; None where that is not known, as of a later Triton's."""
    try:
        kinds = _kinds(compiled)
        if kinds is None:
            return None
        arguments = [pair for pair in zip(kinds, values, strict=True) if pair[0] != "constexpr"]
        threads = compiled.metadata.target.warp_size * compiled.metadata.num_warps
        function, shared = compiled.function, compiled.metadata.shared
    except (AttributeError, ValueError):
        return None
    x, y, z = grid
    scratch = [("*i8", None)] * 2
    return Launch(compiled.name, function, (x, y, z), threads, shared, (*arguments, *scratch))


@functools.cache
def _kinds(compiled: Any) -> tuple[str, ...] | None:
    """Triton's types of a kernel's arguments; None where its launch takes more than them."""
    metadata, kinds = compiled.metadata, tuple(compiled.src.signature.values())
    if metadata.num_ctas != 1 or any(getattr(metadata, name, None) for name in _SPECIAL):
        return None
    passed = [_PTX.get(kind if kind[0] != "*" else "*") for kind in kinds if kind != "constexpr"]
    return kinds if declared(compiled.asm.get("ptx", ""), compiled.name) == [*passed, "u64", "u64"] else None


_SPECIAL = "global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl", "tensordesc_meta"
_PTX = {"*": "u64", "i32": "u32", "u32": "u32", "i64": "u64", "u64": "u64", "fp32": "f32"}


def declared(ptx: str, name: str) -> list[str]:
    """The types of the parameters of a kernel, as its PTX declares them: "u64", "u32", "f32"."""
    entry = re.search(rf"\.entry\s+{re.escape(name)}\s*\(([^)]*)\)", ptx)
    return re.findall(r"\.param\s+\.(\w+)", entry[1]) if entry else []
