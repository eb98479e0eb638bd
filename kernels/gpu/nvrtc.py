"""CUDA C++ without a compiler on the machine: NVRTC makes a cubin of it, and the driver loads that.

Both are called by ``cuda-bindings``, on which PyTorch's CUDA wheels depend since 2.11, as on NVRTC. Where they are
missing, ``why_not`` says so, and what would be compiled does not serve.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any


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


@functools.cache
def _bindings(name: str) -> Any:
    return import_module(f"cuda.bindings.{name}")


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of cuda-bindings' returns behind its status."""
    status, *rest = result
    if int(status):
        raise DriverError(f"{type(status).__name__}: {status.name}")
    return rest[0] if rest else None
