"""The GPU's operators on a machine that has none: everything that the host does, and nothing that a device would.

Triton's driver is replaced by `Driver`: kernels are compiled for a real target, the JIT binds, looks up and launches as
it always does, and the launcher counts instead of calling CUDA. The operators of ``kernels/gpu`` serve CPU tensors, but
for those that quantize. What a kernel would have written is whatever the memory held; products that a GPU gives to
cuBLAS run on the CPU, so shapes are to be small.

"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as active

TARGET = GPUTarget("cuda", 90, 32)

launches: list[str] = []  # the names of the kernels, in the order of their launches


class _Launcher:
    """Counts a launch. The driver's own, in C, takes about as long as the call of this."""

    def __init__(self, source: Any, metadata: Any):
        self.name: str = metadata.name

    def __call__(self, *_: Any) -> None:
        launches.append(self.name)


class Driver:
    """What Triton asks of a driver, for a device that is not there."""

    launcher_cls = _Launcher

    def __init__(self, target: GPUTarget = TARGET):
        self._target = target
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (0, 0, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232448, "multiprocessor_count": 132},
        )

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def pretend() -> Iterator[None]:
    """Serve eager calls with CPU tensors by the GPU's operators, inside the body. It is the whole process'."""
    from qloralab.kernels.gpu import operators, self_check
    from qloralab.lora import ops as lora_ops
    from qloralab.nf4 import ops
    from qloralab.nf4.operator import backend

    found = {**vars(ops), **vars(lora_ops)}
    implementations = [found[name].implementations for name in operators.KERNELS if not name.startswith("quantize")]
    before = [dict(one) for one in implementations], self_check._failure
    active.set_active(Driver())  # pyright: ignore[reportArgumentType]
    self_check._failure = lambda *_: ""  # there are no results to check
    for one in implementations:
        one[backend("CPU")] = one[backend("CUDA")]
    try:
        yield
    finally:
        for one, right in zip(implementations, before[0], strict=True):
            one.update(right)
        self_check._failure = before[1]
        self_check._passed.clear()
        self_check._serving.clear()
        active._active = None
