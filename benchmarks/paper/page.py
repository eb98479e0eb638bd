"""docs/paper.md, from the records: what can be concluded, then a section for each table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .in_short import in_short
from .table import Records, Table

OPENING = Path(__file__).with_name("opening.md")
PICTURES = Path("docs", "pictures")
PAGE = Path("docs", "paper.md")
RECORDS = Path("benchmarks", "records", "paper")


def read(root: Path, name: str) -> Records:
    """The records of a table below a root; empty where it was not measured. The first one tells of the run."""
    file = root / RECORDS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else []


def write_page(root: Path, tables: Mapping[str, Table]) -> Path:
    """Write the page and its pictures from all records that there are; returns the page's path."""
    (root / PICTURES).mkdir(parents=True, exist_ok=True)
    parts = []
    for name, table in tables.items():
        if found := read(root, name):
            run, *records = found
            picture = PICTURES / f"paper-{name}.png"
            table.picture(records, root / picture)
            parts += [f"## {table.TITLE}", table.markdown(records)]
            parts += [f"![{table.TITLE}]({picture.relative_to(PAGE.parent)})", _run(name, run)]
    measured = {name: found[1:] for name in tables if (found := read(root, name))}
    parts = [OPENING.read_text().strip(), "## In short", in_short(measured), *parts]
    page = root / PAGE
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def _run(name: str, run: Mapping[str, Any]) -> str:
    """Where the figures of a section come from, in a line."""
    settings = ", ".join(f"{key} {_value(value)}" for key, value in _flat(run["settings"]).items())
    load = f", {run['load']:.0f} processes at work" if "load" in run else ""
    return (
        f"*Size {run['size']} ({settings}); {run['device']}, class {run['class']}{load}; {run['seconds']:.0f} s; "
        f"commit {run['commit']}; `python -m benchmarks.paper --size {run['size']} --only {name}`.*"
    )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the levels that they have."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value) if isinstance(value, Mapping) else {key: value}
    return found


def _value(value: Any) -> str:
    if value is None:
        return "all"
    return "/".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
