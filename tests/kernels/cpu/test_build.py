"""Real compilations of a C file of five lines: what is cached, what is compiled again, what is refused and how."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qloralab.kernels.cpu import build as module
from qloralab.kernels.cpu.build import BuildError, build, cache_folder, load
from qloralab.nf4 import processor
from qloralab.nf4.processor import supported_isas

pytestmark = pytest.mark.compiler

SOURCE = """
#include "answer.h"
int helper(void) { return ANSWER; }
__attribute__((visibility("default"))) int answer(void) { return helper(); }
"""
PROGRESS = "qloralab: compiling answer.c with "
X86 = platform.machine() == "x86_64"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What the user set for the real kernels does not reach these."""
    for name in ("CC", "QLORALAB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "answer.h").write_text("#define ANSWER 42\n")
    (folder / "answer.c").write_text(SOURCE)
    return folder / "answer.c"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Makes $CC a shell script: the given lines, then the real compiler."""
    real = shutil.which("cc")

    def make(lines: str) -> Path:
        script = tmp_path / "compiler.sh"
        script.write_text(f'#!/bin/sh\n{lines}\nexec {real} "$@"\n')
        script.chmod(0o755)
        monkeypatch.setenv("CC", str(script))
        return script

    return make


def libraries(cache: Path) -> list[Path]:
    """The finished libraries; anything else in the folder was left behind."""
    found = list(cache.iterdir())
    assert all(path.suffix == ".so" for path in found), found
    return found


def test_compiled_once_with_one_line_of_progress(source, cache, capfd):
    first = build([source], cache=cache)
    before = first.stat()
    assert capfd.readouterr() == ("", f"{PROGRESS}cc, about ten seconds, once\n")
    assert build([source], cache=cache) == first
    assert load([source], cache=cache).answer() == 42
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert capfd.readouterr() == ("", "")
    assert libraries(cache) == [first]
    assert first.name.startswith("answer-")


def test_only_what_asks_for_it_is_visible(source, cache):
    library = load([source], cache=cache)
    assert not hasattr(library, "helper")


def test_several_sources_make_one_library(source, cache):
    second = source.with_name("twice.c")
    exported = '__attribute__((visibility("default")))'
    second.write_text(f"int helper(void);\n{exported} int twice(void) {{ return 2 * helper(); }}\n")
    assert load([source, second], cache=cache).twice() == 84
    second.write_text(second.read_text().replace("2 *", "3 *"))
    assert load([source, second], cache=cache).twice() == 126


def test_a_loaded_library_leaves_subnormal_numbers_alone(source, cache):
    load([source], cache=cache)
    assert float("5e-324") * float("1.0") == float("5e-324")  # flush-to-zero would make it 0


def change_source(source, monkeypatch):
    source.write_text(SOURCE.replace("helper()", "helper() + 1"))


def change_header(source, monkeypatch):
    source.with_name("answer.h").write_text("#define ANSWER 43\n")


def change_cflags(source, monkeypatch):
    monkeypatch.setenv("QLORALAB_CFLAGS", f"{os.environ.get('QLORALAB_CFLAGS', '')} -O0 '-DNAME=\"two words\"'")


def change_compiler(source, monkeypatch):
    other = source.with_name("cc")
    other.symlink_to(shutil.which("cc") or "cc")
    monkeypatch.setenv("CC", str(other))


def change_compiler_arguments(source, monkeypatch):
    monkeypatch.setenv("CC", "cc -DUNUSED")


def change_compiler_version(source, monkeypatch):
    real = module._run
    answer = [(0, "cc 99.0\n")]
    monkeypatch.setattr(module, "_run", lambda run, *rest: answer if "--version" in run[0] else real(run, *rest))


def change_features(source, monkeypatch):
    features = module.cpu_features() + " one_more"
    monkeypatch.setattr(module, "cpu_features", lambda: features)


def change_machine(source, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "vax")


CHANGES = [
    change_source,
    change_header,
    change_cflags,
    change_compiler,
    change_compiler_arguments,
    change_compiler_version,
    change_features,
    change_machine,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_may_change_the_library_gives_it_another_name(change, source, cache, monkeypatch, capfd):
    first = build([source], cache=cache)
    change(source, monkeypatch)
    second = build([source], cache=cache)
    assert first != second
    assert capfd.readouterr().err.count(PROGRESS) == 2
    assert sorted(libraries(cache)) == sorted([first, second])


def test_the_instruction_set_and_extra_flags_are_part_of_the_name(source, cache):
    paths = {build([source], isa, extra, cache) for isa in ("native", "portable") for extra in ([], ["-DA"], ["-DB"])}
    assert len(paths) == 6


def test_a_new_header_beside_the_source_is_seen(source, cache):
    first = build([source], cache=cache)
    source.with_name("new.h").write_text("")
    assert build([source], cache=cache) != first


MACROS = """
__attribute__((visibility("default"))) int answer(void) {
#if defined(QLORALAB_PORTABLE)
    return 1;
#elif defined(__AVX512BW__)
    return 512;
#elif defined(__AVX2__)
    return 2;
#else
    return 0;
#endif
}
"""


@pytest.mark.skipif(not X86, reason="the names of instruction sets are those of x86-64; run on one")
@pytest.mark.parametrize(("isa", "answer"), [("avx512", 512), ("avx2", 2), ("portable", 1)])
def test_the_instruction_set_reaches_the_compiler(isa, answer, source, cache):
    source.write_text(MACROS)
    path = build([source], isa, cache=cache)  # builds anywhere, whatever this machine can run
    if isa in supported_isas():
        assert ctypes.CDLL(str(path)).answer() == answer


def test_native_is_what_the_machine_has(source, cache):
    source.write_text(MACROS)
    best = next((isa for isa in ("avx512", "avx2") if isa in supported_isas()), None)
    assert load([source], "native", cache=cache).answer() == {"avx512": 512, "avx2": 2, None: 0}[best]


ZEN1 = "fpu sse2 avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"


@pytest.mark.parametrize(
    ("features", "names"),
    [
        ("", ("native", "portable")),
        ("fp asimd", ("native", "portable")),
        (ZEN1, ("native", "avx2", "portable")),
        (ZEN1.replace("avx2 ", ""), ("native", "portable")),
        (f"{ZEN1} avx512f avx512bw avx512cd avx512dq avx512vl", ("native", "avx512", "avx2", "portable")),
        (f"{ZEN1} avx512f avx512cd", ("native", "avx2", "portable")),
    ],
)
def test_supported_instruction_sets(features, names, monkeypatch):
    monkeypatch.setattr(processor, "cpu_features", lambda: features)
    assert supported_isas() == names


def test_an_instruction_set_that_is_not_here_is_not_loaded(source, cache, monkeypatch):
    monkeypatch.setattr(processor, "cpu_features", lambda: ZEN1)
    with pytest.raises(BuildError, match="this machine has no avx512; it runs native, avx2, portable"):
        load([source], "avx512", cache=cache)
    assert not cache.exists()


@pytest.mark.parametrize("function", [build, load])
def test_an_unknown_instruction_set(function, source, cache):
    with pytest.raises(ValueError, match="isa is one of native, avx512, avx2, portable, not 'mmx'"):
        function([source], "mmx", cache=cache)


def test_a_compiler_without_native_compiles_for_the_baseline(source, cache, compiler):
    compiler('case "$*" in *-march=native*|*-mcpu=native*) echo "unknown argument" >&2; exit 1;; esac')
    assert load([source], cache=cache).answer() == 42


def test_cc_with_arguments(source, cache, monkeypatch):
    source.write_text(SOURCE.replace("ANSWER", "OTHER"))
    monkeypatch.setenv("CC", "cc -DOTHER=7")
    assert load([source], cache=cache).answer() == 7


def refused(*arguments, **options) -> str:
    """The message of the `BuildError` that loading raises."""
    with pytest.raises(BuildError) as caught:
        load(*arguments, **options)
    return str(caught.value)


def test_no_compiler(source, cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    message = refused([source], cache=cache)
    assert message.startswith("no C compiler: none of cc, gcc, clang is on PATH; install one")
    assert "apt-get install gcc" in message
    assert "dnf install gcc" in message


def test_cc_is_not_there(source, cache, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    assert refused([source], cache=cache) == "CC names the C compiler 'no-such-compiler', which is not there"


def test_cc_cannot_be_split(source, cache, monkeypatch):
    monkeypatch.setenv("CC", "cc '-DX")
    assert refused([source], cache=cache) == """CC="cc '-DX": No closing quotation"""


def test_cc_is_not_a_program(source, cache, monkeypatch, tmp_path):
    script = tmp_path / "empty"
    script.write_text("")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    assert f"the C compiler {script} does not start (Exec format error)" in refused([source], cache=cache)


def test_a_compiler_that_fails_silently(source, cache, monkeypatch):
    monkeypatch.setenv("CC", "false")
    false = shutil.which("false")
    first, second, third = refused([source], cache=cache).splitlines()
    assert first == f"the C compiler {false} failed (status 1):"
    assert second == "it printed nothing"
    assert third.startswith(f"$ {false} -std=gnu11 -O3 ")
    assert libraries(cache) == []


def test_a_compiler_that_writes_nothing(source, cache, monkeypatch):
    monkeypatch.setenv("CC", "true")
    assert "failed (no output file):\n" in refused([source], cache=cache)


def test_an_error_in_the_source_is_shown_past_the_warnings(source, cache):
    noise = "".join(f"#warning number {index}\n" for index in range(20))
    source.write_text(f"{noise}\nint broken(void) {{ return nothing_of_this_name; }}\n{noise}")
    lines = refused([source], cache=cache).splitlines()
    assert "nothing_of_this_name" in lines[1]
    assert "error:" in lines[1]
    assert len(lines) <= 14
    assert libraries(cache) == []


def test_a_missing_header_of_the_system_says_what_to_install(source, cache):
    source.write_text("#include <no_such_header.h>\n")
    assert "libc6-dev" in refused([source], cache=cache)


def test_a_compiler_that_never_ends_is_stopped_with_its_children(source, cache, compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 1)
    child = tmp_path / "child"
    compiler(f'case "$*" in *library.so*) sleep 100 & echo $! > {child}; wait;; esac')
    start = time.monotonic()
    assert refused([source], cache=cache).startswith("the C compiler took more than 1 s\n")
    assert time.monotonic() - start < 30
    assert not is_running(int(child.read_text()))
    assert libraries(cache) == []


def is_running(pid: int) -> bool:
    """Whether a process is there and is no zombie, after at most a second of patience."""
    for _ in range(100):
        try:
            status = Path(f"/proc/{pid}/stat").read_text()
        except FileNotFoundError:
            return False
        if status.rpartition(")")[2].split()[0] in "ZX":
            return False
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return True


def test_a_preloaded_library_is_not_forced_on_the_compiler(source, cache, compiler, monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "libm.so.6")
    compiler('if [ -n "$LD_PRELOAD" ]; then exit 1; fi')
    assert load([source], cache=cache).answer() == 42


def test_messages_do_not_depend_on_the_users_language(source, cache, compiler, monkeypatch):
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    compiler('if [ "$LC_ALL" != C ]; then exit 1; fi')
    assert load([source], cache=cache).answer() == 42


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda contents: contents[: len(contents) // 2], id="half"),
        pytest.param(lambda contents: contents[:4096], id="first page"),
        pytest.param(lambda contents: b"", id="empty"),
        pytest.param(lambda contents: bytes(len(contents)), id="zeros"),
        pytest.param(lambda contents: contents[:5000] + bytes([contents[5000] ^ 1]) + contents[5001:], id="one bit"),
        pytest.param(lambda contents: b"no ELF" + hashlib.sha256(b"no ELF").digest(), id="whole, but no library"),
    ],
)
def test_a_damaged_file_is_compiled_again(damage, source, cache, capfd):
    path = build([source], cache=cache)
    whole = path.read_bytes()
    path.unlink()  # a library that this process loaded stays as it is
    path.write_bytes(damage(whole))
    assert load([source], cache=cache).answer() == 42
    assert path.read_bytes()[-32:] == hashlib.sha256(path.read_bytes()[:-32]).digest()
    assert capfd.readouterr().err.count(PROGRESS) == 2
    assert libraries(cache) == [path]


def test_a_library_that_never_loads_is_compiled_twice_and_given_up(source, cache, capfd):
    source.write_text("int missing(void);\n" + SOURCE.replace("ANSWER", "missing()"))
    message = refused([source], cache=cache)
    assert "does not load" in message
    assert "undefined symbol: missing" in message
    assert capfd.readouterr().err.count(PROGRESS) == 2


def test_the_cache_cannot_be_made(source, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    message = refused([source], cache=file / "below")
    assert message.startswith(f"cannot write to the cache folder {file / 'below'} (Not a directory); ")
    assert "QLORALAB_CACHE" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; run as another user")
def test_the_cache_is_read_only(source, cache):
    cache.mkdir(mode=0o500)
    message = refused([source], cache=cache)
    assert message.startswith(f"cannot write to the cache folder {cache} (Permission denied); ")


def test_what_is_in_the_cache_needs_no_writing(source, cache):
    path = build([source], cache=cache)
    cache.chmod(0o500)
    before = cache.stat().st_mtime_ns
    assert build([source], cache=cache) == path
    assert cache.stat().st_mtime_ns == before
    cache.chmod(0o700)


def test_a_cache_that_everyone_may_write_to(source, cache):
    cache.mkdir()
    cache.chmod(0o777)
    message = refused([source], cache=cache)
    assert message == (
        f"the cache folder {cache} can be written to by everyone; set QLORALAB_CACHE to a folder of your own"
    )
    assert libraries(cache) == []


@pytest.fixture
def give_away(monkeypatch):
    """Makes a path belong to somebody else: truly where this is root, else this process takes itself for another."""

    def give(path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, 12345, -1)
        else:
            mine = os.geteuid()
            monkeypatch.setattr(os, "geteuid", lambda: mine + 1)

    return give


def test_a_cache_of_somebody_else(source, cache, give_away):
    build([source], cache=cache)
    give_away(cache)
    assert "belongs to another user" in refused([source], cache=cache)


def planted(path: Path) -> None:
    """Replace a library by another that is whole, too."""
    contents = path.read_bytes()[:-32] + b"planted"
    path.unlink()
    path.write_bytes(contents + hashlib.sha256(contents).digest())


def test_a_file_that_everyone_may_write_to_is_not_loaded(source, cache):
    path = build([source], cache=cache)
    planted(path)
    path.chmod(0o777)
    build([source], cache=cache)
    assert b"planted" not in path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away; run as root")
def test_a_file_of_somebody_else_is_not_loaded(source, cache, give_away):
    path = build([source], cache=cache)
    planted(path)
    give_away(path)
    build([source], cache=cache)
    assert b"planted" not in path.read_bytes()
    assert path.stat().st_uid == os.geteuid()


def test_a_planted_file_of_this_user_is_trusted(source, cache):
    # The other half of the two above: they fail for the reason they state.
    path = build([source], cache=cache)
    planted(path)
    build([source], cache=cache)
    assert b"planted" in path.read_bytes()


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_permissions_do_not_depend_on_the_umask(umask, source, cache):
    before = os.umask(umask)
    try:
        path = build([source], cache=cache)
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "qloralab"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache" / "qloralab"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/qloralab")
    monkeypatch.setenv("QLORALAB_CACHE", "/mine")
    assert cache_folder() == Path("/mine")


def test_a_relative_cache(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORALAB_CACHE", ".")
    assert load([source]).answer() == 42
    assert build([source]).parent == tmp_path


def test_the_users_cache_is_used(source, cache, monkeypatch):
    monkeypatch.setenv("QLORALAB_CACHE", str(cache))
    assert build([source]).parent == cache


FOUR = """
import os, pathlib, sys
from qloralab.kernels.cpu import build
for _ in range(4):
    if not os.fork():
        answer = build.load([pathlib.Path(sys.argv[1])], cache=pathlib.Path(sys.argv[2])).answer()
        os.write(1, b"%d\\n" % answer)  # a line at a time, also where output is not buffered
        os._exit(0)
print([os.wait()[1] for _ in range(4)])
"""


def test_several_processes_at_once(source, cache, compiler):
    compiler("sleep 0.5")  # long enough that none finishes before the others look
    command = [sys.executable, "-c", FOUR, str(source), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "42\n" * 4 + "[0, 0, 0, 0]\n", done.stderr
    assert done.stderr.count(PROGRESS) >= 2, "they did not meet, so nothing was shown"
    assert len(libraries(cache)) == 1
