"""The threads that the C code runs on are those of torch, not others like them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qloralab.kernels.cpu import pool
from qloralab.kernels.cpu.build import load

THREADS = 3

# Which thread ran each member of a team: its number in the team, and the number that the kernel knows it by.
SOURCE = """
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <unistd.h>

typedef void (*entry)(void (*)(void *), void *, unsigned, unsigned);
typedef int (*number)(void);
typedef struct { number thread_number; int *kernel_numbers; } job;

static void body(void *data)
{
    job *j = data;
    j->kernel_numbers[j->thread_number()] = (int)syscall(SYS_gettid);
}

__attribute__((visibility("default"))) void team(entry parallel, number thread_number, unsigned threads, int *out)
{
    job j = {thread_number, out};
    parallel(body, &j, threads, 0);
}
"""


@pytest.fixture
def found() -> pool.Pool:
    result = pool.find()
    assert result is not None, "this torch uses OpenMP, but its runtime was not found"
    return result


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield THREADS
    torch.set_num_threads(before)


def tasks() -> set[int]:
    """The threads of this process, as the kernel numbers them."""
    return {int(name) for name in os.listdir("/proc/self/task")}


def test_it_is_the_runtime_that_torch_brought_or_was_linked_with(found):
    assert found.path.is_file()
    assert found.path.name.startswith(("libgomp", "libomp", "libiomp5"))
    loaded = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
    assert found.path in loaded
    site_packages = Path(torch.__file__).parent.parent
    brought = {path for path in loaded if site_packages / "torch" in path.parents or "torch.libs" in path.parts}
    brought = {path for path in brought if path.name.startswith(("libgomp", "libomp", "libiomp5"))}
    assert found.path in brought or not brought


def test_the_addresses_are_functions_of_it(found):
    runtime = ctypes.CDLL(str(found.path), mode=os.RTLD_NOW | os.RTLD_NOLOAD)
    assert found.parallel == ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value
    assert found.thread_number == ctypes.cast(runtime.omp_get_thread_num, ctypes.c_void_p).value


@pytest.mark.compiler
def test_a_team_is_made_of_the_threads_that_torch_works_on(found, threads, tmp_path):
    (tmp_path / "team.c").write_text(SOURCE)
    library = load([tmp_path / "team.c"], cache=tmp_path / "cache")
    library.team.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p]
    torch.ones(1 << 20).exp()  # torch makes its team
    before = tasks()
    ran = (ctypes.c_int * (threads + 1))()
    for _ in range(3):
        library.team(found.parallel, found.thread_number, threads, ran)
        assert len(set(ran[:threads])) == threads  # each number of the team was taken, by another thread
        assert ran[threads] == 0  # and no further one
        assert set(ran[:threads]) <= before
        torch.ones(1 << 20).exp()
        assert tasks() == before  # torch works on with the same threads


def test_without_openmp_in_torch_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.backends.openmp, "is_available", lambda: False)
    assert pool.find() is None


@pytest.mark.compiler
def test_without_openmp_in_the_process_there_is_none(monkeypatch, tmp_path):
    (tmp_path / "empty.c").write_text("")
    empty = load([tmp_path / "empty.c"], cache=tmp_path / "cache")
    monkeypatch.setattr(pool, "_scopes", lambda: [empty])
    assert pool.find() is None


@pytest.mark.compiler
def test_a_function_of_the_same_name_elsewhere_is_not_taken(monkeypatch, tmp_path, found):
    exported = '__attribute__((visibility("default")))'
    names = ("GOMP_parallel", "omp_get_thread_num")
    (tmp_path / "fake.c").write_text("".join(f"{exported} int {name}(void) {{ return 0; }}\n" for name in names))
    fake = load([tmp_path / "fake.c"], cache=tmp_path / "cache")
    real = pool._scopes()
    monkeypatch.setattr(pool, "_scopes", lambda: [fake, *real])
    assert pool.find() == found


def test_no_file_is_mapped_at_zero():
    assert pool._mapped_file(0) is None
