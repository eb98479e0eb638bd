"""Runs that go on: after a kill at any moment, after a signal, after their end; and what does not go on."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from qloralab.checkpoint.models import load_model
from qloralab.settings import Settings
from qloralab.train.finetune import finetune, resume
from qloralab.train.run_directory import RunDirectory
from qloralab.train.trainer import Trainer

MEASURED = ("tokens_per_s", "rss_mb")


def left_by(run: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The metrics of a run, without what was measured, and the tensors that it trained."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (weights,) = [*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines], load_file(weights)


def assert_same(run: Path, whole: Path) -> None:
    (lines, tensors), (its_lines, its_tensors) = left_by(run), left_by(whole)
    assert lines == its_lines
    assert tensors.keys() == its_tensors.keys()
    assert all(torch.equal(tensor, its_tensors[name]) for name, tensor in tensors.items())
    assert (run / "samples.md").read_text() == (whole / "samples.md").read_text()


def killed(settings: Settings, tmp_path: Path, trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs that are killed and go on (see killed.py), each compared with the whole run; what is told of them."""
    trials = [{"out": str(tmp_path / f"killed-{number}"), **trial} for number, trial in enumerate(trials)]
    asked = {"settings": settings.given(), "whole": str(tmp_path / "whole"), "trials": trials}
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), json.dumps(asked)]
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    told = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [one["again"] for one in told] == [0] * len(trials), ran.stderr
    for trial in trials:
        run = Path(trial["out"])
        went_on = run if (run / "config.json").exists() else Path(f"{run}-again")
        assert_same(went_on, tmp_path / "whole")
        assert not list(went_on.rglob("*.part"))
        shutil.rmtree(run, ignore_errors=True)
    return told


def test_a_run_killed_at_a_random_moment_ends_as_if_it_had_not_been(settings, tmp_path):
    """Fourteen moments of a run whose adapters have dropout; six more are those of a paged state, below."""
    moments = [{"moment": random.Random(number).random()} for number in range(14)]
    told = killed(settings(steps=12, save_every=2, lora_dropout=0.1), tmp_path, moments)
    assert sum(one["killed"] for one in told) >= 10  # the others had ended
    assert len({one["steps"] for one in told}) > 3  # the kills fell into different steps


@pytest.mark.slow
def test_a_paged_state_goes_on_too(settings, write_model, tmp_path):
    config = LlamaConfig(
        vocab_size=260, hidden_size=256, intermediate_size=768, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    model = write_model("larger")
    LlamaForCausalLM(config).save_pretrained(model)
    given = settings(model=model, method="full", state_budget=17, steps=6, save_every=2, batch_size=2)
    told = killed(given, tmp_path, [{"moment": random.Random(number).random()} for number in range(20, 26)])
    assert sum(one["killed"] for one in told) >= 3
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["state_budget"] == 17


@pytest.mark.parametrize(("method", "calls"), [("qlora", range(1, 40, 2)), ("full", range(5, 20))])
def test_a_kill_in_the_middle_of_each_save(settings, tmp_path, method, calls):
    """At every other call that makes a file durable or renames it: of config, adapter, metrics, checkpoint."""
    given = settings(method=method, steps=4, save_every=2, keep=1)
    told = killed(given, tmp_path, [{"call": number} for number in calls])
    alive = [one["killed"] for one in told].index(False)
    assert alive >= 8
    assert not any(one["killed"] for one in told[alive:])


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
@pytest.mark.parametrize("state_bits", [32, 8])
def test_more_steps_for_a_run_that_ended(settings, silent, tmp_path, method, state_bits):
    """Two of them in one place: the second has the state of the first."""
    first = settings(method=method, state_bits=state_bits, steps=4)
    finetune(first, silent)
    before = left_by(first.out)[1]
    with pytest.raises(Exception, match=r"run is complete, with 4 steps; give --steps to go on"):
        resume(first.out, display=silent)
    result = resume(first.out, 7, silent)
    assert (result.steps, result.interrupted) == (7, False)
    lines, after = left_by(first.out)
    assert [line["step"] for line in lines] == list(range(8))
    assert any(not torch.equal(after[name], before[name]) for name in before)
    config = json.loads((first.out / "config.json").read_text())
    assert (config["steps"], config["result"]["steps"]) == (7, 7)
    assert [one["step"] for one in config["resumed"]] == [4]


def test_a_signal_saves_a_checkpoint_of_that_step(settings, silent, tmp_path, monkeypatch):
    whole = settings(steps=6, out=tmp_path / "whole", lora_dropout=0.1)
    finetune(whole, silent)
    given, step = settings(steps=6, lora_dropout=0.1, save_every=5), Trainer.train_step

    def interrupted(self):
        if self.step == 3:
            os.kill(os.getpid(), 15)
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    assert finetune(given, silent).interrupted
    monkeypatch.undo()
    assert [path.name for path in (given.out / "checkpoints").iterdir()] == ["step-000004.safetensors"]
    assert not resume(given.out, display=silent).interrupted
    assert_same(given.out, whole.out)


def test_an_infinite_loss_leaves_the_state_before_it(settings, silent, refusal, tmp_path, monkeypatch):
    whole = settings(steps=6, out=tmp_path / "whole", lora_dropout=0.1)
    finetune(whole, silent)
    given, backward = settings(steps=6, lora_dropout=0.1), Trainer._backward
    monkeypatch.setattr(
        Trainer, "_backward", lambda self, some: backward(self, some) if self.step < 4 else float("nan")
    )
    message = refusal(finetune, given, silent)
    assert message.startswith("the loss is nan and the gradient")
    assert message.endswith(f"what was trained before is in {given.out / 'checkpoints' / 'step-000004.safetensors'}")
    monkeypatch.undo()
    resume(given.out, display=silent)
    assert_same(given.out, whole.out)


@pytest.mark.parametrize(("where", "step"), [("_backward", 4), ("validate", 3)])
def test_an_unexpected_error_leaves_what_goes_on(settings, silent, tmp_path, monkeypatch, where, step):
    """In a step, whose dropout has been drawn; in a validation, behind a step whose metrics are not written yet."""
    whole = settings(steps=6, out=tmp_path / "whole", lora_dropout=0.1)
    finetune(whole, silent)
    given, function = settings(steps=6, lora_dropout=0.1), getattr(Trainer, where)

    def breaks(self, *arguments):
        found = function(self, *arguments)
        if self.step == step:
            raise ZeroDivisionError
        return found

    monkeypatch.setattr(Trainer, where, breaks)
    with pytest.raises(ZeroDivisionError):
        finetune(given, silent)
    monkeypatch.undo()
    resume(given.out, display=silent)
    assert_same(given.out, whole.out)


def test_the_last_checkpoints_stay(settings, silent):
    given = settings(steps=6, save_every=1, keep=3)
    finetune(given, silent)
    names = sorted(path.name for path in (given.out / "checkpoints").iterdir())
    assert names == [f"step-{step:06}.safetensors" for step in (4, 5, 6)]


def test_what_changed_is_refused_by_name(settings, silent, refusal, model_dir, colours, tmp_path):
    model, data = shutil.copytree(model_dir, tmp_path / "model"), shutil.copy(colours, tmp_path / "data.jsonl")
    given = settings(model=model, data=str(data))
    finetune(given, silent)
    run, config = given.out, (given.out / "config.json").read_text()

    def says(**changes: Any) -> str:
        (run / "config.json").write_text(json.dumps({**json.loads(config), **changes}))
        return refusal(resume, run, 9, silent)

    changed = {**json.loads(config)["given"], "lr": 0.5}
    assert says(given=changed) == f"{run}: --lr was None and is 0.5 in config.json now; undo that"
    assert "no setting 'warp'" in says(given={**changed, "warp": 9})
    (run / "config.json").write_text(config)
    assert refusal(resume, run, 5, silent) == "--steps is 5, and the run has 6; a run that goes on may have more"

    lines = Path(data).read_text().splitlines(keepends=True)
    Path(data).write_text("".join(lines[1:]))
    assert refusal(resume, run, 9, silent).endswith("its data changed since; it cannot go on")
    Path(data).write_text("".join(lines))
    other = load_model(model)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    other.save_pretrained(model)
    assert refusal(resume, run, 9, silent).endswith("its model changed since; it cannot go on")
    shutil.rmtree(model)
    assert "model does not exist" in refusal(resume, run, 9, silent)


def test_a_run_that_lives_is_refused(settings, silent, refusal, tmp_path):
    finetune(settings(), silent)
    run = tmp_path / "run"
    alive = RunDirectory.reopen(run)
    assert refusal(resume, run, 9, silent) == f"{run}: another process is writing this run; wait for it, or stop it"
    alive.close()
    assert resume(run, 9, silent).steps == 9
    assert "is no run directory" in refusal(resume, tmp_path, 9, silent)
    (run / "config.json").unlink()
    assert "was killed before it began" in refusal(resume, run, 9, silent)


def test_other_versions_are_said(settings, silent, capfd):
    given = settings()
    finetune(given, silent)
    config = json.loads((given.out / "config.json").read_text())
    config["versions"]["torch"] = "1.0"
    (given.out / "config.json").write_text(json.dumps(config))
    resume(given.out, 7, silent)
    assert "began with torch 1.0, now" in capfd.readouterr().err


def test_the_command_takes_its_settings_from_the_run(settings, silent, program):
    given = settings()
    finetune(given, silent)
    status, _, err = program("finetune", "--resume", given.out, "--lr", 1)
    assert (status, err) == (
        2,
        f"qloralab: error: --lr would be ignored: {given.out} has its own settings; leave it out\n",
    )
    status, out, err = program("finetune", "--resume", given.out, "--steps", 8)
    assert (status, err) == (0, "")
    assert f"run  {given.out}, from step 6 of 8\n" in out


def test_settings_survive_their_json(settings):
    for given in (
        settings(),
        settings(method="full", lr=0.1),
        settings(skip="a, b"),
        settings(double_quant=False, seed=-3),
    ):
        again = Settings.from_given(json.loads(json.dumps(given.given())))
        assert again == dataclasses.replace(given, out=None)
