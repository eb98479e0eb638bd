"""Standard output and standard error may fail, and end nothing: whoever watches a run is free to go.

A reader goes away (``| head``), the disk of a log is full, the terminal is closed or knows ASCII only. Python raises
at the next line that is written. Here that line is lost, the first loss is told on standard error, and all goes on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any


class Lasting:
    """A text stream that never raises. What its encoding lacks is written with backslashes.

    Args:
        stream: to write to; everything else that it has is to be had here.

    Attributes:
        failure: why the first line was lost; None as long as none was.
    """

    def __init__(self, stream: IO[str]):
        self.failure: str | None = None
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._try(self._stream.write, text)
        except UnicodeEncodeError as error:
            known = text.encode(error.encoding, "backslashreplace").decode(error.encoding)
            self._try(self._stream.write, known)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable[..., Any], *arguments: str) -> None:
        try:
            call(*arguments)
        except UnicodeEncodeError:
            raise
        except RuntimeError:
            pass  # the line of a signal's handler, in the middle of another line: CPython's streams are not reentrant
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            if self.failure is None:
                self.failure = getattr(error, "strerror", None) or str(error)
                name = str(getattr(self._stream, "name", "the output")).strip("<>")
                with suppress(OSError, ValueError):
                    print(f"qloralab: {name} cannot be written: {self.failure}; going on without it", file=sys.stderr)


@contextmanager
def lasting_output() -> Iterator[None]:
    """While it is entered, ``sys.stdout`` and ``sys.stderr`` are lasting; a closed one is the null device."""
    before = sys.stdout, sys.stderr
    lasting = [Lasting(stream or open(os.devnull, "w", encoding="utf-8")) for stream in before]  # noqa: SIM115
    sys.stdout, sys.stderr = lasting  # type: ignore[assignment]
    try:
        yield
    finally:
        for stream in lasting:
            stream.flush()
            if stream.failure:  # or the end of the process would fail to write what is left in its buffer
                with suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.stdout, sys.stderr = before
