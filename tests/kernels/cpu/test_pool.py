"""The threads that the C code runs on are those of torch, not others like them."""

from __future__ import annotations

import ctypes
import os
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
FAKE = "".join(
    f'__attribute__((visibility("default"))) int {name}(void) {{ return 0; }}\n'
    for name in ("GOMP_parallel", "omp_get_thread_num")
)


@pytest.fixture
def found() -> pool.Pool:
    result = pool.find()
    assert result is not None, "this torch uses OpenMP, but its runtime was not found"
    return result


def compiled(folder: Path, source: str) -> ctypes.CDLL:
    (folder / "source.c").write_text(source)
    return load([folder / "source.c"], cache=folder / "cache")


def test_it_is_the_runtime_that_torch_brought_or_was_linked_with(found):
    assert found.path.is_file()
    assert found.path.name.startswith(pool.RUNTIMES)
    loaded = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
    assert found.path in loaded
    home = Path(torch.__file__).parent
    brought = {path for path in loaded if home in path.parents or "torch.libs" in path.parts}
    brought = {path for path in brought if path.name.startswith(pool.RUNTIMES)}
    assert found.path in brought or not brought
    runtime = ctypes.CDLL(str(found.path), mode=os.RTLD_NOW | os.RTLD_NOLOAD)
    assert found.parallel == ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value
    assert found.thread_number == ctypes.cast(runtime.omp_get_thread_num, ctypes.c_void_p).value


@pytest.mark.compiler
def test_a_team_is_made_of_the_threads_that_torch_works_on(found, set_threads, tmp_path):
    def tasks() -> set[int]:
        return {int(name) for name in os.listdir("/proc/self/task")}

    set_threads(THREADS)
    library = compiled(tmp_path, SOURCE)
    library.team.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p]
    torch.ones(1 << 20).exp()  # torch makes its team
    before = tasks()
    ran = (ctypes.c_int * (THREADS + 1))()
    for _ in range(3):
        library.team(found.parallel, found.thread_number, THREADS, ran)
        assert len(set(ran[:THREADS])) == THREADS  # each number of the team was taken, by another thread
        assert ran[THREADS] == 0  # and no further one
        assert set(ran[:THREADS]) <= before
        torch.ones(1 << 20).exp()
        assert tasks() == before  # torch works on with the same threads


@pytest.mark.compiler
def test_without_openmp_there_is_none(monkeypatch, tmp_path):
    empty = compiled(tmp_path, "")
    with monkeypatch.context() as patch:  # in the process
        patch.setattr(pool, "_scopes", lambda: [empty])
        assert pool.find() is None
    monkeypatch.setattr(torch.backends.openmp, "is_available", lambda: False)
    assert pool.find() is None


@pytest.mark.compiler
def test_a_function_of_the_same_name_elsewhere_is_not_taken(monkeypatch, tmp_path, found):
    fake, real = compiled(tmp_path, FAKE), pool._scopes()
    monkeypatch.setattr(pool, "_scopes", lambda: [fake, *real])
    assert pool.find() == found
    assert pool._mapped_file(0) is None
