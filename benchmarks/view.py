"""Views of records: tables on the terminal, pictures, and ratios of times that are held against goals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Goal:
    """A ratio of times to reach.

    Attributes:
        operation: of the point.
        M: rows, or None.
        peer: a column of the table.
        ratio: that is to be reached.
        faster: the peer's time over ours is at least the ratio; else ours over the peer's is at most the ratio.
    """

    operation: str
    M: int | None
    peer: str
    ratio: float
    faster: bool = True

    def reached(self, ours: float, peer: float) -> tuple[float, bool]:
        """The ratio of two times, and whether it is good enough."""
        ratio = peer / ours if self.faster else ours / peer
        return ratio, ratio >= self.ratio if self.faster else ratio <= self.ratio


def points(records: Sequence[Record]) -> Iterator[dict[str, Record]]:
    """The records of each point that providers were timed at, by provider, in the order of their first record."""
    found: dict[tuple, dict[str, Record]] = {}
    for record in records:
        if "provider" in record:
            key = (record.get("memory"), record["operation"], tuple(record["shape"]), record["M"])
            found.setdefault(key, {})[record["provider"]] = record
    yield from found.values()


def point_cells(point: Mapping[str, Record]) -> tuple[str, str, str]:
    """What a row of a table begins with: operation, weight, M."""
    some = next(iter(point.values()))
    return some["operation"], "x".join(map(str, some["shape"])), str(some["M"] or "")


def grid(
    headings: Iterable[str], rows: Iterable[Sequence[str]], left: Iterable[str] = (), wrap: bool = False, **options: Any
) -> Table:
    """A table of cells, numbers to the right.

    Args:
        headings: of the columns.
        rows: of cells.
        left: the headings of what is no number.
        wrap: whether a cell may take several lines.
        options: title and caption.
    """
    view = Table(**options)
    for heading in headings:
        view.add_column(heading, justify="left" if heading in left else "right", no_wrap=not wrap)
    for row in rows:
        view.add_row(*row)
    return view


def show(tables: Iterable[Table], width: int = 0, lines: Iterable[str] = ()) -> None:
    """Print tables, at least as wide as this where the terminal says less or is none, and lines below them."""
    console = Console()
    console.width = max(console.width, width)
    for table in tables:
        console.print(table)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def p50(record: Record) -> float:
    """The median time of a record, ms."""
    return record["ms"]["p50"]


def yes(holds: bool) -> str:
    """A verdict as a word."""
    return "yes" if holds else "no"


@contextmanager
def picture(path: Path, rows: int, columns: int, **options: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes, [rows, columns], to draw on; written as a PNG afterwards."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained", **options)
    yield figure, axes
    figure.savefig(path, dpi=110)
    plt.close(figure)


def annotate(axes: Any, x: float, y: float, text: str, **options: Any) -> None:
    """Write a few words above a point."""
    axes.annotate(text, (x, y), xytext=(0, 3), textcoords="offset points", **{"ha": "center", **options})
