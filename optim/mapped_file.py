"""State in a file that is mapped into memory: paging on a CPU, by the calls that a kernel offers for it.

A shared mapping makes bytes of a file appear at addresses. By itself the kernel reads them when they are touched, a
page of 4 KiB at a time, writes them back when it sees fit, and drops them when memory is short. That reads late and in
small pieces, and it keeps what was used last, which an optimizer needs last. So the pager says what is wanted
(``pager.py``), and the arena asks the kernel for it::

    fetch   madvise(POPULATE_WRITE)      reads, and maps every page writable: no page fault is left for the update
    evict   madvise(DONTNEED)            takes the pages out of this process
            sync_file_range              writes what was changed: begins all ranges, then waits for the disk
            posix_fadvise(DONTNEED)      takes them out of the kernel's cache

The calls run on threads, so that the disk reads and writes while the update runs; two threads read, so that the disk
always has a request. Bytes that are to stay are anonymous memory, mapped over the same addresses; the kernel does not
write that to the file. ``mincore`` tells what is really in memory.

**The kernel's own time** is what paging costs on a fast disk, and it is by the page. Two things make it small. Where
the file system has large folios (ext4 from Linux 6.16, XFS), the mapping is advised MADV_HUGEPAGE and MADV_RANDOM: then
a fault reads the 2 MiB around it as one folio, no more and no less. Elsewhere madvise(WILLNEED) has the range read
ahead, in pages; which of the two it is, is tried out. And a page that is mapped has to be made read-only before it is
written to the disk, each with a message to the other processors; so pages are unmapped first, all at once. Measured
with 2 GB of state on 2 processors: 0.62 GB/s read and written without either, 1.26 without large folios, 2.3 with both,
and 2.5 with the second thread that reads.

The file has no name: it is gone when the last reference is, also after a kill. All of its blocks are allocated at the
start, so that a full disk is an error there, and not a signal (SIGBUS) in the middle of an update.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .arena import ALIGNMENT, Ranges, Ticket, between

PAGE = mmap.PAGESIZE
IN_MEMORY = {0x01021994: "tmpfs", 0x858458F6: "ramfs"}  # linux/magic.h

_POPULATE_READ, _POPULATE_WRITE = 22, 23  # linux/mman.h; from Linux 5.14
_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin
_WAIT_WRITE_WAIT = 7  # SYNC_FILE_RANGE_WAIT_BEFORE | WRITE | WAIT_AFTER
_FIXED = 0x10  # MAP_FIXED


class MappedFile:
    """Bytes in an unlinked file, mapped; an arena (``arena.py``).

    Args:
        nbytes: how many.
        keep: ranges that stay in memory. The file has no blocks for them.
        directory: where the file is made; None: the first of the directory for temporary files, /var/tmp and the
            current one that is on a disk.

    Raises:
        OSError: the file system has too little room, or is in memory itself; no file can be made there.
        NotImplementedError: the system is not Linux.
    """

    def __init__(self, nbytes: int, keep: Ranges = (), directory: str | os.PathLike[str] | None = None):
        if sys.platform != "linux":
            raise NotImplementedError(f"paging to a file needs Linux; this is {sys.platform}")
        self.failure: Exception | None = None
        folder = _on_disk(directory)
        self.where = f"a file in {folder}"
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # open as long as the arena lives
        weakref.finalize(self, self._file.close)
        os.ftruncate(self._file.fileno(), nbytes)
        self._allocate(nbytes, keep, folder)
        mapping = mmap.mmap(self._file.fileno(), nbytes)  # lives as long as the tensor
        self.bytes = torch.frombuffer(mapping, dtype=torch.uint8)
        self._address = self.bytes.data_ptr()
        self._large_folios = self._advise_large_folios(between(nbytes, keep))
        for first, end in keep:
            self._stay(first, end - first)
        # The first that was submitted never waits for a later one, so two that read do not wait for each other either.
        self._reader, self._writer = ThreadPoolExecutor(2, "qloralab-reads"), ThreadPoolExecutor(1, "qloralab-writes")

    def fetch(self, ranges: Ranges, after: Ticket | None) -> Ticket:
        """Read on a thread. Returns a future."""
        return self._reader.submit(self._fetch, ranges, after)

    def wait(self, ticket: Ticket) -> float:
        """The seconds until the future was done.

        Raises:
            OSError: the disk could not be read.
        """
        future: Future[None] = ticket
        if future.done():
            future.result()
            return 0.0
        start = time.perf_counter()
        future.result()
        return time.perf_counter() - start

    def evict(self, ranges: Ranges, after: Ticket | None) -> Ticket:
        """Write and drop on another thread. Returns a future that has no exception: see ``failure``.

        A fetch that is still waiting for its turn would otherwise bring in what has just left. No two wait for each
        other: what a fetch waits for is an eviction from before it, and evictions run in their order.
        """
        return self._writer.submit(self._evict, ranges, after)

    def recall(self) -> None:
        """Nothing: what stays is anonymous memory, which only swapping takes away."""

    def resident_bytes(self) -> int:
        """The pages in memory, by ``mincore``: in the kernel's cache, mapped here or not."""
        pages = torch.zeros(-(-len(self.bytes) // PAGE), dtype=torch.uint8, device="cpu")
        _check(_libc().mincore(self._address, len(self.bytes), pages.data_ptr()), "mincore")
        return int(pages.bitwise_and_(1).sum()) * PAGE

    def rss_bytes(self) -> int:
        """The pages mapped here: this arena's part of the process's resident set, from /proc/self/smaps."""
        total, inside = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            key, *rest = line.split()
            if not key.endswith(":"):
                first, end = (int(number, 16) for number in key.split("-"))
                inside = first < self._address + len(self.bytes) and end > self._address
            elif inside and key == "Rss:":
                total += int(rest[0]) * 1024
        return total

    def _fetch(self, ranges: Ranges, after: Future[None] | None) -> None:
        if after is not None:
            after.result()
        for first, end in ranges if not self._large_folios else ():
            self._advise(first, end, mmap.MADV_WILLNEED)
        for first, end in ranges:
            try:
                self._advise(first, end, _POPULATE_WRITE)
            except OSError as error:
                if error.errno != 22:  # EINVAL: an older kernel
                    raise OSError(error.errno, f"the optimizer's state could not be read from {self.where}") from error
                self.bytes[first:end:PAGE].sum()

    def _evict(self, ranges: Ranges, after: Future[None] | None) -> None:
        if after is not None:
            after.exception()  # waits; whoever asked for the bytes is told of it
        for first, end in ranges:
            self._advise(first, end, mmap.MADV_DONTNEED)
        try:
            for how in (_WRITE, _WAIT_WRITE_WAIT):
                for first, end in ranges:
                    done = _libc().sync_file_range(self._file.fileno(), first, end - first, how)
                    _check(done, f"the optimizer's state could not be written to {self.where}")
        except OSError as error:
            self.failure = self.failure or error
            return
        for first, end in ranges:
            os.posix_fadvise(self._file.fileno(), first, end - first, os.POSIX_FADV_DONTNEED)

    def _advise_large_folios(self, away: Ranges) -> bool:
        """Ask for folios of 2 MiB, and find out whether there are any: does one page that is read bring its folio?"""
        if not away:
            return False
        size, first = len(self.bytes), away[0][0]
        end = min(first + ALIGNMENT, size)
        resident = torch.zeros(-(-(end - first) // PAGE), dtype=torch.uint8, device="cpu")
        try:
            self._advise(0, size, mmap.MADV_HUGEPAGE)
            self._advise(0, size, mmap.MADV_RANDOM)
            self._advise(first, first + PAGE, _POPULATE_READ)
            _check(_libc().mincore(self._address + first, end - first, resident.data_ptr()), "mincore")
        except OSError:
            found = False
        else:
            found = bool((resident & 1).all())
        self._advise(first, end, mmap.MADV_DONTNEED)
        os.posix_fadvise(self._file.fileno(), first, end - first, os.POSIX_FADV_DONTNEED)
        if not found:
            self._advise(0, size, mmap.MADV_NORMAL)
        return found

    def _advise(self, first: int, end: int, advice: int) -> None:
        _check(_libc().madvise(self._address + first, end - first, advice), "madvise")

    def _allocate(self, nbytes: int, keep: Ranges, folder: Path) -> None:
        away = between(nbytes, keep)
        try:
            for first, end in away:
                os.posix_fallocate(self._file.fileno(), first, end - first)
        except OSError as error:
            self._file.close()
            wanted, free = sum(end - first for first, end in away), os.statvfs(folder)
            left = free.f_bavail * free.f_frsize
            raise OSError(
                error.errno,
                f"the optimizer's state needs a file of {wanted / 1e9:.2f} GB in {folder}, which has {left / 1e9:.2f} "
                f"GB left: {os.strerror(error.errno or 0)}. state_dir= (or TMPDIR) names another directory",
            ) from None

    def _stay(self, first: int, length: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED
        wanted = self._address + first
        found = _libc().mmap(wanted, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if found != wanted:
            number = ctypes.get_errno()
            why = os.strerror(number)
            raise OSError(number, f"there are no {length / 1e6:.0f} MB of memory for the optimizer's state: {why}")
        _libc().madvise(wanted, length, mmap.MADV_HUGEPAGE)  # fewer entries in the page tables; not all kernels have it


def _on_disk(directory: str | os.PathLike[str] | None) -> Path:
    """The directory, or the first of the usual ones, that is not in memory itself."""
    candidates = [tempfile.gettempdir(), "/var/tmp", os.curdir] if directory is None else [directory]
    reasons = []
    for candidate in candidates:
        if not os.path.isdir(candidate):
            reasons.append(f"{candidate} is no directory")
        elif kind := IN_MEMORY.get(_file_system(candidate)):
            reasons.append(f"{candidate} is in memory ({kind})")
        else:
            return Path(candidate).absolute()
    raise OSError(f"{', '.join(reasons)}. The optimizer's state pages to a disk: state_dir= (or TMPDIR) names one")


def _file_system(directory: str | os.PathLike[str]) -> int:
    """The magic number of the file system, as in linux/magic.h."""
    answer = ctypes.create_string_buffer(512)  # struct statfs: its first field is f_type, of the size of a long
    _check(_libc().statfs(os.fsencode(directory), answer), f"statfs {directory}")
    return ctypes.c_long.from_buffer(answer).value & 0xFFFFFFFF


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


_loaded: Any = None


def _libc() -> Any:
    """The C library, whose calls leave the interpreter's lock; those of ``mmap`` and ``os`` partly hold it."""
    global _loaded
    if _loaded is None:
        library: Any = ctypes.CDLL(None, use_errno=True)
        size, address, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
        signatures: dict[str, Sequence[Any]] = {
            "madvise": (address, size, number),
            "mincore": (address, size, address),
            "mmap": (address, size, number, number, number, ctypes.c_int64),
            "sync_file_range": (number, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint),
            "statfs": (ctypes.c_char_p, ctypes.c_char_p),
        }
        for name, arguments in signatures.items():
            getattr(library, name).argtypes = arguments
        library.mmap.restype = address
        _loaded = library
    return _loaded
