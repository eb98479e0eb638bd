"""Time several ways of doing one thing against each other, in one process.

One round samples each contender once, in a new order, so that what the machine does meanwhile (another process, a
change of its clock) reaches all of them alike, and nobody always runs behind the same neighbour. A contender that is
given as several functions, one for each copy of its data, takes the next of them at every call: data that was touched
last round is not in the cache.

**On a GPU** a call of a small kernel takes longer to launch than to run, so calls are put into a CUDA graph, which
launches them all at once; a replay between two events, divided by the calls in it, is a sample. What cannot be captured
is launched between two events instead, and its record says ``events``: the time of a small operation then is that of
its launch. The results of a round over the copies are kept until the next, so that no output is written twice into the
same memory within a round either.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Run = Callable[[], object]

SAMPLE_MS = 2.0  # a sample of a GPU takes at least about this, or MOST_CALLS
MOST_CALLS = 256


@dataclass(frozen=True)
class Timer:
    """A contender that is warm.

    Attributes:
        sample: takes one sample: milliseconds a call.
        kind: "host", "graph" or "events".
        note: why it is no graph, where one was tried.
    """

    sample: Callable[[], float]
    kind: str = "host"
    note: str | None = None


def host(runs: Sequence[Run], graph: bool = False, warm_up: int = 1) -> Timer:
    """A timer by the processor's clock, for functions that have finished when they return.

    Args:
        runs: to call in rotation, each once before the first sample.
        graph: is for the clock of a GPU.
        warm_up: calls after those.
    """
    for number in range(len(runs) + warm_up):
        runs[number % len(runs)]()
    turns = itertools.cycle(runs)

    def sample() -> float:
        run = next(turns)
        start = time.perf_counter()
        result = run()
        elapsed = time.perf_counter() - start
        del result  # it is freed when the clock has stopped
        return 1000 * elapsed

    return Timer(sample)


def cuda(runs: Sequence[Run], graph: bool) -> Timer:
    """A timer by the device's clock: run each function, estimate, capture where ``graph`` says that it may be tried."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what is to be captured is warmed up off the default stream
        _rounds(runs, 2)
    torch.cuda.current_stream().wait_stream(aside)
    estimate = _between_events(lambda: _rounds(runs, 1))
    rounds = max(1, min(MOST_CALLS // len(runs), round(SAMPLE_MS / max(estimate, 1e-3))))
    calls, note = rounds * len(runs), None
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


def interleave(
    timers: Mapping[str, Timer], seconds: float = 1.0, fewest: Mapping[str, int] | int = 15, most: int = 200
) -> dict[str, list[float]]:
    """Sample each contender as often as its share of time allows, in turns with the others.

    Args:
        timers: by name.
        seconds: for each contender; 0 asks for the fewest samples.
        fewest: samples of a contender, by name or for all, when ``seconds`` would allow fewer.
        most: samples of a contender that takes next to no time.

    Returns:
        by name, the samples in the order in which they were taken: milliseconds a call.
    """
    repetitions = {name: fewest if isinstance(fewest, int) else fewest[name] for name in timers}
    for name, timer in timers.items() if seconds else ():
        start = time.perf_counter()
        timer.sample()
        allowed = int(seconds / (time.perf_counter() - start))
        repetitions[name] = max(repetitions[name], min(most, allowed))
    rounds = max(repetitions.values(), default=0)
    order = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(rounds):
        # Fewer repetitions than rounds are spread evenly over them.
        due = [n for n, r in repetitions.items() if (turn + 1) * r // rounds > turn * r // rounds]
        for name in order.sample(due, len(due)):
            samples[name].append(timers[name].sample())
    return samples


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile of at least two numbers."""
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


def _rounds(runs: Sequence[Run], rounds: int) -> None:
    kept: list[object] = [None] * len(runs)
    for _ in range(rounds):
        for number, run in enumerate(runs):
            kept[number] = run()


def _between_events(body: Callable[[], None]) -> float:
    """Milliseconds on the device."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    body()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
