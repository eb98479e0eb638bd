"""A model with layers in 4 bits as PyTorch's modules are used: files, strictness, copies, processes, hooks."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qloralab as ql
from qloralab.nf4.linear import QuantizedLinear
from qloralab.nf4.tensor import QuantizedTensor

K, H, N = 66, 48, 63
GRID = torch.linspace(-1, 1, 16)
CODEBOOKS = {"nf4": "nf4", "fp4": "fp4", "int4": "int4", "nf3": "nf3", "own": GRID}
codebooks = pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS)
double_quants = pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])


def network(codebook: Any = "nf4", double_quant: bool = True) -> Any:
    """An nn.Sequential of two layers in 4 bits, one with and one without a bias, and a norm that is not quantized."""
    first, last = nn.Linear(K, H), nn.Linear(H, N, bias=False)
    options = {"codebook": codebook, "double_quant": double_quant, "compute_dtype": torch.float32}
    block = nn.Sequential(nn.LayerNorm(H), QuantizedLinear.from_linear(last, **options))
    return nn.Sequential(QuantizedLinear.from_linear(first, **options), block)


def weights(model: nn.Module) -> dict[str, QuantizedTensor]:
    return {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


def parts(weight: QuantizedTensor) -> dict[str, Tensor]:
    named = {name: getattr(weight, name) for name in ("packed", "scales", "absmax2", "offset", "values")}
    return {name: part for name, part in named.items() if part is not None}


def pointers(model: nn.Module) -> set[int]:
    """The memory of every weight, of whichever kind."""
    tensors = [*model.parameters(), *(part for weight in weights(model).values() for part in parts(weight).values())]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """Same bits of every weight, same output."""
    for name, weight in weights(a).items():
        other = weights(b)[name]
        assert parts(weight).keys() == parts(other).keys()
        for part, tensor in parts(weight).items():
            assert tensor.dtype == parts(other)[part].dtype, f"{name}.{part}"
            assert tensor.numpy().tobytes() == parts(other)[part].numpy().tobytes(), f"{name}.{part}"
        assert (weight.shape, weight.dtype, weight.codebook, weight.block_size) == (
            other.shape,
            other.dtype,
            other.codebook,
            other.block_size,
        )
    for (name, one), two in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(one, two), name
    x = torch.randn(3, K)
    assert torch.equal(a(x), b(x))


# Files


@codebooks
@double_quants
@pytest.mark.parametrize("how", ["torch", "safetensors"])
def test_a_state_dict_goes_through_a_file_bit_for_bit(how, codebook, double_quant, tmp_path):
    model, other = network(codebook, double_quant), network(codebook, double_quant)
    file = tmp_path / "model"
    if how == "torch":
        torch.save(model.state_dict(), file)
        state = torch.load(file, weights_only=True)
    else:
        save_file(model.state_dict(), file)
        state = load_file(file)
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert_same(other, model)


@codebooks
def test_the_checkpoint_brings_its_codebook_and_options(codebook):
    model, other = network(codebook, double_quant=False), network("nf4")
    other.load_state_dict(model.state_dict())
    assert_same(other, model)


def test_a_state_dict_is_of_tensors_and_trains_nothing():
    state = network().state_dict()
    assert all(type(tensor) is Tensor for tensor in state.values())
    assert not any(tensor.requires_grad for tensor in state.values())


def test_the_prefix_is_the_path_of_the_layer():
    model = network()
    names = {"weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"}
    names |= {"weight.quant_state.bitsandbytes__nf4"}
    expected = {f"0.{name}" for name in names} | {f"1.1.{name}" for name in names}
    assert model.state_dict().keys() == {"0.bias", "1.0.weight", "1.0.bias", *expected}
    assert model[1].state_dict(prefix="up.").keys() >= {f"up.1.{name}" for name in names}


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"model": m}], ids=["module", "in-a-dict"])
def test_a_pickle_of_the_model_is_refused_with_advice(wrap):
    model = network()
    for save in (pickle.dumps, lambda thing: torch.save(thing, io.BytesIO())):
        with pytest.raises(pickle.PicklingError, match=r"state_dict\(\) of the module"):
            save(wrap(model))


# Strict and not


def test_strict_names_what_is_missing_and_what_is_too_many():
    state = network().state_dict()
    first = {name: tensor for name, tensor in state.items() if name.startswith("0.")}
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"1\.1\.weight"'):
        network().load_state_dict(first)
    with pytest.raises(RuntimeError, match=r'(?s)Unexpected key.*"0\.weights"'):
        network().load_state_dict({**state, "0.weights": torch.zeros(1)})


def test_not_strict_loads_what_there_is():
    model, other = network(), network()
    kept = other[1][1].weight
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("1.1.")}
    found = other.load_state_dict({**state, "9.weight": torch.zeros(1)}, strict=False)
    assert found.missing_keys == ["1.1.weight"]
    assert found.unexpected_keys == ["9.weight"]
    assert other[1][1].weight is kept
    other[1][1].weight = model[1][1].weight
    assert_same(other, model)


@pytest.mark.parametrize("strict", [True, False])
def test_another_shape_is_refused_strict_or_not(strict):
    model = network()
    before = model[0].weight
    state = model.state_dict()
    renamed = {name.replace("1.1.", "0.", 1): tensor for name, tensor in state.items() if name.startswith("1.1.")}
    rest = {name: tensor for name, tensor in state.items() if not name.startswith("0.weight")}
    with pytest.raises(RuntimeError, match=r"0\.weight is \[63, 48\] in the checkpoint; the layer is \[48, 66\]"):
        model.load_state_dict({**rest, **renamed}, strict=strict)
    assert model[0].weight is before


@pytest.mark.parametrize("strict", [True, False])
def test_half_a_weight_is_refused_strict_or_not(strict):
    model = network()
    before = model[0].weight
    state = network().state_dict()
    del state["0.weight.absmax"]
    with pytest.raises(RuntimeError, match=r"0\.weight\.absmax.*is missing"):
        model.load_state_dict(state, strict=strict)
    assert model[0].weight is before


def test_parts_of_two_kinds_of_weight_are_refused():
    state = network(double_quant=False).state_dict()
    state["0.weight.nested_absmax"] = network().state_dict()["0.weight.nested_absmax"]
    with pytest.raises(RuntimeError, match=r"0\.weight\.nested_absmax.*does not belong"):
        network().load_state_dict(state)
    state = {**network("nf4").state_dict(), **network("fp4").state_dict()}
    with pytest.raises(RuntimeError, match="a 4-bit weight has exactly one"):
        network().load_state_dict(state)


# Memory and devices


def test_loading_copies():
    model, other = network(), network()
    other.load_state_dict(model.state_dict())
    assert not pointers(other) & pointers(model)


def test_loading_with_assign_copies_nothing():
    model, other = network(), network()
    state = model.state_dict()
    other.load_state_dict(state, assign=True)
    for name, weight in weights(other).items():
        assert weight.packed.data_ptr() == state[f"{name}.weight"].data_ptr()
    assert_same(other, model)


@codebooks
def test_a_model_on_the_meta_device_is_filled_by_assigning(codebook):
    model, other = network(codebook), network(codebook).to("meta")
    assert all(weight.device.type == "meta" for weight in weights(other).values())
    other.load_state_dict(model.state_dict(), assign=True)
    assert all(weight.device.type == "cpu" for weight in weights(other).values())
    assert_same(other, model)


@codebooks
def test_a_model_on_the_meta_device_is_filled_after_to_empty(codebook):
    model, other = network(codebook), network(codebook).to("meta")
    other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict())
    assert_same(other, model)


@codebooks
@double_quants
@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_a_cast_of_the_model_leaves_the_bits(cast, codebook, double_quant):
    model = network(codebook, double_quant)
    before = copy.deepcopy(model)
    getattr(model, cast)()
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, cast)}
    assert model.float().state_dict().keys() == before.state_dict().keys()
    for (name, tensor), expected in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        if ".weight" in name and not name.startswith("1.0."):
            assert tensor.dtype == expected.dtype, name
            assert tensor.numpy().tobytes() == expected.numpy().tobytes(), name


@codebooks
def test_a_deep_copy_has_memory_of_its_own(codebook):
    model = network(codebook)
    twin = copy.deepcopy(model)
    assert not pointers(twin) & pointers(model)
    assert_same(twin, model)


def test_a_shared_weight_is_copied_once():
    layer = QuantizedLinear.from_linear(nn.Linear(K, K))
    model = nn.Sequential(layer, QuantizedLinear(layer.weight, layer.bias))
    twin: Any = copy.deepcopy(model)
    assert twin[0].weight is twin[1].weight
    assert twin[0].weight is not layer.weight


def test_a_copy_shares_as_copies_of_modules_do():
    model = network()
    twin = copy.copy(model)
    assert pointers(twin) == pointers(model)
    assert_same(twin, model)


# Processes


@pytest.fixture(scope="module")
def child() -> Iterator[Any]:
    """A pool of one other process, which starts with nothing of this one."""
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool


def test_a_child_process_works_on_the_shared_model(child):
    model = network().requires_grad_(False).share_memory()  # gradients do not cross between processes
    assert all(part.is_shared() for weight in weights(model).values() for part in parts(weight).values())
    x = torch.randn(3, K)
    found = child.apply(nn.Sequential.forward, (model, x))  # the child has the reference only, whose sums are others
    torch.testing.assert_close(found, model(x), rtol=2e-2, atol=2e-2)
    child.apply(QuantizedTensor.map, (model[0].weight, torch.zero_))  # writes zeros over every part
    assert not any(part.any() for part in parts(model[0].weight).values())


# Hooks


def test_hooks_of_the_state_dict_run():
    model = network()
    seen: list[str] = []

    def rename(module, state, prefix, metadata) -> None:
        seen.append(prefix)
        for name in list(state):
            if name.startswith(prefix):
                state[f"model.{name}"] = state.pop(name)

    def restore(module, state, prefix, *_) -> None:
        for name in list(state):
            state[name.removeprefix("model.")] = state.pop(name)

    model.register_state_dict_post_hook(rename)
    state = model.state_dict()
    assert seen == [""]
    assert "model.0.weight.absmax" in state
    other = network()
    other.register_load_state_dict_pre_hook(restore)
    other.load_state_dict(state)
    assert_same(other, model)


def test_a_hook_of_the_layer_sees_its_weight():
    model = network()
    seen: list[set[str]] = []
    model[0].register_state_dict_post_hook(lambda module, state, prefix, _: seen.append(set(state)))
    model.state_dict()
    assert {"0.weight", "0.weight.absmax", "0.weight.quant_state.bitsandbytes__nf4"} <= seen[0]


# A model as the library makes it


def test_a_model_with_adapters_goes_through_a_file(tmp_path):
    def make() -> nn.Module:
        model = ql.quantize_(nn.Sequential(nn.Linear(K, H), nn.Linear(H, N)), compute_dtype=torch.float32)
        return ql.inject_(model, ql.LoraConfig(r=4, lora_alpha=8))

    model, other = make(), make()
    with torch.no_grad():
        for parameter in ql.trainable(model):
            parameter.normal_()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_same(other, model)


@codebooks
def test_it_is_compiled_in_one_piece(codebook):
    model = network(codebook)
    x = torch.randn(3, K, requires_grad=True)
    torch._dynamo.reset()
    found, expected = torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    (ours,), (theirs,) = (torch.autograd.grad(y, x, torch.ones_like(y)) for y in (found, expected))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)
