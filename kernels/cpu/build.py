"""C, compiled by the system's compiler at first use, and kept for the next process.

A wheel with compiled code would serve one instruction set; source serves the machine it runs on. The files are compiled
at the same time, and the library is kept under a name that changes with everything that decides what is in it::

    <cache>/<stem of the first source>-<hash>.so
    hash    = sources and headers, instruction set, flags, compiler and its version, CPU features, machine
    <cache> = $QLORALAB_CACHE, else $XDG_CACHE_HOME/qloralab, else ~/.cache/qloralab

**Several processes at once.** Each compiles into a temporary folder inside the cache and renames the result. Renaming
is atomic: a reader finds nothing or a whole file, and who comes second replaces the same by the same.

**Damage.** A library cut short (a full disk, a killed copy) kills the process that loads it with SIGBUS. So the file
ends with the SHA-256 of what comes before it, which the loader never looks at, and a file that does not match is
compiled again.

**Trust.** A library runs with the rights of whoever loads it. The cache folder, and a file in it, are used only when
they belong to this user or to root, and when not everyone may write to them. What the owner grants to a group is the
owner's decision, and so are the folders above.

**Flags.** ``-ffp-contract=off``: a product and a sum are two roundings on every path, as in PyTorch. Never
``-ffast-math``: a library linked with it sets flush-to-zero for the whole process. No ``-fopenmp``: see ``pool.py``.

===============  =====================================================================================
CC               the compiler, with arguments if need be; otherwise the first of cc, gcc, clang on PATH
QLORALAB_CFLAGS  flags that come after ours, for sanitizers and experiments
QLORALAB_CACHE   the cache folder
QLORALAB_ISA     the instruction set that the operators ask for, see ``kernels/dispatch.py``
===============  =====================================================================================
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from qloralab.nf4.processor import cpu_features, supported_isas

# The last one silences notes on how vectors are passed to functions, of which none is called from outside.
FLAGS = ("-O3", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi")
STANDARDS = {".c": "-std=gnu11", ".cpp": "-std=c++17"}
LIBRARIES = ("-lm",)
TIMEOUT = 120  # seconds
COMPILERS = ("cc", "gcc", "clang")
INSTALL = (
    "install one (Debian, Ubuntu: apt-get install gcc libc6-dev; Fedora: dnf install gcc; Alpine: apk add gcc musl-dev)"
)

# Instruction sets by name. Each has flags to try in order: a compiler may not know the first. -march=native is
# -mcpu=native in the compilers for ARM, and unknown to some others, where the plain baseline remains.
NATIVE = {"x86_64": (("-march=native",), ()), "aarch64": (("-mcpu=native",), ())}
ISAS = {
    "native": NATIVE.get(platform.machine(), (("-march=native",), ("-mcpu=native",), ())),
    "avx512": (("-march=x86-64-v4",),),
    "avx2": (("-march=x86-64-v3",),),
    "portable": (("-DQLORALAB_PORTABLE",),),
}


class BuildError(RuntimeError):
    """The C code cannot be compiled or loaded here. The message says why and what to do about it."""


def build(
    sources: Sequence[Path],
    isa: str = "native",
    extra: Sequence[str] = (),
    cache: Path | None = None,
    *,
    again: bool = False,
) -> Path:
    """Compile C or C++ files into one shared library, unless the cache has it.

    Args:
        sources: the files. Headers in their folders count as part of them.
        isa: the instruction set to compile for: native (this machine's), avx512, avx2 or portable.
        extra: more flags for the compiler and the linker.
        cache: where the library is kept, instead of the user's cache folder.
        again: whether to compile even if the cache has it.

    Returns:
        The shared library. Everything is hidden in it but what asks for default visibility.

    Raises:
        ValueError: an unknown instruction set.
        BuildError: no compiler, a failing compiler, or a cache folder that cannot be written or is not trusted.
    """
    if isa not in ISAS:
        raise ValueError(f"isa is one of {', '.join(ISAS)}, not {isa!r}")
    compiler = _compiler()
    extra = [*extra, *_words("QLORALAB_CFLAGS")]
    folder = (cache_folder() if cache is None else cache).absolute()  # the loader searches for a name without a slash
    path = folder / f"{sources[0].stem}-{_hash(sources, isa, extra, compiler)}.so"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if why := _distrust(folder):
            raise BuildError(f"the cache folder {folder} {why}; set QLORALAB_CACHE to a folder of your own")
        if again or not _usable(path):
            with tempfile.TemporaryDirectory(prefix=".compiling-", dir=folder) as scratch:
                os.replace(_compile(sources, isa, extra, compiler, Path(scratch)), path)
    except OSError as error:
        advice = "make it writable, or set QLORALAB_CACHE to a folder that is"
        raise BuildError(f"cannot write to the cache folder {folder} ({error.strerror}); {advice}") from None
    return path


def load(
    sources: Sequence[Path], isa: str = "native", extra: Sequence[str] = (), cache: Path | None = None
) -> ctypes.CDLL:
    """Load what ``build`` returns for the same arguments. A cached file that does not load is compiled once more.

    Raises:
        ValueError, BuildError: as ``build``; also when this machine lacks the instruction set, or nothing loads.
    """
    if isa in ISAS and isa not in supported_isas():
        raise BuildError(f"this machine has no {isa}; it runs {', '.join(supported_isas())}")
    why = None
    for again in (False, True):
        path = build(sources, isa, extra, cache, again=again)
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            why = f"{path} does not load ({error})"
    raise BuildError(f"{why}; if its folder is mounted noexec, set QLORALAB_CACHE to one that is not")


def cache_folder() -> Path:
    """Where libraries are kept, see the top of this file. It need not exist."""
    if named := os.environ.get("QLORALAB_CACHE"):
        return Path(named)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the XDG specification says to ignore it then
        base = Path(os.path.expanduser("~/.cache"))
    if not base.is_absolute():
        raise BuildError("this user has no home folder to keep compiled code in; set QLORALAB_CACHE to a folder")
    return base / "qloralab"


def _compile(sources: Sequence[Path], isa: str, extra: Sequence[str], compiler: list[str], scratch: Path) -> Path:
    """The finished library, in the folder `scratch`."""
    name = Path(compiler[0]).name
    what = "the CPU kernels" if len(sources) > 1 else sources[0].name
    print(f"qloralab: compiling {what} with {name}, about ten seconds, once", file=sys.stderr, flush=True)
    path = scratch / "library.so"
    flags = [*FLAGS, *_isa_flags(isa, compiler, scratch)]
    objects = [scratch / f"{source.name}.o" for source in sources]
    steps = [
        [*compiler, STANDARDS[source.suffix], *flags, "-c", "-o", str(to), str(source), *extra]
        for source, to in zip(sources, objects, strict=True)
    ]
    link = [*compiler, *flags, "-shared", "-o", str(path), *map(str, objects), *extra, *LIBRARIES]
    for commands in steps, [link]:
        for command, (status, output) in zip(commands, _run(commands, scratch), strict=True):
            if status:
                raise _failure(command, f"status {status}", output)
    if not path.is_file():
        raise _failure(link, "no output file", "")
    contents = path.read_bytes()
    path.write_bytes(contents + hashlib.sha256(contents).digest())
    path.chmod(0o755)  # whatever the umask: others may read it, none may write it
    return path


def _failure(command: list[str], why: str, output: str) -> BuildError:
    lines = output.strip().splitlines() or ["it printed nothing"]
    first = next((index for index, line in enumerate(lines) if "error:" in line), len(lines))
    lines = lines[first : first + 12] or lines[-12:]
    if any(line.endswith(".h: No such file or directory") for line in lines):
        lines.append(f"A header of the C library may be missing: {INSTALL}.")
    return BuildError("\n".join([f"the C compiler {command[0]} failed ({why}):", *lines, f"$ {shlex.join(command)}"]))


def _isa_flags(isa: str, compiler: list[str], scratch: Path) -> Sequence[str]:
    """The first flags of this instruction set that the compiler takes; the last ones untried."""
    *choices, last = ISAS[isa]
    for flags in choices:
        ((status, _),) = _run([[*compiler, *flags, "-x", "c", "-fsyntax-only", os.devnull]], scratch)
        if status == 0:
            return flags
    return last


def _compiler() -> list[str]:
    """The command that compiles C, its first word an absolute path."""
    asked = _words("CC")
    for command in [asked] if asked else [[name] for name in COMPILERS]:
        if path := shutil.which(command[0]):
            return [os.path.abspath(path), *command[1:]]
    if asked:
        raise BuildError(f"CC names the C compiler {asked[0]!r}, which is not there")
    raise BuildError(f"no C compiler: none of {', '.join(COMPILERS)} is on PATH; {INSTALL}")


def _words(variable: str) -> list[str]:
    """The words of an environment variable, split as a shell splits them."""
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise BuildError(f"{variable}={os.environ[variable]!r}: {error}") from None


def _hash(sources: Sequence[Path], isa: str, extra: Sequence[str], compiler: list[str]) -> str:
    """32 hexadecimal digits that change with anything that may change the library."""
    headers = {header for source in sources for header in source.parent.glob("*.h")}
    ((_, version),) = _run([[*compiler, "--version"]])
    machine = [platform.machine(), cpu_features(), *compiler, version.partition("\n")[0]]
    flags = [*FLAGS, *LIBRARIES, isa, *map(str, ISAS[isa]), *extra]
    files = [(file.name, file.read_bytes()) for file in [*sources, *sorted(headers)]]
    return hashlib.sha256(repr((machine, flags, files)).encode()).hexdigest()[:32]


def _run(commands: Sequence[list[str]], scratch: Path | None = None) -> list[tuple[int, str]]:
    """Exit status and output of each of some commands of the compiler, which run at the same time.

    They keep their temporary files in `scratch`. Each runs in a process group of its own, so that its children end with
    it when it takes too long or on Ctrl-C.
    """
    environment = {**os.environ, "LC_ALL": "C"}  # messages in English, whatever the user speaks: they are looked at
    environment.pop("LD_PRELOAD", None)  # a sanitizer's runtime is meant for this process
    if scratch is not None:
        environment["TMPDIR"] = str(scratch)
    deadline = time.monotonic() + TIMEOUT
    processes: list[subprocess.Popen[str]] = []
    command: list[str] = []
    try:
        for command in commands:
            started = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
                text=True, errors="replace", process_group=0,
            )  # fmt: skip
            processes.append(started)
        outputs = [process.communicate(timeout=max(0, deadline - time.monotonic()))[0] for process in processes]
    except BaseException as error:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise BuildError(f"the C compiler took more than {TIMEOUT} s\n$ {shlex.join(error.cmd)}") from None
        if isinstance(error, OSError):
            raise BuildError(f"the C compiler {command[0]} does not start ({error.strerror}); {INSTALL}") from None
        raise
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def _usable(path: Path) -> bool:
    """Whether this file is a whole library that may be loaded."""
    try:
        if _distrust(path):
            return False
        contents = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(contents[:-32]).digest() == contents[-32:]


def _distrust(path: Path) -> str | None:
    """Why code from there is not to be run, or None."""
    found = path.stat()
    if found.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user (number {found.st_uid})"
    if found.st_mode & stat.S_IWOTH:
        return "can be written to by everyone"
    return None
