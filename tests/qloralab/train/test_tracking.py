"""Runs in W&B, offline, and in trackio, local: each read back from what the tracker itself wrote."""

from __future__ import annotations

import importlib
import importlib.util
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qloralab.train import prepare as prepare_module
from qloralab.train.finetune import finetune, resume
from qloralab.train.tensorboard import NAMES
from qloralab.train.tracking import Tracker


@pytest.fixture
def wandb(monkeypatch):
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("needs wandb: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    module = importlib.import_module("wandb")
    module.teardown()  # it keeps the environment that it has seen
    yield module
    module.teardown()


@pytest.fixture
def trackio(monkeypatch, tmp_path_factory):
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("needs trackio: pip install trackio")
    if "trackio" not in sys.modules:  # which reads it when it is loaded
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
    return importlib.import_module("trackio.sqlite_storage").SQLiteStorage


def records(folder: Path) -> Iterator[Any]:
    """The records of an offline run of W&B: 7 bytes, then chunks in blocks of 32 KiB, LevelDB's log format."""
    importlib.import_module("wandb").teardown()  # ends its process, which writes what it holds
    pb = importlib.import_module("wandb.proto.wandb_internal_pb2")
    (path,) = folder.glob("run-*.wandb")
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # no header fits: the block is filled up
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the only chunk of a record, or its last
            yield pb.Record.FromString(whole)
            whole = b""


def numbers(metrics: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Of each step what was measured."""
    return {line["step"]: {name: line[name] for name in NAMES if line[name] is not None} for line in metrics}


def in_wandb(folder: Path) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            step = record.history.step.num
            assert step not in found
            found[step] = {name: items[name] for name in NAMES if name in items}
    return found


def in_trackio(storage: Any, run_id: str) -> list[tuple[int, dict[str, float]]]:
    (name,) = {run["name"] for run in storage.get_run_records("qloralab") if run["id"] == run_id}
    logs = storage.get_logs("qloralab", name, run_id=run_id)
    return [(line["step"], {key: line[key] for key in NAMES if key in line}) for line in logs]


def config_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "config.json").read_text())


def test_wandb_has_the_numbers_of_the_run(wandb, settings, silent, metrics_of):
    run = finetune(settings(track="wandb"), silent).path
    (folder,) = (run / "wandb").glob("offline-run-*")
    assert in_wandb(folder) == numbers(metrics_of(run))
    (began,) = (r.run for r in records(folder) if r.WhichOneof("record_type") == "run")
    assert (began.project, began.display_name, began.run_id) == ("qloralab", "run", config_of(run)["tracker_id"])
    given = {item.key: json.loads(item.value_json) for item in began.config.update}
    assert given["steps"] == 6
    assert given["data_type"] == "nf4"


def test_wandb_goes_on_with_the_run(wandb, settings, silent, metrics_of):
    run = finetune(settings(track="wandb"), silent).path
    (first,) = (run / "wandb").glob("offline-run-*")
    resume(run, 8, silent)
    (second,) = {*(run / "wandb").glob("offline-run-*")} - {first}
    assert first.name.split("-")[-1] == second.name.split("-")[-1] == config_of(run)["tracker_id"]
    assert in_wandb(second) == numbers(metrics_of(run)[7:])


def test_without_a_login_wandb_writes_offline(wandb, settings, silent, monkeypatch, tmp_path):
    """Where it would ask for a key or end."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    run = finetune(settings(track="wandb"), silent).path
    assert [*(run / "wandb").glob("offline-run-*")]
    assert config_of(run)["notes"] == []


def test_trackio_has_the_numbers_of_the_run(trackio, settings, silent, metrics_of):
    run = finetune(settings(track="trackio"), silent).path
    run_id = config_of(run)["tracker_id"]
    assert in_trackio(trackio, run_id) == [*numbers(metrics_of(run)).items()]
    assert trackio.get_run_config("qloralab", "run", run_id=run_id)["steps"] == 6


def test_trackio_has_each_step_once_after_a_kill(trackio, settings, silent, metrics_of):
    """Killed behind the checkpoint of step 3: steps 4 to 6 were logged, are taken again, and are not logged again."""
    run = finetune(settings(track="trackio"), silent).path
    for later in sorted((run / "checkpoints").iterdir())[1:]:
        later.unlink()
    config = config_of(run)
    del config["result"]
    (run / "config.json").write_text(json.dumps(config))
    resume(run, 8, silent)
    assert config_of(run)["tracker_id"] == config["tracker_id"]
    found = in_trackio(trackio, config["tracker_id"])
    assert [step for step, _ in found] == list(range(9))
    assert found[7:] == [*numbers(metrics_of(run)).items()][7:]


def test_a_tracker_that_does_not_start_ends_nothing(wandb, settings, silent, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    result = finetune(settings(track="wandb"), silent)
    assert result.steps == 6
    (note,) = config_of(result.path)["notes"]
    assert note.startswith("no wandb: ")


def test_a_tracker_that_fails_later_ends_nothing(wandb, settings, silent, monkeypatch):
    """Its run is finished under it: the next step cannot be logged, is noted, and is the last that is tried."""

    def finish_early(self, metrics):
        wandb.finish()
        log(self, metrics)

    log = Tracker.log
    monkeypatch.setattr(Tracker, "log", finish_early)
    result = finetune(settings(track="wandb"), silent)
    assert result.steps == 6
    (note,) = config_of(result.path)["notes"]
    assert note.startswith("no more in wandb: ")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_without_the_package_it_is_refused_before_anything_is_read(settings, silent, refusal, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(prepare_module, "read_jsonl", None)
    line = refusal(finetune, settings(track=name), silent)
    assert line == f"--track {name} needs a package: pip install {name}"


def test_an_unknown_tracker_is_refused(settings, refusal):
    assert refusal(settings, track="mlflow") == "--track is 'mlflow'; it must be one of wandb, trackio"
