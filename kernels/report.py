"""What serves each operator on a device, and why; and whether what environment variables ask for can be had."""

from __future__ import annotations

import os

import torch

from qloralab.lora import ops as lora_ops
from qloralab.nf4 import ops, processor
from qloralab.nf4.operator import Operator

from . import dispatch
from .cpu import operators as _cpu_operators  # noqa: F401  # registers them
from .cpu.build import BuildError
from .gpu import operators as gpu_operators
from .gpu import self_check


def check_environment() -> None:
    """Refuse what environment variables ask for and cannot have, before anything slow.

    Raises:
        ValueError: QLORALAB_CPU, QLORALAB_GPU or QLORALAB_ISA is none of its words, or this machine lacks the
            instruction set.
    """
    dispatch.asked_mode()
    self_check.mode()
    processor.isa()


def implementations(device: str = "cpu") -> list[dict[str, str]]:
    """What serves each operator on a device, and why: dictionaries with operator, device, implementation, why.

    Compiles where the choice asks for it, as the first operator would, but neither warns nor raises `BuildError`.

    Args:
        device: "cpu" or "cuda"; the current one of the GPUs.

    Raises:
        ValueError: another device, or what ``check_environment`` refuses.
    """
    declared = [name for name, value in (vars(ops) | vars(lora_ops)).items() if isinstance(value, Operator)]
    if device == "cuda":
        there = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        return gpu_operators.report(declared, there)
    if device != "cpu":
        raise ValueError(f"the device is cpu or cuda, not {device!r}")
    choice = dispatch.mode()
    opened = None if choice == "reference" else dispatch.opened()
    rows = []
    for name in (*declared, *dispatch.CHUNK_UPDATES):
        if opened is None:
            implementation, why = "reference", f"it was asked for ({dispatch.VARIABLE}=reference)"
        elif isinstance(opened, BuildError):
            implementation, why = "none" if choice == "native" else "reference", str(opened).splitlines()[0]
        elif not _has_cpu_kernel(name):
            implementation, why = "reference", "there is no C for it"
        else:
            threads = f"on the threads of {opened.pool.path.name}" if opened.pool else "on one thread"
            asked = f" ({processor.VARIABLE}={opened.isa})" if os.environ.get(processor.VARIABLE) == opened.isa else ""
            implementation, why = "native", f"C compiled for {opened.isa}{asked}, {threads}"
        rows.append({"operator": name, "device": "cpu", "implementation": implementation, "why": why})
    return rows


def _has_cpu_kernel(name: str) -> bool:
    """Whether something was registered for the CPU beside the reference, which serves any device."""
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    return name in dispatch.CHUNK_UPDATES or registered(f"qloralab::{name}", "CPU")
