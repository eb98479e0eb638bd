"""What of an optimizer's state is in memory, sampled by a thread while it steps.

Three witnesses, none of which is the pager itself:

* ``mincore`` on all of the state: pages in the kernel's cache, whether this process has them mapped or not;
* the resident set of the mapping, from /proc/self/smaps;
* the growth of the process's whole resident set since before the optimizer was made, from /proc/self/status. So it has
  everything that the optimizer takes, tables and temporary tensors too, and neither parameters nor gradients.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import qloralab as ql

EVERY = 0.05  # seconds


def status_bytes(field: str) -> int:
    """A field of /proc/self/status, such as VmRSS or VmData, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


class Watch:
    """Takes samples while it is entered.

    Args:
        optimizer: to look at.
        before: bytes of VmRSS before it was made.

    Attributes:
        samples: by name, a list each: seconds since the start; mincore_mb, mapping_mb, process_mb, 10**6 bytes.
        ends: seconds when the steps ended.
    """

    def __init__(self, optimizer: ql.PagedAdamW, before: int):
        self._optimizer, self._before = optimizer, before
        self._start = time.perf_counter()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run)
        self.samples: dict[str, list[float]] = {"seconds": [], "mincore_mb": [], "mapping_mb": [], "process_mb": []}
        self.ends: list[float] = []

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def end_of_step(self) -> None:
        """Take a sample now, and note the time."""
        self.ends.append(round(time.perf_counter() - self._start, 3))
        self._sample()

    def _run(self) -> None:
        while not self._stop.wait(EVERY):
            self._sample()

    def _sample(self) -> None:
        with self._lock:
            at, paging = time.perf_counter() - self._start, self._optimizer.paging()
            process = status_bytes("VmRSS") - self._before
            values = (paging.resident_bytes, paging.rss_bytes or 0, process)
            self.samples["seconds"].append(round(at, 3))
            for name, value in zip(("mincore_mb", "mapping_mb", "process_mb"), values, strict=True):
                self.samples[name].append(round(value / 1e6, 1))
