"""What a run shows on the terminal: facts as they become known, a progress bar with the numbers of the last step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .run_directory import Metrics


class Display:
    """Prints to a terminal with a progress bar; elsewhere (a file, CI) a line now and then."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console()
        self._last_val: float | None = None
        self._bar: Progress | None = None

    def fact(self, name: str, value: str) -> None:
        """One line of what is known now."""
        self.console.print(f"[bold]{name:>9}[/]  {escape(value)}", highlight=False, soft_wrap=True)

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """A spinner while something takes time."""
        with self.console.status(what):
            yield

    @contextmanager
    def training(self, steps: int) -> Iterator[None]:
        """The progress bar of the training loop."""
        self._bar = Progress(
            TextColumn("[bold]    train[/] "),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        with self._bar:
            self._task = self._bar.add_task("train", total=steps, numbers="")
            yield
        self._bar = None

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
        if self._bar is not None:
            self._bar.update(self._task, completed=metrics.step, numbers=text)
        if not self.console.is_terminal and (metrics.step % 10 == 0 or metrics.step == steps):
            self.fact("step", f"{metrics.step}/{steps}  {text}")
