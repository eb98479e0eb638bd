"""What a comparison found, to be read: a table; and for programs: JSON."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import UserError
from .compare import Report, compare
from .rows import ALLOWANCES, DIFFERS, EDGES, NOW_EQUAL, OF_LARGEST, Row, merged

WIDTHS = (80, 120)  # columns of a table
_WIDE = 110  # enough for the first difference
_OURS_FOR_THEIRS = "ours for theirs"
_MEANINGS = {
    "equal": "in every bit",
    "same value": "+0.0 and -0.0, or two codes of 0",
    "no worse": "sums in another order, errors against float64 alike",
    "as documented": "a difference with a known cause; --json lists them with their reasons",
    "ours closer": "to the exact result, in float64",
    "bitsandbytes wrong": "by a float64 oracle, with which ours agrees in every bit",
    NOW_EQUAL: "where another version of bitsandbytes differed",
    DIFFERS: "beyond what is documented",
}
_PER_CODEBOOK = ("codes", "weights", "weights, 8-bit scales")
_SHORT = {
    "codes, extremes": "codes and weights, extremes",
    "weights, extremes": "codes and weights, extremes",
    "scales": "scales, and decoded scales",
    "decoded scales": "scales, and decoded scales",
    "second-level offset": "second-level scales",
    "input gradient": "forward, input gradient",
    "forward": "forward, input gradient",
}


def compare_and_show(weights: int, model: Path | None, seed: int, json_file: Path | None) -> bool:
    """The ``parity`` command: compare, print the table, write the JSON.

    Args:
        weights, model, seed: see ``compare``.
        json_file: to write, or None.

    Returns:
        whether nothing differs beyond what is documented.

    Raises:
        UserError: see ``compare``; or the file cannot be written.
    """
    if json_file is not None:
        _write(json_file, "a", "")  # whether it can be written is told now, not after a minute of work
    console = Console()
    with Console(stderr=True).status("bitsandbytes") as status:
        report = compare(weights, model, seed, progress=lambda text: status.update(escape(text)))
    show(report, console)
    if json_file is not None:
        _write(json_file, "w", to_json(report))
    return not report.fails


def _write(file: Path, mode: str, text: str) -> None:
    try:
        with file.open(mode, encoding="utf-8") as opened:
            opened.write(text)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from error


def show(report: Report, console: Console) -> None:
    """Print the table, the edge cases, what the verdicts mean, and one line that sums it up."""

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    width = min(max(console.width, WIDTHS[0]), WIDTHS[1]) if console.is_terminal else WIDTHS[1]
    console.width = max(console.width, width)
    rows = merged(report.rows, _by_codebook)
    console.print(table(rows, width))
    if width < _WIDE:
        say(f"first differences, {_OURS_FOR_THEIRS}:")
        for row in rows:
            if _first(row):
                say(f"  {_name(row)}: {_first(row)}")
    console.print(_edges([row for row in report.rows if row.quantity == EDGES], width))
    for verdict, meaning in _MEANINGS.items():
        if any(verdict == row.verdict for row in report.rows):
            say(f"{verdict:<20}{meaning}")
    say("")
    say(summary(report))


def table(rows: list[Row], width: int | None = None) -> Table:
    """Rows as a table: quantity, compared, equal, first difference, largest difference, verdict.

    Args:
        rows: of a report, or fewer: see ``in_short``.
        width: in columns; text wraps between words, and below 110 there is no room for the first difference. None: a
            Markdown table, as wide as it gets.
    """
    is_markdown = width is None
    has_room = width is None or width >= _WIDE
    view = Table(box=box.MARKDOWN if is_markdown else box.SIMPLE_HEAD, width=width, pad_edge=is_markdown)
    view.add_column("quantity", no_wrap=is_markdown)
    view.add_column("compared", justify="right", no_wrap=True)
    view.add_column("equal", justify="right", no_wrap=True)
    if has_room:
        ratio = None if is_markdown else 1
        view.add_column(f"first difference, {_OURS_FOR_THEIRS}", overflow="fold", no_wrap=is_markdown, ratio=ratio)
    view.add_column("largest", no_wrap=True)
    view.add_column("verdict", no_wrap=True)
    for row in rows:
        view.add_row(
            _name(row),
            f"{row.compared:,}",
            f"{row.equal:,}",
            *([escape(_first(row))] if has_room else []),
            _largest(row),
            f"[bold red]{row.verdict}[/]" if row.fails else row.verdict,
        )
    return view


def _edges(rows: list[Row], width: int) -> Table:
    view = Table(box=box.SIMPLE_HEAD, width=width, pad_edge=False)
    for heading in ("edge case", "ours", "bitsandbytes", "verdict"):
        view.add_column(heading)
    for row in rows:
        view.add_row(row.detail, *(escape(text) for text in row.cases[0]["found"]), row.verdict)
    return view


def in_short(report: Report) -> list[Row]:
    """The short form of the table: a dozen rows or so."""
    return merged(
        report.rows,
        lambda row: (_SHORT.get(row.quantity, row.quantity), _by_codebook(row)[1] if row.quantity == "codes" else ""),
    )


def _by_codebook(row: Row) -> tuple[str, str]:
    """One row for each quantity, or for each of the codebooks where it depends on them."""
    return row.quantity, row.detail.partition(" ")[0] if row.quantity in _PER_CODEBOOK else ""


def _name(row: Row) -> str:
    return f"{row.quantity}, {row.detail}" if row.detail else row.quantity


def _first(row: Row) -> str:
    """The first difference; of edge cases there is a table of their own."""
    return "" if row.first is None or row.quantity == EDGES else row.first


def _largest(row: Row) -> str:
    if not row.largest or not row.unit:
        return ""
    if row.unit == OF_LARGEST:
        return f"{100 * row.largest:.2g} % of max"
    return f"{row.largest:.3g} {row.unit}"


def summary(report: Report) -> str:
    """One line: how much was compared, with what, and whether it holds."""
    facts, failing = report.facts, [row for row in report.rows if row.fails]
    codes = sum(row.compared for row in report.rows if row.quantity.startswith("codes"))
    end = "nothing differs beyond what is documented"
    if failing:
        end = f"{sum(row.beyond for row in failing):,} differences in {len(failing)} rows are not documented"
    return (
        f"{codes:,} weights, bitsandbytes {facts['versions']['bitsandbytes']}, {facts['instruction_set']}, "
        f"{facts['seconds']:.0f} s: {end}"
    )


def to_json(report: Report, most: int | None = None) -> str:
    """The report as JSON: facts, the allowances, and every row with the tensors that were compared.

    Args:
        report: to be written.
        most: tensors that are listed in each row, and then only such in which something differs; None lists all.
    """
    document: dict[str, Any] = {
        **report.facts,
        "fails": report.fails,
        "allowances": {
            name: {"verdict": one.verdict, "rule": one.rule, "reason": one.reason} for name, one in ALLOWANCES.items()
        },
        "rows": [_as_dict(row, most) for row in report.rows],
    }
    return json.dumps(document, indent=1) + "\n"


def from_json(text: str) -> Report:
    """The report that ``to_json`` wrote.

    Raises:
        ValueError, KeyError: the text is something else.
    """
    facts = json.loads(text)
    rows = [
        Row(
            row["quantity"], row["detail"], row["unit"], row["compared"], row["equal"], row["beyond"],
            Counter(row["allowed"]), row["first_difference"], row["largest_difference"], row["cases"],
            NOW_EQUAL if row["verdict"] == NOW_EQUAL else None,
        )
        for row in facts.pop("rows")
    ]  # fmt: skip
    return Report(rows, facts)


def _as_dict(row: Row, most: int | None) -> dict[str, Any]:
    cases = row.cases
    if most is not None and row.quantity != EDGES:  # of which each is a row of its own
        cases = [case for case in cases if case["equal"] < case["compared"]][:most]
    return {
        "quantity": row.quantity,
        "detail": row.detail,
        "compared": row.compared,
        "equal": row.equal,
        "allowed": dict(row.allowed),
        "beyond": row.beyond,
        "first_difference": row.first,
        "largest_difference": row.largest,
        "unit": row.unit,
        "verdict": row.verdict,
        "tensors": len(row.cases),
        "cases": cases,
    }
