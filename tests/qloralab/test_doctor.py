"""``qloralab doctor``: what it tells, and that its tests can fail."""

import io
import json

import pytest
from rich.console import Console

from qloralab import doctor
from qloralab.errors import UserError
from qloralab.kernels import dispatch, report


def test_it_tells_the_machine_the_operators_and_the_tests(tmp_path):
    text, file = io.StringIO(), tmp_path / "doctor.json"
    assert doctor.doctor(file, Console(file=text, width=120))
    found = json.loads(file.read_text())
    assert {"torch", "processor", "C compiler", "GPU", "computes in"} <= set(found["machine"])
    assert found["operators"] == report.implementations()
    assert all(test["passed"] for test in found["tests"])
    assert "dequantize" in text.getvalue()
    assert "FAILED" not in text.getvalue()


@pytest.mark.parametrize("wrong", ["quantize: bits", "dequantize: bits", "linear: error", "AdamW: error"])
def test_a_wrong_result_is_found(monkeypatch, wrong):
    """Where the reference is chosen, its results are what they were; otherwise one of them is off by a little."""
    name = {"quantize": "_codes", "dequantize": "_weights", "linear": "_product", "AdamW": "_update"}[
        wrong.split(":")[0]
    ]
    right = getattr(doctor, name)

    def off(dtype):
        results = right(dtype)
        if dispatch.mode() != "reference":
            results[0] = results[0].clone()
            results[0].flatten()[3] += 1
        return results

    monkeypatch.setattr(doctor, name, off)
    found = {test["test"]: test["passed"] for test in doctor.self_test()}
    assert not found.pop(wrong)
    assert all(found.values())


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        doctor.doctor(tmp_path / "no" / "doctor.json", Console(file=io.StringIO()))
