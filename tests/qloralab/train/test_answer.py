"""``qloralab generate``: the prompt in the model's own format, the weights as they were in training."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from qloralab import LoraConfig, inject_, load_adapter_, quantize_, save_adapter
from qloralab.checkpoint.limits import Limits
from qloralab.checkpoint.models import load_model, load_tokenizer
from qloralab.display import Display
from qloralab.errors import UserError
from qloralab.lora.inject import adapters
from qloralab.nf4.linear import QuantizedLinear
from qloralab.nf4.processor import compute_dtype
from qloralab.train import generate as module
from qloralab.train.generate import answer, generate

WRITTEN = "<|start|>user\nColour?<|end|>\n<|start|>assistant\n"


@pytest.fixture(scope="module")
def adapter(model_dir, tmp_path_factory):
    """An adapter that changes what the model says."""
    torch.manual_seed(1)
    model = inject_(load_model(model_dir), LoraConfig(r=4, lora_alpha=8))
    for layer in adapters(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    path = tmp_path_factory.mktemp("adapter")
    save_adapter(model, path)
    return path


def expected(model_dir, prompt: str, adapter=None, quantized=True, dtype=None) -> str:
    tokenizer, dtype = load_tokenizer(model_dir), dtype or compute_dtype().dtype
    if quantized:
        model = quantize_(load_model(model_dir, torch.bfloat16), compute_dtype=dtype).to(dtype)
    else:
        model = load_model(model_dir, dtype)
    if adapter:
        load_adapter_(model, adapter)
    return generate(model, tokenizer, [tokenizer(prompt).input_ids], 8)[0].strip()


@pytest.mark.parametrize("with_adapter", [False, True], ids=["alone", "adapter"])
@pytest.mark.parametrize("quantized", [True, False], ids=["4 bits", "dense"])
def test_the_answer(model_dir, adapter, with_adapter, quantized):
    chosen = adapter if with_adapter else None
    found = answer(model_dir, chosen, "Colour?", 8, quantized)
    assert found == expected(model_dir, WRITTEN, chosen, quantized)


@pytest.mark.parametrize("quantized", [True, False], ids=["4 bits", "dense"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_dtype_is_the_one_asked_for_and_said_when_it_is_slow(model_dir, machine, dtype, quantized, monkeypatch):
    seen = set()
    monkeypatch.setattr(module, "generate", lambda model, *rest: seen.update(dtypes(model)) or ["an answer"])
    file = io.StringIO()
    answer(model_dir, None, "Colour?", 8, quantized, dtype, Display(Console(file=file), patience=60))
    assert seen == {getattr(torch, dtype)}
    slow = "    dtype  bfloat16: asked for, but slow; the processor is made up\n"
    assert file.getvalue() == (slow if (dtype, machine) == ("bfloat16", torch.float32) else "")


def test_by_default_the_dtype_is_that_of_the_machine(model_dir, machine, monkeypatch):
    seen = set()
    monkeypatch.setattr(module, "generate", lambda model, *rest: seen.update(dtypes(model)) or ["an answer"])
    answer(model_dir, None, "Colour?", 8, True)
    assert seen == {machine}


def dtypes(model) -> set[torch.dtype]:
    """Of the parameters and of the products with 4-bit weights."""
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    return {p.dtype for p in model.parameters()} | {layer.compute_dtype for layer in layers}


def test_what_takes_time_is_said(model_dir, capsys):
    file = io.StringIO()
    answer(model_dir, None, "Colour?", 8, True, "auto", Display(Console(file=file), patience=0.0))
    lines = [line.strip() for line in file.getvalue().splitlines()]
    said = ["reading the tokenizer", "reading tiny", "preparing the CPU kernels", "quantizing", "answering"]
    assert [line.removeprefix("…  ") for line in lines if ":" not in line] == said
    assert capsys.readouterr().out == ""


def test_each_choice_matters(model_dir, adapter):
    answers = {answer(model_dir, chosen, "Colour?", 40, bits) for chosen in (adapter, None) for bits in (True, False)}
    assert len(answers) == 4


def test_without_chat_template_the_prompt_is_that_of_training(model_without_template):
    written = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nColour?\n\n### Response:\n"
    )
    found = answer(model_without_template, None, "Colour?", 8, True)
    assert found == expected(model_without_template, written)


def test_a_prompt_beyond_the_positions_is_told_before_the_model_is_read(model_dir, refusal, monkeypatch):
    monkeypatch.setattr(module, "load_model", lambda *values: pytest.fail("the model was read"))
    monkeypatch.setattr(module.Limits, "of_directory", lambda path: Limits(260, 50, 50))
    message = refusal(answer, model_dir, None, "Colour?" * 8, 8, True)
    assert message == "the prompt: 75 tokens, and the model has 50 positions"


def test_a_wrong_adapter_is_one_line(model_dir, adapter, tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError) as caught:
            answer(model_dir, path, "Colour?", 8, True)
        assert str(path / "adapter_config.json") in str(caught.value)
        assert "\n" not in str(caught.value)
