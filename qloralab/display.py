"""What a run shows: facts as they become known, and a sign of life while something takes time.

On a terminal that is a spinner, and a bar with the time left once it is known how much there is to do. Elsewhere (a
file, CI) it is a line now and then: what is going on after a second, how far it is every five seconds.

Nothing here imports torch: the import of torch is the first thing that takes time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from .terminal import Lasting

if TYPE_CHECKING:
    from .train.run_directory import Metrics

PATIENCE = 1.0  # seconds before something is worth a line
PACE = 5.0  # seconds between lines about one thing

Update = Callable[[int, int], None]  # how much is done, how much there is


class Display:
    """Prints facts and progress. That what it writes to fails is no error.

    Args:
        console: where to; by default standard output.
        patience: seconds before a line says what is going on, where there is no terminal.
        pace: seconds between such lines.
        clock: seconds since some moment.
    """

    def __init__(
        self,
        console: Console | None = None,
        patience: float = PATIENCE,
        pace: float = PACE,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.console = console or Console()
        file = self.console.file
        self._output = file if isinstance(file, Lasting) else Lasting(file)
        self.console.file = self._output  # type: ignore[assignment]
        self._patience = patience
        self._pace = pace
        self._clock = clock
        self._last_val: float | None = None
        self._live: Progress | None = None  # what is on the terminal now; there can be one
        self._steps = _Work(clock)
        self._said = clock()  # the last line about a step

    def fact(self, name: str, value: str) -> None:
        """One line of what is known now."""
        self.console.print(Text.assemble((f"{name:>9}", "bold"), f"  {value}"), soft_wrap=True)

    @property
    def failure(self) -> str | None:
        """Why a line was lost; None where none was."""
        return self._output.failure

    @contextmanager
    def busy(self, what: str, unit: str = "") -> Iterator[Update]:
        """While something takes time.

        Args:
            what: that is going on.
            unit: of how much is done.

        Returns:
            a function to call with how much is done and how much there is, where that is known. It shows the time left.
        """
        work = _Work(self._clock)
        if not self.console.is_terminal:
            with self._lines(what, unit, work):
                yield work.update
            return
        inside = self._live is not None
        with self._bars(transient=True) as bars:
            task = bars.add_task(escape(what), total=None, work=work, text="")

            def update(done: int, total: int) -> None:
                work.update(done, total)
                bars.update(task, completed=done, total=total, text=f"{done:,}/{total:,} {unit}")

            try:
                yield update
            finally:
                if inside:
                    bars.remove_task(task)

    @contextmanager
    def training(self, steps: int, done: int = 0) -> Iterator[None]:
        """The progress of the training loop, of whose steps some may have been done by an earlier process."""
        self._steps = _Work(self._clock, done)
        self._said = self._clock()
        if not self.console.is_terminal:
            yield
            return
        with self._bars(transient=False) as bars:
            self._task = bars.add_task("[bold]  train[/]", total=steps, work=self._steps, text="")
            yield

    def step(self, metrics: Metrics, steps: int, paging: str = "") -> None:
        """The numbers of a step, and a word on paging."""
        if metrics.val_loss is not None:
            self._last_val = metrics.val_loss
        numbers = [] if metrics.loss is None else [f"loss {metrics.loss:.2f}"]
        if self._last_val is not None:
            numbers.append(f"val {self._last_val:.2f}")
        if metrics.tokens_per_s is not None:
            numbers.append(f"{metrics.tokens_per_s:,.0f} tok/s")
        numbers.append(f"{metrics.rss_mb / 1000:.2f} GB")
        if paging:
            numbers.append(paging)
        text = "  ".join(numbers)
        self._steps.update(metrics.step, steps)
        if self._live is not None:
            self._live.update(self._task, completed=metrics.step, text=f"{metrics.step}/{steps}  {text}")
        if self.console.is_terminal:
            return
        due = self._clock() - self._said >= self._pace  # slow steps have a line each
        if due or metrics.step % 10 == 0 or metrics.step == steps:
            self._said = self._clock()
            left = self._steps.left() if metrics.step < steps else None
            self.fact("step", f"{metrics.step}/{steps}  {text}{'' if left is None else f'  {duration(left)} left'}")

    @contextmanager
    def _bars(self, transient: bool) -> Iterator[Progress]:
        """What is on the terminal already, or a new one."""
        if self._live is not None:
            yield self._live
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=Column(min_width=len("validating"))),
            _Bar(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.fields[text]}"),
            _Left(),
        )
        self._live = Progress(*columns, console=self.console, transient=transient, expand=True)
        try:
            with self._live:
                yield self._live
        finally:
            self._live = None

    @contextmanager
    def _lines(self, what: str, unit: str, work: _Work) -> Iterator[None]:
        """Lines from another thread, so that they come also while this one is in the middle of something."""
        ended = threading.Event()

        def say() -> None:
            if ended.wait(self._patience):
                return
            self.fact("…", what)
            while not ended.wait(self._pace):
                self.fact("…", f"{what}: {work.described(unit)}")

        thread = threading.Thread(target=say, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()  # it is not in the middle of its line


def duration(seconds: float) -> str:
    """Seconds as a person reads them: 0:07, 12:34, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Work:
    """How much of something is done, and when that was known."""

    def __init__(self, clock: Callable[[], float], before: int = 0):
        self._clock = clock
        self._start = self._known = clock()
        self._before = self._done = before  # what was done before the clock started
        self._total = 0

    def update(self, done: int, total: int) -> None:
        self._done, self._total, self._known = done, total, self._clock()

    def left(self) -> float | None:
        """Seconds, at the pace so far; None before anything is done."""
        if self._done <= self._before:
            return None
        rest = (self._known - self._start) * (self._total - self._done) / (self._done - self._before)
        return max(0.0, rest - (self._clock() - self._known))

    def described(self, unit: str) -> str:
        """How far it is, in words."""
        left = self.left()
        if left is None:
            return f"{duration(self._clock() - self._start)} so far"
        return f"{self._done:,}/{self._total:,} {unit}, {duration(left)} left"


class _Bar(BarColumn):
    """A bar where it is known how much there is."""

    def render(self, task: Task) -> Text:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().render(task) if task.total else Text("")  # pyright: ignore[reportReturnType]


class _Left(ProgressColumn):
    """The time left, which runs down between two updates."""

    def render(self, task: Task) -> Text:
        left = task.fields["work"].left()
        return Text("" if left is None else f"{duration(left)} left")
