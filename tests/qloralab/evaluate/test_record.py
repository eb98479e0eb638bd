"""The JSON of a run: what is written is read again to the last bit, and nothing else is read."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qloralab.evaluate.evaluation import Evaluation, compare
from qloralab.evaluate.record import check_out, read_record, write_record
from qloralab.nf4.files.errors import FormatError

FULL = Evaluation(
    16, 8, "abc", "document", np.array([3, 5]), np.array([0.1, 1 / 3]), np.array([1e-9, 0.2]), np.array([3, 4]),
    np.array([0.1, 2 / 7]),
)  # fmt: skip
BARE = Evaluation(16, 8, "abc", "window", np.array([3, 5, 1]), np.array([0.1, 0.2, 0.7]))


@pytest.mark.parametrize("one", [FULL, BARE], ids=["with-reference", "alone"])
def test_what_is_written_is_read_again(one, tmp_path):
    path = tmp_path / "new" / "a.json"
    write_record(path, one, ["a.py:1", "b.py:2"], {"versions": {"torch": "2"}})
    found = read_record(path)
    for name, value in vars(one).items():
        assert np.array_equal(getattr(found, name), value), name
    document = json.loads(path.read_text())
    assert document["versions"] == {"torch": "2"}
    assert document["results"]["perplexity"]["value"] == one.perplexity
    expected = ["a.py:1", "b.py:2"] if one is FULL else ["window 1", "window 2", "window 3"]
    assert [unit["source"] for unit in document["evaluation"]["units"]] == expected
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_differences_are_written(tmp_path):
    path = tmp_path / "a.json"
    write_record(path, FULL, ["a", "b"], {}, compare(FULL, FULL))
    assert json.loads(path.read_text())["differences"]["kl"] == {"value": 0.0, "interval": [0.0, 0.0]}


def test_other_files_are_refused(tmp_path, refusal):
    path = tmp_path / "a.json"
    assert "cannot be read: No such file" in refusal(read_record, path)
    write_record(path, FULL, ["a", "b"], {})
    whole = json.loads(path.read_text())
    for change in (
        {"evaluation": 3},
        {"evaluation": {**whole["evaluation"], "units": []}},
        {"evaluation": {**whole["evaluation"], "units": [{"tokens": 1}]}},
        {"evaluation": {**whole["evaluation"], "units": [{"tokens": 0, "nll": 0.0}]}},
        {"evaluation": {**whole["evaluation"], "units": [{"tokens": 1, "nll": float("nan")}]}},
        {"evaluation": {**whole["evaluation"], "units": [{"tokens": 1, "nll": "a"}]}},
    ):
        path.write_text(json.dumps(change))
        assert refusal(read_record, path) == f"{path} is not what `qloralab eval --out` writes"
    path.write_text("[")
    with pytest.raises(FormatError, match="is not JSON"):
        read_record(path)


def test_out_is_checked_before_anything_is_done(tmp_path, refusal):
    assert "is a directory" in refusal(check_out, tmp_path)
    (tmp_path / "file").touch()
    assert "is not a directory" in refusal(check_out, tmp_path / "file" / "a.json")
    check_out(tmp_path / "new" / "a.json")
    assert not (tmp_path / "new").exists()
