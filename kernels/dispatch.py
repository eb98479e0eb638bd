"""Which implementation serves an operator, and why; and in which dtype a device multiplies.

Every operator of ``nf4/ops.py`` and ``lora/ops.py`` has a reference in plain PyTorch. On CPUs there is a second one in
C, compiled at first use; on NVIDIA GPUs one in Triton (``gpu/self_check.py``). ``QLORALAB_CPU`` chooses. It is checked
at the first use of a public name, and read when the first operator runs:

=========  ============================================================================================
auto       C where it compiles; otherwise one warning that says what to install, and the reference runs
native     C, or ``BuildError``
reference  plain PyTorch; nothing is compiled
=========  ============================================================================================

``QLORALAB_ISA`` (native, avx512, avx2, portable; read then too) is the instruction set that the C is compiled for: the
machine's own, or a lower one, to test and to measure what slower machines run. ``compute_dtype`` follows it.

An automatic choice may fall back, and ``report.py`` shows which. An explicit one that cannot be honoured raises.
Importing compiles nothing. A process compiles at most once for an instruction set: what failed is not tried again.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qloralab.nf4 import processor
from qloralab.nf4.processor import compute_dtype as compute_dtype  # this is where one asks

from .cpu.build import BuildError

if TYPE_CHECKING:
    from .cpu.library import Library

VARIABLE = "QLORALAB_CPU"
MODES = ("auto", "native", "reference")
# Updates: functions of kernels/, not declared in nf4/ and lora/.
CHUNK_UPDATES = ("adamw", "adamw_8bit")

_lock = threading.Lock()
_mode: str | None = None
_isa: str | None = None
_opened: dict[str, Library | BuildError] = {}  # by instruction set
_warned = False


def mode() -> str:
    """The choice: auto, native or reference.

    Raises:
        ValueError: QLORALAB_CPU is something else.
    """
    global _mode
    _mode = _mode or asked_mode()
    return _mode


def asked_mode() -> str:
    """What QLORALAB_CPU asks for now; raises as ``mode`` does."""
    return _checked(os.environ.get(VARIABLE) or "auto", VARIABLE)


def isa() -> str:
    """The instruction set that the C is compiled for: native, or the lower one that was asked for.

    Raises:
        ValueError: QLORALAB_ISA cannot be honoured, see ``nf4/processor.py``.
    """
    global _isa
    _isa = _isa or processor.isa()
    return _isa


def native() -> Library | None:
    """The compiled library, or None where the reference is to run. The first call may compile, for about ten seconds.

    Raises:
        ValueError: QLORALAB_CPU is none of the three, or QLORALAB_ISA cannot be honoured.
        BuildError: the choice is native, and there is no library.
    """
    choice = mode()
    if choice == "reference":
        return None
    found = opened()
    if not isinstance(found, BuildError):
        return found
    if choice == "native":
        raise found.with_traceback(None)
    _warn_once(found)
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


def _checked(choice: str, what: str) -> str:
    if choice not in MODES:
        raise ValueError(f"{what} is one of {', '.join(MODES)}, not {choice!r}")
    return choice


def opened() -> Library | BuildError:
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
