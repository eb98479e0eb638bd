"""The comparison's table is a view of its records: what it prints is what was measured."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.finetune import LIBRARIES, RECORDS, table


def record(library: str, speed: float, memory: float) -> dict:
    return {
        "library": library,
        "steps": 60,
        "tokens": 29000,
        "device": "a processor",
        "tokens_per_s": {"p50": speed, "all": speed / 2},
        "peak_mb": memory,
        "val_before": 4.0,
        "val_after": 2.5,
    }


def test_the_table_divides_ours_by_theirs():
    out = io.StringIO()
    Console(file=out, width=120).print(table([record(LIBRARIES[0], 300, 2000), record(LIBRARIES[1], 100, 5000)]))
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in out.getvalue().splitlines() if "│" in line}
    assert [cell.strip() for cell in rows["tokens/s, median step"]] == ["300", "100", "3.00"]
    assert [cell.strip() for cell in rows["peak memory, MB"]] == ["2,000", "5,000", "0.40"]


def test_the_committed_records_are_of_the_same_job():
    paths = sorted(RECORDS.glob("finetune-*.json"))
    if not paths:
        pytest.skip("no record is committed")
    records = [json.loads(Path(path).read_text()) for path in paths]
    assert {r["library"] for r in records} == set(LIBRARIES)
    for field in ("steps", "tokens", "trainable", "device"):
        assert len({r[field] for r in records}) == 1, field
    # the same weights in 4 bits: the two begin at the same loss
    assert records[0]["val_before"] == pytest.approx(records[1]["val_before"], abs=0.02)
