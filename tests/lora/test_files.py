"""Adapter files, to PEFT and back, and every file that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qloralab.lora import files
from qloralab.lora.config import LoraConfig
from qloralab.lora.files import CONFIG_FILE, WEIGHTS_FILE, load_adapter_, save_adapter
from qloralab.lora.inject import adapters, inject_, linear_names, quantize_

IDS = torch.arange(24).view(2, 12)
# Largest difference of two logits of about 1: float32 sums, in another order, through two layers.
SAME_LOGITS = 2e-6
UP = "base_model.model.model.layers.1.mlp.up_proj"


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.15,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def adapted(model: nn.Module | None = None, **fields: Any) -> Any:
    """A model whose adapters do something."""
    model = inject_(model or llama(), LoraConfig(**{"r": 4, "lora_alpha": 8, **fields}))
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.normal_(std=0.1)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    assert (logits(found) - logits(expected)).abs().max() < SAME_LOGITS


@pytest.fixture
def saved(tmp_path) -> Path:
    save_adapter(adapted(), tmp_path)
    return tmp_path


CONFIGS = [
    {},
    {"use_rslora": True},
    {"r": 3, "lora_alpha": 0.5, "lora_dropout": 0.1},
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": r"model\.layers\.1\.mlp\..*"},
]


@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_peft_opens_ours(fields, tmp_path):
    model = adapted(**fields)
    save_adapter(model, tmp_path / "new" / "adapter")
    theirs: Any = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "new" / "adapter"))
    assert_same(theirs, model)
    assert (logits(theirs) - logits(llama())).abs().max() > 0.1
    assert theirs.peft_config["default"].lora_dropout == fields.get("lora_dropout", 0)
    found = {name.removeprefix("base_model.model.") for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert found == set(adapters(model))


@pytest.mark.parametrize("fields", CONFIGS[:4], ids=str)
def test_we_open_those_of_peft(fields, tmp_path):
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **fields})
    config.task_type, config.init_lora_weights = "CAUSAL_LM", False
    theirs = peft.get_peft_model(llama(), config)
    theirs.save_pretrained(str(tmp_path))
    model = llama()
    assert load_adapter_(model, tmp_path) is model
    assert_same(model, theirs)
    assert (logits(model) - logits(llama())).abs().max() > 0.1
    assert next(iter(adapters(model).values())).config.lora_dropout == fields.get("lora_dropout", 0)
    assert [n for n, q in model.named_parameters() if q.requires_grad and "lora_" not in n] == []


def test_an_adapter_of_a_quantized_model_opens_on_its_dequantized_weights(tmp_path):
    model: Any = quantize_(llama(), compute_dtype=torch.float32)
    dense = llama()
    with torch.no_grad():
        for name in linear_names(dense):
            dense.get_submodule(name).weight.copy_(model.get_submodule(name).weight.dequantize())
    save_adapter(adapted(model), tmp_path)
    assert_same(peft.PeftModel.from_pretrained(dense, str(tmp_path)), model)
    assert_same(load_adapter_(quantize_(llama(), compute_dtype=torch.float32), tmp_path), model)


def test_what_is_written(saved):
    layers = adapters(adapted())
    tensors = load_file(saved / WEIGHTS_FILE)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in tensors.items()} == {
        f"base_model.model.{name}.{which}.weight": (torch.float32, tuple(getattr(layer, which).shape))
        for name, layer in layers.items()
        for which in ("lora_A", "lora_B")
    }
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    fields = json.loads((saved / CONFIG_FILE).read_text())
    assert fields["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (fields["r"], fields["lora_alpha"], fields["peft_type"]) == (4, 8, "LORA")


def test_saving_does_not_change_the_bits(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path)
    again = load_adapter_(llama(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    save_adapter(again, tmp_path / "2")
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        assert (tmp_path / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_ambiguous_suffixes_become_paths(tmp_path):
    model = adapted(target_modules=["1.mlp.up_proj", "q_proj"])
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["target_modules"] == sorted(adapters(model))
    assert_same(peft.PeftModel.from_pretrained(llama(), str(tmp_path)), model)


def test_a_path_that_is_the_end_of_another_is_no_wider_to_peft(tmp_path):
    """PEFT takes "up" of a list for "block.up" too."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"up": nn.Linear(8, 8), "block": nn.ModuleDict({"up": nn.Linear(8, 8)})})

    save_adapter(adapted(model(), target_modules="up", task_type=None), tmp_path)
    theirs = peft.PeftModel.from_pretrained(model(), str(tmp_path))  # pyright: ignore[reportArgumentType]
    assert [name for name, m in theirs.named_modules() if hasattr(m, "lora_A")] == ["base_model.model.up"]


def test_load_into_a_model_with_adapters(saved):
    model = inject_(llama(), LoraConfig(4, 8, lora_dropout=0.5))
    before = [id(parameter) for parameter in model.parameters()]
    load_adapter_(model, saved)
    assert_same(model, load_adapter_(llama(), saved))
    assert [id(parameter) for parameter in model.parameters()] == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 2}, r"has r = 4, scaling = 2; .* has other ones"),
        ({"lora_alpha": 16}, r"has r = 4, scaling = 2; .* has other ones"),
        ({"target_modules": ["q_proj"]}, "adapts 14 layers, the model 2"),
    ],
    ids=["rank", "scaling", "layers"],
)
def test_load_into_other_adapters(saved, fields, message):
    model = adapted(**fields)
    before = logits(model)
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter_(model, saved)
    assert str(saved) in str(caught.value)
    assert torch.equal(logits(model), before)


def test_a_model_without_adapters_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="has no adapters"):
        save_adapter(llama(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("step", ["weights", "config", "rename"])
def test_an_interrupted_save_leaves_the_earlier_files(saved, monkeypatch, step):
    before = {name: (saved / name).read_bytes() for name in (WEIGHTS_FILE, CONFIG_FILE)}

    def fail(target, *args, **kwargs):
        Path(target).write_bytes(b"half") if step != "rename" else None
        raise KeyboardInterrupt

    def save_half(tensors, path, metadata):
        fail(path)

    model = adapted(r=2)
    place = {"weights": (files, "save_file", save_half), "config": (Path, "write_text", fail)}
    with monkeypatch.context() as patch:
        patch.setattr(*place.get(step, (files.os, "replace", fail)))
        with pytest.raises(KeyboardInterrupt):
            save_adapter(model, saved)
    assert {name: (saved / name).read_bytes() for name in before} == before
    assert_same(load_adapter_(llama(), saved), adapted())
    save_adapter(model, saved)
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
