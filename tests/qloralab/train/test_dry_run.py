"""What a dry run says is what the run then does."""

from __future__ import annotations

import pytest
import torch

from qloralab.lora.inject import trainable
from qloralab.settings import STEPS
from qloralab.train import prepare as prepare_module
from qloralab.train.dry_run import dry_run, tokens_of
from qloralab.train.finetune import finetune
from qloralab.train.prepare import prepare


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 3},
        {"steps": 7, "seed": 3},
        {"epochs": 2, "steps": STEPS, "batch_size": 3},
        {"method": "full", "steps": 1},
        {"target_modules": "q_proj,v_proj", "r": 3, "skip": "down_proj", "epochs": 1, "steps": STEPS},
        {"method": "lora", "steps": 4},
    ],
    ids=["part of an epoch", "epochs and a part", "epochs", "full", "some layers", "lora"],
)
def test_the_run_is_as_it_was_said(settings, silent, metrics_of, changes):
    chosen = settings(**changes)
    plan = dry_run(chosen, silent)
    assert not chosen.out.exists()
    assert plan.memory.trained == sum(one.numel() for one in trainable(prepare(chosen, silent).model))
    last = metrics_of(finetune(chosen, silent).path)[-1]
    assert (plan.steps, plan.tokens) == (last["step"], last["tokens"])


def test_no_weight_is_read_and_nothing_written(settings, model_dir, tmp_path, watched, monkeypatch):
    monkeypatch.setattr(prepare_module, "load_model", None)
    display, printed = watched()
    plan = dry_run(settings(epochs=2, steps=STEPS, seeds=3), display)
    assert [*tmp_path.iterdir()] == []
    assert (plan.examples, plan.held_out, plan.steps, plan.epochs) == (16, 4, 8, 2.0)
    lines = printed().splitlines()
    assert "    steps  8 of 4 examples, 2 epochs: " + f"{plan.tokens:,} tokens" in lines
    assert "  dry run  each of 3 runs is such a one; no weight was read, nothing was written" in lines
    assert any(line.startswith("   memory  about ") for line in lines)


def test_an_adapter_that_is_trained_on_has_its_own_rank(settings, silent, tmp_path):
    finetune(settings(out=tmp_path / "first", r=2, target_modules="q_proj", steps=1), silent)
    plan = dry_run(settings(adapter=tmp_path / "first" / "adapter"), silent)
    assert plan.memory.trained == 2 * 2 * (64 + 64)


def test_a_model_in_4_bits(settings, silent, four_bits, model_dir, tmp_path):
    four_bits(model_dir, tmp_path / "4bit")
    one, other = dry_run(settings(model=tmp_path / "4bit"), silent), dry_run(settings(), silent)
    assert (one.memory.trained, one.memory.weights) == (other.memory.trained, other.memory.weights)


def test_what_cannot_run_is_refused(settings, silent, refusal, tmp_path):
    assert "no.jsonl cannot be read" in refusal(dry_run, settings(data=str(tmp_path / "no.jsonl")), silent)
    assert "no linear layer matches 'nothing'" in refusal(dry_run, settings(target_modules="nothing"), silent)


def test_the_command(program, model_dir, colours, tmp_path):
    status, out, err = program("finetune", "--model", model_dir, "--data", colours, "--dry-run", "--epochs", 3)
    assert (status, err) == (0, "")
    assert "    steps  15 of 4 examples, 3 epochs: " in out  # 18 to train on
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("steps", [1, 3, 4, 7])
def test_the_tokens_of_the_first_steps_are_part_of_all(steps):
    lengths = torch.randint(1, 50, (13,)).tolist()
    more = tokens_of(lengths, 4, 0, steps + 1) - tokens_of(lengths, 4, 0, steps)
    assert 0 < more <= sum(sorted(lengths)[-4:])
    assert tokens_of(lengths, 4, 0, 12) == 3 * sum(lengths)
