"""State in a mapped file: its bytes survive, what is evicted is not in memory, and a disk that fails is an error.

What the arena says of memory is what the kernel says, by ``mincore`` and /proc/self/smaps, and what is said of the file
is read from the file, past the arena, by ``pread`` and ``fstat``.
"""

from __future__ import annotations

import errno
import gc
import mmap
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qloralab.optim import mapped_file
from qloralab.optim.arena import Ranges, between
from qloralab.optim.mapped_file import IN_MEMORY, PAGE, MappedFile

UNIT = 1 << 21  # the unit of ranges: what one fault reads where there are large folios
NBYTES = 8 * UNIT
ALL: Ranges = [(0, NBYTES)]
TWO: Ranges = [(UNIT, 2 * UNIT), (5 * UNIT, 6 * UNIT)]  # a chunk has a range in each run of the state


def file_system(path: Path) -> str:
    """Of the mount that a directory is below."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    above = [(len(point), kind) for point, kind in mounts if path.resolve().is_relative_to(point)]
    return max(above)[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty directory on a disk."""
    if file_system(tmp_path) in IN_MEMORY.values():
        pytest.skip(f"{tmp_path} is on no disk: --basetemp names another directory")
    return tmp_path


def fill(arena: MappedFile, ranges: Ranges) -> Tensor:
    """Write something, and return a copy of all bytes."""
    for first, end in ranges:
        arena.bytes[first:end] = torch.randint(256, (end - first,), dtype=torch.uint8)
    return arena.bytes.clone()


def evict(arena: MappedFile, ranges: Ranges) -> None:
    assert arena.wait(arena.evict(ranges, None)) >= 0
    assert arena.failure is None


def fetch(arena: MappedFile, ranges: Ranges) -> None:
    assert arena.wait(arena.fetch(ranges, None)) >= 0


def in_file(arena: MappedFile, first: int, end: int) -> Tensor:
    """Bytes of the file, not by the mapping."""
    return torch.frombuffer(bytearray(os.pread(arena._file.fileno(), end - first, first)), dtype=torch.uint8)


def left(folder: Path) -> list[str]:
    """The descriptors and the mappings of files in a directory."""
    names = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            names.append(os.readlink(link))
        except FileNotFoundError:  # the descriptor that listed them
            continue
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [name for name in (*names, *maps) if str(folder) in name]


# bytes


@pytest.mark.parametrize("keep", [(), [(2 * UNIT, 4 * UNIT)]], ids=["nothing kept", "some kept"])
def test_bytes_are_zero_at_first(keep, folder):
    arena = MappedFile(NBYTES + 5, keep, folder)
    assert (arena.bytes.dtype, arena.bytes.shape) == (torch.uint8, (NBYTES + 5,))
    assert not arena.bytes.any()


def test_only_what_is_evicted_has_to_be_in_the_file(folder):
    arena = MappedFile(NBYTES, directory=folder)
    written = fill(arena, TWO)
    evict(arena, TWO)
    for first, end in TWO:
        assert torch.equal(in_file(arena, first, end), written[first:end])
    fetch(arena, TWO)
    changed = fill(arena, TWO[:1])
    evict(arena, TWO)
    assert torch.equal(in_file(arena, *TWO[0]), changed[slice(*TWO[0])])
    assert torch.equal(in_file(arena, *TWO[1]), written[slice(*TWO[1])])


def test_what_is_away_comes_back_where_it_is_touched(folder):
    arena = MappedFile(NBYTES, directory=folder)
    written = fill(arena, ALL)
    evict(arena, ALL)
    assert arena.bytes[5 * UNIT + 3] == written[5 * UNIT + 3]
    assert 0 < arena.resident_bytes() < NBYTES
    arena.bytes[0] = 255 - written[0]
    evict(arena, ALL)
    assert in_file(arena, 0, 2).tolist() == [255 - int(written[0]), int(written[1])]


# memory


def test_residency_is_that_of_the_ranges_that_were_fetched(folder):
    arena = MappedFile(NBYTES, directory=folder)
    for _ in range(2):
        written = fill(arena, ALL)
        assert (arena.resident_bytes(), arena.rss_bytes()) == (NBYTES, NBYTES)
        evict(arena, TWO)
        assert (arena.resident_bytes(), arena.rss_bytes()) == (6 * UNIT, 6 * UNIT)
        evict(arena, ALL)
        assert (arena.resident_bytes(), arena.rss_bytes()) == (0, 0)
        fetch(arena, TWO)
        assert (arena.resident_bytes(), arena.rss_bytes()) == (2 * UNIT, 2 * UNIT)
        fetch(arena, ALL)
        assert torch.equal(arena.bytes, written)


def test_a_kernel_that_cannot_populate_has_its_pages_touched(folder, monkeypatch):
    monkeypatch.setattr(mapped_file, "_POPULATE_WRITE", 9999)  # EINVAL, as from Linux 5.13
    arena = MappedFile(NBYTES, directory=folder)
    written = fill(arena, ALL)
    evict(arena, ALL)
    fetch(arena, TWO)
    for first, end in TWO:
        assert arena.rss_bytes() >= 2 * UNIT
        assert torch.equal(arena.bytes[first:end], written[first:end])


def test_what_is_kept_stays_and_has_no_blocks_in_the_file(folder):
    keep = [(4 * UNIT, 6 * UNIT), (0, UNIT)]  # in any order
    away = [(UNIT, 4 * UNIT), (6 * UNIT, NBYTES)]
    arena = MappedFile(NBYTES, keep, folder)
    written = fill(arena, ALL)
    evict(arena, away)
    assert (arena.resident_bytes(), arena.rss_bytes()) == (3 * UNIT, 3 * UNIT)
    for first, end in keep:
        assert torch.equal(arena.bytes[first:end], written[first:end])
        assert not in_file(arena, first, end).any()
    assert arena.rss_bytes() == 3 * UNIT, "nothing else was read"
    blocks = 512 * os.fstat(arena._file.fileno()).st_blocks
    assert 5 * UNIT <= blocks < 5 * UNIT + 64 * 1024, "besides, the list of them"
    fetch(arena, away)
    assert torch.equal(arena.bytes, written)


def test_all_blocks_are_allocated_before_anything_is_written(folder):
    arena = MappedFile(NBYTES, directory=folder)
    status = os.fstat(arena._file.fileno())
    assert (status.st_size, 512 * status.st_blocks >= NBYTES) == (NBYTES, True)


@pytest.mark.parametrize(
    ("keep", "away"),
    [
        ((), [(0, 10)]),
        ([(0, 10)], []),
        ([(0, 3)], [(3, 10)]),
        ([(7, 10)], [(0, 7)]),
        ([(5, 6), (1, 2)], [(0, 1), (2, 5), (6, 10)]),
        ([(2, 4), (4, 6)], [(0, 2), (6, 10)]),
    ],
)
def test_what_ranges_leave(keep, away):
    assert between(10, keep) == away


def test_too_little_memory_for_what_is_kept_is_an_error_that_leaves_nothing(folder):
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1":
        pytest.skip("this system promises any memory (vm.overcommit_memory is 1)")
    message = "there are no 4398047 MB of memory for the optimizer's state: Cannot allocate memory"
    with pytest.raises(OSError, match=message) as caught:
        MappedFile(4 << 40, [(0, 4 << 40)], folder)  # a file without a block
    assert caught.value.errno == errno.ENOMEM
    del caught
    gc.collect()
    assert left(folder) == []


# the order of the work


def test_a_fetch_begins_when_the_eviction_before_it_is_over(folder):
    arena, room = MappedFile(NBYTES, directory=folder), Future()
    evict(arena, ALL)
    ticket = arena.fetch(TWO, room)
    arena.wait(arena.fetch([(0, UNIT)], None))  # another thread reads meanwhile
    assert not ticket.done()
    assert arena.resident_bytes() == UNIT
    room.set_result(None)
    assert arena.wait(ticket) >= 0
    assert arena.resident_bytes() == 3 * UNIT


def test_without_large_folios_ranges_are_read_ahead(folder, monkeypatch):
    advice: list[tuple[int, int, int]] = []
    advise = MappedFile._advise

    def noted(self: MappedFile, first: int, end: int, what: int) -> None:
        if what == mapped_file._POPULATE_READ:
            raise OSError(errno.EINVAL, "an older kernel")
        advice.append((first, end, what))
        advise(self, first, end, what)

    monkeypatch.setattr(MappedFile, "_advise", noted)
    arena = MappedFile(NBYTES, directory=folder)
    assert advice[-1] == (0, NBYTES, mmap.MADV_NORMAL), "not MADV_RANDOM, which reads page by page"
    written = fill(arena, ALL)
    evict(arena, ALL)
    advice.clear()
    arena.wait(arena.fetch(TWO, None))
    assert advice[:2] == [(*pair, mmap.MADV_WILLNEED) for pair in TWO]
    assert arena.resident_bytes() == 2 * UNIT
    assert torch.equal(arena.bytes, written)


def test_with_large_folios_a_fault_reads_one_and_no_more(folder):
    arena = MappedFile(NBYTES, directory=folder)
    if not arena._large_folios:
        pytest.skip("this file system has no large folios")
    written = fill(arena, ALL)
    evict(arena, ALL)
    assert arena.bytes[3 * UNIT + 5] == written[3 * UNIT + 5]
    assert arena.resident_bytes() == UNIT


def test_a_wait_takes_the_seconds_until_the_work_is_over_and_none_behind_it(folder):
    class Late(Future[None]):
        def result(self, timeout: float | None = None) -> None:
            if not self.done():
                self.set_result(None)
            super().result(timeout)

    arena, ticket = MappedFile(NBYTES, directory=folder), Late()
    assert 0 < arena.wait(ticket) < 10
    assert arena.wait(ticket) == 0.0


# the file


def test_the_file_has_no_name_and_its_directory_is_named_in_any_way(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for directory in (folder, str(folder), "."):
        arena = MappedFile(PAGE, directory=directory)
        assert arena.where == f"a file in {folder}"
        assert list(folder.iterdir()) == []
        assert os.fstat(arena._file.fileno()).st_nlink == 0
        assert len(left(folder)) >= 2, "a descriptor and a mapping"


def test_a_tensor_keeps_the_memory_and_with_it_the_descriptor_and_threads_go(folder):
    before = threading.enumerate()
    arena = MappedFile(NBYTES, [(0, UNIT)], folder)
    written = fill(arena, ALL)
    evict(arena, [(UNIT, NBYTES)])
    fetch(arena, TWO)
    threads = [thread for thread in threading.enumerate() if thread not in before]
    assert sorted(thread.name for thread in threads) == ["qloralab-reads_0", "qloralab-writes_0"]
    view = arena.bytes[7:]
    del arena
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert torch.equal(view, written[7:])
    assert left(folder)
    del view
    assert left(folder) == []


# which directory


@pytest.mark.parametrize(
    ("in_memory", "expected"), [((), 0), ((0,), 1), ((0, 1), 2)], ids=["the first", "the second", "the last"]
)
def test_the_first_of_the_usual_directories_that_is_on_a_disk(in_memory, expected, folder, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    (folder / "here").mkdir()
    monkeypatch.chdir(folder / "here")
    usual, found = [str(folder), "/var/tmp", os.curdir], mapped_file._file_system
    spoiled = {usual[i]: 0x01021994 for i in in_memory}
    monkeypatch.setattr(mapped_file, "_file_system", lambda path: spoiled.get(path, 0xEF53))
    assert mapped_file._on_disk(None) == [folder, Path("/var/tmp"), folder / "here"][expected]
    assert found(folder) not in IN_MEMORY


def test_without_a_directory_on_a_disk_the_reasons_are_told(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere at all")
    monkeypatch.setattr(mapped_file, "_file_system", lambda path: 0x858458F6)
    message = "/nowhere at all is no directory, /var/tmp is in memory (ramfs), . is in memory (ramfs). The optimizer's"
    with pytest.raises(OSError, match=f"^{re.escape(message)}"):
        MappedFile(NBYTES)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("/dev/shm", "in memory (tmpfs)"), ("missing", "no directory"), ("file", "no directory")],
)
def test_a_directory_on_no_disk_is_refused(name, reason, folder, monkeypatch):
    if name == "/dev/shm" and file_system(Path(name)) != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs")
    monkeypatch.chdir(folder)
    Path("file").touch()
    message = f"{name} is {reason}. The optimizer's state pages to a disk: state_dir= (or TMPDIR) names one"
    with pytest.raises(OSError, match=f"^{re.escape(message)}$"):
        MappedFile(NBYTES, directory=name)


def test_another_system_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(NotImplementedError, match=r"^paging to a file needs Linux; this is darwin$"):
        MappedFile(NBYTES)


# disks that are full, and disks that fail


def test_a_full_disk_is_told_with_sizes_and_leaves_nothing(folder, monkeypatch):
    def full(descriptor: int, first: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "no")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="the optimizer's state needs a file of") as caught:
        MappedFile(40_000_000, [(0, 25_001_984)], folder)
    status = os.statvfs(folder)
    said = re.fullmatch(
        rf"the optimizer's state needs a file of 0\.01 GB in {re.escape(str(folder))}, which has ([\d.]+) GB left: "
        r"No space left on device\. state_dir= \(or TMPDIR\) names another directory",
        str(caught.value.strerror),
    )
    assert said
    assert float(said[1]) == pytest.approx(status.f_bavail * status.f_frsize / 1e9, rel=0.1, abs=1)
    assert caught.value.errno == errno.ENOSPC
    assert left(folder) == []


@contextmanager
def unwritable(arena: MappedFile) -> Iterator[None]:
    """The descriptor is that of /dev/null, which has no ranges to write (ESPIPE)."""
    descriptor = arena._file.fileno()
    whole, null = os.dup(descriptor), os.open("/dev/null", os.O_RDWR)
    os.dup2(null, descriptor)
    try:
        yield
    finally:
        os.dup2(whole, descriptor)
        os.close(whole)
        os.close(null)


def test_an_eviction_that_fails_raises_nothing_and_its_bytes_stay(folder):
    arena = MappedFile(NBYTES, directory=folder)
    written = fill(arena, TWO)
    evict(arena, [(0, UNIT), (2 * UNIT, 5 * UNIT), (6 * UNIT, NBYTES)])
    with unwritable(arena):
        arena.wait(arena.evict(TWO[:1], None))
        first = arena.failure
        arena.wait(arena.evict(TWO[1:], None))
    assert isinstance(first, OSError)
    assert first.errno == errno.ESPIPE
    assert first.strerror == f"the optimizer's state could not be written to a file in {folder}: Illegal seek"
    assert arena.failure is first, "the first one is kept"
    assert arena.resident_bytes() == 2 * UNIT
    assert torch.equal(arena.bytes, written)


def test_an_eviction_waits_for_the_fetch_before_it(folder):
    arena, room = MappedFile(NBYTES, directory=folder), Future()
    evict(arena, [(0, NBYTES)])
    arrival = arena.fetch(TWO, room)
    gone = arena.evict(TWO, arrival)
    with pytest.raises(TimeoutError):
        gone.result(timeout=0.1)
    room.set_result(None)
    arena.wait(gone)
    assert arrival.done()
    assert arena.resident_bytes() == 0


def test_a_fetch_behind_an_eviction_that_failed_goes_on(folder):
    arena = MappedFile(NBYTES, directory=folder)
    with unwritable(arena):
        after = arena.evict(TWO[:1], None)
        assert arena.wait(arena.fetch(TWO[1:], after)) >= 0
    assert arena.failure


def test_a_fetch_that_fails_is_raised_by_the_wait(folder):
    arena = MappedFile(NBYTES, directory=folder)
    evict(arena, ALL)
    os.ftruncate(arena._file.fileno(), 7 * UNIT)
    ticket = arena.fetch([(6 * UNIT, NBYTES)], None)
    for _ in range(2):
        with pytest.raises(OSError, match="the optimizer's state could not be read from a file in ") as caught:
            arena.wait(ticket)
        assert caught.value.errno == errno.EFAULT
    fetch(arena, [(0, UNIT)])  # the thread goes on
