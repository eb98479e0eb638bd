"""Runs of several processes: DDP and FSDP2 over gloo on this machine, beside the same run of one process."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qloralab import one_voice
from qloralab.errors import UserError
from qloralab.settings import Settings
from qloralab.train.finetune import finetune
from qloralab.train.processes import ALONE, Processes, processes

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")

ROOT = Path(__file__).parents[3]
MEASURED = ("tokens_per_s", "rss_mb")
Job = dict[str, Any]


def run_together(jobs: list[Job]) -> list[dict[str, Any]]:
    """What together.py tells of each job."""
    command = [sys.executable, str(Path(__file__).with_name("together.py")), json.dumps(jobs)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def all_well(jobs: list[Job]) -> None:
    for job, told in zip(jobs, run_together(jobs), strict=True):
        assert told == {"statuses": [0] * job["count"], "told": []}, job


def metrics_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def trained_by(run: Path) -> dict[str, torch.Tensor]:
    (weights,) = [*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")]
    return load_file(weights)


def assert_same(run: Path, other: Path) -> None:
    """Bit for bit."""
    assert metrics_of(run) == metrics_of(other)
    found, expected = trained_by(run), trained_by(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert (run / "samples.md").read_text() == (other / "samples.md").read_text()


def assert_close(run: Path, other: Path) -> None:
    """But for the order in which float32 numbers are added."""
    found, expected = metrics_of(run), metrics_of(other)
    assert [line["tokens"] for line in found] == [line["tokens"] for line in expected]
    for line, its in zip(found, expected, strict=True):
        for key in ("loss", "val_loss", "grad_norm", "lr"):
            assert line[key] == (its[key] if its[key] is None else pytest.approx(its[key], rel=2e-5)), (key, line, its)
    mine, theirs = trained_by(run), trained_by(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():  # AdamW's first steps have the sign of a gradient, whose last bit may decide it
        assert (tensor - theirs[name]).norm() <= 0.02 * theirs[name].norm() + 1e-6, name


KINDS: dict[str, Job] = {
    "qlora": {"save_every": 2},
    "lora": {"method": "lora", "checkpointing": True},
    "full": {"method": "full", "tied": True},
    "merge-aware": {"merge_aware": True},
    "parts": {"batch_size": 5, "accumulate": 2, "state_budget": 17},
    "few": {"batch_size": 3, "held_out": 3, "steps": 8},  # fewer examples than processes; a last batch of one
}
ENGINES = [(2, "ddp"), (4, "ddp"), (2, "fsdp"), (4, "fsdp")]


@pytest.fixture(scope="module")
def given(model_dir: Path, write_model: Callable[..., Path], colours: Path) -> Callable[..., Job]:
    """Settings of a short run as JSON."""

    tied_dir = write_model("tied", tie_word_embeddings=True)

    def make(tied: bool = False, **changes: Any) -> Job:
        model = tied_dir if tied else model_dir
        small = {"model": model, "data": str(colours), "steps": 4, "held_out": 4, "eval_every": 2, "out": None}
        dropout = (
            {}
            if changes.keys() & {"merge_aware", "lora_dropout"} or changes.get("method") == "full"
            else {"lora_dropout": 0.0}
        )
        return Settings(**{**small, **dropout, **changes}).given()

    return make


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, given: Callable[..., Job]) -> Path:
    """A directory of finished runs: KIND-1, and KIND-2-ddp, KIND-4-fsdp, ...; dropout-…"""
    folder = tmp_path_factory.mktemp("together")
    jobs: list[Job] = []
    for kind, changes in KINDS.items():
        jobs.append({"count": 1, "parallel": None, "settings": given(**changes), "out": str(folder / f"{kind}-1")})
        for count, parallel in ENGINES if kind == "qlora" else ENGINES[1:3]:
            out = str(folder / f"{kind}-{count}-{parallel}")
            jobs.append({"count": count, "parallel": parallel, "settings": given(**changes), "out": out})
    for name, changes in {"dropout-a": {}, "dropout-b": {}, "dropout-other": {"seed": 1}}.items():
        settings = given(lora_dropout=0.5, **changes)
        jobs.append({"count": 2, "parallel": "fsdp", "settings": settings, "out": str(folder / name)})
    all_well(jobs)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [f"{kind}-{count}-{how}" for kind in KINDS for count, how in (ENGINES if kind == "qlora" else ENGINES[1:3])]
)
def test_the_losses_of_one_process(runs, name):
    assert_close(runs / name, runs / f"{name.split('-')[0] if 'aware' not in name else 'merge-aware'}-1")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_what_each_process_holds(runs, count):
    """With fsdp an N-th of the model, rows that do not divide by N padded; with ddp all of it."""
    whole = int((runs / "qlora-1" / "held-0").read_text())
    held = [int((runs / f"qlora-{count}-fsdp" / f"held-{rank}").read_text()) for rank in range(count)]
    assert whole <= sum(held) <= 1.01 * whole
    assert max(held) <= 1.01 * whole / count
    assert int((runs / f"qlora-{count}-ddp" / "held-1").read_text()) == whole


@pytest.mark.slow
def test_dropout_is_repeatable(runs):
    assert_same(runs / "dropout-a", runs / "dropout-b")
    assert metrics_of(runs / "dropout-a")[1] != metrics_of(runs / "dropout-other")[1]


@pytest.mark.slow
def test_config_tells_the_processes(runs):
    config = json.loads((runs / "qlora-4-fsdp" / "config.json").read_text())
    assert (config["parallel"], config["processes"]) == ("fsdp", 4)
    assert "parallel" not in json.loads((runs / "qlora-1" / "config.json").read_text())


def cut_off(run: Path, out: Path, step: int) -> Path:
    """A run as a kill after a step would have left it."""
    shutil.copytree(run, out)
    for path in out.glob("checkpoints/*.safetensors"):
        if path.name > f"step-{step:06}.safetensors":
            path.unlink()
    config = json.loads((out / "config.json").read_text())
    del config["result"]
    (out / "config.json").write_text(json.dumps(config))
    shutil.rmtree(out / "adapter")
    return out


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_processes(runs, tmp_path):
    """With as many, bit for bit."""
    ways = [("qlora-2-ddp", 2, "ddp"), ("qlora-4-fsdp", 4, "fsdp"), ("qlora-4-fsdp", 2, "ddp")]
    ways += [("qlora-4-ddp", 4, "ddp"), ("qlora-2-ddp", 4, "fsdp"), ("qlora-4-fsdp", 1, None), ("qlora-1", 2, "fsdp")]
    jobs = []
    for began, count, parallel in ways:
        run = cut_off(runs / began, tmp_path / f"{began}-then-{count}-{parallel}", 2)
        jobs.append({"count": count, "parallel": parallel, "resume": str(run), "out": str(run)})
    all_well(jobs)
    for (began, count, parallel), job in zip(ways, jobs, strict=True):
        same = began == f"qlora-{count}-{parallel}"
        (assert_same if same else assert_close)(Path(job["resume"]), runs / began)


@pytest.mark.slow
def test_a_process_that_is_lost(runs, given, tmp_path):
    """The others end, and what there was is there."""
    jobs = [
        {"count": 2, "parallel": how, "settings": given(), "out": str(tmp_path / f"{how}-{rank}"), "fails": rank}
        for how, rank in [("ddp", 0), ("ddp", 1), ("fsdp", 0), ("fsdp", 1)]
    ]
    for job, told in zip(jobs, run_together(jobs), strict=True):
        lost, left = job["fails"], 1 - job["fails"]
        assert told["statuses"][lost] == 9
        assert told["statuses"][left] == 1
        assert told["told"] == [
            f"{left} UserError: another process of this run was lost; its own message, or torchrun's, says why"
        ]
        assert len(metrics_of(Path(job["out"]))) == 1


@pytest.mark.slow
def test_another_file_in_one_process_is_refused(given, tmp_path, colours):
    other = tmp_path / "other.jsonl"
    other.write_text(colours.read_text().replace("Colour 3?", "Colour 4?"))
    out = str(tmp_path / "run")
    job = {"count": 2, "parallel": "ddp", "settings": given(), "out": out, "other_data": str(other)}
    (told,) = run_together([{**job, "data_of_its_own": 1}])
    assert told["statuses"] == [1, 1]
    assert sorted(told["told"]) == [
        "0 UserError: its data is not that of rank 1; give all the same files",
        "1 UserError: rank 1 of 2: its data is not that of rank 0; give all the same files",
    ]
    assert not Path(out).exists()


def test_what_several_processes_cannot_do(settings, silent):
    group = Processes("fsdp", 0, 2)
    for changes, why in (
        ({"seeds": 2}, "--seeds takes one process; start a run with --parallel for each --seed"),
        ({"state_bits": 8}, "--parallel fsdp has no --state-bits 8, whose scales cannot be split"),
        ({"init": "loftq"}, "--parallel fsdp has no --init loftq, which saves a base; start from one that a run"),
    ):
        with pytest.raises(UserError) as raised:
            finetune(settings(**changes), silent, group)
        assert str(raised.value).startswith(why)


def test_without_a_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with processes(None) as group:
        assert group is ALONE
    for parallel, why in (
        ("ddp", "--parallel ddp takes several processes: torchrun --nproc-per-node N -m qloralab finetune"),
        ("tp", "--parallel is 'tp'; it must be one of ddp, fsdp"),
    ):
        with pytest.raises(UserError) as raised, processes(parallel):  # type: ignore[arg-type]
            pass
        assert str(raised.value).startswith(why)


def test_several_processes_without_parallel(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    why = "4 processes were started for one run; say --parallel ddp or fsdp"
    with pytest.raises(UserError, match=why), processes(None):
        pass


def test_alone():
    """One process exchanges nothing, and takes all examples."""
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    assert ALONE.total(1.5, 2) == [1.5, 2]
    assert ALONE.any(True)
    assert not ALONE.any(False)
    assert ALONE.from_first("a") == "a"
    before = torch.get_rng_state()
    ALONE.seed(0, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_shares():
    """Of each batch every process has another part, together all; and other masks in each step and process."""
    parts = [Processes("ddp", rank, 3).share(range(7)) for rank in range(3)]
    assert parts == [[0, 3, 6], [1, 4], [2, 5]]
    drawn = set()
    with torch.random.fork_rng():
        for rank in range(3):
            for step in range(3):
                Processes("ddp", rank, 3).seed(0, step)
                drawn.add(int(torch.randint(2**62, ())))
    assert len(drawn) == 9


@pytest.mark.parametrize(
    ("environment", "count", "first"),
    [
        ({}, 1, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, 2, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, 2, False),
        ({"WORLD_SIZE": "8"}, 1, True),
        ({"RANK": "3", "WORLD_SIZE": "x"}, 1, True),
    ],
)
def test_one_voice(monkeypatch, environment, count, first):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(one_voice, "_asked", list(one_voice._asked))
    assert one_voice.speaks()  # another command is one process, whatever the environment says
    one_voice.expect_others()
    assert (one_voice.started(), one_voice.is_first(), one_voice.speaks()) == (count, first, first)
    one_voice.ask(lambda: not first)
    assert one_voice.speaks() is not first


@pytest.mark.slow
def test_torchrun(given, tmp_path):
    """The command itself: one display, and of a mistake one line."""
    options = [part for key, value in given().items() for part in (f"--{key.replace('_', '-')}", value)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "qloralab", "finetune"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def launched(*more: str) -> tuple[int, str, list[str]]:
        command = [*launcher, "--parallel", "ddp", *map(str, options), *more]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        ours = [line for line in ran.stderr.splitlines() if line.startswith("qloralab: ")]
        return ran.returncode, ran.stdout, ours

    status, out, lines = launched("--out", "run")
    assert (status, lines) == (0, [])
    assert out.count("val loss  ") == 1
    assert "processes  2, ddp: " in out
    status, out, lines = launched("--out", "run")
    assert status == 1
    (line,) = lines
    assert line.endswith("run exists and is not empty; a run never writes over another, give --out a new name")


def test_settings_know_nothing_of_processes():
    """How many processes a run has is no setting: it goes on with any number."""
    assert not {"parallel", "processes"} & {field.name for field in dataclasses.fields(Settings)}
