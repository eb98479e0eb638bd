"""CUDA C++ without a compiler on the machine: NVRTC makes a cubin of it, the driver loads and launches that.

Both come with ``cuda-bindings``, on which PyTorch's CUDA wheels depend since 2.11, NVRTC with them. Where they are
missing, ``why_not`` says so, and what would be compiled does not serve.

**A launch that depends** (programmatic dependent launch, sm_90 and newer) may begin while the grid before it ends; the
kernel itself waits where it needs what that grid wrote.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor


class DriverError(RuntimeError):
    """NVRTC or the driver has refused. The message says what."""


@functools.cache
def why_not() -> str:
    """Why nothing can be compiled here, in words; empty where it can."""
    try:
        _bindings("nvrtc").nvrtcVersion()
    except ImportError:
        return "cuda-bindings is not installed"
    except Exception as error:  # the library itself is looked for at the first call
        return f"NVRTC cannot be loaded: {' '.join(str(error).split())[:200]}"
    return ""


def compile_source(source: Path, target: str, options: Sequence[bytes] = ()) -> bytes:
    """Compile a file of CUDA C++.

    Args:
        source: the file; it includes nothing.
        target: such as ``"sm_90"``.
        options: for NVRTC.

    Returns:
        machine code, a cubin.

    Raises:
        DriverError: it does not compile, with the compiler's first lines.
    """
    nvrtc = _bindings("nvrtc")
    program = _checked(nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 0, None, None))
    try:
        options = [f"--gpu-architecture={target}".encode(), b"--std=c++17", *options]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(status):
            log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise DriverError(f"{source.name} for {target}: {log.decode(errors='replace').strip()[:1000]}")
        cubin = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
        return bytes(cubin)
    finally:
        _checked(nvrtc.nvrtcDestroyProgram(program))


def load(cubin: bytes, name: str, shared: int) -> int:
    """Load a kernel on the current device, for the length of the process.

    Args:
        cubin: of ``compile_source``.
        name: of the kernel, declared as ``extern "C"``.
        shared: bytes of dynamic shared memory that a launch may ask for.

    Returns:
        a handle (CUfunction).
    """
    driver = _bindings("driver")
    function = _checked(driver.cuModuleGetFunction(_checked(driver.cuModuleLoadData(cubin)), name.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(function, attribute, shared))
    return int(function)


def launch_native(
    function: int,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared: int,
    stream: int,
    arguments: Sequence[Any],
    dependent: bool,
) -> None:
    """Launch a kernel on the current device.

    Args:
        function: of ``load``.
        grid, block: CTAs, and threads of each.
        shared: bytes of dynamic shared memory.
        stream: a handle (CUstream).
        arguments: tensors and None, which are pointers; int, 32 bits; float, 32 bits.
        dependent: whether it may begin while the grid before it ends.
    """
    driver = _bindings("driver")
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = block
    config.sharedMemBytes, config.hStream = shared, driver.CUstream(stream)
    if dependent:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
    values, types = zip(*map(_c_argument, arguments), strict=True)
    _checked(driver.cuLaunchKernelEx(config, driver.CUfunction(function), (values, types), 0))


@functools.cache
def _bindings(name: str) -> Any:
    return import_module(f"cuda.bindings.{name}")


def _c_argument(value: Any) -> tuple[Any, Any]:
    """A value and its type in C."""
    if value is None or isinstance(value, Tensor):
        return 0 if value is None else value.data_ptr(), ctypes.c_void_p
    return (value, ctypes.c_float) if isinstance(value, float) else (value & 0xFFFFFFFF, ctypes.c_uint)


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of cuda-bindings' returns behind its status."""
    status, *rest = result
    if int(status):
        raise DriverError(f"{type(status).__name__}: {status.name}")
    return rest[0] if rest else None
