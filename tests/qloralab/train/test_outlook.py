"""The seconds that are left, counted step by step; and a line that names what helps on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qloralab.compute import Precision
from qloralab.kernels import dispatch
from qloralab.settings import Settings
from qloralab.train import outlook
from qloralab.train.outlook import note, seconds_left
from qloralab.train.run_directory import Metrics

FAST = Precision(torch.float32, "it is fast", slow=False)
SLOW = Precision(torch.bfloat16, "it is slow", slow=True)


def settings(**changes: Any) -> Settings:
    return Settings(out=Path("none"), model=Path("model"), **changes)


@pytest.fixture
def served(monkeypatch):
    """Says what serves the adapted layers: ``served("reference", "no C compiler")``."""

    def by(implementation: str, why: str) -> None:
        row = {"operator": "adapted_linear", "implementation": implementation, "why": why}
        monkeypatch.setattr(outlook.report, "implementations", lambda device: [{**row, "operator": "linear"}, row])

    by("native", "C")
    return by


@pytest.mark.parametrize("every", [1, 3, 50, 1000])
@pytest.mark.parametrize("steps", [2, 3, 100, 150])
@pytest.mark.parametrize("step", [1, 2])
def test_every_step_and_every_validation_counts(step, steps, every):
    expected = 0.0
    for later in range(step + 1, steps + 1):
        expected += 500 / 40
        if later % every == 0 or later == steps:
            expected += 7.0
    found = seconds_left(
        settings(steps=steps, eval_every=every), Metrics(step, 0, 1.0, None, 1.0, 1.0, 40.0, 1.0), 500, 7.0
    )
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(1801, "30 minutes"), (3600, "60 minutes"), (5900, "98 minutes"), (6000, "1.7 hours"), (16920, "4.7 hours")],
)
def test_the_time_is_one_that_a_person_says(served, seconds, shown):
    expected = f"about {shown} for the 149 steps left; shorter with fewer --steps or a smaller --max-length"
    assert note(settings(), 1, seconds, FAST, "cpu") == expected


def test_one_step(served):
    assert " for the 1 step left; " in note(settings(steps=2), 1, 2000, FAST, "cpu")


def test_a_dtype_that_is_emulated_is_named(served):
    line = note(settings(), 1, 2000, SLOW, "cpu")
    assert line.endswith(
        "; shorter with --dtype float32, which is not emulated here, fewer --steps or a smaller --max-length"
    )


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_the_reference_is_named_where_it_serves(served, method):
    served("reference", "no C compiler: install gcc")
    line = note(settings(method=method), 1, 2000, FAST, "cpu")
    advice = "compiled operators instead of the reference in plain PyTorch (no C compiler: install gcc)"
    assert (advice in line) == (method == "qlora")  # the others have no weights in 4 bits


def test_the_real_report_says_who_serves():
    with dispatch.use("reference"):
        line = note(settings(), 1, 2000, FAST, "cpu")
    assert "plain PyTorch (it was asked for (QLORALAB_CPU=reference))" in line
