"""Which implementation serves an operator, and why; and in which dtype a device multiplies.

Every operator of ``nf4/ops.py`` and ``lora/ops.py`` has a reference in plain PyTorch. On CPUs there is a second one in
C, compiled at first use; on NVIDIA GPUs one in Triton (``gpu/self_check.py``). ``QLORALAB_CPU`` chooses. It is checked
at the first use of a public name (``check_environment``), and read when the first operator runs:

=========  ============================================================================================
auto       C where it compiles; otherwise one warning that says what to install, and the reference runs
native     C, or ``BuildError``
reference  plain PyTorch; nothing is compiled
=========  ============================================================================================

``QLORALAB_ISA`` (native, avx512, avx2, portable; read then too) is the instruction set that the C is compiled for: the
machine's own, or a lower one, to test and to measure what slower machines run. ``compute_dtype`` follows it.

An automatic choice may fall back, and ``report`` shows what was chosen. An explicit one that cannot be honoured raises.
Importing compiles nothing. A process compiles at most once for an instruction set: what failed is not tried again.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from qloralab.nf4 import processor
from qloralab.nf4.operator import Operator
from qloralab.nf4.processor import compute_dtype as compute_dtype  # this is where one asks

from .cpu.build import BuildError

if TYPE_CHECKING:
    from .cpu.library import Library

VARIABLE = "QLORALAB_CPU"
MODES = ("auto", "native", "reference")
# Operators that are functions of kernels/, not declared in nf4/ and lora/.
CHUNK_UPDATES = ("adamw", "adamw_8bit")

_lock = threading.Lock()
_mode: str | None = None
_isa: str | None = None
_opened: dict[str, Library | BuildError] = {}  # by instruction set
_warned = False


def check_environment() -> None:
    """Refuse what environment variables ask for and cannot have, before anything slow.

    Raises:
        ValueError: QLORALAB_CPU, QLORALAB_GPU or QLORALAB_ISA is none of its words, or this machine lacks the
            instruction set.
    """
    from .gpu import self_check

    _checked(os.environ.get(VARIABLE) or "auto", VARIABLE)
    self_check.mode()
    processor.isa()


def mode() -> str:
    """The choice: auto, native or reference.

    Raises:
        ValueError: QLORALAB_CPU is something else.
    """
    global _mode
    if _mode is None:
        _mode = _checked(os.environ.get(VARIABLE) or "auto", VARIABLE)
    return _mode


def isa() -> str:
    """The instruction set that the C is compiled for: native, or the lower one that was asked for.

    Raises:
        ValueError: QLORALAB_ISA cannot be honoured, see ``nf4/processor.py``.
    """
    global _isa
    if _isa is None:
        _isa = processor.isa()
    return _isa


def native() -> Library | None:
    """The compiled library, or None where the reference is to run. The first call may compile, for some seconds.

    Raises:
        ValueError: QLORALAB_CPU is none of the three, or QLORALAB_ISA cannot be honoured.
        BuildError: the choice is native, and there is no library.
    """
    choice = mode()
    if choice == "reference":
        return None
    opened = _open()
    if not isinstance(opened, BuildError):
        return opened
    if choice == "native":
        raise opened.with_traceback(None)
    _warn_once(opened)
    return None


@contextmanager
def use(choice: str, isa: str | None = None) -> Iterator[None]:
    """Run the body with another choice, for tests and benchmarks that compare implementations in one process.

    The whole process changes, not this thread alone: operators also run on threads of autograd. The compute dtype stays
    as it is: layers have theirs already.

    Args:
        choice: auto, native or reference.
        isa: the instruction set of the C, one of ``nf4.processor.supported_isas()``; None: as before.

    Raises:
        ValueError: another word, or an instruction set that this machine lacks.
    """
    global _mode, _isa
    choice = _checked(choice, "the implementation")
    if isa is not None and isa not in processor.supported_isas():
        raise ValueError(f"the instruction set here is one of {', '.join(processor.supported_isas())}, not {isa!r}")
    before = _mode, _isa
    _mode, _isa = choice, isa or _isa
    try:
        yield
    finally:
        _mode, _isa = before


def report(device: str = "cpu") -> list[dict[str, str]]:
    """What serves each operator on a device, and why: dictionaries with operator, device, implementation, why.

    Compiles where the choice asks for it, as the first operator would, but neither warns nor raises `BuildError`.

    Args:
        device: "cpu" or "cuda"; the current one of the GPUs.

    Raises:
        ValueError: another device, QLORALAB_CPU (QLORALAB_GPU) is none of its three words, or QLORALAB_ISA cannot be
            honoured.
    """
    if device == "cuda":
        from .gpu import operators as gpu_operators

        there = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        return gpu_operators.report(_declared(), there)
    if device != "cpu":
        raise ValueError(f"the device is cpu or cuda, not {device!r}")
    from .cpu import operators  # noqa: F401  # registers them

    choice = mode()
    opened = None if choice == "reference" else _open()
    rows = []
    for name in _operators():
        if opened is None:
            implementation, why = "reference", f"it was asked for ({VARIABLE}=reference)"
        elif isinstance(opened, BuildError):
            implementation, why = "none" if choice == "native" else "reference", str(opened).splitlines()[0]
        elif not _has_cpu_kernel(name):
            implementation, why = "reference", "there is no C for it"
        else:
            threads = f"on the threads of {opened.pool.path.name}" if opened.pool else "on one thread"
            asked = f" ({processor.VARIABLE}={opened.isa})" if os.environ.get(processor.VARIABLE) == opened.isa else ""
            implementation, why = "native", f"C compiled for {opened.isa}{asked}, {threads}"
        rows.append({"operator": name, "device": "cpu", "implementation": implementation, "why": why})
    return rows


def _checked(choice: str, what: str) -> str:
    if choice not in MODES:
        raise ValueError(f"{what} is one of {', '.join(MODES)}, not {choice!r}")
    return choice


def _open() -> Library | BuildError:
    """The library for the instruction set, or why there is none; found out once."""
    name = isa()
    if name not in _opened:  # the lock is for the first call only
        with _lock:
            if name not in _opened:
                from .cpu.library import Library

                try:
                    _opened[name] = Library(name)
                except BuildError as error:
                    _opened[name] = error.with_traceback(None)
    return _opened[name]


def _warn_once(error: BuildError) -> None:
    global _warned
    with _lock:
        first, _warned = not _warned, True
    if first:
        note = f"The operators run in plain PyTorch, several times slower. {VARIABLE}=reference asks for that silently."
        warn(f"qloralab's CPU kernels are not in use: {error}\n{note}")


def warn(message: str) -> None:
    """Issue a RuntimeWarning about this machine: no line of code is to blame, so none is shown."""
    warnings.warn_explicit(message, RuntimeWarning, "qloralab", 0)


def _operators() -> list[str]:
    return [*_declared(), *CHUNK_UPDATES]


def _declared() -> list[str]:
    """The operators of nf4/ops.py and lora/ops.py, in the order of those files."""
    from qloralab.lora import ops as lora_ops
    from qloralab.nf4 import ops

    every = {**vars(ops), **vars(lora_ops)}
    return [name for name, value in every.items() if isinstance(value, Operator)]


def _has_cpu_kernel(name: str) -> bool:
    """Whether something was registered for the CPU beside the reference, which serves any device."""
    return name in CHUNK_UPDATES or torch._C._dispatch_has_kernel_for_dispatch_key(f"qloralab::{name}", "CPU")
