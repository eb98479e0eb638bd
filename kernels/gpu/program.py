"""Launches as data, and several of them by one call of C (``launch.c``, compiled at first use).

A launch is what CUDA's driver takes for one: the handle of a function, its grid, the threads of a program, bytes of
dynamic shared memory, and the values of its parameters. Some are addresses, which another call has elsewhere. So a
`Program` keeps of each the number of a base and the bytes behind it, and takes the bases with each call: an array of
addresses, of operands, results and a workspace. All others are constants of the program.

The driver's function is asked of ``libcuda.so.1`` by name, at the first program: nothing is linked, so that this
compiles and loads where there is no GPU.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..cpu.build import load

SOURCE = Path(__file__).with_name("launch.c")
MOST_PARAMETERS = 64  # as launch.c has it
INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: this thread has used no GPU yet
# Tensors that stay where they are as long as the process, by their address: a program may have it as a constant.
RESIDENT: dict[int, Tensor] = {}
_FORMATS = {"i32": "<i4x", "u32": "<I4x", "i64": "<q", "u64": "<Q", "fp32": "<f4x"}  # by Triton's names


class Launch(NamedTuple):
    """A launch of a kernel.

    Attributes:
        name: of the kernel, for messages.
        function: the driver's handle, CUfunction.
        grid: of programs.
        threads: of a program.
        shared: bytes of dynamic shared memory of a program.
        arguments: Triton's type and the value of each parameter: "*bf16" or another pointer with a tensor, or None for
            a null pointer; "i32", "u32", "i64", "u64" and "fp32" with a number.
        dependent: whether it may start before the kernel in front of it has ended (programmatic dependent launch): it
            waits itself where it needs to, but for operands that were there before.
    """

    name: str
    function: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    arguments: tuple[tuple[str, Any], ...]
    dependent: bool = False


class Slot(NamedTuple):
    """Where an address is: bytes behind the base of a number."""

    base: int
    offset: int = 0


def resident(tensor: Tensor) -> Tensor:
    """The tensor, which stays from now on."""
    RESIDENT[tensor.data_ptr()] = tensor
    return tensor


class NotAProgramError(ValueError):
    """A launch has a parameter that a program cannot keep. The message says which."""


class Program:
    """Launches that are issued together.

    Attributes:
        launches: them, with a `Slot`, or an address that stays, in the place of each tensor.
    """

    def __init__(self, launches: Sequence[Launch], place: Callable[[Tensor], Slot | int | None]):
        """Args:
            launches: one or more.
            place: of a tensor: relative to a base; or its address, where that stays; None: nobody knows.

        Raises:
            NotAProgramError: a parameter has another type or no place, or there are too many of them; or a floating-
                point one is 0, whose sign a key does not tell.
            BuildError, OSError: there is no C compiler, or no driver.
        """
        self.launches = [one._replace(arguments=tuple(_placed(one, place))) for one in launches]
        kept = [(_Parameter * len(one.arguments))(*map(_parameter, one.arguments)) for one in self.launches]
        self._kept = kept, (_Launch * len(launches))(*map(_launch, self.launches, kept))
        self._run, self._launch = _library().qloralab_launch, driver()
        self._address, self._count = ctypes.addressof(self._kept[1]), len(launches)

    def __call__(self, bases: bytes, stream: int, depend: bool = False) -> bool:
        """Issue the launches, in order.

        Args:
            bases: the addresses, 64 bits each.
            stream: the driver's handle.
            depend: whether launches start before others have ended, if they may.

        Returns:
            whether they were; False where this thread has no context of CUDA yet, which a launch of Triton's makes.

        Raises:
            RuntimeError: the driver refused one.
        """
        failed = self._run(self._launch, self._address, self._count, bases, stream, depend)
        if not failed:
            return True
        if failed == INVALID_CONTEXT:
            return False
        raise RuntimeError(f"the launch of {self.launches[failed >> 32].name} failed: {_words(failed & 0xFFFFFFFF)}")


@functools.cache
def driver() -> int:
    """The address of cuLaunchKernelEx.

    Raises:
        OSError: there is no driver.
    """
    address = ctypes.cast(ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx, ctypes.c_void_p).value
    assert address is not None
    return address


class _Parameter(ctypes.Structure):
    _fields_ = (("slot", ctypes.c_int64), ("value", ctypes.c_uint64))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        *((name, ctypes.c_uint32) for name in ("threads", "shared", "dependent", "count")),
        ("parameters", ctypes.POINTER(_Parameter)),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    library = load([SOURCE], "portable")
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    library.qloralab_launch.argtypes = pointer, pointer, integer, ctypes.c_char_p, pointer, ctypes.c_int
    library.qloralab_launch.restype = integer
    return library


def _placed(one: Launch, place: Callable[[Tensor], Slot | int | None]) -> list[tuple[str, Any]]:
    """The arguments, without tensors."""
    if len(one.arguments) > MOST_PARAMETERS:
        raise NotAProgramError(f"{one.name} has {len(one.arguments)} parameters, of at most {MOST_PARAMETERS}")
    found = list[tuple[str, Any]]()
    for kind, value in one.arguments:
        if kind.startswith("*"):
            value = 0 if value is None else place(value)
            if value is None:
                raise NotAProgramError(f"{one.name} is given a tensor of unknown origin")
        elif kind not in _FORMATS or (kind == "fp32" and (value == 0 or abs(value) > _LARGEST)):
            raise NotAProgramError(f"{one.name} is given {value!r} as {kind}")
        found.append((kind, value))
    return found


_LARGEST = 3.4028234663852886e38  # of float32


def _parameter(argument: tuple[str, Any]) -> _Parameter:
    kind, value = argument
    if isinstance(value, Slot):
        return _Parameter(*value)
    constant = struct.pack("<Q" if kind.startswith("*") else _FORMATS[kind], value)
    return _Parameter(-1, int.from_bytes(constant, "little"))


def _launch(one: Launch, parameters: Any) -> _Launch:
    grid = (ctypes.c_uint32 * 3)(*one.grid)
    return _Launch(one.function, grid, one.threads, one.shared, one.dependent, len(parameters), parameters)


def _words(result: int) -> str:
    """The name and number of a CUresult."""
    name = ctypes.c_char_p()
    with suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuGetErrorName(result, ctypes.byref(name))
    return f"{(name.value or b'CUresult').decode()} ({result})"
