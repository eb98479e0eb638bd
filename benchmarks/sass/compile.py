"""Compile Triton kernels for a GPU that is not here, and read what came out.

Triton compiles for any target, and its wheel brings NVIDIA's assembler and disassembler, so the machine code of a
kernel and what it occupies are known before a GPU runs it:

    @triton.jit kernel  ->  PTX  ->  cubin  ->  SASS (nvdisasm), registers, stack, shared memory (cuobjdump)

A `Case` names one way in which a kernel is launched: types and constants are part of the compiled code. Each file of
kernels ends with its ``CASES``, and with ``CASES_SM_90`` for what is of use on one target alone; ``KERNEL_FILES`` lists
the files. The launcher of triton marks pointers and integers that are divisible by 16, and the compiler makes wider
loads of that; a case says the same through ``divisible``.

A process either compiles or interprets: with ``TRITON_INTERPRET=1``, ``@triton.jit`` makes interpreted functions, which
cannot be compiled. `compile_cases` therefore works in processes of its own, in which the variable is not set, as many
as there are processors. What was compiled before comes out of triton's own cache. ``reader.py`` reads the SASS.

NVIDIA's tools are in the wheels for Linux. Verified with triton 3.6.0 and 3.7.1, for sm_80, sm_90, sm_100 and sm_120.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qloralab.kernels.gpu.case import CUDA_FILES, FILES, Budget, Case, CudaCase

KERNEL_FILES = tuple(dict.fromkeys(FILES.values()))  # modules of kernels/gpu with CASES, in the order of the table
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")  # A100; H100, H200; B200; RTX 50


class OfflineError(RuntimeError):
    """A kernel cannot be compiled here, or triton or one of its tools is missing."""


class NoKernelError(OfflineError):
    """No kernel has a name. The message ends with the names that there are."""


@dataclass(frozen=True)
class Compiled:
    """What became of a case.

    Attributes:
        name: of the case.
        target: such as ``"sm_90"``.
        triton: the version that compiled it.
        weights_per_thread: the case's weights, divided by the threads of a program.
        registers: 32-bit, per thread.
        spilled: bytes of stack and local memory per thread: 0, unless the registers do not suffice.
        shared: bytes of shared memory per program.
        sass: the machine code, as text; empty where it was not asked for.
        budget: of the case, where its file states one.
    """

    name: str
    target: str
    triton: str
    weights_per_thread: float
    registers: int
    spilled: int
    shared: int
    sass: str
    budget: Budget | None = None


def triton_version() -> str:
    """The version of the triton that compiles; raises OfflineError where there is none."""
    return _triton().__version__


def tool(name: str) -> Path:
    """The program `name` of NVIDIA's, out of the wheel of the triton in use: nvdisasm, cuobjdump or ptxas.

    Raises:
        OfflineError: there is no triton, or no such program in it.
    """
    path = Path(_triton().__file__).parent / "backends" / "nvidia" / "bin" / name
    if not os.access(path, os.X_OK):
        raise OfflineError(
            f"triton {triton_version()} has no {name}, which its wheels for Linux bring; looked for {path}"
        )
    return path


def run_tool(name: str, *arguments: str | Path, folder: Path | None = None) -> str:
    """What `tool` prints, run in a folder.

    Raises:
        OfflineError: it is missing, or it failed.
    """
    done = subprocess.run([tool(name), *arguments], capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise OfflineError(f"{name}: {(done.stderr or done.stdout).strip() or f'status {done.returncode}'}")
    return done.stdout


def occupied(cubin: str | Path, symbol: str = "") -> tuple[int, int, int] | None:
    """Registers, bytes spilled and static shared memory of a compiled kernel, by its mangled name or the only one."""
    usage = run_tool("cuobjdump", "-res-usage", cubin)
    before = rf"Function {re.escape(symbol)}:\s+" if symbol else ""
    found = re.search(before + r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        return None
    registers, stack, shared, local = map(int, found.groups())
    return registers, stack + local, shared


def compile_case(case: Case, target: str = "sm_90", disassemble: bool = True) -> Compiled:
    """Compile a case in this process, which must not interpret.

    Args:
        case: to be compiled.
        target: one of `TARGETS`.
        disassemble: whether its machine code is wanted, which takes half a second; otherwise `sass` is empty.

    Raises:
        OfflineError: this process interprets (``TRITON_INTERPRET``), a parameter has neither type nor value, triton
            refuses the kernel, or a tool is missing. The message names the case.
        ValueError: another target.
    """
    capability = _capability(target)
    triton = _triton()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if not isinstance(case.kernel, JITFunction):
        raise OfflineError(f"{case.name}: {case.kernel} is no compilable kernel; is TRITON_INTERPRET set?")
    names = list(case.kernel.arg_names)
    if sorted(names) != sorted([*case.signature, *case.constexprs]):
        wrong = sorted(set(names) ^ {*case.signature, *case.constexprs}) or "one is in both"
        raise OfflineError(f"{case.name}: signature and constexprs together name each parameter once; not so: {wrong}")
    divisible = case.divisible
    if divisible is None:
        divisible = [name for name, kind in case.signature.items() if kind.startswith("*") or kind in ("i32", "i64")]
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    try:
        compiled: Any = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # of many kinds: the compiler's own, and what its passes raise
        raise OfflineError(f"{case.name} does not compile for {target}: {error}") from error
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = occupied(file.name)
        # -ndf: without following the data, which would add nothing to the text.
        sass = run_tool("nvdisasm", "-c", "-ndf", file.name) if disassemble else ""
    if usage is None:
        raise OfflineError(f"{case.name}: cuobjdump states no registers")
    return Compiled(
        name=case.name,
        target=target,
        triton=triton.__version__,
        weights_per_thread=case.weights / (32 * case.num_warps),
        registers=usage[0],
        spilled=usage[1],
        shared=compiled.metadata.shared,  # cuobjdump sees only what is static
        sass=sass,
        budget=case.budget,
    )


def compile_cuda(case: CudaCase, target: str = "sm_90") -> Compiled:
    """Compile a case in CUDA C++, by NVRTC.

    Raises:
        OfflineError: NVRTC or a tool is missing, or the compiler refuses.
        ValueError: another target.
    """
    from qloralab.kernels.gpu import nvrtc

    _capability(target)
    if why := nvrtc.why_not():
        raise OfflineError(f"{case.name}: {why}")
    try:
        cubin = case.compile(target)
    except nvrtc.DriverError as error:
        raise OfflineError(f"{case.name} does not compile for {target}: {error}") from error
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = occupied(file.name)
        sass = run_tool("nvdisasm", "-c", "-ndf", file.name)
    if usage is None:
        raise OfflineError(f"{case.name}: cuobjdump states no registers")
    return Compiled(case.name, target, triton_version(), case.weights, *usage[:2], case.shared, sass, case.budget)


def cuda_cases() -> list[CudaCase]:
    """The cases in CUDA C++; none where NVRTC is missing."""
    from qloralab.kernels.gpu import nvrtc

    if nvrtc.why_not():
        return []
    modules = dict.fromkeys(CUDA_FILES.values())
    return [case for name in modules for case in importlib.import_module(f"qloralab.kernels.gpu.{name}").CUDA_CASES]


def cases_of(module: str, target: str) -> Sequence[Case]:
    """The cases of a module, which is imported by its full name: ``CASES``, and ``CASES_SM_90`` for sm_90 alone.

    Raises:
        OfflineError: it cannot be imported, or has no ``CASES``.
    """
    try:
        found = importlib.import_module(module)
        return [*found.CASES, *getattr(found, f"CASES_{target.upper()}", ())]
    except (ImportError, AttributeError) as error:
        raise OfflineError(f"{module}: {error}") from error


def kernel_modules() -> list[str]:
    """The full names of `KERNEL_FILES`."""
    return [f"qloralab.kernels.gpu.{name}" for name in KERNEL_FILES]


def compile_cases(
    targets: Iterable[str] = ("sm_90",),
    modules: Iterable[str] | None = None,
    only: str | None = None,
    disassemble: bool = True,
) -> list[Compiled]:
    """Compile the cases of modules, in several processes that do not interpret.

    Args:
        targets: of `TARGETS`.
        modules: full names of modules with CASES. None: `kernel_modules`.
        only: the name of a case, or the first words of the names of several. None: every case.
        disassemble: see `compile_case`.

    Returns:
        one entry for each case and target: by target, then as the modules list them.

    Raises:
        OfflineError: see `compile_case` and `cases_of`; or two cases have one name, or none has the name `only`.
        ValueError: a target is none of `TARGETS`.
    """
    targets = list(targets)
    for target in targets:
        _capability(target)
    _triton()
    modules = kernel_modules() if modules is None else list(modules)
    # Spawned, not forked: torch has threads. What these processes import is not imported here.
    with ProcessPoolExecutor(
        len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn"), initializer=_begin_worker
    ) as pool:
        names = {target: pool.map(_names, modules, [target] * len(modules)) for target in targets}
        jobs = []
        for target in targets:
            listed = [(module, name) for module, some in zip(modules, names[target], strict=True) for name in some]
            chosen = select([name for _, name in listed], only)
            jobs += [
                pool.submit(_compile_named, module, name, target, disassemble)
                for module, name in listed
                if name in chosen
            ]
        try:
            return [job.result() for job in jobs]
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, what has not begun does not begin


def select(names: Sequence[str], only: str | None) -> list[str]:
    """The names that are meant: `only` itself, or else those that begin with its words; all, if it is None.

    Raises:
        NoKernelError: none is.
        OfflineError: a name occurs twice.
    """
    if len(set(names)) < len(names):
        raise OfflineError(f"two cases have one name: {', '.join(sorted({n for n in names if names.count(n) > 1}))}")
    if only is None:
        return list(names)
    if only in names:
        return [only]
    if chosen := [name for name in names if re.match(rf"{re.escape(only)}(?!\w)", name)]:
        return chosen
    raise NoKernelError(f"no kernel is called {only!r}; there are: {', '.join(names)}")


def _begin_worker() -> None:
    """Begins a worker process, before triton is imported in it."""
    os.environ.pop("TRITON_INTERPRET", None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def _names(module: str, target: str) -> list[str]:
    return [case.name for case in cases_of(module, target)]


def _compile_named(module: str, name: str, target: str, disassemble: bool) -> Compiled:
    (case,) = (case for case in cases_of(module, target) if case.name == name)
    return compile_case(case, target, disassemble)


def _triton() -> Any:
    try:
        import triton
    except ImportError as error:
        raise OfflineError("this needs triton, which has wheels for Linux") from error
    return triton


def _capability(target: str) -> int:
    if target not in TARGETS:
        raise ValueError(f"the target is one of {', '.join(TARGETS)}, not {target!r}")
    return int(target.removeprefix("sm_"))
