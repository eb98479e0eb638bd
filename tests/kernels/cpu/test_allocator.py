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


@pytest.fixture(scope="module", autouse=True)
def compiled():
    if "-fsanitize" in os.environ.get("QLORALAB_CFLAGS", ""):
        pytest.skip("a sanitizer has a malloc of its own, which keeps what is freed")
    try:
        allocator._load()
    except BuildError as error:
        pytest.skip(str(error).splitlines()[0])


def run(program: str, install: bool = True) -> str:
    """What a program prints, PyTorch's memory being ours."""
    start = "import gc, threading, torch\n"
    start += "from qloralab.kernels.cpu import allocator\nallocator.install()\n" if install else ""
    done = subprocess.run([sys.executable, "-c", start + program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Tensors of one size between others that stay, every second freed, as many made again. The first is freed once, so that
# malloc takes what is smaller from its heap and not from the system.
REUSE = """
torch.empty(30 << 20, dtype=torch.uint8)
size = 1_000_003
tensors = [torch.empty(size, dtype=torch.uint8) for _ in range(20)]
holes = {t.data_ptr() for t in tensors[::2]}
small = []
for i in range(0, 20, 2):
    tensors[i] = None
    small += [bytes(n) for n in range(513, 600)]  # what takes the pieces that were cut off
again = [torch.empty(size, dtype=torch.uint8) for _ in holes]
print(len(holes & {t.data_ptr() for t in again}))
"""


def test_a_hole_takes_the_next_tensor_of_its_size():
    assert int(run(REUSE)) >= 9  # the small ones may have opened one


def test_alignment_sizes_and_contents():
    run("""
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
""")


def test_tensors_from_before_and_from_other_threads():
    run(
        """
old = [torch.full((n,), 3.0) for n in (1, 1000, 1_000_000)]
from qloralab.kernels.cpu import allocator
allocator.install()
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
        install=False,
    )


def test_too_much_is_an_error_that_names_the_size():
    out = run("""
for size in (1 << 60, (1 << 63) - 1):
    try:
        torch.empty(size, dtype=torch.uint8)
    except RuntimeError as error:
        print(str(error).splitlines()[0])
""")
    assert f"you tried to allocate {1 << 60} bytes" in out
    assert f"you tried to allocate {(1 << 63) - 1} bytes" in out


def test_the_profiler_sees_it():
    out = run("""
with torch.profiler.profile(profile_memory=True) as profile:
    x = torch.ones(1000)
    del x
events = [e for e in profile.events() if e.name == "[memory]" or e.self_cpu_memory_usage]
print(sorted({e.self_cpu_memory_usage for e in events}))
""")
    assert "4000" in out


def test_without_a_cpp_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORALAB_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    with pytest.raises(BuildError, match="the C compiler"):
        allocator.install()


def test_another_c_library_keeps_its_own(monkeypatch):
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setenv("CC", "no-such-compiler")
    allocator.install()
