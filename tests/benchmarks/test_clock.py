"""Contenders take turns, evenly, over all copies of their data."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch

from qloralab.benchmarks.clock import Timer, cuda, host, interleave, quantiles


def noted(names: str) -> tuple[dict[str, Timer], list[str]]:
    """Timers that note each sample."""
    calls: list[str] = []
    return {name: Timer(lambda name=name: calls.append(name) or float(len(calls))) for name in names}, calls


def test_few_repetitions_are_spread_over_the_rounds_of_the_others():
    timers, calls = noted("os")  # often, seldom
    samples = interleave(timers, seconds=0.0, fewest={"o": 12, "s": 3})
    assert [len(samples["o"]), len(samples["s"])] == [12, 3]
    before = [calls[: i + 1].count("o") for i, name in enumerate(calls) if name == "s"]
    assert all(abs(count - round_) <= 1 for count, round_ in zip(before, (4, 8, 12), strict=True))


def test_every_round_has_each_once_in_changing_order():
    timers, calls = noted("abc")
    samples = interleave(timers, seconds=0.0, fewest=48)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert {"".join(sorted(turn)) for turn in rounds} == {"abc"}
    assert all(8 <= [turn[0] for turn in rounds].count(name) <= 26 for name in "abc")
    assert samples["a"] == [number + 1 for number, name in enumerate(calls) if name == "a"]


def test_a_share_of_time_bounds_the_repetitions():
    timers, _ = noted("a")
    assert len(interleave(timers, seconds=10.0)["a"]) == 200
    assert len(interleave(timers, seconds=10.0, most=60)["a"]) == 60
    assert len(interleave(timers, seconds=0.0)["a"]) == 15


def test_the_hosts_clock_calls_the_copies_in_rotation_after_each_was_called_once():
    calls: list[int] = []
    timer = host([partial(calls.append, i) for i in range(4)], warm_up=0)
    assert calls == [0, 1, 2, 3]
    assert all(timer.sample() >= 0 for _ in range(8))
    assert calls == 3 * [0, 1, 2, 3]
    assert host([lambda: time.sleep(0.02)]).sample() >= 20


def test_quantiles():
    assert quantiles([float(i) for i in range(11)]) == {"p20": 2.0, "p50": 5.0, "p80": 8.0}


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [True, False])
def test_the_devices_clock(graph):
    source = torch.ones(2**28, dtype=torch.uint8, device="cuda")
    timer = cuda([source.clone, source.clone], graph)
    assert timer.kind == ("graph" if graph else "events")
    assert 2**29 / 20e9 < timer.sample() * 1e3 < 2**29 / 20e3  # between 20 GB/s and 20 TB/s


@pytest.mark.gpu
def test_what_cannot_be_captured_is_timed_by_events():
    x = torch.ones(8, device="cuda")
    timer = cuda([lambda: x.sum().item()], graph=True)
    assert timer.kind == "events"
    assert timer.note
    assert timer.sample() > 0
