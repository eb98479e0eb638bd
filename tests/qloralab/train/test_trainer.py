"""A step is the step of transformers and torch; parts, padding and order change nothing; only what trains moves."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import resource
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from qloralab.data.batches import collate, length_grouped_batches
from qloralab.data.encoding import NO_LABEL
from qloralab.errors import UserError
from qloralab.lora.inject import adapters
from qloralab.settings import Method
from qloralab.train.trainer import Trainer, schedule

# Relative. Both compute in bfloat16, 8 bits, on differently padded rows: its rounding, averaged over a batch.
BF16 = 2e-3
# Relative. The same numbers, summed in float32 in another order.
FLOAT32 = 1e-5
METHODS: tuple[Method, ...] = ("qlora", "lora", "full")


def batches(trainer: Trainer) -> Iterator[list]:
    """The batches in the order of training."""
    lengths = [len(example.input_ids) for example in trainer.train]
    for epoch in range(1000):
        for batch in length_grouped_batches(lengths, trainer.settings.batch_size, trainer.settings.seed, epoch):
            yield [trainer.train[index] for index in batch]


def tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of all that the model holds."""
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def labels_of(example: Any) -> int:
    return sum(label != NO_LABEL for label in example.labels[1:])


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_that_of_transformers(make, method):
    trainer = make(method)
    for layer in adapters(trainer.model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)  # or the adapters would be nothing yet
    batch = collate(next(batches(trainer)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=method == "full"):
        expected = trainer.model(**batch).loss.item()
    assert trainer.train_step().loss == pytest.approx(expected, rel=BF16)


@pytest.mark.parametrize("method", METHODS)
def test_validation_is_the_mean_over_all_answer_tokens(make, method):
    trainer, seen = make(method, held_out=9, batch_size=2), []
    sums, counts = [], []
    for example in trainer.held_out:  # one at a time, without padding
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels[1:])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=method == "full"):
            logits = trainer.model(input_ids=ids).logits[0, :-1]
        sums.append(F.cross_entropy(logits.double(), labels, reduction="sum").item())
        counts.append(labels_of(example))
    assert len(set(counts)) > 1  # else every mean is the same
    found = trainer.validate(lambda done, total: seen.append((done, total)))
    assert found == pytest.approx(sum(sums) / sum(counts), rel=BF16)
    lengths = sorted(len(example.input_ids) for example in trainer.held_out)
    assert seen == [(sum(lengths[:end]), sum(lengths)) for end in (4, 8, 9)]


def test_validation_is_repeatable_and_leaves_no_trace(make):
    trainer = make(lora_dropout=0.5)
    trainer.train_step()
    trainer.train_step()
    trainer.model.train()
    before, random = tensors(trainer), torch.get_rng_state()
    assert trainer.validate() == trainer.validate()
    assert torch.equal(torch.get_rng_state(), random)
    after = tensors(trainer)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert trainer.step == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_products_are_taken_in_the_dtype(make, method, dtype):
    trainer, seen = make(method, dtype), set()
    trainer.model.model.layers[0].mlp.register_forward_hook(lambda layer, x, y: seen.add(y.dtype))
    trainer.train_step()
    trainer.validate()
    assert seen == {dtype}
    assert {parameter.dtype for parameter in trainer.parameters} == {torch.float32}


@pytest.mark.parametrize("method", METHODS)
def test_only_what_should_train_moves(make, method):
    trainer = make(method)
    before = tensors(trainer)
    for _ in range(2):  # A gets no gradient as long as B is zero
        trainer.train_step()
    after = tensors(trainer)
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == {name for name in before if method == "full" or "lora_" in name}
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_is_on_in_training(make, dropout):
    trainer = make("lora", torch.float32, lora_dropout=dropout)
    for layer in adapters(trainer.model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    with torch.no_grad():
        expected = trainer.model.eval()(**collate(next(batches(trainer)))).loss.item()
    assert (trainer.train_step().loss == pytest.approx(expected, rel=FLOAT32)) == (dropout == 0.0)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 2), (4, 4), (5, 2), (3, 3)])
def test_parts_of_a_batch_add_up(make, batch_size, accumulate):
    whole = make("lora", torch.float32, batch_size=batch_size, lr=1e-3)
    parts = make("lora", torch.float32, batch_size=batch_size, accumulate=accumulate, lr=1e-3)
    for _ in range(6):  # past the end of the epoch, whose last batch has fewer examples than parts
        one, other = whole.train_step(), parts.train_step()
        assert other.loss == pytest.approx(one.loss, rel=FLOAT32)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=100 * FLOAT32)
        assert (other.tokens, other.lr) == (one.tokens, one.lr)


@pytest.mark.parametrize("limit", [0.01, 1e6])
def test_the_norm_is_that_before_clipping(make, limit):
    trainer = make("lora", torch.float32, max_grad_norm=limit)
    batch = collate(next(batches(trainer)))
    trainer.model(**batch).loss.backward()
    norm = math.sqrt(sum(parameter.grad.double().square().sum() for parameter in trainer.parameters))
    trainer.model.zero_grad()
    metrics = trainer.train_step()
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-3)
    averages = [trainer.optimizer.state[parameter]["exp_avg"] for parameter in trainer.parameters]
    used = math.sqrt(sum(average.double().square().sum() for average in averages)) / 0.1  # 1 - beta1, at the first step
    assert used == pytest.approx(min(limit, norm), rel=1e-3)


def test_the_state_has_the_bits_and_the_budget_that_were_asked_for(make):
    trainer = make(state_bits=8, state_budget=17)
    trainer.train_step()
    paging = trainer.optimizer.paging()
    assert trainer.optimizer.state[trainer.parameters[0]]["state1"].dtype == torch.uint8
    assert paging.budget == 17 * 10**6
    assert trainer.paging() == f"state {paging.resident_bytes / 1e6:.0f}/{paging.state_bytes / 1e6:.0f} MB, 0 stalls"
    assert make().paging() == ""


def test_a_budget_changes_no_bit_of_a_run(make):
    """Of the model's state a chunk stays, and that of a larger parameter pages."""
    ends = []
    for budget in (None, 22):
        trainer = make("full", state_budget=budget)
        extra = torch.nn.Parameter(torch.zeros(5_000_000))
        trainer.optimizer.add_param_group({"params": [extra]})
        for _ in range(2):
            extra.grad = torch.linspace(-1, 1, 5_000_000)
            trainer.train_step()
        assert (trainer.optimizer.paging().fetched > 0) == (budget is not None)
        ends.append([*(parameter.detach().clone() for parameter in trainer.parameters), extra.detach()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_a_step_is_adamw_without_decay(make):
    trainer = make("lora", torch.float32, lr=1e-3, steps=1, max_grad_norm=1e9)
    before = tensors(trainer)
    trainer.model(**collate(next(batches(trainer)))).loss.backward()
    grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    trainer.train_step()
    after = tensors(trainer)
    for name in (name for name in grads if "lora_B" in name):
        step = after[name] - before[name]
        clear = grads[name].abs() > 1e-5  # against eps = 1e-8, and the last digits of the gradient
        torch.testing.assert_close(step[clear], -1e-3 * grads[name][clear].sign(), rtol=2e-3, atol=0)
    for name in (name for name in grads if "lora_A" in name):  # no gradient yet, so that only a decay could move it
        assert torch.equal(before[name], after[name])


def test_every_example_once_per_epoch_and_tokens_without_padding(make):
    trainer = make("lora", batch_size=3, steps=14, lr=0.25)
    order = list(islice(batches(trainer), 14))  # 16 examples: 6 batches an epoch
    sources = [example.source for batch in order[:6] for example in batch]
    assert sorted(sources) == sorted(example.source for example in trainer.train)
    assert not {example.source for example in trainer.held_out} & set(sources)
    assert trainer.tokens_per_step == sum(len(example.input_ids) for example in trainer.train) / 6
    seen = 0
    for number, batch in enumerate(order, 1):
        metrics = trainer.train_step()
        seen += sum(len(example.input_ids) for example in batch)
        lr = 0.25 * schedule(number - 1, 14)
        assert (metrics.step, metrics.tokens, metrics.val_loss, metrics.lr) == (number, seen, None, lr)
        assert trainer.optimizer.param_groups[0]["lr"] == lr
        assert metrics.tokens_per_s is not None
        assert metrics.tokens_per_s > 0
        assert metrics.rss_mb > 100


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (1, {0: 1.0}),
        (2, {0: 1.0, 1: 1.0}),
        (10, {0: 1.0, 1: 1.0, 2: 8 / 9, 9: 1 / 9}),
        (100, {0: 1 / 3, 1: 2 / 3, 2: 1.0, 3: 1.0, 4: 96 / 97, 50: 50 / 97, 99: 1 / 97}),
    ],
)
def test_schedule(steps, expected):
    assert {step: schedule(step, steps) for step in expected} == pytest.approx(expected)
    values = [schedule(step, steps) for step in range(steps)]
    assert all(0 < value <= 1 for value in values)
    assert max(values) == 1


def test_a_loss_that_is_not_finite_ends_it_before_the_step(make):
    trainer = make()
    trainer.train_step()
    next(iter(adapters(trainer.model).values())).lora_A.data[0, 0] = math.nan
    before = tensors(trainer)
    with pytest.raises(UserError, match=r"^the loss is nan .* at step 2; try a smaller --lr$"):
        trainer.train_step()
    after = tensors(trainer)
    assert all(torch.equal(after[name].nan_to_num(), tensor.nan_to_num()) for name, tensor in before.items())
    with pytest.raises(UserError, match=r"^the validation loss is nan after step 1; try a smaller --lr$"):
        trainer.validate()


@pytest.fixture
def large(make) -> Trainer:
    """A trainer with a parameter whose moments take 4 GB: more than the process can have kept from earlier tests.

    Nobody reads or writes the parameter, so its memory is never there.
    """
    trainer = make(state_bits=32)
    trainer.parameters = [torch.nn.Parameter(torch.empty(500_000_000))]
    return trainer


def test_no_memory_for_the_state(large):
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + 50_000_000, before[1]))
    try:
        with pytest.raises(UserError) as caught:
            large._optimizer()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert str(caught.value) == (
        "there is no memory for the optimizer's state (4.00 GB); give --state-budget the MB of it that may be in "
        "memory, or --state-bits 8"
    )


def test_no_disk_for_the_state_names_what_the_command_has(large, monkeypatch, tmp_path):
    def full(*values):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    large.settings = dataclasses.replace(large.settings, state_budget=17)
    with pytest.raises(UserError) as caught:
        large._optimizer()
    message = str(caught.value)
    assert message.startswith(f"--state-budget 17: the optimizer's state needs a file of 4.00 GB in {tmp_path}, which")
    assert message.endswith(" GB left: No space left on device. TMPDIR names another directory")
