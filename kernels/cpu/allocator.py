"""PyTorch's memory on CPUs: what a tensor leaves serves the next tensor of its size.

PyTorch asks for memory with ``posix_memalign``, aligned to 64 bytes. The GNU C library serves that by looking for a
free chunk that is 96 bytes larger, and cuts off what is too much. So the hole that a freed tensor leaves is too small
for the next tensor of its size, and what was cut off soon belongs to something else. A training step frees and makes
tensors of a few sizes between others that stay, and so leaves holes that nothing fills: of 2,630 MB that steps of the
default job took in float32, 500.

``install`` gives PyTorch an allocator (``c10::SetCPUAllocator``) that asks ``malloc`` for 64 bytes more and aligns
inside. A hole then fits the next tensor of its size exactly, at no cost in time. It holds for the whole process, for
tensors made from then on, and there is no way back. The program installs it, ``import qloralab`` does not.

It is C++, because PyTorch's interface is: it needs a C++ compiler (``g++`` beside ``gcc``) and PyTorch's headers, which
are in its wheels.
"""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import torch

from .build import load

SOURCE = Path(__file__).with_name("allocator.cpp")


def install() -> None:
    """Let freed memory serve the next tensor of its size, in this process, from now on.

    Does nothing where the C library is not GNU's.

    Raises:
        BuildError: it cannot be compiled here: mostly there is no C++ compiler.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    _load().qloralab_install_allocator()


def give_back() -> None:
    """Return to the system what the C library keeps of memory that was freed (``malloc_trim``).

    The GNU C library returns the end of its memory by itself, and large pieces only until it has seen some freed. A
    process that has just let go of most of a model would keep all of it. Does nothing with another C library.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _load() -> ctypes.CDLL:
    home = Path(torch.__file__).parent
    headers = [f"-I{home / 'include'}", f"-DTORCH_VERSION={torch.__version__}"]  # the version makes it another library
    return load([SOURCE], "portable", [*headers, f"-L{home / 'lib'}", "-lc10", "-lstdc++"])
