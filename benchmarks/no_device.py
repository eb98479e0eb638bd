"""The GPU's operators on a machine that has none: everything that the host does, and nothing that a device would.

Triton's driver is replaced by `Driver`: kernels are compiled for a real target, the JIT binds, looks up and launches as
it always does, and the launcher writes down what it was given instead of calling CUDA. So does what stands for the
driver's function where launches are replayed, in C (``no_device.c``). The operators of ``kernels/gpu`` serve CPU
tensors, but for those that quantize. What a kernel would have written is whatever the memory held; products that a GPU
gives to cuBLAS run on the CPU, so shapes are to be small.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as active

from qloralab.kernels.cpu.build import load

TARGET = GPUTarget("cuda", 90, 32)
STREAM = 7  # the handle of the current stream

_names = ["none"]  # by the handle of the function
_taken = 0  # launches that were asked for


class Launch(NamedTuple):
    """A launch as the driver got it.

    Attributes:
        name: of the kernel.
        grid, threads, shared, stream: see ``program.Launch``.
        dependent: whether it has the attribute of a programmatic dependent launch.
        parameters: their bits; addresses are 64.
    """

    name: str
    function: int
    grid: tuple[int, ...]
    threads: int
    shared: int
    stream: int
    dependent: bool
    parameters: tuple[int, ...]


def launches() -> list[Launch]:
    """Those since the last call of this, of which there may be a thousand."""
    global _taken
    first, _taken = _taken, _driver().launched()
    return [_launch(_driver().launch(number).contents) for number in range(first, _taken)]


def function(name: str, sizes: Sequence[int]) -> int:
    """The handle of a new function with parameters of so many bytes."""
    _names.append(name)
    known = _driver().sizes_of(len(_names) - 1)
    for number, size in enumerate(sizes):
        known[number] = size
    return len(_names) - 1


class _Taken(ctypes.Structure):
    """``Launch`` of no_device.c."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("function", "stream")),
        *((name, ctypes.c_uint32 * 3) for name in ("grid", "block")),
        *((name, ctypes.c_uint32) for name in ("shared", "dependent", "attributes", "count")),
        ("parameters", ctypes.c_uint64 * 64),
    )


@functools.cache
def _driver() -> ctypes.CDLL:
    """The functions of no_device.c, with CUDA's header as Triton has it."""
    header = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library = load([Path(__file__).with_suffix(".c")], "portable", [f"-I{header}"])
    library.launch.argtypes = library.sizes_of.argtypes = (ctypes.c_int64,)
    library.launch.restype = library.next.restype = ctypes.POINTER(_Taken)
    library.launched.restype = ctypes.c_int64
    library.sizes_of.restype = ctypes.POINTER(ctypes.c_uint8)
    return library


def _launch(one: Any) -> Launch:
    assert one.attributes == one.dependent
    assert tuple(one.block[1:]) == (1, 1)
    parameters = tuple(one.parameters[: one.count])
    name, grid = _names[one.function], tuple(one.grid)
    return Launch(name, one.function, grid, one.block[0], one.shared, one.stream, bool(one.dependent), parameters)


_FORMATS = {"i32": "<i", "u32": "<I", "i64": "<q", "u64": "<Q", "fp32": "<f"}


class _Launcher:
    """What Triton's launcher hands to the driver, written down."""

    def __init__(self, source: Any, metadata: Any):
        self._kinds = tuple(source.signature.values())
        passed = [kind for kind in self._kinds if kind != "constexpr"]
        sizes = [8 if kind[0] == "*" else struct.calcsize(_FORMATS[kind]) for kind in passed]
        function(metadata.name, [*sizes, 8, 8])  # behind them, pointers to scratch memory

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: int, metadata: Sequence[int], _1: Any, _2: Any, _3: Any,
        *values: Any,
    ) -> None:  # fmt: skip
        one = _driver().next().contents
        one.function, one.stream, one.shared, one.dependent, one.attributes = function, stream, metadata[2], 0, 0
        one.grid[:], one.block[:] = (x, y, z), (32 * metadata[0], 1, 1)
        passed = [(kind, value) for kind, value in zip(self._kinds, values, strict=True) if kind != "constexpr"]
        bits = [_bits(kind, value) for kind, value in passed] + [0, 0]
        one.count = len(bits)
        one.parameters[: len(bits)] = bits


def _bits(kind: str, value: Any) -> int:
    if kind.startswith("*"):
        return 0 if value is None else value.data_ptr()
    return int.from_bytes(struct.pack(_FORMATS[kind], value), "little")


class Driver:
    """What Triton asks of a driver, for a device that is not there."""

    launcher_cls = _Launcher

    def __init__(self, target: GPUTarget = TARGET):
        self._target = target
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (0, len(_names) - 1, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232448, "multiprocessor_count": 132},
        )

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return STREAM

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def pretend() -> Iterator[None]:
    """Serve eager calls with CPU tensors by the GPU's operators, inside the body. It is the whole process'."""
    import qloralab.kernels.cpu.operators  # noqa: F401  # registers itself, and is replaced
    from qloralab.kernels.gpu import operators, program, replay, self_check
    from qloralab.lora import ops as lora_ops
    from qloralab.nf4 import ops
    from qloralab.nf4.operator import backend

    found = {**vars(ops), **vars(lora_ops)}
    implementations = [found[name].implementations for name in operators.KERNELS if not name.startswith("quantize")]
    before = [dict(one) for one in implementations], self_check._failure, program.driver
    active.set_active(Driver())  # pyright: ignore[reportArgumentType]
    self_check._failure = lambda *_: ""  # there are no results to check
    address = ctypes.cast(_driver().launch_kernel, ctypes.c_void_p).value or 0
    program.driver = lambda: address
    replay.clear()
    for one in implementations:
        one[backend("CPU")] = one[backend("CUDA")]
    try:
        yield
    finally:
        for one, right in zip(implementations, before[0], strict=True):
            one.update(right)
        _, self_check._failure, program.driver = before
        self_check._passed.clear()
        self_check._serving.clear()
        replay.clear()
        active._active = None
