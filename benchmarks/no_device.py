"""The GPU's operators on a machine that has none: everything that the host does, and nothing that a device would.

Triton's driver is replaced by `Driver`: kernels are compiled for a real target, the JIT binds, looks up and launches as
it always does, and the launcher counts instead of calling CUDA. The operators of ``kernels/gpu`` are registered for CPU
tensors, instead of the C ones. What a kernel would have written is whatever the memory held; products that a GPU gives
to cuBLAS run on the CPU, so shapes are to be small.

This changes the process for good: ``pretend`` is called before anything imports the operators, in a process of its own.
"""

from __future__ import annotations

import sys
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


def pretend() -> None:
    """Serve CPU tensors by the GPU's operators, from now on.

    Raises:
        RuntimeError: the operators are registered already.
    """
    if "qloralab.kernels.cpu.operators" in sys.modules:
        raise RuntimeError("the operators are registered already: pretend() comes first, in a process of its own")
    active.set_active(Driver())
    from qloralab.nf4.operator import Operator

    register = Operator.on

    def on(self: Operator, device: str, *around: Any) -> Any:
        if device == "CPU" or self._name.startswith("quantize"):  # weights are to hold something
            return lambda function: function
        return register(self, "CPU", *around)

    Operator.on = on
    from qloralab.kernels.gpu import self_check

    self_check._failure = lambda name, device: ""  # there are no results to check
