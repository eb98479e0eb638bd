"""Signals wait until an update is whole: Ctrl-C, and those by which a scheduler announces the end.

A handler in Python runs between any two instructions of the main thread. One that raises, or saves a checkpoint, would
do so in the middle of a step, when some parameters are updated and others are not.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

HELD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_Noted = tuple[int, FrameType | None]


@contextmanager
def held_interrupts() -> Iterator[None]:
    """While the body runs, signals are noted; behind it, the handlers that were there get each of them, in their order.

    Only Python's main thread handles signals: in another one nothing is changed, nor for a signal that is not handled
    in Python.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: handler for number in HELD if callable(handler := signal.getsignal(number))}
    noted: list[_Noted] = []
    try:
        for number in before:
            signal.signal(number, lambda number, frame: noted.append((number, frame)))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _deliver(noted, before)


def _deliver(noted: Sequence[_Noted], handlers: Mapping[int, Any]) -> None:
    """Call the handler of each signal, also when the one of another raises; the last error comes out."""
    if noted:
        (number, frame), *rest = noted
        try:
            handlers[number](number, frame)
        finally:
            _deliver(rest, handlers)
