"""SIGINT waits until the body is over, and then reaches the handler that was there."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from qloralab.optim.interrupts import held_interrupts

Calls = list[tuple[int, object]]


@pytest.fixture
def calls() -> Iterator[Calls]:
    """What a handler of ours gets."""
    got: Calls = []
    real = signal.signal(signal.SIGINT, lambda number, frame: got.append((number, frame)))
    yield got
    signal.signal(signal.SIGINT, real)


def test_it_comes_behind_the_body_and_once(calls):
    with held_interrupts():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert calls == []
    assert [number for number, _ in calls] == [signal.SIGINT]
    assert calls[0][1] is not None, "the frame that was interrupted"
    signal.raise_signal(signal.SIGINT)
    assert len(calls) == 2, "the handler is not back"


def test_without_a_signal_nothing_is_called(calls):
    before = signal.getsignal(signal.SIGINT)
    with held_interrupts():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
    assert calls == []


def test_an_error_in_the_body_comes_out_and_the_handler_is_back(calls):
    before = signal.getsignal(signal.SIGINT)

    def body() -> None:
        with held_interrupts():
            signal.raise_signal(signal.SIGINT)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()
    assert signal.getsignal(signal.SIGINT) is before
    assert len(calls) == 1


def test_the_handler_of_python_raises(calls):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    done = []

    def body() -> None:
        with held_interrupts():
            signal.raise_signal(signal.SIGINT)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        body()
    assert done == [True]


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL], ids=["ignored", "default"])
def test_what_is_not_handled_in_python_stays(handler, calls):
    signal.signal(signal.SIGINT, handler)
    with held_interrupts():
        assert signal.getsignal(signal.SIGINT) is handler


def test_another_thread_changes_nothing(calls):
    seen, before = [], signal.getsignal(signal.SIGINT)

    def body() -> None:
        with held_interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [before]


def test_one_within_another(calls):
    with held_interrupts():
        with held_interrupts():
            signal.raise_signal(signal.SIGINT)
        assert calls == []
    assert len(calls) == 1
