"""Tables as the lines of cells that a reader sees."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console
from rich.table import Table

Lines = Callable[..., list[list[str]]]


@pytest.fixture
def lines() -> Lines:
    """``lines(table, ...)``: the stripped cells of each line of tables, headings and rules left out."""

    def read(*tables: Table) -> list[list[str]]:
        console = Console(file=io.StringIO(), width=220)
        console.print(*tables)
        text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
        return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line[:1] == "│"]

    return read
