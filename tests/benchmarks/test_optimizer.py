"""``benchmarks/optimizer.py`` on a small state: the questions are answered, and an answer that does not hold shows."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from rich.console import Console

from qloralab.benchmarks import optimizer
from qloralab.benchmarks.adamw import RATE, Contender, ours
from qloralab.benchmarks.case import WrongResultError
from qloralab.benchmarks.optimizer import JobError, job, kill, limit, main, paging
from qloralab.benchmarks.optimizer_views import goals, plot, tables, throughput

BUDGET = 1 << 24
COMMON = {"device": "a processor", "commit": "abc"}
GB = 10**9
PAGING: dict[str, Any] = {
    **COMMON, "kind": "paging", "budget": 256_000_000, "spare": 64_000_000, "steps": 2, "same_bits": True,
    "state_bytes": 4 * GB, "tensors": 7, "ends": [1.0, 2.0],
    "samples": {
        "seconds": [0.0, 1.5, 1.0], "mincore_mb": [1, 255, 254], "mapping_mb": [1, 200, 2], "process_mb": [9, 280, 5],
    },
    "seconds": {"step": [4.0, 5.0, 9.0], "write": [2.0], "read": [3.0], "mixed": [4.0]},
    "traffic": [8 * GB] * 3, "stalled": [0.5, 0.75, 1.0], "disk_bytes": 4 * GB, "direct": True, "file_system": "ext4",
}  # fmt: skip
RESIDENT = [
    {
        **COMMON, "kind": "resident", "set": "one", "optimizer": name, "bits": bits, "elements": 10**6, "tensors": 1,
        "ms": {"p20": ms, "p50": ms, "p80": ms}, "bound_ms": 1.0, "state_bytes": 10**6, "copy_gb_per_s": 9.0,
    }
    for name, bits, ms in (("torch fused", 32, 2.0), ("ours", 32, 2.05), ("bitsandbytes", 32, 6.0))
]  # fmt: skip
LIMIT = {
    **COMMON, "kind": "limit", "same_bits": True, "ours": {"finished": True, "limit": 5 * GB},
    "torch": {"finished": False, "error": "[x.cpp:1] err == 0. DefaultCPUAllocator: can't allocate memory. Error 12"},
}  # fmt: skip
KILL = {**COMMON, "kind": "kill", "killed_in": 3, "resumed_at": 2, "same_bits": True}
RECORDS = [PAGING, LIMIT, KILL, *RESIDENT]


@pytest.mark.parametrize("bits", [32, 8])
def test_ours_trains_to_where_torch_does(bits):
    error = ours("ours", bits).check()
    assert error < 1e-5 if bits == 32 else 1e-4 < error < 0.1


def test_an_optimizer_with_another_rate_is_refused():
    wrong = Contender("wrong", 32, lambda params: torch.optim.AdamW(params, lr=1.01 * RATE, weight_decay=0.01))
    with pytest.raises(WrongResultError, match=r"wrong: error 0\.01"):
        wrong.check()


def test_a_state_that_pages_is_watched_and_compared_with_the_disk(tmp_path):
    found = paging(8 * BUDGET, BUDGET, 2, 1, str(tmp_path))
    assert found["same_bits"]
    assert found["state_bytes"] >= 8 * BUDGET
    assert len(found["ends"]) == 2
    assert 0 < max(found["samples"]["mincore_mb"]) <= (BUDGET + found["spare"]) / 1e6
    assert found["disk_bytes"] >= found["traffic"][0] // 2 > 6 * BUDGET
    rates = throughput(found)
    assert 0 < rates["step"] < 100
    assert rates["share"] == pytest.approx(rates["step"] / rates["sequential"])


def test_a_killed_process_goes_on_to_the_same_bits(tmp_path):
    found = kill(4 * BUDGET, BUDGET, str(tmp_path))
    assert (found["resumed_at"], found["same_bits"]) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_within_a_limit_ours_ends_and_that_of_torch_does_not(tmp_path):
    found = limit(12 * BUDGET, BUDGET, 1, str(tmp_path))
    assert found["same_bits"]
    assert found["ours"]["finished"]
    assert not found["torch"]["finished"]
    assert "allocate" in found["torch"]["error"]


def test_a_job_that_fails_says_why(tmp_path):
    with pytest.raises(JobError, match="limited ended with 1, not as it was to; it said: ValueError: budget is"):
        job("limited", which="ours", state=8000, budget=1, steps=1, directory=str(tmp_path))


def test_a_job_that_is_not_killed_is_an_error():
    with pytest.raises(JobError, match="unpaged ended with 0, not as it was to"):
        job("unpaged", killed=True, state=8000, steps=1)


def test_the_command_says_what_failed_in_a_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--state", "1e6", "--budget", "1", "--directory", str(tmp_path), "--out", str(tmp_path)])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("paged ended with 1")


def test_rates_are_of_medians():
    rates = throughput(PAGING)
    expected = {"write": 2, "read": 4 / 3, "sequential": 8 / 5, "mixed": 2, "step": 8 / 5, "share": 1}
    assert rates == pytest.approx(expected)


def test_goals_that_hold():
    lines = list(goals(RECORDS))
    assert [line[:4] for line in lines] == ["yes "] * 8
    assert "within 5000 MB of data" in lines[5]
    assert lines[5].endswith("torch failed (can't allocate memory); ours finished")


@pytest.mark.parametrize(
    ("keys", "value", "line"),
    [
        ((0, "samples", "mincore_mb", 1), 321, 0),
        ((0, "samples", "mapping_mb", 0), 321, 1),
        ((0, "samples", "process_mb", 2), 321, 2),
        ((0, "same_bits"), False, 3),
        ((0, "traffic"), [5 * GB] * 3, 4),
        ((1, "torch", "finished"), True, 5),
        ((1, "same_bits"), False, 5),
        ((2, "same_bits"), False, 6),
        ((4, "ms", "p50"), 2.2, 7),
    ],
)
def test_a_goal_that_is_missed_shows(keys, value, line):
    records: Any = copy.deepcopy(RECORDS)
    part = records
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    assert [number for number, one in enumerate(goals(records)) if one.startswith("NO")] == [line]


def test_the_tables_have_the_numbers():
    console = Console(width=150)
    with console.capture() as capture:
        for table in tables(RECORDS):
            console.print(table)
    text = " ".join(capture.get().split())  # captions are broken to the width of their table
    for part in ("4,000 MB of state in 7 tensors", "1.60", "100%", "a step 5.00 s", "0.75 s waiting", "0.98", "2.93"):
        assert part in text


def test_the_picture_is_drawn(tmp_path):
    plot(RECORDS, tmp_path / "all.png")
    plot(RESIDENT, tmp_path / "part.png")
    assert matplotlib.image.imread(tmp_path / "all.png").std() > 0.05


@pytest.mark.parametrize("committed", [False, True])
def test_records_are_shown_again_without_measuring(committed, tmp_path, monkeypatch, capsys):
    Path(tmp_path, "optimizer.json").write_text(json.dumps(RECORDS))
    monkeypatch.setattr(optimizer, "measure", None)
    main(["--view", *(() if committed else ("--out", str(tmp_path)))])
    assert "killed in step 3" in capsys.readouterr().out
