"""That adapters are put where they are asked for, that only they train, and that nothing else changes."""

from __future__ import annotations

import copy
from typing import Any, assert_type

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from qloralab.lora import inject
from qloralab.lora.config import LoraConfig
from qloralab.lora.inject import adapters, inject_, trainable, untrained, wrap_
from qloralab.nf4.model import left_out, linear_names, quantize_

from .models import IDS, LLAMA_LINEAR, adapted, llama

CONFIG = LoraConfig(4, 8)
quantized_or_not = pytest.mark.parametrize("quantized", [False, True], ids=["dense", "quantized"])


def test_the_head_of_a_classifier_is_dense_and_frozen_by_name(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(inject.LOGGER, "warning", lambda text, *names: said.append(text % names))
    config = llama().config
    config.num_labels, config.pad_token_id = 3, 0
    model = inject_(quantize_(LlamaForSequenceClassification(config)), CONFIG)
    assert linear_names(model) == LLAMA_LINEAR
    assert left_out(model)["score"] == "the output head"
    assert type(model.score) is nn.Linear
    assert said == ["score is frozen like the rest; to train it, set its requires_grad and save it yourself"]
    inject_(llama(), CONFIG)
    assert len(said) == 1


def test_an_adapter_from_a_file_is_not_put_where_the_weight_is_read():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.proj.weight.T

    model = nn.Sequential(Reader())
    with pytest.raises(ValueError, match=r"^0\.proj cannot have an adapter: .*Reader\.forward reads its weight"):
        wrap_(model, ["0.proj"], CONFIG)
    assert trainable(model) == list(model.parameters())


def test_a_transformer_layer_evaluates_as_it_trains():
    """Its eval mode reads the weights of linear1 and linear2, and passed their adapters by."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model: Any = nn.ModuleDict({"up": nn.Linear(16, 16), "encoder": layer})
    inject_(quantize_(model, compute_dtype=torch.float32), CONFIG)
    assert list(adapters(model)) == ["up"]
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        train, evaluated = (layer.train(mode)(x) for mode in (True, False))
    assert torch.allclose(train, evaluated, atol=1e-5)


@quantized_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_follows_may_change_the_output_in_place(dtype, quantized):
    """As nn.ReLU(inplace=True), or Llama 4, which adds its experts to the shared one's output."""

    def gradients(model: Any, inplace: bool) -> list[Tensor]:
        x = torch.linspace(-1, 1, 2 * 3 * 64, dtype=dtype).view(2, 3, 64).requires_grad_()
        y = model[0](x)
        y = y.mul_(2).relu_() if inplace else (y * 2).relu()
        model[1](y).square().sum().backward()
        return [x.grad, *(p.grad for p in trainable(model))]  # pyright: ignore[reportReturnType]

    made: Any = nn.Sequential(nn.Linear(64, 64, dtype=dtype), nn.Linear(64, 8, dtype=dtype))
    model = adapted(quantize_(made, compute_dtype=dtype) if quantized else made)
    for a, b in zip(gradients(copy.deepcopy(model), True), gradients(model, False), strict=True):
        assert a.any()
        assert torch.equal(a, b)


def test_adapters_that_never_had_a_gradient_are_named():
    model: Any = inject_(nn.ModuleDict({"used": nn.Linear(16, 16), "idle": nn.Linear(16, 16)}), CONFIG)
    assert untrained(model) == ["used", "idle"]
    optimizer = torch.optim.AdamW(trainable(model))
    model["used"](torch.randn(3, 16)).sum().backward()
    optimizer.step()
    assert untrained(model) == ["idle"]


def test_a_type_checker_keeps_the_type_of_the_model():
    model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=8))
    assert_type(quantize_(model), LlamaForCausalLM)
    assert_type(inject_(model, CONFIG), LlamaForCausalLM)


@quantized_or_not
def test_only_adapters_train(quantized):
    model = quantize_(llama()) if quantized else llama()
    before = model(input_ids=IDS).logits
    assert inject_(model, CONFIG) is model
    assert torch.equal(model(input_ids=IDS).logits, before)
    names = [name for name, q in model.named_parameters() if q.requires_grad]
    assert names == [f"{name}.{which}" for name in LLAMA_LINEAR for which in ("lora_A", "lora_B")]
    assert [id(q) for q in trainable(model)] == [id(q) for q in model.parameters() if q.requires_grad]
    frozen = {name: q.clone() for name, q in model.named_parameters() if not q.requires_grad}
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    for _ in range(2):  # A moves when B is no longer zero
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert all(q.grad is not None and q.grad.any() and q.any() for q in trainable(model))
    assert all(torch.equal(q, frozen[name]) for name, q in model.named_parameters() if name in frozen)


@quantized_or_not
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_mode_of_the_model_is_kept(training, quantized):
    model = llama().train(training)
    inject_(quantize_(model) if quantized else model, LoraConfig(4, 8, lora_dropout=0.5))
    assert {module.training for module in model.modules()} == {training}


def test_targets_choose():
    model = inject_(llama(), LoraConfig(4, 8, target_modules=["q_proj", "1.mlp.up_proj"]))
    assert list(adapters(model)) == [n for n in LLAMA_LINEAR if n.endswith(("q_proj", "1.mlp.up_proj"))]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"], ["embed_tokens"], "nope"], ids=str)
def test_a_target_that_is_no_linear_layer(targets, tied):
    with pytest.raises(ValueError, match="no linear layer matches"):
        inject_(llama(tied), LoraConfig(4, 8, target_modules=targets))


def test_nothing_is_changed_below_an_adapter():
    model = inject_(llama(), CONFIG)
    before = {name: id(q) for name, q in model.named_parameters()}
    with pytest.raises(ValueError, match="has adapters already; inject them once"):
        inject_(model, CONFIG)
    with pytest.raises(ValueError, match="has adapters already; quantize it before"):
        quantize_(model)
    assert {name: id(q) for name, q in model.named_parameters()} == before
