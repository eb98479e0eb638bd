"""Resident memory, against memory that was just taken."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qloralab import resident
from qloralab.resident import peak_mb, resident_mb

MB = 10**6
# Part of the taken memory that other threads and the allocator may add or give back meanwhile.
SLACK = 0.2


def touched(megabytes: int) -> np.ndarray:
    """A mapping of its own: malloc, once told to keep what is freed (``qloralab.allocator``), would recycle memory."""
    taken = np.frombuffer(mmap.mmap(-1, megabytes * MB), dtype=np.uint8)
    taken[:] = 1
    return taken


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="compared with Linux's /proc")
def test_the_unit_is_a_million_bytes():
    taken = touched(int(peak_mb() - resident_mb()) + 200)  # at its peak, the process holds that much
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    expected = pages * os.sysconf("SC_PAGE_SIZE") / MB
    assert resident_mb() == pytest.approx(expected, rel=0.01)
    assert peak_mb() == pytest.approx(expected, rel=0.01)
    del taken


def test_resident_grows_by_what_is_touched_and_shrinks_by_what_is_freed():
    before = resident_mb()
    taken = touched(200)
    assert resident_mb() - before == pytest.approx(200, rel=SLACK)
    del taken
    assert resident_mb() - before < 200 * SLACK


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_the_peak_stays_when_memory_is_freed():
    height = peak_mb()
    size = int(height - resident_mb()) + 200
    taken = touched(size)
    assert peak_mb() - height == pytest.approx(200, rel=SLACK)
    del taken
    assert peak_mb() - height > 200 * (1 - SLACK)
    assert resident_mb() < peak_mb()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_a_process_does_not_start_from_the_peak_of_its_parent():
    taken = touched(300)
    code = "from qloralab.resident import peak_mb; print(peak_mb())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    del taken
    assert float(child.stdout) < peak_mb() - 200


def test_without_proc_it_is_the_present_value(monkeypatch):
    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(resident.Path, "read_text", missing)
    assert peak_mb() == pytest.approx(resident_mb(), rel=0.01)
