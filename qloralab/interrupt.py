"""Ctrl-C: a wish while a model is trained (finish the step, keep what was trained), the end of the process elsewhere.

An exception alone does not do: some of the places where it may be raised swallow it. A scheduler that ends the job
(SIGTERM) and a terminal that goes away (SIGHUP) are the same wish.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

STATUS = 130  # of a process that Ctrl-C ended: 128 + SIGINT
LINE = "\nqloralab: stopped"
_LATER = 0.02  # seconds


class StopRequest:
    """While it is entered, the first SIGINT, SIGTERM or SIGHUP sets ``requested``; the second raises KeyboardInterrupt.

    A second SIGHUP does not: the kernel sends one, and the shell another. A signal that is ignored stays so, as below
    ``nohup``. Python's main thread alone is told of signals; elsewhere there is none.

    Args:
        on_request: called at the first signal.
        launched: by ``torchrun``, which sends SIGTERM to processes that a Ctrl-C has reached already, and to those that
            are about to say which other one they lost. Only a second SIGINT raises, and after an error SIGTERM is
            ignored.
    """

    def __init__(self, on_request: Callable[[], None], launched: bool = False):
        self.requested = False
        self._on_request = on_request
        self._launched = launched
        self._repeatable = (signal.SIGINT,) if launched else (signal.SIGINT, signal.SIGTERM)
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: it is not Python's
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        ending = self._launched and kind is not None
        for number, handler in self._before.items():
            handler = signal.SIG_IGN if ending and number == signal.SIGTERM else handler
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number in self._repeatable:
            raise KeyboardInterrupt
        if self.requested:
            return
        self.requested = True
        self._on_request()


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """While it is entered, SIGINT ends the process: the line on stderr, the status, no cleaning up.

    For imports. The C code of torch imports numpy and drops what is raised there, so that a KeyboardInterrupt is lost,
    or comes back seconds later as an ImportError. Leaves SIGINT alone where it is ignored, as below ``nohup``.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_CLEAN_LINE = b"\r\x1b[K\x1b[?25h"  # to its start, erased, the cursor shown: a spinner hides it


def _end(number: int, frame: FrameType | None) -> None:
    try:
        for terminal in filter(os.isatty, (1, 2)):
            os.write(terminal, _CLEAN_LINE)
        os.write(2, f"{LINE}\n".encode())
    finally:
        os._exit(STATUS)


@contextmanager
def no_lost_interrupt() -> Iterator[None]:
    """Where a KeyboardInterrupt cannot be raised, raise it as soon as it can be.

    A signal may arrive in a destructor or in the callback of a weak reference, and an import runs many of them. Python
    then prints the exception, with its traceback, and goes on as if nobody had pressed Ctrl-C. Here it comes again a
    moment later.
    """
    before = sys.unraisablehook

    def again(lost: sys.UnraisableHookArgs) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            main = threading.main_thread().ident or 0
            threading.Timer(
                _LATER, signal.pthread_kill, [main, signal.SIGINT]
            ).start()  # now, it would be raised in here
        else:
            before(lost)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = before
