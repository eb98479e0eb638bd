"""What is written can be read: by a program, at any moment of the run."""

from __future__ import annotations

import datetime
import errno
import importlib.metadata
import json
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from qloralab.checkpoint.models import load_model, load_tokenizer
from qloralab.lora.config import LoraConfig
from qloralab.lora.inject import inject_, trainable
from qloralab.nf4.processor import processor_class
from qloralab.settings import Settings
from qloralab.train.run_directory import Metrics, RunDirectory, versions

FIRST = Metrics(0, 0, None, 3.5, None, None, None, 100.0)
SECOND = Metrics(1, 64, 3.25, None, 1e-3, 0.5, 120.0, 101.5)


@pytest.fixture
def run(tmp_path):
    run = RunDirectory.create(Settings(out=tmp_path / "deep" / "run", model=Path("model"), lora_alpha=8.0))
    yield run
    run.close()


class Trained:
    """A model that trains, and the run directory that it is saved in."""

    def __init__(self, method: Any, model_dir: Path, out: Path):
        self.run = RunDirectory.create(Settings(out=out, model=model_dir, method=method))
        self.model, self.tokenizer = load_model(model_dir), load_tokenizer(model_dir)
        if method != "full":
            inject_(self.model, LoraConfig(r=4, lora_alpha=8))

    def save(self) -> None:
        self.run.save(self.model, self.tokenizer)

    def contents(self) -> dict[Path, bytes | None]:
        """What is in the directory, hidden names and folders included."""
        return {path: path.read_bytes() if path.is_file() else None for path in self.run.path.rglob("*")}

    @torch.no_grad()
    def train(self) -> dict[Path, bytes | None]:
        """After a save; what that left."""
        self.save()
        for parameter in trainable(self.model):
            parameter += 1
        return self.contents()


@pytest.fixture
def trained(tmp_path, model_dir):
    made: list[Trained] = []

    def make(method: str) -> Trained:
        made.append(Trained(method, model_dir, tmp_path))
        return made[-1]

    yield make
    for one in made:
        one.run.close()


@pytest.mark.parametrize("method", ["qlora", "full"])
@pytest.mark.parametrize("size", [100, 3_000], ids=["at once", "halfway"])
def test_a_full_disk_leaves_what_was_saved_before(trained, full_disk, method, size):
    one = trained(method)
    before = one.train()
    with full_disk(size), pytest.raises((OSError, SafetensorError), match="File too large"):
        one.save()
    assert one.contents() == before
    one.save()
    weights = next(one.run.trained.glob("*.safetensors"))
    assert weights.read_bytes() != before[weights]
    assert one.contents().keys() == before.keys()


def test_a_disk_that_holds_the_adapter_but_not_its_config(trained, monkeypatch):
    def full(*values, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    one = trained("qlora")
    before = one.contents()
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        one.save()
    assert one.contents() == {**before, one.run.trained: None}


def test_ctrl_c_during_a_save_leaves_what_was_saved_before(trained):
    def interrupt(path):  # the weights are written by then
        raise KeyboardInterrupt

    one = trained("full")
    before = one.train()
    one.tokenizer = SimpleNamespace(save_pretrained=interrupt)
    with pytest.raises(KeyboardInterrupt):
        one.save()
    assert one.contents() == before


@pytest.mark.parametrize("fails", ["old", "model"])
def test_a_model_that_cannot_be_put_in_place_leaves_the_one_before(trained, monkeypatch, fails):
    one = trained("full")
    before, rename = one.train(), Path.rename

    def failing(self, target):
        assert any(one.run.path.glob("*model*/model.safetensors")), "a moment without a model"
        if target.name.endswith(fails) and self.name.startswith((".model.part", "model")):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        one.save()
    assert one.contents() == before


def test_the_config_says_the_settings_again(run):
    config = json.loads((run.path / "config.json").read_text())
    (run.path / "config.json").rename(run.path.parent / "config.json")
    for name in ("metrics.jsonl", "run.yaml"):
        (run.path / name).unlink()  # settings ask for an empty directory
    fields = {name: config[name] for name in Settings.__dataclass_fields__}
    again = Settings(**{**fields, "out": Path(fields["out"]), "model": Path(fields["model"])})
    resolved = {"lr": 1e-3, "too_long": "skip"}
    assert again == Settings(out=run.path, model=Path("model"), lora_alpha=8.0, **resolved)


def test_the_config_has_the_versions(run):
    found = json.loads((run.path / "config.json").read_text())["versions"]
    assert found == versions()
    assert found["python"] == platform.python_version()
    for package in ("qloralab", "torch", "transformers"):
        assert found[package] == importlib.metadata.version(package)
    assert platform.machine() in found["machine"]
    assert found["processor"] == processor_class()


def test_the_processor_is_the_class_that_was_asked_for(monkeypatch):
    monkeypatch.setenv("QLORALAB_ISA", "portable")
    assert versions()["processor"] == "portable"


def test_fields_are_added_to_the_config(tmp_path):
    run = RunDirectory.create(
        Settings(out=tmp_path / "run", model=Path("model"), dtype="float32"), dtype_reason="asked for"
    )
    run.close()
    before = json.loads((run.path / "config.json").read_text())
    assert (before["dtype"], before["dtype_reason"]) == ("float32", "asked for")
    run.update_config(result={"steps": 3})
    run.update_config(more=1)
    assert json.loads((run.path / "config.json").read_text()) == {**before, "result": {"steps": 3}, "more": 1}


def test_a_full_disk_leaves_the_config_as_it_was(run, full_disk):
    before = (run.path / "config.json").read_bytes()
    with full_disk(100), pytest.raises(OSError, match="File too large"):
        run.update_config(more="x" * 1000)
    assert (run.path / "config.json").read_bytes() == before
    assert {file.name for file in run.path.iterdir()} == {"run.yaml", "config.json", "metrics.jsonl"}


def test_closing_does_not_fail_after_a_line_that_did(run, full_disk):
    with full_disk(100):
        with pytest.raises(OSError, match="File too large"):
            run.log(SECOND)
        run.close()


def test_a_line_is_on_disk_when_it_is_logged(run, metrics_of):
    assert metrics_of(run.path) == []
    run.log(FIRST)
    assert len(metrics_of(run.path)) == 1
    run.log(SECOND)
    assert metrics_of(run.path) == [
        {"step": 0, "tokens": 0, "loss": None, "val_loss": 3.5, "lr": None, "grad_norm": None, "tokens_per_s": None,
         "rss_mb": 100.0},
        {"step": 1, "tokens": 64, "loss": 3.25, "val_loss": None, "lr": 0.001, "grad_norm": 0.5, "tokens_per_s": 120.0,
         "rss_mb": 101.5},
    ]  # fmt: skip
    assert run.metrics == [FIRST, SECOND]


def test_a_path_below_a_file_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        RunDirectory.create(Settings(out=tmp_path / "file" / "run", model=Path("model")))


def test_a_directory_is_taken_once(run, refusal):
    """Both runs have seen that it was free."""
    settings = Settings(out=run.path.parent / "other", model=Path("model"))
    first = RunDirectory.create(settings)
    before = (first.path / "config.json").read_bytes()
    message = f"{settings.out} was taken by another run in the meantime; give --out a new name"
    assert refusal(RunDirectory.create, settings) == message
    first.close()
    assert (first.path / "config.json").read_bytes() == before


def test_runs_of_one_second_have_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Stopped(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2023, 5, 23, 9, 5, 1)

    monkeypatch.setattr(datetime, "datetime", Stopped)
    runs = [RunDirectory.create(Settings(out=None, model=Path("model"))) for _ in range(3)]
    names = ["20230523-090501", "20230523-090501-2", "20230523-090501-3"]
    assert [run.path for run in runs] == [Path("runs", name) for name in names]
    assert [json.loads((run.path / "config.json").read_text())["out"] for run in runs] == [f"runs/{n}" for n in names]
    for run in runs:
        run.close()
