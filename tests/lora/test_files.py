"""Adapter files, to PEFT and back, and every file that is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from qloralab.lora.config import LoraConfig
from qloralab.lora.files import CONFIG_FILE, WEIGHTS_FILE, save_adapter
from qloralab.lora.inject import adapters, inject_, load_adapter_, wrap_
from qloralab.nf4.model import linear_names, quantize_

from .models import adapted, llama, logits

# Largest difference of two logits of about 1: float32 sums, in another order, through two layers.
SAME_LOGITS = 2e-6


def adapted_by_peft(model: nn.Module) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")}


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
    assert adapted_by_peft(theirs) == set(adapters(model))


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
    assert adapted_by_peft(theirs) == {"up"}


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


@pytest.mark.parametrize("rename", range(5))
def test_an_interrupted_save_leaves_the_earlier_files_or_all_of_the_new_ones(saved, monkeypatch, rename):
    before = {name: (saved / name).read_bytes() for name in (WEIGHTS_FILE, CONFIG_FILE)}
    calls, real = iter(range(5)), os.replace

    def interrupted(*paths: Path) -> None:
        if next(calls) == rename:
            raise KeyboardInterrupt
        real(*paths)

    model = adapted(r=2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        if rename < 4:
            with pytest.raises(KeyboardInterrupt):
                save_adapter(model, saved)
        else:  # there are four: the weights under their hidden name, the config out of the way, then both
            save_adapter(model, saved)
    after = {name: (saved / name).read_bytes() for name in before}
    if rename < 3:
        assert after == before
    else:
        save_adapter(model, saved.parent / "new")
        assert after == {name: (saved.parent / "new" / name).read_bytes() for name in before}
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


KILLED = """
import os, pathlib, sys, torch
from torch import nn
from qloralab.lora.config import LoraConfig
from qloralab.lora.inject import load_adapter_
from qloralab.lora.inject import adapters, inject_
from qloralab.lora.files import save_adapter

def save(value):  # B is full of the value, and scaling is the value
    model = inject_(nn.Sequential(nn.Linear(8, 8)), LoraConfig(2, 2 * value))
    model[0].lora_B.data.fill_(value)
    save_adapter(model, sys.argv[1])

def dying(function, calls):
    def call(*arguments, **options):
        calls[0] -= 1
        if calls[0] < 0:
            os._exit(9)
        return function(*arguments, **options)
    return call

step, died = 0, True
while died:
    save(1)
    child = os.fork()
    if not child:
        calls = [step]
        for name in ("open", "fsync", "replace", "rename", "unlink"):
            setattr(os, name, dying(getattr(os, name), calls))
        save(2)
        os._exit(0)
    died = os.waitpid(child, 0)[1] != 0
    try:
        layer = adapters(load_adapter_(nn.Sequential(nn.Linear(8, 8)), sys.argv[1]))["0"]
        print(layer.lora_B[0, 0].item(), layer.config.scaling)
    except FileNotFoundError as error:
        print(error)
    step += 1
save(3)
print(*sorted(os.listdir(sys.argv[1])))
"""


def test_a_save_that_is_killed_never_leaves_the_weights_of_one_beside_the_config_of_another(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    *outcomes, files = done.stdout.splitlines()
    refused = f"{tmp_path / CONFIG_FILE} does not exist: saving it was interrupted"
    assert list(dict.fromkeys(outcomes)) == ["1.0 1.0", refused, "2.0 2.0"]
    assert files == f"{CONFIG_FILE} {WEIGHTS_FILE}"


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077], ids=oct)
def test_files_have_the_mode_that_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_adapter(adapted(), tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}


def in_wrappers(model: Any) -> Any:
    for index, layer in enumerate(model.model.layers):
        compiled: Any = torch.compile(layer)
        model.model.layers[index] = checkpoint_wrapper(compiled)
    return torch.compile(nn.DataParallel(model))


def test_wrappers_leave_no_trace_in_the_file(saved, tmp_path):
    model = in_wrappers(adapted())
    save_adapter(model, tmp_path / "wrapped")
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        assert (tmp_path / "wrapped" / name).read_bytes() == (saved / name).read_bytes()
    for other in (in_wrappers(llama()), in_wrappers(adapted())):
        loaded = adapters(load_adapter_(other, saved)).values()
        assert all(torch.equal(a.lora_B, b.lora_B) for a, b in zip(loaded, adapters(model).values(), strict=True))


def test_what_trains_beside_the_adapters_is_named(tmp_path):
    model = adapted()
    for name in ("model.norm", "model.embed_tokens", "model.layers.0.self_attn.q_proj.base_layer", "lm_head"):
        model.get_submodule(name).requires_grad_(True)
    named = (
        r"in the file: model\.embed_tokens\.weight, model\..*q_proj\.base_layer\.weight, model.norm.weight and 1 oth"
    )
    with pytest.warns(UserWarning, match=named):
        save_adapter(model, tmp_path)


def test_an_adapter_that_never_had_a_gradient_is_named_where_others_had(tmp_path):
    model = adapted()
    names = sorted(adapters(model))
    adapters(model)[names[1]].lora_B.data.zero_()
    with pytest.warns(UserWarning, match=f"these adapters never had a gradient: {names[1]}$"):
        save_adapter(model, tmp_path)
    for layer in adapters(model).values():
        layer.lora_B.data.zero_()
    save_adapter(model, tmp_path)  # none of them has: before training


def test_a_module_at_two_paths_is_named(tmp_path):
    def model() -> Any:
        torch.manual_seed(0)
        one = nn.Linear(8, 8)
        return nn.Sequential(OrderedDict(first=one, act=nn.ReLU(), second=one))

    ours = adapted(model())
    with pytest.warns(UserWarning, match=r"several paths, of which PEFT adapts the first alone: first = second$"):
        save_adapter(ours, tmp_path)
    theirs, x = peft.PeftModel.from_pretrained(model(), str(tmp_path)), torch.randn(3, 8)
    assert not torch.allclose(theirs(x), ours(x), atol=0.01)
    assert torch.equal(load_adapter_(model(), tmp_path)(x), ours(x))


SMALL = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
EXPERTS = {
    **SMALL, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4,
    "mlp_only_layers": [0],
}  # fmt: skip
T5 = {"vocab_size": 97, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4}
# By kind: the model, the task type in the file, and the layers that PEFT leaves out.
KINDS: dict[str, tuple[Callable[[], Any], str | None, set[str]]] = {
    "plain": (lambda: nn.Sequential(nn.Linear(8, 8)), None, set()),
    "causal": (llama, "CAUSAL_LM", set()),
    "classification": (lambda: AutoModelForSequenceClassification.from_config(llama().config), None, set()),
    "encoder": (lambda: AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **SMALL)), None, set()),
    "encoder and decoder": (lambda: AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **T5)), None, set()),
    "experts, whose names PEFT keeps": (
        lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2_moe", **EXPERTS)), "CAUSAL_LM", set()
    ),
    "experts, whose names PEFT takes": (
        lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **EXPERTS)), "CAUSAL_LM",
        {"gate_proj", "up_proj", "down_proj"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_peft_opens_every_kind_of_model_or_it_is_said_what_it_leaves_out(kind, tmp_path):
    make, task_type, dropped = KINDS[kind]
    model = make()
    names = [name for name in linear_names(model) if min(model.get_submodule(name).weight.shape) > 1]
    wrap_(model, names, LoraConfig(2, 2))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["task_type"] == task_type
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path))
    missing = [name for name in adapters(model) if name not in adapted_by_peft(theirs)]
    assert {name.rpartition(".")[2] for name in missing} == dropped
    told = "save_adapter: PEFT takes these names for those of experts, and leaves their adapters out: " + ", ".join(
        missing
    )
    assert [str(one.message) for one in said] == [told] * bool(missing)
