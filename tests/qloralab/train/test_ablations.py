"""The flags that change one thing of a run: what they do to the model, to config.json, and to the file for PEFT."""

from __future__ import annotations

import json
import math

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from qloralab.lora.inject import adapters
from qloralab.nf4.linear import QuantizedLinear
from qloralab.train.finetune import finetune
from qloralab.train.prepare import prepare


def layers(model) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def test_the_data_type_is_that_of_every_layer(settings, silent):
    prepared = prepare(settings(data_type="mxfp4", block_size=64, skip="layers.0.mlp,o_proj"), silent)
    found = layers(prepared.model)
    assert len(found) == 14 - 3 - 2
    assert {(layer.weight.codebook, layer.weight.block_size) for layer in found.values()} == {("mxfp4", 64)}
    assert not [name for name in found if "layers.0.mlp" in name or "o_proj" in name]
    assert len(adapters(prepared.model)) == 14  # what stays dense has its adapter too


def test_scales_in_float32(settings, silent):
    found = layers(prepare(settings(double_quant=False), silent).model)
    assert {layer.weight.double_quant for layer in found.values()} == {False}


def test_a_run_says_what_it_was(settings, silent, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("FIVE = [-1.0, -0.3, 0.0, 0.3, 1.0]")
    chosen = {"data_type": f"{mine}:FIVE", "block_size": 32, "double_quant": False, "skip": "o_proj"}
    path = finetune(
        settings(steps=1, target_modules="q_proj,v_proj", rslora=True, init="gaussian", r=4, **chosen), silent
    ).path
    config = json.loads((path / "config.json").read_text())
    assert config["data_type"] == f"{mine}:FIVE"
    assert config["quantization"]["name"] == "FIVE"
    assert config["quantization"]["encoding"] == "float32"
    expected = {"block_size": 32, "double_quant": False, "skip": ["o_proj"], "rslora": True, "init": "gaussian"}
    assert {name: config[name] for name in expected} == expected
    assert config["target_modules"] == ["q_proj", "v_proj"]


def test_the_defaults_are_written_out(settings, silent):
    config = json.loads((finetune(settings(steps=1), silent).path / "config.json").read_text())
    expected = {"data_type": "nf4", "block_size": 64, "double_quant": True, "skip": [], "rslora": False,
                "init": "kaiming", "target_modules": "all-linear", "seeds": None}  # fmt: skip
    assert {name: config[name] for name in expected} == expected


def test_peft_opens_it_with_its_scaling(settings, silent, model_dir):
    run = finetune(settings(method="lora", steps=2, target_modules="q_proj,down_proj", rslora=True, r=4), silent)
    file = json.loads((run.path / "adapter" / "adapter_config.json").read_text())
    assert (file["use_rslora"], file["target_modules"], file["r"]) == (True, ["down_proj", "q_proj"], 4)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), run.path / "adapter")
    theirs = {name: module for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.Linear)}
    assert len(theirs) == 4
    assert {layer.scaling["default"] for layer in theirs.values()} == {32 / math.sqrt(4)}
    from qloralab import load_adapter_

    ours = load_adapter_(AutoModelForCausalLM.from_pretrained(model_dir), run.path / "adapter")
    ids = torch.arange(20)[None]
    assert torch.allclose(ours.eval()(ids).logits, model.eval()(ids).logits, atol=1e-5)


def test_a_wrong_choice_is_refused_before_anything_is_read(settings, silent, refusal, monkeypatch):
    monkeypatch.setattr("qloralab.train.prepare.read_jsonl", None)
    for changes, message in (
        ({"data_type": "nf9"}, "there is no data type 'nf9'"),
        ({"block_size": 48}, "nf4: block_size is 48"),
        ({"data_type": "nvfp4", "double_quant": True}, "nvfp4: nvfp4 encodes its scales as e4m3"),
    ):
        assert refusal(prepare, settings(**changes), silent).startswith(message)


def test_a_name_that_is_no_layer_is_refused(settings, silent, refusal):
    assert refusal(prepare, settings(skip="nothing"), silent) == "skip: no module is called 'nothing'"
    assert refusal(prepare, settings(target_modules="q_proj,nothing"), silent).startswith(
        "target_modules: no linear layer matches 'nothing'"
    )


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_how_a_starts(settings, silent, init):
    made = adapters(prepare(settings(init=init, r=8), silent).model)
    A = torch.cat([layer.lora_A.detach().flatten() for layer in made.values() if layer.in_features == 64])
    assert all(not layer.lora_B.any() for layer in made.values())
    if init == "gaussian":
        assert A.std().item() == pytest.approx(1 / 8, rel=0.05)
        assert A.abs().max() > 1 / math.sqrt(64)
    else:
        assert A.abs().max() <= 1 / math.sqrt(64)
