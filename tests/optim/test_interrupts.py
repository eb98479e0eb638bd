"""Signals wait until the body is over, and then reach the handlers that were there, each of them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from qloralab.optim.interrupts import HELD, held_interrupts

Calls = list[tuple[int, object]]


@pytest.fixture
def calls() -> Iterator[Calls]:
    """What a handler of ours gets, of each signal that is held."""
    got: Calls = []
    real = {number: signal.signal(number, lambda number, frame: got.append((number, frame))) for number in HELD}
    yield got
    for number, handler in real.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", HELD)
def test_it_comes_behind_the_body_as_often_as_it_came(calls, number):
    with held_interrupts():
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert calls == []
    assert [number for number, _ in calls] == [number] * 2
    assert calls[0][1] is not None, "the frame that was interrupted"
    signal.raise_signal(number)
    assert len(calls) == 3, "the handler is not back"


def test_several_come_in_their_order(calls):
    order = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM]
    with held_interrupts():
        for number in order:
            signal.raise_signal(number)
    assert [number for number, _ in calls] == order


def test_a_handler_that_raises_keeps_none_from_the_others(calls):
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def body() -> None:
        with held_interrupts():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.raise_signal(number)
            assert calls == []

    with pytest.raises(KeyboardInterrupt):
        body()
    assert [number for number, _ in calls] == [signal.SIGTERM, signal.SIGUSR1]


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
