"""Runs with several seeds: each is the run that its seed makes alone, and the interval is Student's."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import pytest
import torch
from rich.console import Console
from scipy import stats

from qloralab.display import Display
from qloralab.train import seeds
from qloralab.train.finetune import finetune
from qloralab.train.seeds import Interval, finetune_seeds


def test_the_interval_is_students():
    numbers = [1.0, 2.0, 4.0, 4.5, 3.0]
    expected = stats.ttest_1samp(numbers, 0).confidence_interval(0.95)
    found = Interval.of(numbers)
    assert (found.mean, found.low, found.high) == pytest.approx((2.9, expected.low, expected.high))
    assert Interval.of([2.0]) == Interval(2.0, None, None)
    assert Interval.of([2.0, 2.0]) == Interval(2.0, 2.0, 2.0)


def test_the_interval_holds_the_mean_as_often_as_it_says():
    draws = torch.randn(1000, 5, generator=torch.Generator().manual_seed(0)).double()
    made: list[Any] = [Interval.of(draw) for draw in draws.tolist()]
    held = sum(one.low <= 0 <= one.high for one in made)
    assert 925 < held < 975


def test_each_run_is_that_of_its_seed(settings, tmp_path):
    file = io.StringIO()
    chosen = settings(seed=3, seeds=2, steps=2, eval_every=2)
    result = finetune_seeds(chosen, Display(Console(file=file, width=200)))
    assert {path.name for path in chosen.out.iterdir()} == {"seed-3", "seed-4", "seeds.json"}
    assert not result.interrupted
    alone = finetune(
        dataclasses.replace(chosen, seed=4, seeds=None, out=tmp_path / "alone"), Display(Console(file=file))
    )
    assert result.runs[4].val_after == alone.val_after
    after: list[Any] = [run.val_after for run in result.runs.values()]
    assert after[0] != after[1]
    assert result.val_after == Interval.of(after)
    written = json.loads((chosen.out / "seeds.json").read_text())
    assert written["runs"]["3"]["val_after"] == after[0]
    assert written["val_after"] == dataclasses.asdict(result.val_after)
    assert (written["confidence"], written["settings"]["seeds"]) == (0.95, 2)
    assert json.loads((chosen.out / "seed-3" / "config.json").read_text())["seed"] == 3
    shown = file.getvalue()
    assert f"{result.val_after.mean:.4f}" in shown
    assert "95% interval" in shown


def test_a_stopped_run_is_the_last_and_does_not_count(settings, silent, monkeypatch, refusal):
    calls: list[int] = []

    def stopping(some, display):
        calls.append(some.seed)
        return dataclasses.replace(finetune(some, display), interrupted=some.seed == 1)

    monkeypatch.setattr(seeds, "finetune", stopping)
    result = finetune_seeds(settings(seeds=4, steps=1), silent)
    assert (calls, list(result.runs), result.interrupted) == ([0, 1], [0], True)
    assert json.loads((result.path / "seeds.json").read_text())["interrupted"] is True
    stopped = settings(seed=1, seeds=2, steps=1, out=result.path.parent / "other")
    assert refusal(finetune_seeds, stopped, silent).startswith("the first of 2 runs was stopped: there is no mean")
