"""How sure a figure is: 95 % intervals over repetitions, and over what was drawn.

* **Student's t**, of a few independent repetitions (seeds)::

      mean +- t(0.975, n - 1) * s / sqrt(n)

* **The bootstrap** (Efron, 1979), of many samples of unequal weight (matrices, sentences): 2,000 times, as many are
  drawn as there are, with replacement; the interval runs from the 2.5th to the 97.5th percentile.

Two things that saw the same seeds or samples are compared by their differences or ratios, sample by sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Estimate = dict[str, Any]  # value: float; interval: [low, high], or None of one sample
_DRAWS = 2000


def student(values: Sequence[float]) -> Estimate:
    """The mean of repetitions and its interval."""
    from scipy.special import stdtrit

    found = np.asarray(values, np.float64)
    if len(found) < 2:
        return {"value": float(found.mean()), "interval": None}
    half = float(stdtrit(len(found) - 1, 0.975) * found.std(ddof=1) / np.sqrt(len(found)))
    mean = float(found.mean())
    return {"value": mean, "interval": [mean - half, mean + half]}


def bootstrap(samples: Floats, figure: Callable[[Floats], Any]) -> Estimate:
    """A figure of samples and its interval.

    Args:
        samples: float64 [samples, columns].
        figure: of sums, float64 [draws, columns] -> [draws]; the sums are those of the samples drawn.
    """
    count = len(samples)
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), _DRAWS).astype(np.float64) @ samples
    value = float(figure(samples.sum(axis=0, keepdims=True))[0])
    if count < 2:
        return {"value": value, "interval": None}
    low, high = np.percentile(figure(drawn), (2.5, 97.5))
    return {"value": value, "interval": [float(low), float(high)]}


def shown(estimate: Estimate, digits: int = 3, sign: bool = False) -> str:
    """An estimate as a cell: 0.874 (0.871 to 0.877)."""
    form = f"{'+' if sign else ''}.{digits}f"
    if estimate["interval"] is None:
        return f"{estimate['value']:{form}}"
    low, high = estimate["interval"]
    return f"{estimate['value']:{form}} ({low:{form}} to {high:{form}})"
