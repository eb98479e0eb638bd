"""A terminal gets a bar with the numbers, a file plain lines; neither waits long for a sign of life."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from qloralab.display import Display, duration
from qloralab.train.run_directory import Metrics


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def display(terminal: bool, clock=time.monotonic, **options) -> tuple[Display, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120, color_system=None, legacy_windows=False)
    return Display(console, clock=clock, **options), file


def metrics(step: int, loss: float | None = 2.345, val_loss: float | None = None) -> Metrics:
    return Metrics(step, 100 * step, loss, val_loss, 1e-3, 0.5, None if loss is None else 1234.5, 1480.0)


def train(terminal: bool, steps: int, seconds: float = 0.5) -> str:
    """What a run prints that validates before its first step and after its last."""
    clock = Clock()
    shown, file = display(terminal, clock)
    with shown.training(steps):
        shown.step(metrics(0, None, 3.75), steps)
        for step in range(1, steps + 1):
            clock.now += seconds
            shown.step(metrics(step, val_loss=2.5 if step == steps else None), steps)
    return file.getvalue()


def wait_for(file: io.StringIO, text: str) -> None:
    """Until another thread has printed it."""
    end = time.monotonic() + 30
    while text not in file.getvalue():
        assert time.monotonic() < end, file.getvalue()[-300:]
        time.sleep(0.002)


def test_a_file_gets_plain_lines():
    printed = train(terminal=False, steps=25, seconds=0.25)
    assert "\x1b" not in printed
    assert "\r" not in printed
    step = ["loss", "2.35", "val", "3.75", "1,234", "tok/s", "1.48", "GB"]
    assert [line.split() for line in printed.splitlines() if line.strip()] == [
        ["step", "0/25", "val", "3.75", "1.48", "GB"],
        ["step", "10/25", *step, "0:04", "left"],
        ["step", "20/25", *step, "0:01", "left"],
        ["step", "25/25", "loss", "2.35", "val", "2.50", "1,234", "tok/s", "1.48", "GB"],
    ]


def test_a_run_that_goes_on_does_not_count_what_was_done_before():
    clock = Clock()
    shown, file = display(False, clock)
    with shown.training(150, 100):
        shown.step(metrics(100), 150)
        for step in range(101, 111):
            clock.now += 2
            shown.step(metrics(step), 150)
    assert [line.split()[-2:] for line in file.getvalue().splitlines()][-1] == ["1:20", "left"]
    assert "left" not in file.getvalue().splitlines()[0]


@pytest.mark.parametrize(("seconds", "steps"), [(1.0, [5, 10, 15, 20]), (3.0, [2, 4, 6]), (60.0, [1, 2, 3])])
def test_slow_steps_have_more_lines(seconds, steps):
    printed = train(terminal=False, steps=steps[-1] + 5, seconds=seconds)
    found = [int(match[1]) for match in re.finditer(r"step  (\d+)/", printed)]
    assert found[: len(steps) + 1] == [0, *steps]


def test_a_terminal_gets_a_bar_with_the_numbers():
    printed = train(terminal=True, steps=3)
    last = [line for line in re.split(r"[\r\n]", printed) if "train" in line][-1]
    for text in ("train", "3/3", "loss 2.35", "val 2.50", "1,234 tok/s", "1.48 GB", "0:00 left"):
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


def test_a_file_does_not_see_what_is_quick():
    shown, file = display(terminal=False, patience=60)
    with shown.busy("reading") as progress:
        progress(1, 2)
        shown.fact("data", "here")
    assert file.getvalue().split() == ["data", "here"]


def test_a_file_is_told_what_takes_long_and_how_far_it_is():
    clock = Clock()
    shown, file = display(terminal=False, clock=clock, patience=0.0, pace=0.002)
    with shown.busy("validating", "tokens") as progress:
        wait_for(file, "        …  validating\n")
        clock.now += 65
        wait_for(file, "        …  validating: 1:05 so far\n")
        progress(1_000, 4_000)
        wait_for(file, "        …  validating: 1,000/4,000 tokens, 3:15 left\n")
        clock.now += 15  # the time runs down, though nothing more is known
        wait_for(file, "        …  validating: 1,000/4,000 tokens, 3:00 left\n")
        clock.now += 1000
        wait_for(file, "        …  validating: 1,000/4,000 tokens, 0:00 left\n")
    assert "\x1b" not in file.getvalue()
    printed = file.getvalue()
    time.sleep(0.02)
    assert file.getvalue() == printed, "a line after the end"


def test_by_default_nothing_is_silent_for_more_than_a_few_seconds():
    shown, file = display(terminal=False)
    with shown.busy("reading"):
        time.sleep(0.2)
        assert file.getvalue() == ""
        start = time.monotonic()
        wait_for(file, "reading\n")
        assert time.monotonic() - start < 20  # one second, on a machine that may be busy
    assert (shown._patience, shown._pace) == (1.0, 5.0)


def test_no_thread_is_left_behind():
    shown, _ = display(terminal=False, patience=0.0, pace=0.001)
    before = threading.active_count()
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), shown.busy("reading"):
            raise error
    with shown.busy("reading"):
        pass
    assert threading.active_count() == before


def test_a_terminal_sees_the_spinner():
    shown, file = display(terminal=True)
    with shown.busy("reading the [examples]"):
        wait_for(file, "⠋ reading the [examples]")
        wait_for(file, "⠙ reading the [examples]")  # it turns


def test_a_terminal_sees_a_bar_and_the_time_left_where_they_are_known():
    clock = Clock()
    shown, file = display(terminal=True, clock=clock)
    with shown.busy("validating", "tokens") as progress:
        wait_for(file, "validating")
        assert "━" not in file.getvalue()
        clock.now += 30
        progress(1_000, 4_000)
        wait_for(file, "━")
        wait_for(file, "1,000/4,000 tokens 1:30 left")
        clock.now += 10
        wait_for(file, "1,000/4,000 tokens 1:20 left")


def test_what_takes_time_within_training_is_beside_the_bar():
    """A terminal has one live display."""
    clock = Clock()
    shown, file = display(terminal=True, clock=clock)
    with shown.training(3):
        shown.step(metrics(0, None, 3.75), 3)
        with shown.busy("validating", "tokens") as progress:
            progress(10, 40)
            wait_for(file, "10/40 tokens")
        with shown.busy("saving"):
            wait_for(file, "saving")
        clock.now += 4
        shown.step(metrics(1), 3)
        wait_for(file, "0:08 left")
        with pytest.raises(KeyboardInterrupt), shown.busy("validating"):
            raise KeyboardInterrupt
    last = re.split(r"[\r\n]+", file.getvalue().strip())[-2:]
    assert any("train" in line for line in last)
    assert not any("saving" in line or "validating" in line for line in last)


@pytest.mark.parametrize("where", ["busy", "training"])
def test_the_cursor_comes_back_after_an_error(where):
    shown, file = display(terminal=True)
    with pytest.raises(KeyboardInterrupt), shown.busy("x") if where == "busy" else shown.training(3):
        raise KeyboardInterrupt
    assert file.getvalue().rfind("\x1b[?25h") > file.getvalue().rfind("\x1b[?25l") >= 0


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0:00"),
        (7.4, "0:07"),
        (59.6, "1:00"),
        (754, "12:34"),
        (3599.4, "59:59"),
        (3723, "1:02:03"),
        (9e4, "25:00:00"),
    ],
)
def test_durations(seconds, shown):
    assert duration(seconds) == shown


def test_it_is_there_before_torch_is():
    code = "import sys, qloralab.display; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
