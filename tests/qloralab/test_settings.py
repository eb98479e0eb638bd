"""What cannot be run is refused, in the words of the command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from qloralab.errors import UserError
from qloralab.settings import METHODS, Settings


def refusal(tmp_path: Path, **changes: object) -> str:
    with pytest.raises(UserError) as caught:
        Settings(**{"out": tmp_path / "run", "model": Path("model"), **changes})  # pyright: ignore[reportArgumentType]
    return str(caught.value)


def test_the_defaults_are_accepted(tmp_path):
    settings = Settings(out=tmp_path / "run", model=Path("model"))
    assert settings.method == "qlora"
    assert not settings.out.exists()


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", ["steps", "batch_size", "accumulate", "max_length", "held_out", "eval_every"])
def test_counts_start_at_one(tmp_path, name, value):
    option = "--" + name.replace("_", "-")
    assert refusal(tmp_path, **{name: value}) == f"{option} is {value}; it must be at least 1"


def test_one_is_enough(tmp_path):
    counts = dict.fromkeys(("steps", "batch_size", "accumulate", "max_length", "held_out", "eval_every"), 1)
    Settings(out=tmp_path / "run", model=Path("model"), **counts)


@pytest.mark.parametrize("value", [0.0, -1e-3, float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "option"), [("lr", "--lr"), ("max_grad_norm", "--max-grad-norm")])
def test_rates_are_positive(tmp_path, name, option, value):
    assert refusal(tmp_path, **{name: value}) == f"{option} is {value}; it must be positive and finite"


def test_no_more_parts_than_examples(tmp_path):
    message = "--accumulate 5 is more than the 4 examples of a batch"
    assert refusal(tmp_path, accumulate=5, batch_size=4) == message
    Settings(out=tmp_path / "run", model=Path("model"), accumulate=4, batch_size=4)


def test_full_fine_tuning_has_no_adapter(tmp_path):
    assert refusal(tmp_path, method="full", adapter=Path("a")).startswith("--adapter goes with --method qlora or lora")
    for method in METHODS:
        Settings(out=tmp_path / "run", model=Path("model"), method=method)


def test_a_run_does_not_write_over_another(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    Settings(out=out, model=Path("model"))
    (out / "metrics.jsonl").write_text("kept")
    assert refusal(tmp_path) == f"{out} exists and is not empty; a run never writes over another, give --out a new name"
    assert str(out / "metrics.jsonl") in refusal(tmp_path, out=out / "metrics.jsonl")
    assert (out / "metrics.jsonl").read_text() == "kept"


@pytest.mark.parametrize(("method", "rate"), [("qlora", 1e-3), ("lora", 1e-3), ("full", 1e-4)])
def test_the_learning_rate_depends_on_the_method(tmp_path, method, rate):
    settings = Settings(out=tmp_path / "run", model=Path("model"), method=method)
    assert settings.learning_rate == rate
    assert dataclasses.replace(settings, lr=0.5).learning_rate == 0.5
