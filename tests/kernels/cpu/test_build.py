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

EXPORTED = '__attribute__((visibility("default")))'
SOURCE = f"""
#include "answer.h"
int helper(void) {{ return ANSWER; }}
{EXPORTED} int answer(void) {{ return helper(); }}
"""
MACROS = f"""
{EXPORTED} int answer(void) {{
#if defined(QLORALAB_PORTABLE)
    return 1;
#elif defined(__AVX512BW__)
    return 512;
#elif defined(__AVX2__)
    return 2;
#else
    return 0;
#endif
}}
"""
PROGRESS = "qloralab: compiling answer.c with "
ZEN1 = "fpu sse2 avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The cache folder; what else the user set for the real kernels does not reach these."""
    for name in ("CC", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("QLORALAB_CACHE", str(tmp_path / "cache"))
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

    def make(lines: str) -> None:
        script = tmp_path / "compiler.sh"
        script.write_text(f'#!/bin/sh\n{lines}\nexec {real} "$@"\n')
        script.chmod(0o755)
        monkeypatch.setenv("CC", str(script))

    return make


def libraries(cache: Path) -> list[Path]:
    """The finished libraries; anything else in the folder was left behind."""
    found = list(cache.glob("*"))
    assert all(path.suffix == ".so" for path in found), found
    return found


def refused(source: Path, cache: Path | None = None) -> str:
    """The message of the `BuildError` that loading raises."""
    with pytest.raises(BuildError) as caught:
        load([source], cache=cache)
    return str(caught.value)


def test_compiled_once_with_one_line_of_progress(source, cache, capfd):
    first = build([source])
    before = first.stat()
    assert capfd.readouterr() == ("", f"{PROGRESS}cc, about ten seconds, once\n")
    assert build([source]) == first
    assert load([source]).answer() == 42
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert capfd.readouterr() == ("", "")
    assert libraries(cache) == [first]
    assert first.name.startswith("answer-")


def test_several_sources_make_one_library_that_hides_what_does_not_ask_to_be_seen(source):
    second = source.with_name("twice.c")
    second.write_text(f"int helper(void);\n{EXPORTED} int twice(void) {{ return 2 * helper(); }}\n")
    library = load([source, second])
    assert library.twice() == 84
    assert not hasattr(library, "helper")
    second.write_text(second.read_text().replace("2 *", "3 *"))
    assert load([source, second]).twice() == 126


def test_a_loaded_library_leaves_subnormal_numbers_alone(source):
    load([source])
    assert float("5e-324") * float("1.0") == float("5e-324")  # flush-to-zero would make it 0


def change_compiler(source, patch):
    other = source.with_name("cc")
    other.symlink_to(shutil.which("cc") or "cc")
    patch.setenv("CC", str(other))


def change_version(source, patch):
    real, answer = module._run, [(0, "cc 99.0\n")]
    patch.setattr(module, "_run", lambda run, *rest: answer if "--version" in run[0] else real(run, *rest))


CHANGES = {
    "source": lambda source, patch: source.write_text(SOURCE.replace("helper()", "helper() + 1")),
    "header": lambda source, patch: source.with_name("answer.h").write_text("#define ANSWER 43\n"),
    "new header": lambda source, patch: source.with_name("new.h").write_text(""),
    "flags": lambda source, patch: patch.setenv(
        "QLORALAB_CFLAGS", f"{os.environ.get('QLORALAB_CFLAGS', '')} -O0 '-DNAME=\"two words\"'"
    ),
    "compiler": change_compiler,
    "arguments of the compiler": lambda source, patch: patch.setenv("CC", "cc -DUNUSED"),
    "version": change_version,
    "features": lambda source, patch: patch.setattr(module, "cpu_features", lambda: "one_more"),
    "machine": lambda source, patch: patch.setattr(platform, "machine", lambda: "vax"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_may_change_the_library_gives_it_another_name(change, source, cache, monkeypatch, capfd):
    first = build([source])
    CHANGES[change](source, monkeypatch)
    second = build([source])
    assert first != second
    assert capfd.readouterr().err.count(PROGRESS) == 2
    assert sorted(libraries(cache)) == sorted([first, second])


def test_the_instruction_set_and_extra_flags_are_part_of_the_name(source):
    paths = {build([source], isa, extra) for isa in ("native", "portable") for extra in ([], ["-DA"], ["-DB"])}
    assert len(paths) == 6


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the names of instruction sets are x86-64's; run on one")
@pytest.mark.parametrize(("isa", "answer"), [("avx512", 512), ("avx2", 2), ("portable", 1), ("native", None)])
def test_the_instruction_set_reaches_the_compiler(isa, answer, source):
    source.write_text(MACROS)
    path = build([source], isa)  # builds anywhere, whatever this machine can run
    best = next((isa for isa in ("avx512", "avx2") if isa in supported_isas()), None)
    if isa in supported_isas():
        assert ctypes.CDLL(str(path)).answer() == (answer or {"avx512": 512, "avx2": 2, None: 0}[best])


def test_an_instruction_set_that_is_unknown_or_not_here_is_refused(source, cache, monkeypatch):
    monkeypatch.setattr(processor, "cpu_features", lambda: f"{ZEN1} avx512f avx512cd")  # a part of AVX512
    with pytest.raises(BuildError, match="this machine has no avx512; it runs native, avx2, portable"):
        load([source], "avx512")
    for function in (build, load):
        with pytest.raises(ValueError, match="isa is one of native, avx512, avx2, portable, not 'mmx'"):
            function([source], "mmx")
    assert not cache.exists()


@pytest.mark.parametrize(
    ("script", "variables"),
    [
        ('case "$*" in *-march=native*|*-mcpu=native*) echo "unknown argument" >&2; exit 1;; esac', {}),
        ('if [ -n "$LD_PRELOAD" ]; then exit 1; fi', {"LD_PRELOAD": "libm.so.6"}),
        ('if [ "$LC_ALL" != C ]; then exit 1; fi', {"LC_ALL": "de_DE.UTF-8"}),
    ],
    ids=["no native", "a preloaded library", "another language"],
)
def test_what_would_disturb_a_compiler_is_kept_from_it(script, variables, source, compiler, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    compiler(script)
    assert load([source]).answer() == 42


def test_cc_with_arguments(source, monkeypatch):
    source.write_text(SOURCE.replace("ANSWER", "OTHER"))
    monkeypatch.setenv("CC", "cc -DOTHER=7")
    assert load([source]).answer() == 7


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("no-such-compiler -O2", r"CC names the C compiler 'no-such-compiler', which is not there"),
        ("cc '-DX", r"""CC="cc '-DX": No closing quotation"""),
        ("./empty", r"the C compiler /.*/empty does not start \(Exec format error\).*"),
        ("false", r"the C compiler /.*/false failed \(status 1\):\nit printed nothing\n\$ /.*/false -std=gnu11 -O3 .*"),
        ("true", r"the C compiler /.*/true failed \(no output file\):\n.*\n\$ .*"),
    ],
)
def test_a_cc_that_is_no_compiler(command, message, source, cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("")
    (tmp_path / "empty").chmod(0o755)
    monkeypatch.setenv("CC", command)
    with pytest.raises(BuildError, match=rf"\A{message}\Z"):
        load([source])
    assert libraries(cache) == []


NOISE = "".join(f"#warning number {index}\n" for index in range(20))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{NOISE}\nint broken(void) {{ return nothing_of_this_name; }}\n{NOISE}", "error:.*nothing_of_this_name"),
        ("#include <no_such_header.h>\n", r"no_such_header[\s\S]*libc6-dev"),
    ],
)
def test_an_error_in_the_source_is_shown_past_the_warnings(text, message, source, cache):
    source.write_text(text)
    with pytest.raises(BuildError, match=rf"\A[^\n]*\n[^\n]*{message}") as caught:
        load([source])
    assert len(str(caught.value).splitlines()) <= 14
    assert libraries(cache) == []


def test_a_compiler_that_never_ends_is_stopped_with_its_children(source, cache, compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 1)
    child = tmp_path / "child"
    compiler(f'case "$*" in *library.so*) sleep 100 & echo $! > {child}; wait;; esac')
    start = time.monotonic()
    assert refused(source).startswith("the C compiler took more than 1 s\n")
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


DAMAGES = {
    "half": lambda contents: contents[: len(contents) // 2],
    "first page": lambda contents: contents[:4096],
    "empty": lambda contents: b"",
    "zeros": lambda contents: bytes(len(contents)),
    "one bit": lambda contents: contents[:5000] + bytes([contents[5000] ^ 1]) + contents[5001:],
    "whole, but no library": lambda contents: b"no ELF" + hashlib.sha256(b"no ELF").digest(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_compiled_again(damage, source, cache, capfd):
    path = build([source])
    whole = path.read_bytes()
    path.unlink()  # a library that this process loaded stays as it is
    path.write_bytes(DAMAGES[damage](whole))
    assert load([source]).answer() == 42
    assert path.read_bytes()[-32:] == hashlib.sha256(path.read_bytes()[:-32]).digest()
    assert capfd.readouterr().err.count(PROGRESS) == 2
    assert libraries(cache) == [path]


def test_a_library_that_never_loads_is_compiled_twice_and_given_up(source, capfd):
    source.write_text("int missing(void);\n" + SOURCE.replace("ANSWER", "missing()"))
    message = refused(source)
    assert "does not load" in message
    assert "undefined symbol: missing" in message
    assert message.endswith("; if its folder is mounted noexec, set QLORALAB_CACHE to one that is not")
    assert capfd.readouterr().err.count(PROGRESS) == 2


@pytest.mark.parametrize("why", ["Not a directory", "Permission denied"])
def test_a_cache_that_cannot_be_written_to(why, source, tmp_path):
    if why == "Permission denied" and os.geteuid() == 0:
        pytest.skip("root may write anywhere; run as another user")
    folder = tmp_path / "file" / "below"
    if why == "Permission denied":
        folder.mkdir(mode=0o500, parents=True)
    else:
        folder.parent.write_text("")
    message = refused(source, folder)
    assert message.startswith(f"cannot write to the cache folder {folder} ({why}); ")
    assert "QLORALAB_CACHE" in message


def test_what_is_in_the_cache_needs_no_writing(source, cache):
    path = build([source])
    cache.chmod(0o500)
    before = cache.stat().st_mtime_ns
    assert build([source]) == path
    assert cache.stat().st_mtime_ns == before
    cache.chmod(0o700)


def test_a_cache_that_others_may_write_to(source, cache, monkeypatch):
    cache.mkdir()
    cache.chmod(0o777)
    advice = "set QLORALAB_CACHE to a folder of your own"
    assert refused(source) == f"the cache folder {cache} can be written to by everyone; {advice}"
    assert libraries(cache) == []
    cache.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(cache, 12345, -1)
    else:  # this process takes itself for another
        mine = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    assert "belongs to another user" in refused(source)


@pytest.mark.parametrize("by", ["this user", "everyone", "somebody else"])
def test_only_a_file_that_others_could_not_have_planted_is_loaded(by, source):
    if by == "somebody else" and os.geteuid() != 0:
        pytest.skip("only root can give a file away; run as root")
    path = build([source])
    contents = path.read_bytes()[:-32] + b"planted"
    path.unlink()
    path.write_bytes(contents + hashlib.sha256(contents).digest())  # whole, too
    path.chmod(0o777 if by == "everyone" else 0o755)
    os.chown(path, 12345 if by == "somebody else" else -1, -1)
    build([source])
    assert (b"planted" in path.read_bytes()) == (by == "this user")
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert path.stat().st_uid == os.geteuid()


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_permissions_do_not_depend_on_the_umask(umask, source, cache):
    before = os.umask(umask)
    try:
        path = build([source])
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, "/home/me/.cache/qloralab"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/qloralab"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/qloralab"),
        ({"XDG_CACHE_HOME": "/xdg", "QLORALAB_CACHE": "/mine"}, "/mine"),
    ],
    ids=str,
)
def test_where_the_cache_is(variables, folder, monkeypatch):
    monkeypatch.delenv("QLORALAB_CACHE")
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


def test_a_cache_named_from_the_working_directory(source, monkeypatch, tmp_path):
    monkeypatch.setenv("QLORALAB_CACHE", ".")
    monkeypatch.chdir(tmp_path)
    assert load([source]).answer() == 42
    assert build([source]).parent == tmp_path


FOUR = """
import os, pathlib, sys
from qloralab.kernels.cpu import build
for _ in range(4):
    if not os.fork():
        answer = build.load([pathlib.Path(sys.argv[1])]).answer()
        os.write(1, b"%d\\n" % answer)  # a line at a time, also where output is not buffered
        os._exit(0)
print([os.wait()[1] for _ in range(4)])
"""


def test_several_processes_at_once(source, cache, compiler):
    compiler("sleep 0.5")  # long enough that none finishes before the others look
    done = subprocess.run([sys.executable, "-c", FOUR, str(source)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "42\n" * 4 + "[0, 0, 0, 0]\n", done.stderr
    assert done.stderr.count(PROGRESS) >= 2, "they did not meet, so nothing was shown"
    assert len(libraries(cache)) == 1
