"""The first signal is a wish, the second is now, and afterwards everything is as before."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from qloralab.interrupt import StopRequest

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
    calls = []
    with StopRequest(lambda: calls.append(number)) as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
    assert calls == [number]
    assert stop.requested


@signals
def test_requested_is_set_before_the_call_back(number):
    seen = []
    with StopRequest(lambda: seen.append(stop.requested)) as stop:
        signal.raise_signal(number)
    assert seen == [True]


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


def test_handlers_come_back(before):
    with StopRequest(lambda: None):
        assert all(handlers()[number] is not before[number] for number in SIGNALS)
    assert handlers() == before


def test_handlers_come_back_after_an_error(before):
    with pytest.raises(ZeroDivisionError), StopRequest(lambda: None):
        raise ZeroDivisionError
    assert handlers() == before


def test_no_signal_no_request():
    calls = []
    with StopRequest(lambda: calls.append(1)) as stop:
        pass
    assert not stop.requested
    assert calls == []
