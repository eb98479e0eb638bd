"""What ``qloralab memory`` counts, beside tensors that are there."""

import json

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import qloralab as ql
from qloralab.errors import UserError
from qloralab.memory.predict import Job, predict
from qloralab.memory.report import LLAMA, config_of, memory
from qloralab.nf4.data_type import data_type
from qloralab.nf4.linear import QuantizedLinear

CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=300,
)  # fmt: skip


def job(method: str = "qlora", **changes) -> Job:
    return Job(**{"method": method, "dtype": torch.float32, "data_type": data_type("nf4"), "r": 4, **changes})


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_the_weights_are_those_of_a_model_that_is_there(method):
    found = predict(CONFIG, job(method), constants=0)
    model = LlamaForCausalLM(CONFIG)
    parameters = sum(p.numel() for p in model.parameters())
    linear = sum(model.get_parameter(f"{name}.weight").nbytes for name in ql.linear_names(model))
    if method == "qlora":
        ql.quantize_(model)
    if method != "full":
        ql.inject_(model, ql.LoraConfig(r=4, lora_alpha=8))
    held = sum(p.nbytes for p in [*model.parameters(), *model.buffers()])
    packed = sum(m.weight.nbytes for m in model.modules() if isinstance(m, QuantizedLinear))
    trains = sum(p.numel() for p in ql.trainable(model))
    assert found.parameters == parameters
    assert found.trained == trains
    assert found.weights == (packed if method == "qlora" else linear)
    assert found.weights + found.dense + found.adapters == held + packed
    assert (found.gradients, found.optimizer) == (4 * trains, 8 * trains)


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_activations_are_what_autograd_saves(method):
    """On a CPU: the same hooks, around the same model, with numbers in it."""
    found = predict(CONFIG, job(method, batch_size=3, max_length=24), constants=0)
    model = LlamaForCausalLM(CONFIG).train()
    if method == "qlora":
        ql.quantize_(model, compute_dtype=torch.float32)
    if method != "full":
        ql.inject_(model, ql.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05))
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    own |= {part.untyped_storage().data_ptr() for m in model.modules() if isinstance(m, QuantizedLinear)
            for part in m.weight.operands().tensors if part is not None}  # fmt: skip
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = model.model(input_ids=torch.zeros(3, 24, dtype=torch.long), use_cache=False).last_hidden_state
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    assert kept.shape == (3, 24, 64)
    assert found.activations == pytest.approx(measured, rel=0.05)  # masks and positions differ


def test_activations_grow_with_the_batch_and_checkpointing_keeps_the_blocks_inputs():
    one, two = (predict(CONFIG, job(batch_size=size), constants=0) for size in (1, 2))
    assert two.activations == pytest.approx(2 * one.activations, rel=0.02)
    short = predict(CONFIG, job(batch_size=2, checkpointing=True), constants=0)
    assert short.activations == 3 * 2 * 256 * 64 * 4 + two.block


def test_the_optimizer_pages_and_counts_bits():
    whole = predict(CONFIG, job(), constants=0).optimizer
    assert predict(CONFIG, job(state_bits=8), constants=0).optimizer == pytest.approx(whole / 4, rel=0.02)
    assert predict(CONFIG, job(state_budget=1000), constants=0).optimizer == 1000


def test_the_peak_is_the_larger_of_two_moments():
    found = predict(CONFIG, job(), constants=5)
    held = 5 + found.weights + found.dense + found.adapters + found.optimizer
    assert found.peak == held + max(found.activations + found.working, found.gradients + found.block)


@pytest.mark.parametrize(("name", "billions"), [("llama-7b", 6.74), ("llama-65b", 65.29)])
def test_the_paper_s_models_have_their_parameters(name, billions):
    with torch.device("meta"):
        model = LlamaForCausalLM(config_of(name))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


def test_7b_in_4_bits_takes_what_the_paper_s_figure_says():
    """Figure 6: batch 1, 512 tokens, checkpointing, r = 64: 6.9 GB; here without the libraries."""
    sizes = {"r": 64, "batch_size": 1, "max_length": 512, "checkpointing": True}
    found = predict(config_of("llama-7b"), job(dtype=torch.bfloat16, **sizes), constants=0)
    assert found.peak / 1e9 == pytest.approx(6.9, rel=0.1)


def test_the_command_shows_and_writes(tmp_path, capsys):
    CONFIG.save_pretrained(tmp_path)
    out = tmp_path / "memory.json"
    console = Console(width=100)
    found = memory(str(tmp_path / "config.json"), "qlora", "nf4", "float32", out, console, r=4)
    written = json.loads(out.read_text())
    assert written["peak"] == found.peak
    assert written["job"]["data_type"]["codebook"] == "nf4"
    assert "peak" in capsys.readouterr().out


def test_no_such_model(tmp_path):
    with pytest.raises(UserError, match=rf"does not exist.*or give one of {', '.join(LLAMA)}"):
        config_of(str(tmp_path / "nothing"))
