"""What a call costs the host, in exact numbers: launches, calls of the dispatcher, allocations. No GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qloralab.benchmarks.host import counts

ROOT = Path(__file__).resolve().parents[2]
LAYER = ["_project", "_linear", "_grad_B", "_add_parts", "_grad_A", "_linear_grad_input"]
# The kernels that are launched, calls of the dispatcher, and tensors that are made: h, y, dx, dA, dB, and a workspace
# for G and its two parts; with dropout the seed.
EXPECTED = {
    "adapted layer, both ways, dropout": (LAYER, 7, 7),
    "adapted layer, both ways": (LAYER, 6, 6),
    "adapted layer, one token": (["_project", "_linear"], 2, 2),
    "layer without adapter, one token": (["_linear"], 1, 1),
    "dequantize": (["_dequantize"], 1, 1),
}


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> dict[str, dict]:
    """Of a process of its own: here Triton may have been imported to interpret."""
    out = tmp_path_factory.mktemp("host")
    code = f"from qloralab.benchmarks import host; host.SECONDS = 0.001; host.main(['--out', r'{out}'])"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "adapted layer, both ways" in done.stdout
    return {record["case"]: record for record in json.loads(next(out.glob("host-*.json")).read_text())}


@pytest.mark.parametrize("case", EXPECTED)
def test_a_call_costs_what_it_has_to(case, records):
    found = records[case]
    assert (found["launches"], found["calls"], found["allocations"]) == EXPECTED[case], found["dispatched"]
    assert found["us"]["case"] > 0 < found["us"]["empty"]


def test_every_case_is_expected(records):
    assert list(records) == list(EXPECTED)


def test_views_are_calls_and_no_allocations():
    x = torch.zeros(4, 6)
    found = counts(lambda: (x.view(24), x + 1, x.add_(1), x.t().contiguous()))
    assert found["dispatched"] == ["aten.view.default", "aten.add.Tensor", "aten.add_.Tensor", "aten.t.default",
                                   "aten.clone.default"]  # fmt: skip
    assert (found["calls"], found["allocations"], found["launches"]) == (5, 2, [])
