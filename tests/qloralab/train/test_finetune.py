"""A run from its settings to its directory, on a tiny model."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import get_args

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPTNeoConfig

from qloralab.checkpoint.models import load_tokenizer
from qloralab.checkpoint.quantize_checkpoint import quantize_model
from qloralab.compute import precision, run_device
from qloralab.data.encoding import NO_LABEL, Encoded, encode_all
from qloralab.data.examples import Example, Message
from qloralab.display import Display
from qloralab.kernels.gpu import dense_cache
from qloralab.lora.layer import LoRALinear
from qloralab.nf4.linear import QuantizedLinear
from qloralab.settings import Method
from qloralab.train import finetune as module
from qloralab.train import loss, outlook, prepare, report
from qloralab.train.finetune import finetune
from qloralab.train.report import prompt_and_answer
from qloralab.train.run_directory import RunDirectory
from qloralab.train.trainer import Trainer

METHODS = get_args(Method)
MEASURED = {"tokens_per_s", "rss_mb"}  # what differs between two runs of the same settings


@pytest.fixture
def results(metrics_of):
    """The lines of metrics.jsonl, without what was measured."""
    return lambda path: [
        {name: value for name, value in line.items() if name not in MEASURED} for line in metrics_of(path)
    ]


def _write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def config_of(path) -> dict:
    return json.loads((path / "config.json").read_text())


@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns(settings, silent, metrics_of, method):
    result = finetune(settings(method=method, steps=30, eval_every=20, lr=1e-2), silent)
    lines = metrics_of(result.path)
    assert [line["step"] for line in lines] == list(range(31))
    assert lines[-1]["loss"] < 0.5 * lines[1]["loss"]
    validated = {line["step"]: line["val_loss"] for line in lines if line["val_loss"] is not None}
    assert list(validated) == [0, 20, 30]
    assert (result.val_before, result.val_after) == (validated[0], validated[30])
    assert validated[30] < 0.7 * validated[0]
    assert lines[0]["loss"] is lines[0]["lr"] is lines[0]["grad_norm"] is None
    assert (result.steps, result.interrupted) == (30, False)
    saved = {"full": "model"}.get(method, "adapter")
    assert {file.name for file in result.path.iterdir()} == {
        "run.yaml", "config.json", "metrics.jsonl", "loss.png", "samples.md", saved, "checkpoints"
    }  # fmt: skip
    assert config_of(result.path)["result"] == {**dataclasses.asdict(result), "path": str(result.path)}


@pytest.mark.parametrize("asked", ["auto", "bfloat16", "float32"])
@pytest.mark.parametrize("method", [*METHODS, "4 bits"])
def test_the_dtype_is_what_the_option_comes_to(
    settings, model_dir, four_bits, machine, tmp_path, monkeypatch, watched, method, asked
):
    if method == "4 bits":  # a model that is in 4 bits already, whose file says another dtype
        four_bits(model_dir, tmp_path / "4bit", compute_dtype=torch.float16)
    options = {"model": tmp_path / "4bit"} if method == "4 bits" else {"method": method}
    expected, seen = precision(asked, run_device()), watch_products(monkeypatch)
    display, printed = watched()
    config = config_of(finetune(settings(steps=1, dtype=asked, **options), display).path)
    assert seen == {expected.dtype}
    assert (config["dtype"], config["dtype_reason"]) == (expected.name, expected.why)
    assert printed().count(f"    dtype  {expected.described(None if method == '4 bits' else method)}\n") == 1


def watch_products(monkeypatch) -> set[torch.dtype]:
    """The dtypes of what the adapted or dense layers of a block give, and of what the loss gets."""
    seen: set[torch.dtype] = set()
    prepare_model, cross_entropy = prepare._prepare_model, loss.linear_cross_entropy

    def prepared(*values):
        model, errors = prepare_model(*values)
        for layer in model.modules():
            if isinstance(layer, QuantizedLinear):
                seen.add(layer.compute_dtype)
        # In training: what tries the head out, and answers, is without autocast.
        model.model.layers[0].mlp.register_forward_hook(lambda layer, x, y: layer.training and seen.add(y.dtype))
        return model, errors

    def watched(hidden, *rest):
        products = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        seen.add(products)
        return cross_entropy(hidden, *rest)

    monkeypatch.setattr(prepare, "_prepare_model", prepared)
    monkeypatch.setattr(loss, "linear_cross_entropy", watched)
    return seen


def test_what_takes_time_is_said(settings, watched):
    display, printed = watched(0.0, pace=0.001)
    finetune(settings(steps=2), display)
    lines = [line.strip() for line in printed().splitlines()]
    phases = [line.removeprefix("…  ") for line in lines if line.startswith("…") and ":" not in line]
    assert phases == [
        "reading the examples", "reading the tokenizer", "tokenizing", "reading tiny", "preparing the CPU kernels",
        "quantizing", "answering held-out prompts before training", "validating", "validating", "saving",
        "answering held-out prompts after training", "drawing the losses",
    ]  # fmt: skip
    answering = [line for line in lines if "before training: " in line]
    assert any(re.search(r"before training: \d+/32 tokens, 0:0\d left$", line) for line in answering)


@pytest.mark.parametrize(("tokens_per_s", "shown"), [(0.5, True), (1e9, False)])
def test_a_run_that_takes_long_says_so_once_after_the_first_step(settings, monkeypatch, watched, tokens_per_s, shown):
    step, served = Trainer.train_step, {"operator": "adapted_linear", "implementation": "native", "why": "C"}
    monkeypatch.setattr(Trainer, "train_step", lambda self: dataclasses.replace(step(self), tokens_per_s=tokens_per_s))
    monkeypatch.setattr(outlook.report, "implementations", lambda device: [served])
    display, printed = watched(pace=0.0)
    finetune(settings(steps=20), display)
    lines = [line.strip() for line in printed().splitlines()]
    notes = [line for line in lines if line.startswith("note")]
    assert len(notes) == shown
    if shown:
        assert re.match(r"note  about \d+\S* (minutes|hours) for the 19 steps left; shorter with fewer --st", notes[0])
        before, after = lines[lines.index(notes[0]) - 1], lines[lines.index(notes[0]) + 1]
        assert before.startswith("step  1/20")
        assert after.startswith("step  2/20")


def test_nothing_is_said_about_a_run_that_ends(settings, monkeypatch, tmp_path, watched):
    """After its only step, or after Ctrl-C."""
    monkeypatch.setattr(module, "LONG", -1.0)
    for steps, at_step in ((1, 2), (50, 1)):
        press_ctrl_c(monkeypatch, at_step)
        display, printed = watched()
        finetune(settings(out=tmp_path / str(steps), steps=steps), display)
        assert "note" not in printed()


def test_the_same_seed_gives_the_same_run(settings, silent, results, tmp_path):
    paths = [tmp_path / name for name in ("first", "second", "other")]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        torch.rand(seed)  # whatever happened before in the process
        finetune(settings(out=path, seed=seed, lora_dropout=0.1), silent)
    first, second, other = map(results, paths)
    assert first == second
    assert all(one["loss"] != two["loss"] for one, two in zip(first[1:], other[1:], strict=True))
    weights = [(path / "adapter" / "adapter_model.safetensors").read_bytes() for path in paths]
    assert weights[0] == weights[1] != weights[2]


def test_checkpointing_computes_the_same_twice(settings, silent, results, tmp_path, monkeypatch):
    forward, calls, kept = LoRALinear.forward, [], []

    def noted(self, x):
        if self.training:
            calls.append(torch._C._current_graph_task_id() >= 0)  # what the dense cache takes for computing again
        return forward(self, x)

    monkeypatch.setattr(LoRALinear, "forward", noted)
    monkeypatch.setattr(dense_cache, "while_recomputing", lambda device: kept.append(device) or nullcontext())
    plain = finetune(settings(out=tmp_path / "plain", lora_dropout=0.1), silent)
    usual = len(calls)
    assert not any(calls)
    calls.clear()
    checkpointed = finetune(settings(out=tmp_path / "less", lora_dropout=0.1, checkpointing=True), silent)
    assert (len(calls), sum(calls)) == (2 * usual, usual)
    assert kept == [run_device()]
    assert results(checkpointed.path) == results(plain.path)


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_a_run_goes_on_from_an_adapter(settings, silent, metrics_of, tmp_path, method):
    first = finetune(settings(out=tmp_path / "first", method=method, r=4, steps=20, lr=1e-2), silent)
    again = settings(out=tmp_path / "second", method=method, adapter=first.path / "adapter", steps=2)
    second = finetune(again, silent)
    assert second.val_before == first.val_after
    assert metrics_of(second.path)[1]["loss"] < 0.7 * first.val_before
    assert json.loads((second.path / "adapter" / "adapter_config.json").read_text())["r"] == 4


def test_the_config_says_what_trained(settings, silent, tmp_path, watched):
    first = finetune(settings(out=tmp_path / "first", r=4, lora_alpha=12.0, lora_dropout=0.125, steps=1), silent)
    again = settings(out=tmp_path / "second", adapter=first.path / "adapter", steps=1)
    saved, (display, printed) = first.path / "adapter" / "adapter_config.json", watched()
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"base_model_name_or_path": "another/model"}))
    for path in (first.path, finetune(again, display).path):
        config = config_of(path)
        assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 12.0, 0.125)
    assert config["adapter"] == str(first.path / "adapter")
    assert f"     note  {first.path / 'adapter'} says that it is for another/model, and this is " in printed()


@pytest.mark.parametrize("wrong", ["model", "adapter", "out", "permission"])
def test_wrong_paths_are_refused_before_anything_is_read(settings, silent, refusal, monkeypatch, tmp_path, wrong):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(prepare, "read_jsonl", lambda *values: pytest.fail("the data was read"))
    path = tmp_path / "none"
    expected = {
        "model": f"{path} does not exist",
        "adapter": f"{path}/adapter_config.json does not exist",
        "out": f"{tmp_path}/file/run cannot be written: {tmp_path}/file is not a directory",
        "permission": f"{path} cannot be written: no permission to write in {tmp_path}",
    }[wrong]
    if wrong == "permission":
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # permissions do not stop root
    option = {"out": tmp_path / "file" / "run", "permission": path}.get(wrong)
    message = refusal(finetune, settings(**({"out": option} if option else {wrong: path})), silent)
    assert message == expected or (wrong in ("model", "adapter") and message.startswith(expected))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_a_disk_that_fills_up_is_one_line(settings, silent, refusal, full_disk, monkeypatch, method):
    """What was saved before stays: tests of RunDirectory.save."""
    saved, save = [], RunDirectory.save

    def save_once(run, *values):
        with full_disk(3_000) if saved else nullcontext():
            save(run, *values)
        saved.append(run.trained)

    monkeypatch.setattr(RunDirectory, "save", save_once)
    chosen = settings(method=method)
    message = refusal(finetune, chosen, silent)
    assert message.startswith(f"{chosen.out} cannot be written: ")
    assert "File too large" in message
    assert {file.name for file in chosen.out.iterdir()} == {
        "run.yaml", "config.json", "metrics.jsonl", saved[0].name, "checkpoints"
    }  # fmt: skip


def test_a_full_disk_under_the_metrics_is_one_line(settings, silent, refusal, full_disk, monkeypatch):
    train_step = Trainer.train_step
    chosen = settings(steps=50, eval_every=50)

    def step(trainer):
        limit.enter_context(full_disk(300))
        return train_step(trainer)

    monkeypatch.setattr(Trainer, "train_step", step)
    with ExitStack() as limit:
        assert refusal(finetune, chosen, silent) == f"{chosen.out} cannot be written: File too large"


def test_full_fine_tuning_leaves_a_model_that_can_be_tuned_on(settings, silent, tmp_path):
    first = finetune(settings(method="full", steps=10, lr=1e-2), silent)
    model = AutoModelForCausalLM.from_pretrained(first.path / "model")
    start = load_file(settings(out=tmp_path / "x").model / "model.safetensors")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(not torch.equal(parameter, start[name]) for name, parameter in model.named_parameters())
    second = finetune(settings(out=tmp_path / "on", method="full", model=first.path / "model", steps=1), silent)
    assert second.val_before == first.val_after


def press_ctrl_c(monkeypatch, at_step: int) -> None:
    """Once, while a step is computed."""
    train_step = Trainer.train_step

    def step(self):
        if self.step + 1 == at_step:
            signal.raise_signal(signal.SIGINT)
        return train_step(self)

    monkeypatch.setattr(Trainer, "train_step", step)


def test_ctrl_c_ends_the_run_after_the_step(settings, silent, metrics_of, monkeypatch):
    press_ctrl_c(monkeypatch, at_step=3)  # where a validation is due
    result = finetune(settings(steps=50), silent)
    assert (result.steps, result.interrupted, result.val_after) == (3, True, None)
    assert [line["step"] for line in metrics_of(result.path)] == [0, 1, 2, 3]
    assert config_of(result.path)["result"]["interrupted"] is True
    samples = (result.path / "samples.md").read_text()
    assert [samples.count(f"**{name}**") for name in ("before", "after", "reference")] == [3, 0, 3]
    assert (result.path / "loss.png").stat().st_size > 1000
    weights = load_file(result.path / "adapter" / "adapter_model.safetensors")
    assert all(tensor.count_nonzero() for tensor in weights.values())


def test_ctrl_c_in_the_last_step_changes_nothing(settings, silent, results, tmp_path, monkeypatch):
    expected = finetune(settings(out=tmp_path / "expected"), silent)
    press_ctrl_c(monkeypatch, at_step=6)
    result = finetune(settings(), silent)
    assert not result.interrupted
    assert results(result.path) == results(expected.path)
    assert result.val_after == expected.val_after


def test_what_is_known_is_shown(settings, model_dir, tmp_path, watched):
    display, printed = watched()
    path = finetune(settings(model=shutil.copytree(model_dir, tmp_path / "my-model-v1.5"), steps=2), display).path
    facts = dict(line.strip().split("  ", 1) for line in printed().splitlines() if " step " not in line)
    assert facts["model"] == "my-model-v1.5, 95.0 k parameters"
    assert (path / "samples.md").read_text().startswith("# my-model-v1.5, qlora, 2 steps\n")
    assert facts["data"].endswith("colours.jsonl: 16 examples + 4 held out")
    assert facts["quantized"].startswith("nf4, 14 linear layers, 61.4 k weights at 4.1")
    assert facts["adapters"].startswith("r = 16, alpha = 32, 14 layers: 29.7 k trainable parameters")
    model = config_of(path)["model"]
    assert facts["try it"].strip() == f'qloralab generate --model {model} --adapter {path / "adapter"} --prompt "…"'


def test_small_data_is_split_and_described(settings, tmp_path, watched):
    """A tenth is held out; what was cut, is there twice or is not used is said."""
    records = [{"text": f"Number {i}. " + "." * 60 * (i == 3), "id": i} for i in range(28)]
    data = _write(tmp_path / "data.jsonl", [*records, *records[4:6]])
    display, printed = watched()
    path = finetune(settings(data=str(data), steps=1, held_out=None, too_long="cut", max_length=40), display).path
    expected = "27 examples + 3 held out; 1 cut to 40 tokens; 2 duplicates; fields that are not used: id\n"
    assert f"     data  {data}: {expected}" in printed()
    assert config_of(path)["held_out"] == 3


def test_examples_beyond_what_the_model_was_made_for_are_counted(settings, write_model, tmp_path, watched):
    model = write_model("short", max_position_embeddings=40)
    data = _write(tmp_path / "data.jsonl", [{"text": "x" * (36 + i)} for i in range(10)])  # and an end
    display, printed = watched()
    finetune(settings(model=model, data=str(data), steps=1), display)
    assert "     note  6 examples are longer than the 40 tokens the model was made for\n" in printed()


@pytest.fixture(scope="session")
def learned_positions(tmp_path_factory, byte_tokenizer) -> Path:
    """A model with a table of 50 positions, not a multiple of 16; its tokenizer pads with a token it has no row for."""
    path = tmp_path_factory.mktemp("models") / "gpt-neo"
    config = GPTNeoConfig(
        vocab_size=258, hidden_size=32, num_layers=2, attention_types=[[["global"], 2]], num_heads=2,
        max_position_embeddings=50, eos_token_id=257, bos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer = byte_tokenizer(None)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(path)
    return path


def test_nothing_is_wrong_with_examples_as_long_as_the_table_of_positions(
    settings, silent, learned_positions, tmp_path
):
    """Padding to 16, the held-out prompt and 32 tokens would be beyond it, and the tokenizer's padding has no row."""
    data = _write(tmp_path / "data.jsonl", [{"text": "x" * (49 - i % 2)} for i in range(12)])
    chosen = settings(model=learned_positions, data=str(data), steps=2, method="lora")
    assert finetune(chosen, silent).steps == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x" * 50, ": 51 tokens, and the limit is 50; 12 of 12 examples are too long. The model has 50 positions"),
        ("a <|pad|>", ": token 258 ('<|pad|>') of the tokenizer is beyond the 258 rows of the model's embedding"),
    ],
    ids=["position", "token"],
)
def test_what_the_model_has_no_room_for_is_said_before_it_is_read(
    settings, silent, refusal, learned_positions, tmp_path, monkeypatch, text, expected
):
    monkeypatch.setattr(prepare, "load_model", lambda *values: pytest.fail("the model was read"))
    data = _write(tmp_path / "data.jsonl", [{"text": text}] * 12)
    message = refusal(finetune, settings(model=learned_positions, data=str(data)), silent)
    assert message.startswith(f"{data}:1{expected}")


def test_long_functions_of_the_standard_library_are_left_out(settings, monkeypatch, watched):
    long = [Example.from_instruction("a" * (90 * i), "An answer.", f"module.py:{i}") for i in range(8)]
    monkeypatch.setattr(prepare, "stdlib_examples", lambda: long)
    display, printed = watched()
    finetune(settings(data="stdlib", steps=1, held_out=1), display)
    assert "standard library: 2 examples + 1 held out; 5 left out as too long" in printed()


def test_a_directory_that_became_a_file_during_the_run(settings, silent, refusal, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(module, "check_writable", lambda out, at: None)
    out = tmp_path / "file" / "run"
    assert refusal(finetune, settings(out=out), silent) == f"{out} cannot be written: Not a directory"


def test_the_prompt_of_a_conversation_is_all_before_its_last_answer(model_dir):
    tokenizer = load_tokenizer(model_dir)
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    (example,) = encode_all([Example("chat.jsonl:1", tuple(Message(*turn) for turn in turns))], tokenizer, 1000)
    prompt, answer = prompt_and_answer(example)
    before = "<|start|>user\na<|end|>\n<|start|>assistant\nb<|end|>\n<|start|>user\nc<|end|>\n<|start|>assistant\n"
    assert tokenizer.decode(prompt) == before
    assert tokenizer.decode(answer) == "d<|end|>"


@pytest.mark.parametrize(("length", "cut"), [(2, 1), (3, 2), (16, 15), (17, 16), (40, 16)])
def test_a_text_is_cut_after_16_tokens(length, cut):
    ids = list(range(100, 100 + length))
    assert prompt_and_answer(Encoded(ids, ids, "text.jsonl:1")) == (ids[:cut], ids[cut:])


def test_an_answer_that_begins_right_after_the_first_token():
    assert prompt_and_answer(Encoded([7, 8, 9], [NO_LABEL, 8, NO_LABEL], "x")) == ([7], [8])


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_an_unexpected_error_saves_what_was_trained(settings, silent, metrics_of, monkeypatch, method):
    """Just as Ctrl-C, and then it comes out."""
    train_step = Trainer.train_step

    def step(self):
        if self.step == 2:
            raise KeyError("nobody expects it")
        return train_step(self)

    chosen = settings(method=method, steps=50)
    monkeypatch.setattr(Trainer, "train_step", step)
    with pytest.raises(KeyError, match="nobody expects it"):
        finetune(chosen, silent)
    config = config_of(chosen.out)
    assert config["notes"] == ["unexpected KeyError: 'nobody expects it'"]
    assert [config["result"][name] for name in ("steps", "interrupted", "val_after")] == [2, True, None]
    assert [line["step"] for line in metrics_of(chosen.out)] == [0, 1, 2]
    (weights,) = (chosen.out / {"full": "model"}.get(method, "adapter")).glob("*.safetensors")
    assert all(tensor.count_nonzero() for tensor in load_file(weights).values())
    assert (chosen.out / "samples.md").is_file()


def test_a_disk_that_is_full_then_hides_no_error(settings, silent, monkeypatch):
    def fail(*values):
        raise OSError(28, "No space left on device") if len(values) == 3 else KeyError("first")

    monkeypatch.setattr(Trainer, "train_step", fail)
    monkeypatch.setattr(RunDirectory, "save", fail)
    with pytest.raises(KeyError, match="first"):
        finetune(settings(), silent)


@pytest.mark.parametrize("broken", ["generate", "plot_loss", "write_samples"])
def test_a_report_that_cannot_be_made_is_a_note(settings, monkeypatch, watched, broken):
    def fail(*values):
        raise IndexError("out of\nrange")

    monkeypatch.setattr(report, broken, fail)
    display, printed = watched()
    result = finetune(settings(steps=2), display)
    missing = {
        "generate": ["answers before training", "answers after training"],
        "plot_loss": ["loss.png"],
        "write_samples": ["samples.md"],
    }[broken]
    notes = [f"no {what}: out of range" for what in missing]
    assert config_of(result.path)["notes"] == notes
    lines = printed().splitlines()
    assert [line.strip() for line in lines if "  note  " in line] == [f"note  {n}" for n in notes]
    saved = next(line for line in lines if line.startswith("    saved"))
    assert [name for name in ("loss.png", "samples.md") if name not in saved] == [n for n in missing if "." in n]
    samples = result.path / "samples.md"
    assert ("**before**" in samples.read_text() if samples.exists() else False) == (broken == "plot_loss")


def test_a_display_in_ascii_that_then_fails(settings, model_dir, tmp_path, capsys):
    """And a name that matplotlib would take for a formula."""

    class Disk(io.BytesIO):
        def write(self, data) -> int:
            if b"train" in data:
                raise OSError(28, "No space left on device")
            return super().write(data)

    model = tmp_path / "a$x_{$ 模型"
    model.symlink_to(model_dir)
    disk = Disk()
    display = Display(Console(file=io.TextIOWrapper(disk, "ascii", write_through=True)), patience=60)
    result = finetune(settings(model=model, steps=2), display)
    assert rb"    model  a$x_{$ \u6a21\u578b, 95.0 k parameters" in disk.getvalue()
    assert config_of(result.path)["notes"] == ["the display could not be written: No space left on device"]
    told = "qloralab: the output cannot be written: No space left on device; going on without it\n"
    assert capsys.readouterr() == ("", told)
    assert (result.path / "samples.md").read_text().startswith("# a$x_{$ 模型, qlora, 2 steps\n")
    assert (result.path / "loss.png").stat().st_size > 1000


def test_all_of_it_works_in_a_thread(settings, silent, model_dir, tmp_path):
    """As in a web server: only the main thread is told of signals."""
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(finetune, settings(steps=2), silent).result()
        packed = pool.submit(quantize_model, model_dir, tmp_path / "4bit", None, silent).result()
    assert (result.steps, result.interrupted, packed.layers) == (2, False, 14)
