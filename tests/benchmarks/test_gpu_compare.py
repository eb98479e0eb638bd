"""Two records beside each other: what is slower, what is gone, and the status that a program sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qloralab.benchmarks.gpu import main
from qloralab.benchmarks.gpu_compare import compare, percentage
from qloralab.benchmarks.record import RECORDS, write


def record(provider: str, ms: float | None, status: str = "ok", **fields: Any) -> dict[str, Any]:
    return {
        "kind": "point", "operation": "linear", "shape": [64, 128], "M": 1, "provider": provider, "status": status,
        "ms": ms and {"p20": ms, "p50": ms, "p80": ms}, "device": "a GPU", "commit": "abc", **fields,
    }  # fmt: skip


CANARY = {"kind": "canary", "name": "right", "device": "a GPU", "commit": "abc"}
BEFORE = [CANARY, *(record(name, 1.0) for name in ("same", "within", "over", "wrong", "skipped", "gone"))]
BEFORE += [record("never", None, "failed"), record("mended", None, "failed")]
AFTER = [
    record("over", 1.04), record("within", 1.03), record("same", 1.0), record("wrong", None, "wrong"),
    record("skipped", None, "skipped"), record("never", None, "failed"), record("mended", 9.0), record("new", 1.0),
]  # fmt: skip


def test_what_is_slower_or_wrong_is_over_the_limit(lines):
    table, over = compare(BEFORE, AFTER, 0.0301)
    assert [row[3:] for row in lines(table)] == [
        ["same", "1,000.0", "1,000.0", "1.000", ""],
        ["within", "1,000.0", "1,030.0", "1.030", ""],
        ["over", "1,000.0", "1,040.0", "1.040", "slower"],
        ["wrong", "1,000.0", "wrong", "", "wrong"],
        ["skipped", "1,000.0", "skipped", "", ""],
        ["mended", "failed", "9,000.0", "", ""],
    ]
    assert over == 2
    assert "2 of 6 points are over the limit of 3.0%; 2 are in one record only" in str(table.caption)


def test_points_of_other_rows_or_adapters_are_others(lines):
    old = [record("ours", 1.0, operation="adapted layer")]
    for change in ({"rank": 64, "dropout": 0.0}, {"rank": 16, "dropout": 0.1}, {"M": 2}, {"shape": [128, 64]}):
        table, over = compare(old, [record("ours", 2.0, **{"operation": "adapted layer", **change})], 0.03)
        assert (lines(table), over) == ([], 0)
    _, over = compare(old, [record("ours", 2.0, operation="adapted layer", rank=16, dropout=0.0)], 0.03)
    assert over == 1  # a record from before adapters were recorded


def test_another_card_is_marked(lines):
    table, over = compare([record("ours", 1.0)], [record("ours", 1.0, device="another")], 0.03)
    assert (lines(table)[0][-1], over) == ("another card", 0)
    table, over = compare([record("ours", 1.0)], [record("ours", 2.0, device="another")], 0.03)
    assert (lines(table)[0][-1], over) == ("slower, another card", 1)


@pytest.mark.parametrize(("limit", "status"), [("3%", 1), ("5", 0)])
def test_the_status_says_whether_any_is_over(limit, status, tmp_path, capsys):
    write([record("ours", 1.0)], tmp_path / "a.json")
    write([record("ours", 1.04)], tmp_path / "b.json")
    with pytest.raises(SystemExit) as ended:
        main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--fail-over", limit])
    assert ended.value.code == status
    assert "1.040" in capsys.readouterr().out


def test_a_record_is_no_slower_than_itself():
    records = json.loads(Path(RECORDS / "gpu-nvidia-h100-80gb-hbm3.json").read_text())
    table, over = compare(records, records, 0.0)
    assert over == 0
    assert table.row_count == sum(1 for one in records if one["kind"] == "point" and one["ms"])


def test_percentages():
    assert percentage("3%") == percentage("3") == 0.03
