"""Timing several ways of doing one thing against each other, in one process.

One round calls each contender once, in a new order, so that what the machine does meanwhile (another process, a change
of its clock) reaches all of them alike, and nobody always runs behind the same neighbour. A contender that is given as
several functions, one for each copy of its data, takes the next of them at every call: data that was touched last round
is not in the cache.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Run = Callable[[], object]

MOST = 200  # repetitions of a contender that takes next to no time
WARM_UP = 2
FALLBACK_CACHE = 32 * 2**20


def interleave(
    contenders: Mapping[str, Sequence[Run]],
    seconds: float = 1.0,
    fewest: Mapping[str, int] | int = 15,
    warm_up: int = WARM_UP,
) -> dict[str, list[float]]:
    """Time each contender as often as its share of time allows, in turns with the others.

    Args:
        contenders: by name, the functions to call in rotation.
        seconds: for each contender, warm-up not counted.
        fewest: repetitions of a contender, by name or for all, when ``seconds`` would allow fewer.
        warm_up: calls of a contender before the first that counts, after one of each copy.

    Returns:
        by name, the duration of each call in milliseconds, in the order of the calls.
    """
    repetitions = {}
    for name, runs in contenders.items():
        estimate = [_milliseconds(runs[i % len(runs)]) for i in range(len(runs) + warm_up)][-1]
        least = fewest if isinstance(fewest, int) else fewest[name]
        repetitions[name] = max(least, min(MOST, int(1000 * seconds / estimate)))
    rounds = max(repetitions.values(), default=0)
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        # Fewer repetitions than rounds are spread evenly over them.
        due = [n for n, r in repetitions.items() if (turn + 1) * r // rounds > turn * r // rounds]
        for name in order.sample(due, len(due)):
            runs = contenders[name]
            times[name].append(_milliseconds(runs[len(times[name]) % len(runs)]))
    return times


def _milliseconds(run: Run) -> float:
    start = time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - start
    del result  # freed when the clock has stopped
    return 1000 * elapsed


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile of at least two numbers."""
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


def copies(nbytes: int) -> int:
    """How many copies of nbytes to rotate over: they fill the last-level cache twice, within 2 and 8."""
    return max(2, min(8, math.ceil(2 * last_level_cache() / nbytes)))


def last_level_cache() -> int:
    """Bytes of the largest cache of the first processor; 32 MiB where Linux does not say."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    found = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()  # 32768K
        found.append(int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text))
    return max(found, default=FALLBACK_CACHE)
