"""``benchmarks/gpu_optimizer.py`` without a GPU: contenders, records and the table. The link needs one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import qloralab as ql
from qloralab.benchmarks import gpu_optimizer
from qloralab.benchmarks.adamw import LORA, Contender, make
from qloralab.benchmarks.clock import host
from qloralab.benchmarks.gpu_device import Device, cuda_device
from qloralab.benchmarks.gpu_optimizer import check_paging, contenders, main, points, run, tables

CPU = torch.device("cpu")
DEVICE = Device(CPU, "A GPU (80 GB)", 2**15, host, lambda: 2**34)
LIMITS = {"copy": 2500.0, "to_device": 50.0, "to_host": 55.0, "both": 84.0}
LIMITS |= {"prefetch_to_device": 45.0, "prefetch_to_host": 9.4, "prefetch_both": 16.0}
WHICH = contenders(peer=False, away=False)


def shown(records: list[dict[str, Any]]) -> str:
    console = Console(width=220)
    with console.capture() as capture:
        for table in tables(records):
            console.print(table)
    return capture.get()


def test_parameters_are_the_same_every_time_and_differ_by_tensor():
    a, b = make([50, 50], CPU), make([50, 50], CPU)
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[0], a[1])
    assert a[0].grad is not None
    assert abs(a[0].detach().std().item() - 0.02) < 0.01


def test_a_record_for_each_optimizer_and_set():
    sets = {"one": [1000], "many": [100, 200]}
    records = list(points(DEVICE, LIMITS, WHICH, sets, 0.0))
    assert [(r["set"], r["optimizer"]) for r in records] == [(s, one.name) for s in sets for one in WHICH]
    for record in records:
        assert (record["elements"], record["tensors"]) == {"one": (1000, 1), "many": (300, 2)}[record["set"]]
        assert set(record["ratios"]) == {one.name for one in WHICH} - {record["optimizer"]}
        bytes_ = {32: 28.0, 8: 16.0625}[record["bits"]]
        assert record["bound_ms"] == pytest.approx(1e-6 * bytes_ * record["elements"] / 2500)
        assert record["link_gb_per_s"] is None
    away = Contender("away", 32, lambda params: ql.PagedAdamW(params), away=True)
    (record,) = points(DEVICE, LIMITS, [away], {"one": [1000]}, 0.0)
    assert record["bound_ms"] == pytest.approx(1e-6 * 16 * 1000 / 84)
    assert record["link_gb_per_s"] == pytest.approx(1e-6 * 16 * 1000 / record["ms"]["p50"])


def test_the_table_has_steps_ceilings_and_checks():
    common = {"device": "A GPU", "commit": "abc"}
    away = {"state_bytes": 4e8, "resident_bytes": 6e7, "given_by_device": 7e7, "pointers": ["managed"]}
    times = {name: {"p50": ms} for name, ms in (("read", 10.5), ("write", 10.0), ("update", 14.6))}
    records = [
        {**common, "kind": "ceilings", **LIMITS},
        {**common, "kind": "overlap", **times},
        {**common, "kind": "paging", "bits": 32, "budget": away},
        *({**common, **record} for record in points(DEVICE, LIMITS, WHICH, {"one": [1000]}, 0.0)),
    ]
    records[-2]["ratios"]["bitsandbytes paged"] = 3.25
    text = shown(records)
    for part in (
        "both 84",
        "to the host 9.4",
        "read 10.5, written 10.0, updated 14.6",
        "400 MB of state, 60 resident; the device gave 70; managed memory",
        "torch fused",
        "3.25",
    ):
        assert part in text


def test_records_are_shown_again(tmp_path, capsys):
    record = {"kind": "overlap", "device": "A GPU", "commit": "abc"}
    record |= {name: {"p50": 1.0} for name in ("read", "write", "update")}
    (tmp_path / "records.json").write_text(json.dumps([record]))
    main(["--view", str(tmp_path / "records.json")])
    assert "A GPU, commit abc" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [32, 8])
def test_a_budget_changes_no_bit(bits):
    found = check_paging(torch.device("cuda", 0), bits, elements=2**24)
    assert found["budget"]["read_over_link"] > 0
    assert found["all on the device"]["read_over_link"] == 0


@pytest.mark.gpu
def test_the_whole_command(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(gpu_optimizer, "ELEMENTS", 4 * LORA[0])
    monkeypatch.setattr(gpu_optimizer, "SECONDS", 0.01)
    run(cuda_device(), tmp_path / "records.json")
    kinds = {record["kind"] for record in json.loads((tmp_path / "records.json").read_text())}
    assert kinds == {"errors", "paging", "ceilings", "overlap", "state", "point"}
