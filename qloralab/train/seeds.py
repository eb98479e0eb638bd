"""The same fine-tuning with several seeds: the mean of the validation loss, and how sure it is.

The seed draws the split, the order of the examples, the first values of the adapters and dropout, so the runs differ
as runs of the same settings do. Their losses x are taken for normally distributed with unknown variance. The interval
that holds the mean of all such runs with 95 % confidence is then that of Student::

    mean(x) +- t * s / sqrt(n)        s**2 = sum((x - mean(x))**2) / (n - 1),   t = the 97.5 % quantile for n - 1

With five runs t is 2.776. Two settings are compared seed by seed (``seeds.json`` has the losses of each): runs of one
seed share their split, whose luck drops out of the differences.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from qloralab.nf4.files.atomic import replacing

from ..display import Display
from ..errors import UserError
from ..settings import Settings
from .finetune import Result, finetune

FILE = "seeds.json"
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean of n numbers, and the interval of Student's t around it.

    Attributes:
        mean, low, high: in the unit of the numbers; low and high are None where there are fewer than two numbers.
    """

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Interval:
        """That of some numbers, at least one."""
        from scipy.stats import t

        mean, n = float(np.mean(numbers)), len(numbers)
        if n < 2:
            return cls(mean, None, None)
        half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(numbers, ddof=1) / math.sqrt(n))
        return cls(mean, mean - half, mean + half)

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:.4f}"
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclasses.dataclass(frozen=True)
class SeedsResult:
    """What the runs came to.

    Attributes:
        path: the directory that holds a run directory for each seed, and ``seeds.json``.
        runs: by seed; those that ended.
        val_before, val_after, change: over the runs, in nats per token; change is after less before, run by run.
        interrupted: whether the last run was stopped. It does not count.
    """

    path: Path
    runs: dict[int, Result]
    val_before: Interval
    val_after: Interval
    change: Interval
    interrupted: bool


def finetune_seeds(settings: Settings, display: Display | None = None) -> SeedsResult:
    """Run ``finetune`` with ``settings.seeds`` seeds from ``settings.seed`` on, one after the other.

    After each run ``seeds.json`` is written anew. After Ctrl-C the run that was stopped is saved as ever, no other is
    started, and the result is that of the runs before it.

    Raises:
        UserError: see ``finetune``; or the first run was stopped, so that there is nothing to report.
    """
    display = display or Display()
    path = settings.out or Path("runs", f"{datetime.datetime.now():%Y%m%d-%H%M%S}-seeds")
    seeds = range(settings.seed, settings.last_seed + 1)
    runs: dict[int, Result] = {}
    result: SeedsResult | None = None
    for number, seed in enumerate(seeds, 1):
        display.fact("seed", f"{seed}, run {number} of {len(seeds)}")
        run = finetune(dataclasses.replace(settings, seed=seed, seeds=None, out=path / f"seed-{seed}"), display)
        if run.interrupted:
            break
        runs[seed] = run
        result = _summary(path, runs, interrupted=False)
        _write(result, settings)
    if result is None:
        raise UserError(f"the first of {len(seeds)} runs was stopped: there is no mean; {path} holds what it trained")
    if len(runs) < len(seeds):
        result = dataclasses.replace(result, interrupted=True)
        _write(result, settings)
    _show(result, display)
    return result


def _summary(path: Path, runs: dict[int, Result], interrupted: bool) -> SeedsResult:
    before, after = [run.val_before for run in runs.values()], [_after(run) for run in runs.values()]
    change = [b - a for a, b in zip(before, after, strict=True)]
    return SeedsResult(
        path, dict(runs), Interval.of(before), Interval.of(after), Interval.of(change), interrupted=interrupted
    )


def _after(run: Result) -> float:
    assert run.val_after is not None  # of a run that was not interrupted
    return run.val_after


def _write(result: SeedsResult, settings: Settings) -> None:
    """``seeds.json``: the settings, each run, and the three intervals."""
    written: dict[str, Any] = {
        **dataclasses.asdict(result),
        "confidence": CONFIDENCE,
        "settings": dataclasses.asdict(settings),
    }
    try:
        with replacing(result.path / FILE) as (part,):
            part.write_text(json.dumps(written, indent=2, default=str) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{result.path / FILE} cannot be written: {error.strerror or error}") from error


def _show(result: SeedsResult, display: Display) -> None:
    table = Table("seed", "before", "after", "change", title="validation loss, nats per token", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for seed, run in result.runs.items():
        after = _after(run)
        table.add_row(str(seed), *(f"{number:.4f}" for number in (run.val_before, after, after - run.val_before)))
    table.add_section()
    table.add_row("mean", *(f"{one.mean:.4f}" for one in (result.val_before, result.val_after, result.change)))
    if len(result.runs) > 1:
        intervals = (f"{one.low:.4f} to {one.high:.4f}" for one in (result.val_before, result.val_after, result.change))
        table.add_row(f"{CONFIDENCE:.0%} interval", *intervals)
    display.console.print(table)
    display.fact("saved", str(result.path / FILE))
