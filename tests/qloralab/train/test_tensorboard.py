"""The event file, read back by TensorBoard."""

from __future__ import annotations

import sys

import pytest

from qloralab.train import prepare as prepare_module
from qloralab.train.finetune import finetune
from qloralab.train.tensorboard import NAMES


def test_the_event_file_has_the_numbers_of_the_run(settings, silent, metrics_of):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard: pip install tensorboard"
    )
    run = finetune(settings(tensorboard=True), silent).path
    lines = metrics_of(run)
    events = event_accumulator.EventAccumulator(str(run / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(NAMES)
    for name in NAMES:
        found = {event.step: event.value for event in events.Scalars(name)}
        expected = {line["step"]: line[name] for line in lines if line[name] is not None}
        assert found == pytest.approx(expected, rel=1e-6)


def test_without_the_package_it_is_refused_before_anything_is_read(settings, silent, refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr(prepare_module, "read_jsonl", None)
    line = refusal(finetune, settings(tensorboard=True), silent)
    assert line == "--tensorboard needs a package: pip install 'qloralab[tensorboard]'"


def test_without_the_option_there_is_no_event_file(settings, silent):
    assert not (finetune(settings(steps=1), silent).path / "tensorboard").exists()
