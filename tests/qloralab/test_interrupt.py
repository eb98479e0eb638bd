"""In training the first signal is a wish and the second is now; elsewhere none is lost. Afterwards all is as before."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator

import pytest

from qloralab.interrupt import LINE, STATUS, StopRequest, no_lost_interrupt, stopping_at_once

SIGNALS = (signal.SIGINT, signal.SIGTERM)
signals = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


@pytest.fixture(autouse=True)
def before() -> Iterator[dict[int, object]]:
    """Known handlers, and the real ones back even after a failure."""

    def came_through(number, frame):
        raise AssertionError(f"signal {number} came through")

    real = {number: signal.signal(number, came_through) for number in SIGNALS}
    yield dict.fromkeys(SIGNALS, came_through)
    for number, handler in real.items():
        signal.signal(number, handler)


def handlers() -> dict[int, object]:
    return {number: signal.getsignal(number) for number in SIGNALS}


@signals
def test_the_first_is_a_wish(number):
    seen = []
    with StopRequest(lambda: seen.append(stop.requested)) as stop:
        assert not stop.requested
        signal.raise_signal(number)
    assert seen == [True], "the request is there before the call"
    assert stop.requested


@pytest.mark.parametrize("first", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("second", SIGNALS, ids=lambda number: number.name)
def test_the_second_raises(first, second, before):
    calls = []
    with StopRequest(lambda: calls.append(1)):
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(second)
    assert calls == [1]
    assert handlers() == before


def test_a_terminal_that_goes_away_says_so_twice():
    with StopRequest(lambda: None) as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.requested
        signal.raise_signal(signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGHUP], ids=lambda number: number.name)
def test_what_is_ignored_is_no_request(number):
    real = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequest(lambda: None) as stop:
            signal.raise_signal(number)
        assert not stop.requested
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, real)


def test_handlers_come_back(before):
    """Also after an error; and without a signal there is no request."""
    with StopRequest(lambda: pytest.fail("no signal came")) as stop:
        assert all(handlers()[number] is not before[number] for number in SIGNALS)
    assert (handlers(), stop.requested) == (before, False)
    with pytest.raises(ZeroDivisionError), StopRequest(lambda: None):
        raise ZeroDivisionError
    assert handlers() == before


def lose_an_interrupt() -> None:
    """Ctrl-C in the callback of a weak reference, from which no exception comes out."""
    thing = type("Thing", (), {})()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    with no_lost_interrupt():
        del thing
        assert reference() is None
        time.sleep(10)


@pytest.fixture
def default(before: dict[int, object]) -> None:
    """SIGINT as it is at the start of a process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_interrupt_that_python_drops_is_raised_after_all(default, capfd):
    hook = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt):
        lose_an_interrupt()
    assert capfd.readouterr() == ("", "")
    assert sys.unraisablehook is hook


def test_other_lost_exceptions_go_where_they_went(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    thing = type("Thing", (), {})()
    reference = weakref.ref(thing, lambda _: 1 / 0)
    with no_lost_interrupt():
        del thing
    assert reference() is None
    assert [lost.exc_type for lost in seen] == [ZeroDivisionError]


def run_python(code: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


SWALLOWS = """
import signal
from qloralab.interrupt import stopping_at_once
{before}
with stopping_at_once():
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        pass
print("went on", file=__import__("sys").stderr)
"""


def test_an_import_that_swallows_every_exception_is_stopped():
    assert run_python(SWALLOWS.format(before="")) == (STATUS, LINE + "\n")


def test_the_terminal_gets_its_cursor_back():
    """A spinner turns while libraries are imported, and nothing else is cleaned up when that is interrupted."""
    code = "\n".join(
        [
            "import os, signal, time",
            "from rich.console import Console",
            "from qloralab.display import Display",
            "from qloralab.interrupt import stopping_at_once",
            "with stopping_at_once(), Display(Console(force_terminal=True)).busy('loading'):",
            "    os.kill(os.getpid(), signal.SIGINT)",
            "    time.sleep(30)",
        ]
    )
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # which is what the end of a terminal is on Linux
            while part := os.read(ours, 4096):
                shown += part
        os.close(ours)
    assert process.returncode == STATUS
    hidden, visible = shown.rfind(b"\x1b[?25l"), shown.rfind(b"\x1b[?25h")
    assert 0 <= hidden < visible
    assert b"loading" in shown
    assert shown.endswith(LINE.replace("\n", "\r\n").encode() + b"\r\n")


def test_an_ignored_signal_stays_ignored():
    ignored = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    assert run_python(SWALLOWS.format(before=ignored)) == (0, "went on\n")


def test_after_the_imports_the_handler_is_back(default):
    with stopping_at_once():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    with pytest.raises(ZeroDivisionError), stopping_at_once():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
