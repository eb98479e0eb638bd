"""Threads: those that PyTorch already has.

PyTorch runs its CPU operators on the threads of an OpenMP runtime. A library compiled with ``-fopenmp`` may bring a
second runtime, whose threads want the same cores while those of the first still wait for work. On two cores that cost
8 ms per call, on shapes that take 0.3 ms. So the C code creates no thread. It calls the entry into a parallel region
that torch's own code calls, the function behind ``#pragma omp parallel``::

    void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);

GCC's runtime (libgomp) has it, and LLVM's and Intel's (libomp, libiomp5) have it too. The runtime keeps one team per
calling thread. Ask for ``torch.get_num_threads()`` threads every time: for a smaller team libgomp ends the threads that
are left over, and creates them again later.

Several runtimes may be loaded in one process. The one to use is found as the dynamic loader finds it for torch: the
process's global symbols first (where a preloaded runtime is), then what ``libtorch_cpu`` was linked with.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch  # loads the runtime

RUNTIMES = ("libgomp", "libomp", "libiomp5")


@dataclass(frozen=True)
class Pool:
    """The OpenMP runtime that torch uses in this process: its file, and the addresses of two functions."""

    path: Path
    parallel: int  # void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned)
    thread_number: int  # int omp_get_thread_num(void), which counts the threads of a team from 0


def find() -> Pool | None:
    """The runtime that serves torch, or None: then kernels run on the thread that calls them."""
    if not torch.backends.openmp.is_available():
        return None
    for library in _scopes():
        try:
            functions = library.GOMP_parallel, library.omp_get_thread_num
        except AttributeError:
            continue
        parallel, thread_number = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
        path = _mapped_file(parallel)
        if path is not None and path.name.startswith(RUNTIMES):
            return Pool(path, parallel, thread_number)
    return None


def _scopes() -> list[ctypes.CDLL]:
    """Where the loader looks for the symbols of libtorch_cpu, in its order."""
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    scopes = [ctypes.CDLL(None)]
    with suppress(OSError):  # another operating system, or torch linked into something else
        scopes.append(ctypes.CDLL(str(torch_cpu), mode=os.RTLD_NOW | os.RTLD_NOLOAD))
    return scopes


def _mapped_file(address: int) -> Path | None:
    """The file that this address of the process is mapped from."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    for line in lines:  # 7f1200000000-7f1200010000 r-xp 00000000 fe:00 123   /usr/lib/libgomp.so.1
        span, _, _, _, _, *file = line.split(maxsplit=5)
        first, end = (int(one, 16) for one in span.split("-"))
        if first <= address < end:
            return Path(file[0]) if file else None
    return None
