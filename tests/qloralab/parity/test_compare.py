"""The whole comparison, on its smallest setting and a tiny model."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from qloralab.nf4.tensor import quantize
from qloralab.parity import checks
from qloralab.parity import compare as module
from qloralab.parity.compare import Report, compare
from qloralab.parity.report import to_json
from qloralab.parity.rows import DIFFERS, QUANTITIES


@pytest.fixture(scope="module")
def report(model_dir) -> Report:
    return compare(weights=1, model=model_dir)


def test_nothing_differs_beyond_what_is_documented(report):
    assert [(row.quantity, row.detail, row.first) for row in report.rows if row.fails] == []
    assert report.fails is False


def test_everything_is_compared(report):
    assert {row.quantity for row in report.rows} == set(QUANTITIES)
    assert all(row.compared for row in report.rows)
    for quantity in ("codes", "codes, extremes", "weights", "weights, 8-bit scales", "forward", "input gradient"):
        settings = {row.detail for row in report.rows if row.quantity == quantity}
        assert settings == {f"{codebook} {dtype}" for codebook in ("nf4", "fp4") for dtype in ("f32", "bf16", "f16")}


def test_ordinary_weights_are_equal_in_every_bit(report):
    exact = {"codebooks", "scales", "decoded scales", "files"}
    assert {row.verdict for row in report.rows if row.quantity in exact} == {"equal"}, "without any allowance"
    rows = [row for row in report.rows if row.quantity in ("codes", "weights") and row.detail.startswith("nf4")]
    assert len(rows) == 6
    assert all(row.equal == row.compared > 200_000 for row in rows)
    names = {case["case"] for row in report.rows if row.quantity == "codes" for case in row.cases}
    assert {"model.layers.1.self_attn.q_proj.weight bf16/64", "lm_head.weight f16/64"} <= names


def test_facts_say_where_it_was(report):
    facts = report.facts
    assert (facts["weights"], facts["model"], facts["seed"]) == (1, "tiny", 0)
    assert facts["versions"].keys() >= {"bitsandbytes", "torch", "qloralab", "machine"}
    assert facts["instruction_set"] == torch.backends.cpu.get_cpu_capability()
    assert "native" in facts["implementation"] or "reference" in facts["implementation"]
    assert json.loads(to_json(report))["seconds"] > 0


def test_a_fault_of_ours_is_found(monkeypatch):
    def wrong(*arguments, **options):
        q = quantize(*arguments, **options)
        return dataclasses.replace(q, packed=q.packed ^ (torch.arange(len(q.packed)) == 3).to(torch.uint8)[:, None])

    monkeypatch.setattr(module, "DTYPES", (torch.bfloat16,))
    monkeypatch.setattr(checks, "quantize", wrong)
    found = compare(weights=1)
    assert found.fails
    assert {row.quantity for row in found.rows if row.verdict == DIFFERS} == {"codes", "codes, extremes", "files"}
