"""Contenders take turns, evenly, over all copies of their data."""

from __future__ import annotations

from functools import partial

import pytest

from benchmarks import timing
from benchmarks.timing import copies, interleave, last_level_cache, quantiles


def test_few_repetitions_are_spread_over_the_rounds_of_the_others():
    calls: list[str] = []
    contenders = {name: [partial(calls.append, name)] for name in ("often", "seldom")}
    times = interleave(contenders, seconds=0.0, fewest={"often": 12, "seldom": 3}, warm_up=0)
    assert [len(times["often"]), len(times["seldom"])] == [12, 3]
    timed = calls[2:]  # one warm-up each
    places = [timed[: i + 1].count("often") for i, name in enumerate(timed) if name == "seldom"]
    assert all(abs(place - round_) <= 1 for place, round_ in zip(places, (4, 8, 12), strict=True))


def test_nobody_always_goes_first():
    calls: list[str] = []
    contenders = {name: [partial(calls.append, name)] for name in "ab"}
    interleave(contenders, seconds=0.0, fewest=16, warm_up=0)
    first = calls[2::2]
    assert 3 < first.count("a") < 13
    assert all({*calls[i : i + 2]} == {"a", "b"} for i in range(2, len(calls), 2))


def test_the_copies_are_called_in_rotation():
    calls: list[int] = []
    interleave({"a": [partial(calls.append, i) for i in range(4)]}, seconds=0.0, fewest=8, warm_up=0)
    assert calls == 3 * [0, 1, 2, 3]  # each copy once to warm up


def test_a_share_of_time_bounds_the_repetitions():
    times = interleave({"a": [lambda: None]}, seconds=10.0)
    assert len(times["a"]) == timing.MOST
    assert len(interleave({"a": [lambda: None]}, seconds=0.0)["a"]) == 15


def test_quantiles():
    assert quantiles([float(i) for i in range(11)]) == {"p20": 2.0, "p50": 5.0, "p80": 8.0}


@pytest.mark.parametrize(("nbytes", "count"), [(64, 8), (8_650_000, 8), (22_500_000, 3), (33_554_432, 2), (10**9, 2)])
def test_copies_fill_the_cache_twice(monkeypatch, nbytes, count):
    monkeypatch.setattr(timing, "last_level_cache", lambda: 32 * 2**20)
    assert copies(nbytes) == count


def test_the_last_level_cache_is_a_plausible_size():
    assert 2**18 <= last_level_cache() <= 2**31
