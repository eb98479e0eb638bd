"""How fast the disk is when nothing is asked of it but one file: the measure for the pager's throughput.

Plain calls, pieces of 8 MiB in their order, `DEPTH` of them under way at once, past the kernel's cache (``O_DIRECT``)
where the file system can. The file has its blocks before the first measurement, as the pager's has.

* **sequential**: the file is written, then read.
* **mixed**: it is read by one thread while another writes it, half a file apart: as the pager does.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PIECE = 1 << 23  # bytes
DEPTH = 4


class Disk:
    """A file of its own, without a name.

    Args:
        directory: where.
        nbytes: of the file; rounded up to whole pieces.

    Attributes:
        nbytes: of the file.
        direct: whether the cache is bypassed. If not, it is dropped before each reading, and written out after each
            writing.
    """

    def __init__(self, directory: str | os.PathLike[str], nbytes: int):
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115  # open as long as the object
        self._descriptor = self._file.fileno()
        self.nbytes = -(-nbytes // PIECE) * PIECE
        os.posix_fallocate(self._descriptor, 0, self.nbytes)
        self.direct = self._bypass()
        self._written = mmap.mmap(-1, PIECE)  # begins at a page, as O_DIRECT wants
        self._written.write(os.urandom(PIECE))
        self._buffers = [mmap.mmap(-1, PIECE) for _ in range(DEPTH)]
        self.write()

    def write(self) -> float:
        """The seconds that writing all of it takes."""
        return self._timed(lambda: self._write(0))

    def read(self) -> float:
        """The seconds that reading all of it takes."""
        return self._timed(lambda: self._read(0))

    def mixed(self) -> float:
        """The seconds until all of it is read by one thread and written by another."""
        half = self.nbytes // PIECE // 2

        def both() -> None:
            with ThreadPoolExecutor(2) as pool:
                for done in [pool.submit(self._read, half), pool.submit(self._write, 0)]:
                    done.result()

        return self._timed(both)

    def close(self) -> None:
        """Give up the file."""
        self._file.close()

    def _bypass(self) -> bool:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        except OSError:
            return False
        return True

    def _timed(self, work) -> float:
        if not self.direct:
            os.posix_fadvise(self._descriptor, 0, self.nbytes, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def _write(self, first: int) -> None:
        with ThreadPoolExecutor(DEPTH) as pool:
            list(pool.map(lambda at: os.pwrite(self._descriptor, self._written, at), self._offsets(first)))
        os.fdatasync(self._descriptor)

    def _read(self, first: int) -> None:
        def read(at: int) -> None:
            os.preadv(self._descriptor, [self._buffers[at // PIECE % DEPTH]], at)  # whose bytes are of no interest

        with ThreadPoolExecutor(DEPTH) as pool:
            list(pool.map(read, self._offsets(first)))

    def _offsets(self, first: int) -> list[int]:
        """Bytes where the pieces begin, from a piece on and around."""
        count = self.nbytes // PIECE
        return [(first + i) % count * PIECE for i in range(count)]


def kind(directory: str | os.PathLike[str]) -> str:
    """The file system that a directory is on, as mounted: "ext4"; "unknown" where Linux does not say."""
    best, found = "", "unknown"
    mounts = Path("/proc/self/mounts")
    path = os.path.realpath(directory)
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        _, point, system, *_ = line.split()
        if len(point) >= len(best) and os.path.commonpath([path, point]) == point:
            best, found = point, system
    return found
