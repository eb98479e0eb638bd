"""The GPU that is measured, and the most that it can do.

**The ceilings** are what large buffers reach in the same run: reading alone, a copy, a product in bfloat16. Reading is
faster than a copy, because memory that turns from reading to writing and back waits meanwhile. So of the least traffic,
what is read and written alike takes the time of a copy, and what is read besides takes that of reading::

    bound  =  max(min(read + written, 2 written) / copy  +  max(read - written, 0) / reading,  flops / product)

Records from before reading was measured have the rate of the copy for all of it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F

from .case import Case
from .clock import Run, Timer, cuda, interleave
from .provider import Outcome, Provider, text
from .work import Work

MOST = 60  # samples
ROOM = 0.9  # of the free memory
STATE = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "celsius": "temperature.gpu",
}


@dataclass(frozen=True)
class Limits:
    """What a device can do at most.

    Attributes:
        copy_gb_per_s: bytes read plus bytes written by a large copy, 10**9 a second.
        gemm_tflop_per_s: a large bfloat16 product, 10**12 floating-point operations a second.
        read_gb_per_s: bytes read where none are written; None: as the copy.
    """

    copy_gb_per_s: float
    gemm_tflop_per_s: float
    read_gb_per_s: float | None = None

    def bound_ms(self, work: Work) -> float:
        """The least time of so much work."""
        alone = max(work.read - work.written, 0)
        copied = work.read + work.written - alone
        memory = copied / self.copy_gb_per_s + alone / (self.read_gb_per_s or self.copy_gb_per_s)
        return max(1e-6 * memory, 1e-9 * work.flops / self.gemm_tflop_per_s)


@dataclass(frozen=True)
class Device:
    """What is measured on.

    Attributes:
        device: for torch.
        name: of the hardware.
        cache: bytes of its last-level cache.
        prepare: makes the timers there, see ``clock.py``.
        free: bytes of memory that can be had now.
        id: what nvidia-smi knows it by, or None.
    """

    device: torch.device
    name: str
    cache: int
    prepare: Callable[[Sequence[Run], bool], Timer]
    free: Callable[[], int]
    id: str | None = None

    def lost(self) -> str | None:
        """Why nothing more can run on the device, or None: waiting raises what a kernel of before has done."""
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            return f"the device was lost: {text(error)}"
        return None

    def too_large(self, what: str, need: float) -> str | None:
        """Why so many bytes cannot be had, or None."""
        free = self.free()
        return f"{what} {need / 1e9:.1f} GB, {free / 1e9:.1f} are free" if need > ROOM * free else None


def cuda_device() -> Device:
    """The current GPU."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    device = torch.device("cuda", torch.cuda.current_device())

    def free() -> int:
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused

    return Device(device, properties.name, properties.L2_cache_size, cuda, free, f"GPU-{properties.uuid}")


def state(device: Device) -> dict[str, float | None]:
    """What nvidia-smi says of the device now: clocks in MHz, power and its limit in W, degrees Celsius. None each where
    it says nothing, or is not there."""
    found: dict[str, float | None] = dict.fromkeys(STATE)
    command = ["nvidia-smi", f"--id={device.id}", f"--query-gpu={','.join(STATE.values())}"]
    try:
        said = subprocess.run(
            [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True, timeout=10
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return found
    for name, cell in zip(STATE, said.split(","), strict=False):
        with suppress(ValueError):  # [N/A]
            found[name] = float(cell)
    return found


def ceilings(
    device: Device, nbytes: int = 2**30, shape: tuple[int, int, int] = (8192, 8192, 8192), seconds: float = 0.5
) -> Limits:
    """Measure the rates of reading and copying so many bytes and of a bfloat16 product (M, N, K); the best sample
    counts, it is a bound. Reading is torch's sum or, on a GPU, the kernel of ``gpu_read.py``, whichever is faster."""
    M, N, K = shape
    nbytes = min(nbytes, int(device.free() * ROOM) // 4) // 4 * 4
    source = torch.ones(nbytes // 4, device=device.device)
    target = torch.empty_like(source)
    x, weight = (torch.randn(rows, K, device=device.device).bfloat16() for rows in (M, N))
    runs: dict[str, Run] = {
        "copy": lambda: target.copy_(source),
        "gemm": lambda: F.linear(x, weight),
        "sum": source.sum,
    }
    if device.device.type == "cuda":
        from .gpu_read import read

        runs["read"] = lambda: read(source.view(torch.int32))
    timers = {name: device.prepare([run], True) for name, run in runs.items()}
    times = {name: min(some) for name, some in interleave(timers, seconds, fewest=5, most=MOST).items()}
    reading = min(times[name] for name in ("sum", "read") if name in times)
    return Limits(1e-6 * 2 * nbytes / times["copy"], 1e-9 * 2 * M * N * K / times["gemm"], 1e-6 * nbytes / reading)


def fields(outcome: Outcome, one: Provider, limits: Limits | None, case: Case | None) -> dict[str, Any]:
    """What a record says of a provider at a case (None: it was skipped), the bound and its share of it included."""
    bound, timer = None, outcome.timer
    if case and limits:
        bound = limits.bound_ms(case.least(one.dense))
    return {
        "status": outcome.status,
        "why": outcome.why,
        "ms": outcome.ms,
        "reps": len(outcome.samples),
        "error": outcome.error,
        "timing": timer and timer.kind,
        "note": timer and timer.note,
        "copies": outcome.copies,
        "roofline": limits and asdict(limits),
        "bound_ms": bound,
        "roofline_share": bound / outcome.ms["p50"] if bound and outcome.ms else None,
    }
