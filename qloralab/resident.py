"""How much memory this process holds."""

from __future__ import annotations

from pathlib import Path

import psutil


def resident_mb() -> float:
    """Resident memory of this process, in units of 10**6 bytes."""
    return psutil.Process().memory_info().rss / 1e6


def peak_mb() -> float:
    """The largest resident memory of this process so far, in units of 10**6 bytes.

    From Linux's VmHWM: ``resource.getrusage`` starts from the peak of the process that started this one. Elsewhere,
    the present value.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resident_mb()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6
