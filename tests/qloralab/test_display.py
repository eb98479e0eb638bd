"""A terminal gets a bar with the numbers, a file plain lines."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from qloralab.display import Display
from qloralab.run_directory import Metrics


def display(terminal: bool) -> tuple[Display, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120, color_system=None, legacy_windows=False)
    return Display(console), file


def metrics(step: int, loss: float | None = 2.345, val_loss: float | None = None) -> Metrics:
    return Metrics(step, 100 * step, loss, val_loss, 1e-3, 0.5, None if loss is None else 1234.5, 1480.0)


def train(terminal: bool, steps: int) -> str:
    """What a run prints that validates before its first step and after its last."""
    shown, file = display(terminal)
    with shown.training(steps):
        shown.step(metrics(0, None, 3.75), steps)
        for step in range(1, steps + 1):
            shown.step(metrics(step, val_loss=2.5 if step == steps else None), steps)
    return file.getvalue()


def test_a_file_gets_plain_lines():
    printed = train(terminal=False, steps=25)
    assert "\x1b" not in printed
    assert "\r" not in printed
    assert [line.split() for line in printed.splitlines() if line.strip()] == [
        ["step", "0/25", "val", "3.75", "1.48", "GB"],
        ["step", "10/25", "loss", "2.35", "val", "3.75", "1,234", "tok/s", "1.48", "GB"],
        ["step", "20/25", "loss", "2.35", "val", "3.75", "1,234", "tok/s", "1.48", "GB"],
        ["step", "25/25", "loss", "2.35", "val", "2.50", "1,234", "tok/s", "1.48", "GB"],
    ]


def test_a_terminal_gets_a_bar_with_the_numbers():
    printed = train(terminal=True, steps=3)
    last = [line for line in re.split(r"[\r\n]", printed) if "train" in line][-1]
    for text in ("train", "3/3", "loss 2.35", "val 2.50", "1,234 tok/s", "1.48 GB", "left"):
        assert text in last
    assert "step" not in printed


def test_a_word_on_paging_comes_last():
    shown, file = display(terminal=False)
    shown.step(metrics(1), 1, "state 17/42 MB, 3 stalls")
    assert file.getvalue().rstrip().endswith("1.48 GB  state 17/42 MB, 3 stalls")


def test_steps_outside_of_the_bar_are_no_error():
    shown, file = display(terminal=True)
    with shown.training(1):
        pass
    shown.step(metrics(1), 1)
    assert "loss" not in file.getvalue()


@pytest.mark.parametrize("value", ["a[b].jsonl", "[red]", "x" * 300])
def test_a_fact_is_one_line_as_it_is(value):
    shown, file = display(terminal=False)
    shown.fact("data", value)
    assert file.getvalue() == f"     data  {value}\n"


def test_a_file_does_not_see_the_spinner():
    shown, file = display(terminal=False)
    with shown.busy("reading"):
        shown.fact("data", "here")
    assert file.getvalue().split() == ["data", "here"]


def test_a_terminal_sees_the_spinner():
    shown, file = display(terminal=True)
    with shown.busy("reading the examples"):
        pass
    assert "reading the examples" in file.getvalue()
