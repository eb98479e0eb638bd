"""``qloralab generate``: the prompt in the model's own format, the weights as they were in training."""

from __future__ import annotations

import pytest
import torch

from qloralab import LoraConfig, inject_, load_adapter_, quantize_, save_adapter
from qloralab.answer import answer
from qloralab.errors import UserError
from qloralab.generate import generate
from qloralab.lora.inject import adapters
from qloralab.models import load_model, load_tokenizer

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
    model, tokenizer = load_model(model_dir), load_tokenizer(model_dir)
    if quantized:
        quantize_(model)
    if adapter:
        load_adapter_(model, adapter)
    return generate(model, tokenizer, [tokenizer(prompt).input_ids], 8)[0].strip()


@pytest.mark.parametrize("with_adapter", [False, True], ids=["alone", "adapter"])
@pytest.mark.parametrize("quantized", [True, False], ids=["4 bits", "dense"])
def test_the_answer(model_dir, adapter, with_adapter, quantized):
    chosen = adapter if with_adapter else None
    found = answer(model_dir, chosen, "Colour?", 8, quantized)
    assert found == expected(model_dir, WRITTEN, chosen, quantized)


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


def test_a_wrong_adapter_is_one_line(model_dir, adapter, tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError) as caught:
            answer(model_dir, path, "Colour?", 8, True)
        assert str(path / "adapter_config.json") in str(caught.value)
        assert "\n" not in str(caught.value)
