"""Time on a GPU: how long one call of a function keeps the device busy.

A call of a small kernel takes longer to launch than to run, so calls are put into a CUDA graph, which launches them all
at once; a replay between two events, divided by the calls in it, is a sample. What cannot be captured is launched
between two events instead, and its record says ``events``: the time of a small operation then is that of its launch.

A contender is given as several functions, one for each copy of its data. A sample goes round over them, and the results
of one round are kept until the next, so that no output is written twice into the same memory within a round either.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from benchmarks.timing import Run

SAMPLE_MS = 2.0  # a sample takes at least about this, or MOST_CALLS
MOST_CALLS = 256
FEWEST, MOST = 5, 60  # samples


@dataclass(frozen=True)
class Timer:
    """Takes one sample at a time.

    Attributes:
        sample: milliseconds a call.
        kind: "graph", "events" or "host".
        note: why it is no graph, where one was tried.
    """

    sample: Callable[[], float]
    kind: str
    note: str | None = None


class Clock(Protocol):
    """Prepares functions to be timed."""

    def prepare(self, runs: Sequence[Run], graph: bool) -> Timer:
        """Warm the functions up; ``graph`` says whether capturing them may be tried."""
        ...


class HostClock:
    """The processor's clock, for functions that have finished when they return."""

    def prepare(self, runs: Sequence[Run], graph: bool) -> Timer:
        """Run each function once; a sample is one call of each."""
        for run in runs:
            run()

        def sample() -> float:
            start = time.perf_counter()
            _rounds(runs, 1)
            return 1000 * (time.perf_counter() - start) / len(runs)

        return Timer(sample, "host")


class CudaClock:
    """The device's clock."""

    def prepare(self, runs: Sequence[Run], graph: bool) -> Timer:
        """Run each function, estimate, capture."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what is to be captured is warmed up off the default stream
            _rounds(runs, 2)
        torch.cuda.current_stream().wait_stream(aside)
        estimate = _between_events(lambda: _rounds(runs, 1))
        rounds = max(1, min(MOST_CALLS // len(runs), round(SAMPLE_MS / max(estimate, 1e-3))))
        calls = rounds * len(runs)
        note = None
        if graph:
            captured = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(captured):
                    _rounds(runs, rounds)
            except Exception as error:  # a peer may synchronize, or launch on another stream
                note = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
                torch.cuda.synchronize()
            else:
                captured.replay()
                return Timer(lambda: _between_events(captured.replay) / calls, "graph")
        return Timer(lambda: _between_events(lambda: _rounds(runs, rounds)) / calls, "events", note)


def interleave(timers: Mapping[str, Timer], seconds: float) -> dict[str, list[float]]:
    """Samples of each contender, in turns, in a new order every round.

    Args:
        timers: by name.
        seconds: of host time for each contender, within FEWEST and MOST samples.

    Returns:
        by name, milliseconds a call.
    """
    order = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in timers}
    end = time.perf_counter() + seconds * len(timers)
    for turn in range(MOST):
        if turn >= FEWEST and time.perf_counter() >= end:
            break
        for name in order.sample(list(timers), len(timers)):
            samples[name].append(timers[name].sample())
    return samples


def _rounds(runs: Sequence[Run], rounds: int) -> None:
    kept: list[object] = [None] * len(runs)
    for _ in range(rounds):
        for place, run in enumerate(runs):
            kept[place] = run()


def _between_events(body: Callable[[], None]) -> float:
    """Milliseconds on the device."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    body()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
