"""An evaluation as a person reads it: a table of figures with their intervals, and one of differences."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table

from .evaluation import Comparison, Estimate, Evaluation

_INTERVAL = "95 % interval"
# by figure: what it is called, and how it is written
_FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "perplexity": ("perplexity", lambda value: f"{value:,.3f}"),
    "nll": ("NLL, nats a token", lambda value: f"{value:.4f}"),
    "nll_above": ("NLL above that of {reference}", lambda value: f"{value:.4f}"),
    "kl": ("KL from {reference}, nats a token", lambda value: f"{value:.5f}"),
    "agreement": ("same top word as {reference}", lambda value: f"{100 * value:.2f} %"),
}


def show(evaluation: Evaluation, console: Console, reference: str = "the reference") -> None:
    """Print the figures of a run.

    Args:
        evaluation: of the run.
        console: where to.
        reference: what KL and agreement are taken from.
    """
    estimates = evaluation.estimates()
    table = _table("figure", "value", _INTERVAL)
    for name, (title, written) in _FIGURES.items():
        if name in estimates:
            one = estimates[name]
            table.add_row(title.format(reference=reference), written(one.value), _interval(one, written))
    console.print(table)


def show_differences(
    a: Evaluation, b: Evaluation, comparison: Comparison, console: Console, other: str, reference: str = "the reference"
) -> None:
    """Print how a run differs from another one.

    Args:
        a, b: the run, and the other one.
        comparison: of both.
        console: where to.
        other: what the other one is called.
        reference: see ``show``.
    """
    table = _table("figure", "here", other, "difference", _INTERVAL)
    for name, (title, written) in _FIGURES.items():
        one: Estimate | None = getattr(comparison, name, None)
        if one is not None:
            values = (written(getattr(run, name)) for run in (a, b))
            signed = _signed(written)
            table.add_row(title.format(reference=reference), *values, signed(one.value), _interval(one, signed))
    console.print(table)
    if a.kl is not None and b.kl is not None and comparison.kl is None:
        console.print("KL divergence and agreement are not compared: the two runs took them from different models.")


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(names):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    return table


def _interval(one: Estimate, written: Callable[[float], str]) -> str:
    return "none" if one.interval is None else " to ".join(written(end) for end in one.interval)


def _signed(written: Callable[[float], str]) -> Callable[[float], str]:
    return lambda value: written(value) if value <= 0 else f"+{written(value)}"
