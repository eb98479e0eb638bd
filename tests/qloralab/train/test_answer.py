"""``qloralab generate``: the prompt in the model's own format, the weights as they were in training."""

from __future__ import annotations

import pytest
import torch

from qloralab import LoraConfig, inject_, load_adapter_, quantize_, save_adapter
from qloralab.checkpoint import opened
from qloralab.checkpoint.limits import Limits
from qloralab.checkpoint.models import load_model, load_tokenizer
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


def expected(model_dir, prompt: str, adapter=None, quantized=True) -> str:
    tokenizer, dtype = load_tokenizer(model_dir), compute_dtype().dtype
    if quantized:
        model = quantize_(load_model(model_dir, torch.bfloat16), compute_dtype=dtype).to(dtype)
    else:
        model = load_model(model_dir, dtype)
    if adapter:
        load_adapter_(model, adapter)
    return generate(model, tokenizer, [tokenizer(prompt).input_ids], 40)[0].strip()


def test_the_answer(model_dir, adapter):
    """Each choice matters."""
    seen = set()
    for chosen in (None, adapter):
        for quantized in (True, False):
            found = answer(model_dir, chosen, "Colour?", 40, quantized)
            assert found == expected(model_dir, WRITTEN, chosen, quantized)
            seen.add(found)
    assert len(seen) == 4


@pytest.mark.parametrize("quantized", [True, False], ids=["4 bits", "dense"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_the_dtype_is_the_one_asked_for_and_said_when_it_is_slow(
    model_dir, machine, dtype, quantized, monkeypatch, watched
):
    seen, (display, printed) = set(), watched()
    monkeypatch.setattr(module, "generate", lambda model, *rest: seen.update(dtypes(model)) or ["an answer"])
    answer(model_dir, None, "Colour?", 8, quantized, dtype, display)
    assert seen == {machine if dtype == "auto" else getattr(torch, dtype)}
    slow = "    dtype  bfloat16: asked for, but slow; the processor is made up\n"
    assert printed() == (slow if (dtype, machine) == ("bfloat16", torch.float32) else "")


def dtypes(model) -> set[torch.dtype]:
    """Of the parameters and of the products with 4-bit weights."""
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    return {p.dtype for p in model.parameters()} | {layer.compute_dtype for layer in layers}


def test_what_takes_time_is_said(model_dir, capsys, watched):
    display, printed = watched(0.0)
    answer(model_dir, None, "Colour?", 8, True, "auto", display)
    lines = [line.strip() for line in printed().splitlines()]
    said = ["reading the tokenizer", "reading tiny", "preparing the CPU kernels", "quantizing", "answering"]
    assert [line.removeprefix("…  ") for line in lines if ":" not in line] == said
    assert capsys.readouterr().out == ""


def test_without_chat_template_the_prompt_is_that_of_training(model_without_template):
    written = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nColour?\n\n### Response:\n"
    )
    found = answer(model_without_template, None, "Colour?", 40, True)
    assert found == expected(model_without_template, written)


def test_a_prompt_beyond_the_positions_is_told_before_the_model_is_read(model_dir, refusal, monkeypatch):
    monkeypatch.setattr(opened, "load_model", lambda *values: pytest.fail("the model was read"))
    monkeypatch.setattr(module.Limits, "of_directory", lambda path: Limits(260, 50, 50))
    message = refusal(answer, model_dir, None, "Colour?" * 8, 8, True)
    assert message == "the prompt: 75 tokens, and the model has 50 positions"
