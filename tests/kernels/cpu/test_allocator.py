"""The allocator in processes of its own: it cannot be taken out again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from qloralab.kernels.cpu import allocator
from qloralab.kernels.cpu.build import BuildError

pytestmark = [
    pytest.mark.compiler,
    pytest.mark.skipif(allocator.platform.libc_ver()[0] != "glibc", reason="the C library is not GNU's"),
]

START = """
import gc, threading, torch
from qloralab.kernels.cpu import allocator
old = [torch.full((n,), 3.0) for n in (1, 1000, 1_000_000)]
allocator.install()
"""
PROGRAMS = {
    # Tensors of one size between others that stay, every second freed, as many made again. The first is freed once, so
    # that malloc takes what is smaller from its heap and not from the system.
    "a hole takes the next tensor of its size": """
torch.empty(30 << 20, dtype=torch.uint8)
size = 1_000_003
tensors = [torch.empty(size, dtype=torch.uint8) for _ in range(20)]
holes = {t.data_ptr() for t in tensors[::2]}
small = []
for i in range(0, 20, 2):
    tensors[i] = None
    small += [bytes(n) for n in range(513, 600)]  # what takes the pieces that were cut off
again = [torch.empty(size, dtype=torch.uint8) for _ in holes]
assert len(holes & {t.data_ptr() for t in again}) >= 9  # the small ones may have opened one
""",
    "alignment, sizes and contents": """
for size in [0, 1, 7, 63, 64, 65, 4095, 1 << 20, (1 << 20) + 1, 40 << 20]:
    t = torch.empty(size, dtype=torch.uint8)
    assert t.data_ptr() % 64 == 0 and (t.data_ptr() != 0) == (size > 0), size
    assert bool((t.fill_(7) == 7).all())
x = torch.arange(5.0)
x.untyped_storage().resize_(4000)
assert x.tolist() == [0, 1, 2, 3, 4] and x.untyped_storage().nbytes() == 4000
x.resize_(1000)
assert x[:5].tolist() == [0, 1, 2, 3, 4]
x.share_memory_()
assert x[:5].tolist() == [0, 1, 2, 3, 4]
""",
    "tensors from before and from other threads": """
allocator.install()
made = []
def make():
    made.extend(torch.full((n,), 4.0) for n in range(1, 2000, 7))
threads = [threading.Thread(target=make) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert all(bool((t == 4).all()) for t in made) and all(bool((t == 3).all()) for t in old)
del old, made
gc.collect()
""",
    "too much is an error that names the size": """
for size in (1 << 60, (1 << 63) - 1):
    try:
        torch.empty(size, dtype=torch.uint8)
        raise AssertionError(size)
    except RuntimeError as error:
        assert f"you tried to allocate {size} bytes" in str(error), error
""",
    "the profiler sees it": """
with torch.profiler.profile(profile_memory=True) as profile:
    x = torch.ones(1000)
    del x
assert 4000 in {event.self_cpu_memory_usage for event in profile.events()}
""",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_memory(program):
    if "-fsanitize" in os.environ.get("QLORALAB_CFLAGS", ""):
        pytest.skip("a sanitizer has a malloc of its own, which keeps what is freed")
    try:
        allocator._load()
    except BuildError as error:
        pytest.skip(str(error).splitlines()[0])
    command = [sys.executable, "-c", START + PROGRAMS[program]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_without_a_cpp_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORALAB_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    with pytest.raises(BuildError, match="the C compiler"):
        allocator.install()


def test_another_c_library_keeps_its_own(monkeypatch):
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setenv("CC", "no-such-compiler")
    allocator.install()
