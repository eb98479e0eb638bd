"""Steps from graphs are the steps without them: losses, gradients, masks; and what cannot be captured runs as it is."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qloralab.data.encoding import NO_LABEL, Encoded
from qloralab.lora.inject import adapters
from qloralab.nf4.dense_shares import LOGGER
from qloralab.settings import Method
from qloralab.train import graphs as module
from qloralab.train import prepare
from qloralab.train.dry_run import dry_run
from qloralab.train.finetune import finetune, resume
from qloralab.train.graphs import StepGraphs, has_graphs
from qloralab.train.processes import Processes
from qloralab.train.trainer import Trainer

METHODS: tuple[Method, ...] = ("qlora", "lora", "full")
# Relative. The same numbers, summed in float32 in another order; and in bfloat16, with its rounding.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


@pytest.fixture
def alike(tmp_path: Path) -> str:
    """Data whose examples have as many tokens, and as many labels."""
    records = [{"instruction": f"Colour {i}?", "output": f"It is {i} red."} for i in range(10, 30)]
    path = tmp_path / "alike.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def uneven(tmp_path: Path) -> str:
    """Data of very different lengths."""
    draw = random.Random(3)
    records = [{"instruction": f"{i}?", "output": "It is red. " * draw.randint(1, 16)} for i in range(30)]
    path = tmp_path / "uneven.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def moved(trainer: Trainer) -> Trainer:
    """With adapters that are not zero, so that A has a gradient too."""
    for layer in adapters(trainer.model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    return trainer


def state(trainer: Trainer) -> list[Tensor]:
    return [value.clone() for value in trainer.model.state_dict().values() if isinstance(value, Tensor)]


def grads(trainer: Trainer) -> list[Tensor]:
    found = [parameter.grad for parameter in trainer.parameters]
    assert all(grad is not None for grad in found)
    return [grad.clone() for grad in found if grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_without_graphs(make, tapes, uneven, method, dtype):
    options = {"data": uneven, "batch_size": 5, "accumulate": 2, "lr": 1e-3}
    eager, graphed = make(method, dtype, **options), make(method, dtype, **options)
    graphed.capture()
    assert len(tapes) == len(graphed.graphs.lengths) > 2
    for _ in range(8):  # past the end of the epoch, whose last batch has fewer examples
        one, other = eager.train_step(), graphed.train_step()
        assert other.loss == pytest.approx(one.loss, rel=CLOSE[dtype])
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=10 * CLOSE[dtype])
        assert (other.tokens, other.lr) == (one.tokens, one.lr)
    replays = sum(tape.replays for tape in tapes) - len(tapes)  # each was tried once
    assert replays == 8 * 2 - 1, "the last batch of the epoch is one example"


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_no_bit_differs_where_padding_does_not(make, tapes, alike, method, accumulate):
    """With dropout: the seeds are drawn in the same order."""
    options = {"data": alike, "accumulate": accumulate, "lr": 1e-2, "held_out": 4, "batch_size": 4}
    options |= {} if method == "full" else {"lora_dropout": 0.3}
    eager, graphed = make(method, torch.float32, **options), make(method, torch.float32, **options)
    graphed.capture()
    for _ in range(6):
        torch.manual_seed(eager.step)
        one = eager.train_step()
        after = torch.get_rng_state()
        torch.manual_seed(graphed.step)
        other = graphed.train_step()
        assert (other.loss, other.grad_norm) == (one.loss, one.grad_norm)
        assert torch.equal(torch.get_rng_state(), after)
    assert all(map(torch.equal, state(eager), state(graphed)))
    assert len(tapes) == 1


def test_each_replay_has_masks_of_its_own(make, tapes):
    trainer = moved(make("qlora", torch.float32, lora_dropout=0.5))
    trainer.capture()
    assert trainer.graphs is not None
    losses, found = [], []
    for _ in range(3):
        losses.append(trainer.graphs.backward([trainer.train[:4]], 100))
        found.append(grads(trainer))
    assert len(set(losses)) == 3
    assert not any(map(torch.equal, found[0], found[1]))


def test_gradients_start_at_zero_and_parts_add_up(make, tapes):
    trainer = moved(make("lora", torch.float32))
    trainer.capture()
    graphs, examples = trainer.graphs, trainer.train[:4]
    assert graphs is not None
    whole = graphs.backward([examples], 50)
    expected = grads(trainer)
    trainer.optimizer.zero_grad(set_to_none=True)
    assert graphs.backward([examples[:1], examples[1:]], 50) == pytest.approx(whole, rel=CLOSE[torch.float32])
    torch.testing.assert_close(grads(trainer), expected, rtol=1e-4, atol=1e-7)
    assert graphs.backward([examples], 100) == pytest.approx(whole / 2, rel=CLOSE[torch.float32])
    torch.testing.assert_close(grads(trainer), [grad / 2 for grad in expected], rtol=1e-4, atol=1e-7)


def test_what_a_batch_before_left_in_the_inputs_counts_for_nothing(make, tapes):
    trainer = moved(make("qlora", torch.float32))
    trainer.capture()
    assert trainer.graphs is not None
    few, many = trainer.train[:1], sorted(trainer.train, key=lambda example: -len(example.input_ids))[:4]
    first = trainer.graphs.backward([few], 10), grads(trainer)
    trainer.graphs.backward([many], 10)
    again = trainer.graphs.backward([few], 10), grads(trainer)
    assert first[0] == again[0]
    assert all(map(torch.equal, first[1], again[1]))


@pytest.mark.parametrize("method", METHODS)
def test_capture_leaves_the_run_as_it_was(make, tapes, method):
    trainer = make(method, **({} if method == "full" else {"lora_dropout": 0.3}))
    trainer.train_step()
    before, numbers, drawn = state(trainer), torch.get_rng_state(), random.getstate()
    told: list[tuple[int, int]] = []
    trainer.capture(lambda *done: told.append(done))
    assert told == [(done, 3 * len(tapes)) for done in range(1, 3 * len(tapes) + 1)]
    assert all(map(torch.equal, state(trainer), before))
    assert torch.equal(torch.get_rng_state(), numbers)
    assert random.getstate() == drawn
    assert all(parameter.grad is None for parameter in trainer.parameters)
    assert trainer.step == 1


def test_the_longest_is_captured_first(make, monkeypatch, uneven):
    """So that the others find room in the memory of the first."""
    sizes: list[int] = []

    def captured(run: Any, *_: Any) -> Any:
        sizes.append(run.args[0].ids.shape[1])
        return run

    monkeypatch.setattr(module, "captured", captured)
    trainer = make(data=uneven)
    trainer.capture()
    assert sizes == sorted(trainer.graphs.lengths, reverse=True)


def scaled_loss(run: Callable[[], None], graphs: StepGraphs) -> None:
    run()
    graphs._total.mul_(1.1)


def stale_gradient(run: Callable[[], None], graphs: StepGraphs) -> None:
    run()
    graphs._grads[3].zero_()


def no_gradient(run: Callable[[], None], graphs: StepGraphs) -> None:
    run()
    for grad in graphs._grads:
        grad.zero_()


def not_a_number(run: Callable[[], None], graphs: StepGraphs) -> None:
    run()
    graphs._grads[0].fill_(torch.nan)


def other_masks(run: Callable[[], None], graphs: StepGraphs) -> None:
    torch.manual_seed(99)
    run()


@pytest.mark.parametrize("wrong", [scaled_loss, stale_gradient, no_gradient, not_a_number, other_masks])
def test_a_graph_that_computes_something_else_is_found(make, monkeypatch, wrong):
    trainer = moved(make("qlora", lora_dropout=0.05))
    made: list[StepGraphs] = []
    start = StepGraphs.capture
    monkeypatch.setattr(StepGraphs, "capture", lambda self, *rest: (made.append(self), start(self, *rest))[1])
    monkeypatch.setattr(module, "captured", lambda run, *_: lambda: wrong(run, made[0]))
    numbers = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=r"^a captured step gives another loss, or other gradients$"):
        trainer.capture()
    assert trainer.graphs is None
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(parameter.grad is None for parameter in trainer.parameters)


@pytest.mark.parametrize("draws", [random.random, lambda: torch.rand(()).item()], ids=["python", "values"])
def test_what_the_host_decides_anew_in_each_step_is_not_captured(make, tapes, draws):
    trainer = make()
    trainer.model.model.layers[0].register_forward_hook(lambda *_: draws() and None)
    with pytest.raises(RuntimeError, match=r"random numbers on the host|not permitted when stream is capturing"):
        trainer.capture()
    assert trainer.graphs is None
    assert trainer.train_step().loss > 0


def test_random_numbers_of_the_host_are_those_that_no_gpu_draws():
    before = module.random_states()
    torch.rand(1)
    after = module.random_states()
    assert module._on_host(before, torch.device("cpu")) == module._on_host(after, torch.device("cpu"))
    assert module._on_host(before, torch.device("cuda")) != module._on_host(after, torch.device("cuda"))


def encoded(length: int, labels: int) -> Encoded:
    ids = [1 + i % 200 for i in range(length)]
    return Encoded(ids, [*[NO_LABEL] * (length - labels), *ids[length - labels :]], "made up")


def test_there_is_room_for_the_most_labels_that_a_part_can_have():
    """Of any of the examples that fit, not only of the longest."""
    examples = [encoded(30, 25), encoded(20, 15), encoded(31, 2), encoded(64, 1), encoded(60, 3), encoded(10, 4)]
    parameter = torch.nn.Parameter(torch.zeros(3))
    graphs = StepGraphs(lambda *_: parameter.sum(), [parameter], examples, 2, 32, None)
    assert graphs.lengths == [32, 64]
    assert {length: len(bucket.places) for length, bucket in graphs._buckets.items()} == {32: 40, 64: 40}
    for some in (examples[:2], examples[:1], examples[4:]):
        bucket = graphs._buckets[graphs._length(some)]
        bucket.fill(some)
        labels = [label for example in some for label in example.labels if label != NO_LABEL]
        assert bucket.targets[bucket.targets != NO_LABEL].tolist() == labels
        ids = bucket.ids.flatten()
        assert [
            int(ids[place + 1]) for place, target in zip(bucket.places, bucket.targets, strict=True) if target >= 0
        ] == labels
        assert not bucket.ids[len(some) :].any()


def test_a_run_is_captured_and_one_that_goes_on_captures_anew(settings, tapes, watched, tmp_path, monkeypatch):
    """With the masks that it would have had: no bit differs from a run that was never stopped."""
    whole = settings(graph=True, steps=6, out=tmp_path / "whole", lora_dropout=0.1, accumulate=2)
    display, printed = watched()
    finetune(whole, display)
    assert "  graphs  steps of " in printed()
    made = len(tapes)
    given, step = dataclasses.replace(whole, out=tmp_path / "run", save_every=2), Trainer.train_step

    def interrupted(self: Trainer) -> Any:
        if self.step == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(given, display)
    monkeypatch.setattr(Trainer, "train_step", step)
    assert given.out is not None
    assert json.loads((given.out / "config.json").read_text())["graph"] is True
    resume(given.out, display=display)
    assert len(tapes) == 3 * made
    names = ("loss", "val_loss", "grad_norm", "lr", "tokens")
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("whole", "run")]
    one, other = ([[json.loads(line)[name] for name in names] for line in some] for some in lines)
    assert one == other
    adapters = [load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "run")]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_a_run_that_cannot_be_captured_is_one_without(settings, silent, tapes, tmp_path, monkeypatch):
    def fail(*_: Any) -> Any:
        raise RuntimeError("operation not permitted\n when stream is capturing")

    monkeypatch.setattr(module, "captured", fail)
    said: list[str] = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *parts: said.append(text % parts))
    results = [
        finetune(settings(graph=graph, lora_dropout=0.1, out=tmp_path / str(graph)), silent) for graph in (True, False)
    ]
    assert said == ["the steps run without CUDA graphs: operation not permitted when stream is capturing"]
    assert results[0].val_after == results[1].val_after
    assert json.loads((results[0].path / "config.json").read_text())["notes"] == said


def test_graphs_take_a_gpu(settings, silent, refusal, monkeypatch):
    monkeypatch.setattr(prepare, "has_graphs", lambda device: False)
    for command in (finetune, dry_run):
        expected = "--graph needs an NVIDIA GPU, and there is none here; leave it out"
        assert refusal(command, settings(graph=True), silent) == expected


def test_which_devices_have_graphs(monkeypatch):
    assert not has_graphs(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", None)
    assert has_graphs(torch.device("cuda", 0))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not has_graphs(torch.device("cuda", 0))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_graphs_take_one_process(settings, silent, refusal, parallel):
    message = refusal(finetune, settings(graph=True), silent, Processes(parallel, 0, 2))
    assert message == "--graph takes one process, --parallel exchanges gradients in between; leave one out"


@pytest.mark.parametrize("option", ["checkpointing", "merge_aware"])
def test_what_has_no_graph_is_refused(settings, refusal, option):
    changes = {option: True} | ({"lora_dropout": None} if option == "merge_aware" else {})
    assert refusal(settings, graph=True, **changes).startswith(
        f"--graph cannot be had with --{option.replace('_', '-')}, which "
    )


@pytest.mark.gpu
def test_a_gpu_captures_and_trains_as_without(make):
    options = {"lora_dropout": 0.1, "batch_size": 5, "accumulate": 2, "lr": 1e-3}
    losses = []
    for graph in (False, True):
        trainer = make("qlora", **options)
        trainer.model.to("cuda")
        trainer = Trainer(trainer.model, trainer.train, trainer.held_out, trainer.settings, trainer.dtype)
        if graph:
            trainer.capture()
        torch.manual_seed(0)
        losses.append([trainer.train_step().loss for _ in range(6)])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
