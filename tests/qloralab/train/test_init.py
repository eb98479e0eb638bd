"""``--init loftq`` and ``pissa``: the run, and what it leaves opened elsewhere."""

from __future__ import annotations

import json

import pytest
import torch

from qloralab import load_adapter_, load_quantized
from qloralab.checkpoint.models import check_adapter_fits, load_model, load_tokenizer_and_config
from qloralab.lora.inject import adapters
from qloralab.nf4.model import quantize_
from qloralab.train.finetune import finetune, resume
from qloralab.train.prepare import prepare

IDS = torch.tensor([[5, 80, 91, 44, 200, 17, 60]])


@pytest.mark.parametrize("init", ["loftq", "pissa"])
def test_base_and_adapter_open_as_they_were_trained(settings, silent, watched, monkeypatch, init):
    given = settings(init=init, dtype="float32", r=4)
    display, printed = watched()
    finetune(given, display)
    assert f"{init}  error of the weights 0." in printed().replace("    ", "")
    assert f"--model {given.out / 'base'} --adapter {given.out / 'adapter'}" in printed()
    errors = json.loads((given.out / "config.json").read_text())["init_errors"]
    assert len(errors) == (6 if init == "loftq" else 2)
    assert errors[-1] < errors[0]

    prepared = prepare(given_again(given), silent)
    base = load_quantized(given.out / "base", torch.float32)
    for name, layer in adapters(prepared.model).items():
        ours, saved = (one.state_dict() for one in (layer.base_layer, base.get_submodule(name)))
        assert all(torch.equal(ours[key], saved[key]) for key in ours)
    load_adapter_(base, given.out / "adapter")
    load_adapter_(prepared.model, given.out / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(base(IDS).logits, prepared.model.eval()(IDS).logits)
        plain = load_adapter_(quantize_(load_model(given.model), compute_dtype=torch.float32), given.out / "adapter")
        assert (plain.float()(IDS).logits - base(IDS).logits).abs().max() > 1e-3  # without its base it is nothing


def given_again(given):
    """The settings, for a model that is prepared once more."""
    return type(given).from_given(given.given())


@pytest.mark.parametrize("init", ["loftq", "pissa"])
def test_peft_opens_both_to_the_same_logits(settings, silent, write_model, init):
    """Of layers whose inputs are whole blocks: on a CPU bitsandbytes multiplies wrongly by others."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(model := write_model("whole-blocks"))
    given = settings(model=model, init=init, dtype="float32", r=4)
    finetune(given, silent)
    theirs = AutoModelForCausalLM.from_pretrained(given.out / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, given.out / "adapter").eval()
    ours = load_adapter_(load_quantized(given.out / "base"), given.out / "adapter").eval()
    with torch.no_grad():
        expected = theirs(IDS).logits
        torch.testing.assert_close(ours(IDS).logits, expected, rtol=1e-3, atol=1e-3)


def test_the_start_is_nearer_to_the_dense_model(settings, silent):
    """Before any step: LoftQ's logits are nearer to the dense model's than those of nf4 alone."""
    dense = load_model(settings().model).float().eval()
    distance = {}
    for init in ("kaiming", "loftq"):
        model = prepare(settings(init=init, dtype="float32", r=16), silent).model.eval()
        with torch.no_grad():
            distance[init] = float((model(IDS).logits - dense(IDS).logits).norm())
    assert distance["loftq"] < 0.7 * distance["kaiming"]


def test_a_run_goes_on(settings, silent):
    given = settings(init="loftq", r=4)
    finetune(given, silent)
    before = (given.out / "base" / "model.safetensors").stat().st_mtime_ns
    assert resume(given.out, 8, silent).steps == 8
    assert (given.out / "base" / "model.safetensors").stat().st_mtime_ns == before


def test_another_model_than_the_base_is_refused(settings, silent, refusal, monkeypatch):
    given = settings(init="pissa", r=4)
    finetune(given, silent)
    config = load_tokenizer_and_config(given.model)[1]
    message = f"{given.out / 'adapter'} began with a part of the weights, and belongs to what is left: "
    assert refusal(check_adapter_fits, given.out / "adapter", config) == f"{message}--model {given.out / 'base'}"
    assert check_adapter_fits(given.out / "adapter", load_tokenizer_and_config(given.out / "base")[1]) is None


def test_what_is_refused(settings, silent, refusal, four_bits, model_dir, tmp_path):
    assert refusal(settings, method="lora", init="loftq") == (
        "--init would be ignored: it splits weights that are quantized; leave it out"
    )
    message = "--init pissa saves its base as bitsandbytes opens it, which has nf4 and fp4 only, not bof4"
    assert refusal(finetune, settings(init="pissa", data_type="bof4"), silent) == message
    packed = four_bits(model_dir, tmp_path / "packed")
    assert "--init would be ignored" in refusal(finetune, settings(init="loftq", model=packed), silent)
