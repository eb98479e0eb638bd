"""That a merged model computes what the adapted one did, in one product, and that every bit comes back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import qloralab as ql
from qloralab.lora.config import LoraConfig
from qloralab.lora.inject import adapters, inject_, load_adapter_, trainable
from qloralab.lora.layer import LoRALinear
from qloralab.lora.merge import MergedLinear, merge_, unmerge_
from qloralab.nf4.linear import QuantizedLinear
from qloralab.nf4.model import linear_names, quantize_

from .models import LLAMA_LINEAR, adapted, llama, logits

quantized_or_not = pytest.mark.parametrize("quantized", [False, True], ids=["dense", "quantized"])


def base(quantized: bool, dtype: torch.dtype = torch.float32) -> Any:
    model = llama().to(dtype)
    return quantize_(model, compute_dtype=dtype) if quantized else model


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@quantized_or_not
@pytest.mark.parametrize("use_rslora", [False, True])
def test_logits_are_those_of_base_and_adapter(quantized, use_rslora):
    model = adapted(base(quantized), use_rslora=use_rslora, lora_dropout=0.3)
    expected, plain = logits(model), logits(base(quantized))
    found = logits(merge_(model))
    assert (found - expected).abs().max() < 1e-4 * (expected - plain).abs().max()


@quantized_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_is_rounded_once_from_float32(quantized, dtype):
    model = adapted(base(quantized, dtype), use_rslora=True)
    layers = adapters(model)
    merge_(model)
    for name, layer in layers.items():
        merged = model.get_submodule(name)
        base_layer = layer.base_layer
        is_packed = isinstance(base_layer, QuantizedLinear)
        dense = base_layer.weight.dequantize(torch.float32) if is_packed else base_layer.weight
        exact = dense.double() + 8 / 2 * (layer.lora_B.double() @ layer.lora_A.double())  # alpha / sqrt(r)
        assert merged.weight.dtype == dtype
        half_step = torch.finfo(dtype).eps / 2 * exact.abs()
        assert ((merged.weight - exact).abs() <= half_step + 2e-7).all()  # the sum in float32


@quantized_or_not
def test_every_bit_and_every_object_comes_back(quantized):
    model = adapted(base(quantized))
    before, expected, modules = bits(model), logits(model), dict(model.named_modules())
    parameters = dict(model.named_parameters())
    packed = [m.weight for m in model.modules() if isinstance(m, QuantizedLinear)]
    merge_(model)
    assert not trainable(model)
    assert unmerge_(model) is model
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert dict(model.named_modules()) == modules
    assert all(
        m.weight is w
        for m, w in zip((m for m in model.modules() if isinstance(m, QuantizedLinear)), packed, strict=True)
    )
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(model), expected)
    assert [p.requires_grad for p in parameters.values()] == ["lora_" in name for name in parameters]


@quantized_or_not
def test_the_state_dict_is_that_of_a_dense_model(quantized, tmp_path):
    model = merge_(adapted(base(quantized)))
    assert list(model.state_dict()) == list(llama().state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in llama().named_parameters()]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again.model.layers[0].mlp.up_proj) is nn.Linear
    assert (logits(again) - logits(model)).abs().max() < 1e-5  # products by another code


def test_a_layer_that_is_still_in_4_bits_is_not_written_as_dense(tmp_path):
    model = merge_(adapted(base(True), target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="without an adapter are still in 4 bits"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the model has adapters"):
        ql.save_quantized(model, tmp_path)
    assert not list(tmp_path.iterdir())


@quantized_or_not
def test_biases_and_hooks_stay(quantized):
    model: Any = nn.Sequential(nn.Linear(32, 16))
    with torch.no_grad():
        model[0].bias.normal_()
    model = adapted(quantize_(model, compute_dtype=torch.float32) if quantized else model)
    seen: list[str] = []
    handle = model[0].register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    x, bias = torch.randn(3, 32), model[0].bias
    expected = model(x)
    assert torch.allclose(merge_(model)(x), expected, atol=1e-5)
    assert model[0].bias is bias
    unmerge_(model)(x)
    handle.remove()
    model(x)
    assert seen == ["LoRALinear", "MergedLinear", "LoRALinear"]


@quantized_or_not
def test_the_dtypes_of_a_layer_stay(quantized):
    model: Any = nn.Sequential(nn.Linear(64, 8, dtype=torch.bfloat16))
    model = adapted(quantize_(model) if quantized else model)
    dtypes = (torch.bfloat16, torch.float32) if quantized else (torch.bfloat16,)
    before = [model(torch.ones(1, 64, dtype=dtype)).dtype for dtype in dtypes]
    merge_(model)
    assert [model(torch.ones(1, 64, dtype=dtype)).dtype for dtype in dtypes] == before
    if quantized:
        with pytest.raises(TypeError, match="a floating-point tensor is needed"):
            model(torch.ones(1, 64, dtype=torch.int64))


def test_training_mode_has_no_dropout_and_lets_gradients_through():
    model = adapted(quantize_(nn.Sequential(nn.Linear(64, 8)), compute_dtype=torch.float32), lora_dropout=0.5)
    x = torch.randn(4, 64, requires_grad=True)
    expected = model.eval()(x)
    y = merge_(model.train())(x)
    assert torch.allclose(y, expected, atol=1e-5)
    y.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, model[0].weight.sum(0).expand(4, 64), atol=1e-5)
    assert model[0].training
    assert unmerge_(model.eval())[0].base_layer.training is False


def test_a_merged_layer_follows_the_mode_of_its_layer():
    for mode in (True, False):
        model = adapted(nn.Sequential(nn.Linear(64, 8))).train(mode)
        assert merge_(model)[0].training is mode
        assert unmerge_(model)[0].training is mode


def test_adapters_come_back_on_the_device_that_the_model_is_on():
    model = merge_(adapted(base(True))).to("meta")
    unmerge_(model)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_merged_layer_does_not_train():
    model = merge_(adapted(quantize_(nn.Sequential(nn.Linear(64, 8)))))
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"^0 is merged and does not train; unmerge_ the model first$"):
        model(torch.randn(1, 64))
    assert unmerge_(model)(torch.randn(1, 64)).requires_grad


def test_a_layer_at_two_paths_is_merged_once():
    layer = nn.Linear(64, 64)
    model: Any = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    model = adapted(quantize_(model, compute_dtype=torch.float32))
    was = model["a"]
    merge_(model)
    assert isinstance(model["a"], MergedLinear)
    assert model["b"][0] is model["a"]
    unmerge_(model)
    assert model["a"] is was is model["b"][0]


def test_layers_that_share_a_weight_share_it_again():
    model: Any = nn.ModuleDict({"a": nn.Linear(64, 64, bias=False), "b": nn.Linear(64, 64, bias=False)})
    model["b"].weight = model["a"].weight
    model = adapted(quantize_(model, compute_dtype=torch.float32))
    merge_(model)
    assert not torch.equal(model["a"].weight, model["b"].weight)  # each has its own adapter
    unmerge_(model)
    assert model["a"].base_layer.weight is model["b"].base_layer.weight


def test_a_copy_of_a_merged_model_unmerges_by_itself():
    model = adapted(base(True))
    expected = logits(model)
    again = copy.deepcopy(merge_(model))
    assert torch.equal(logits(unmerge_(again)), expected)
    assert not {id(p) for p in again.parameters()} & {id(p) for p in unmerge_(model).parameters()}


def test_the_model_is_adapted_all_the_same():
    model = merge_(adapted(base(True)))
    assert linear_names(model) == LLAMA_LINEAR
    for change in (quantize_, lambda model: inject_(model, LoraConfig(2, 4))):
        with pytest.raises(ValueError, match="the model has adapters already"):
            change(model)


def test_adapters_of_a_merged_model_are_not_saved_nor_loaded(tmp_path):
    model = adapted(base(True))
    ql.save_adapter(model, tmp_path / "adapter")
    merge_(model)
    with pytest.raises(ValueError, match=r"^the model is merged, so its adapters are out of sight; unmerge_ it"):
        ql.save_adapter(model, tmp_path / "other")
    with pytest.raises(ValueError, match="the model has adapters already"):
        load_adapter_(model, tmp_path / "adapter")
    assert not (tmp_path / "other").exists()
    ql.save_adapter(unmerge_(model), tmp_path / "other")
    names = ("adapter_model.safetensors", "adapter_config.json")
    assert all((tmp_path / "adapter" / n).read_bytes() == (tmp_path / "other" / n).read_bytes() for n in names)


def test_what_cannot_be_merged_is_refused_and_unchanged():
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge_(llama())
    with pytest.raises(ValueError, match=r"^the model is not merged$"):
        unmerge_(adapted())
    model = merge_(adapted())
    with pytest.raises(ValueError, match="merged already; unmerge_ it first"):
        merge_(model)
    with torch.device("meta"):
        meta = inject_(nn.Sequential(nn.Linear(64, 64)), LoraConfig(2, 4))
    with pytest.raises(ValueError, match=r"^0 is on the meta device"):
        merge_(meta)
    assert isinstance(meta[0], LoRALinear)
    sharded = adapted(nn.Sequential(nn.Linear(64, 64)))
    sharded[0].lora_A.data = torch.empty(0)  # as FSDP leaves it between two calls
    with pytest.raises(ValueError, match=r"^0: its adapter is sharded; gather it before merging$"):
        merge_(sharded)
    with pytest.raises(ValueError, match="is itself a layer with an adapter"):
        merge_(adapted(nn.Sequential(nn.Linear(64, 64)))[0])
