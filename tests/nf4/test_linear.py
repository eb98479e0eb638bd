"""A linear layer in 4 bits: its product, its state dict, and how models that have such layers are used: files,
strictness, moves, casts, copies, processes, hooks."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.multiprocessing
from bitsandbytes.nn.modules import Linear4bit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import qloralab as ql
from qloralab.lora.inject import load_adapter_
from qloralab.nf4 import linear as module
from qloralab.nf4.linear import QuantizedLinear
from qloralab.nf4.processor import ComputeDtype
from qloralab.nf4.tensor import QuantizedTensor, quantize

from .weights import assert_near, assert_same_bits, biases, double_quants, parts, pointers

K, H, N = 66, 48, 63
# Root-mean-square error relative to float64: of one rounding to the dtype, and of sums of 66 terms in float32.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
CODEBOOKS = {"nf4": "nf4", "fp4": "fp4", "int4": "int4", "nf3": "nf3", "own": torch.linspace(-1, 1, 16)}
codebooks = pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS)
PAYLOAD = "weight.quant_state.bitsandbytes__nf4"


def in_4_bits(dense: nn.Linear, dtype: torch.dtype | None = torch.float32, **options: Any) -> QuantizedLinear:
    return QuantizedLinear(quantize(dense.weight, **options), dense.bias, dtype)


def layer(double_quant: bool = True, bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> QuantizedLinear:
    return in_4_bits(nn.Linear(K, N, bias=bias), dtype, double_quant=double_quant)


def network(codebook: Any = "nf4", double_quant: bool = True) -> Any:
    """An nn.Sequential of two layers in 4 bits, one with and one without a bias, and a norm that is not quantized."""
    first, last = nn.Linear(K, H), nn.Linear(H, N, bias=False)
    options = {"codebook": codebook, "double_quant": double_quant}
    return nn.Sequential(in_4_bits(first, **options), nn.Sequential(nn.LayerNorm(H), in_4_bits(last, **options)))


def weights(model: nn.Module) -> dict[str, QuantizedTensor]:
    return {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


def memory(model: nn.Module) -> set[int]:
    """Where every weight lies, of whichever kind."""
    found: dict[str, Tensor] = dict(model.named_parameters())
    for name, weight in weights(model).items():
        found |= {f"{name}.{part}": tensor for part, tensor in parts(weight).items()}
    return pointers(found)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """Same bits of every weight, same output."""
    for name, weight in weights(a).items():
        assert_same_bits(weight, weights(b)[name])
    for (name, one), two in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(one, two), name
    x = torch.randn(3, K)
    assert torch.equal(a(x), b(x))


@biases
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_the_product_with_the_dequantized_weight_in_the_compute_dtype(given, compute, bias):
    dense = nn.Linear(K, N, bias=bias)
    found = in_4_bits(dense, compute)
    x = torch.randn(2, 5, K, dtype=given, requires_grad=True)
    weight = quantize(dense.weight).dequantize(compute).double()
    exact = F.linear(x.to(compute).double(), weight, None if dense.bias is None else dense.bias.to(compute).double())
    tolerance = max(TOLERANCE[given], TOLERANCE[compute])
    y = found(x)
    assert y.dtype == given
    assert_near(y.detach(), exact.detach(), tolerance)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.dtype == given
    assert_near(dx, dy.to(compute).double() @ weight, tolerance)


class Device:
    """What a device multiplies, as nf4/processor.py says it; "meta" stands for a GPU that multiplies the other one."""

    def __init__(self, cpu: torch.dtype):
        self.cpu = cpu

    def __call__(self, device: torch.device) -> ComputeDtype:
        other = torch.float32 if self.cpu == torch.bfloat16 else torch.bfloat16
        return ComputeDtype(self.cpu if torch.device(device).type == "cpu" else other, "")


@pytest.mark.parametrize("cpu", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_compute_dtype_it_follows_the_device_of_the_weight(monkeypatch, cpu):
    monkeypatch.setattr(module, "dtype_of", Device(cpu))
    open_, chosen = (in_4_bits(nn.Linear(K, N), dtype) for dtype in (None, torch.float16))
    assert (open_.follows_device, open_.compute_dtype, chosen.follows_device) == (True, cpu, False)
    assert open_.bias is not None
    assert open_.bias.dtype == cpu
    x = torch.randn(3, K)
    y = open_(x)
    for layer in (open_, chosen):
        layer.to("meta")
    assert {open_.compute_dtype, cpu} == {torch.float32, torch.bfloat16}
    assert chosen.compute_dtype == torch.float16
    open_.half()  # a conversion of the dtype is no move
    assert {open_.compute_dtype, cpu} == {torch.float32, torch.bfloat16}
    assert y.dtype == torch.float32


def test_it_leaves_the_dense_layer_as_it_was_and_is_frozen():
    dense = nn.Linear(K, N)
    before = copy.deepcopy(dense)
    found = in_4_bits(dense)
    found.to(torch.float16)
    assert dense.weight.requires_grad
    assert dense.bias.requires_grad
    assert all(torch.equal(one, other) for one, other in zip(dense.parameters(), before.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert (found.in_features, found.out_features) == (K, N)
    assert "in_features=66, out_features=63, bias=True, nf4, block_size=64, double_quant=True" in repr(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cast", ["half", "bfloat16", "float"])
def test_a_cast_of_the_model_does_not_break_the_forward(cast, dtype):
    model = layer(dtype=dtype)
    x = torch.randn(3, K)
    expected = model(x)
    getattr(model, cast)()
    assert torch.allclose(model(x), expected, rtol=0.02, atol=0.02)  # the bias may have been rounded once more


@codebooks
@double_quants
@pytest.mark.parametrize("how", ["torch", "safetensors"])
def test_a_state_dict_goes_through_a_file_bit_for_bit(how, codebook, double_quant, tmp_path):
    model, other = network(codebook, double_quant), network()  # the file brings its codebook and options
    file = tmp_path / "model"
    if how == "torch":
        torch.save(model.state_dict(), file)
        state = torch.load(file, weights_only=True)
    else:
        save_file(model.state_dict(), file)
        state = load_file(file)
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert_same(other, model)


@double_quants
@biases
def test_keys_dtypes_and_shapes_are_those_of_bitsandbytes(double_quant, bias):
    theirs = Linear4bit(
        K, N, bias=bias, quant_type="nf4", compress_statistics=double_quant, compute_dtype=torch.bfloat16
    ).to("cpu")
    expected = {key: (value.dtype, value.shape) for key, value in theirs.state_dict().items()}
    found = {key: (value.dtype, value.shape) for key, value in layer(double_quant, bias).state_dict().items()}
    assert found.keys() == expected.keys()
    for key in found.keys() - {PAYLOAD, "bias"}:  # the payload has digits of a number, the bias the compute dtype
        assert found[key] == expected[key], key


def test_the_prefix_is_the_path_of_the_layer():
    model = network()
    names = [key.removeprefix("0.") for key in model.state_dict() if key.startswith("0.weight")]
    assert len(names) == 6
    expected = {f"{path}.{name}" for path in ("0", "1.1") for name in names}
    assert model.state_dict().keys() == {"0.bias", "1.0.weight", "1.0.bias", *expected}
    assert model[1].state_dict(prefix="up.").keys() >= {f"up.1.{name}" for name in names}
    state = model.state_dict()
    assert all(type(tensor) is Tensor and not tensor.requires_grad for tensor in state.values())


@pytest.mark.parametrize("save", [pickle.dumps, lambda model: torch.save({"model": model}, io.BytesIO())])
def test_a_pickle_of_the_model_is_refused_with_advice(save):
    with pytest.raises(pickle.PicklingError, match=r"state_dict\(\) of the module"):
        save(network())


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


def take_another(state: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """Other tensors in place of all of the first layer's weight."""
    for name in [name for name in state if name.startswith("0.weight")]:
        del state[name]
    state.update({f"0.{name}": tensor for name, tensor in others.items()})


def set_(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({f"0.{name}": value})


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    **{
        f"no {name}": (lambda state, name=name: state.pop(f"0.{name}"), rf"0\.{name.removesuffix('nf4')}")
        for name in ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", PAYLOAD)
    },
    "shape": (
        lambda state: take_another(state, layer(bias=False).state_dict()),
        r"0\.weight is \[63, 66\] in the checkpoint; the layer is \[48, 66\]",
    ),
    "codes": (set_("weight", torch.zeros(5, 1, dtype=torch.uint8)), r"'0\.weight': is torch\.uint8 \[5, 1\]"),
    "scales": (set_("weight.absmax", torch.zeros(65)), r"'0\.weight\.absmax': is torch\.float32"),
    "payload": (set_(PAYLOAD, torch.tensor(list(b"{"), dtype=torch.uint8)), "is not JSON"),
    "codebook": (set_("weight.quant_map", torch.zeros(16)), "is not the nf4 codebook"),
    "nested scales beside plain ones": (
        lambda state: state.update(
            {name: t for name, t in network(double_quant=False).state_dict().items() if "nested" not in name}
        ),
        r"0\.weight\.nested_absmax.*does not belong",
    ),
    "two codebooks": (lambda state: state.update(network("fp4").state_dict()), "a 4-bit weight has exactly one"),
    "dense": (lambda state: take_another(state, {"weight": torch.zeros(H, K)}), "a 4-bit weight has exactly one"),
}


@pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_weight_of_the_layer_is_refused(case, strict):
    change, message = REFUSED[case]
    model, state = network(), dict(network().state_dict())
    before = model[0].weight
    change(state)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state, strict=strict)
    assert model[0].weight is before


def test_loading_copies():
    model, other = network(), network()
    other.load_state_dict(model.state_dict())
    assert not memory(other) & memory(model)


def test_loading_with_assign_copies_nothing():
    model, other = network(), network()
    state = model.state_dict()
    other.load_state_dict(state, assign=True)
    for name, weight in weights(other).items():
        assert weight.packed.data_ptr() == state[f"{name}.weight"].data_ptr()
    assert_same(other, model)


@codebooks
@pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assign"])
def test_a_model_on_the_meta_device_is_filled(assign, codebook):
    model, other = network(codebook), network(codebook).to("meta")
    assert {part.device.type for weight in weights(other).values() for part in parts(weight).values()} == {"meta"}
    if not assign:
        other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict(), assign=assign)
    assert all(weight.device.type == "cpu" for weight in weights(other).values())
    assert_same(other, model)


@codebooks
@double_quants
@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_a_cast_of_the_model_leaves_the_bits(cast, codebook, double_quant):
    model = network(codebook, double_quant)
    before, dtype = copy.deepcopy(model), getattr(torch.empty(0), cast)().dtype
    for change in (lambda: model.to(dtype), getattr(model, cast)):
        change()
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        for name, weight in weights(model).items():
            assert_same_bits(weight, weights(before)[name])
    assert {name: tensor.dtype for name, tensor in model.float().state_dict().items()} == {
        name: tensor.dtype for name, tensor in before.state_dict().items()
    }


@codebooks
def test_a_deep_copy_has_memory_of_its_own(codebook):
    model = network(codebook)
    twin = copy.deepcopy(model)
    assert not memory(twin) & memory(model)
    assert_same(twin, model)


def test_a_child_process_works_on_the_shared_model():
    before = network().requires_grad_(False)
    model = copy.deepcopy(before).share_memory()  # gradients do not cross between processes
    assert all(part.is_shared() for weight in weights(model).values() for part in parts(weight).values())
    x = torch.randn(3, K)
    with torch.multiprocessing.get_context("spawn").Pool(1) as child:
        found = child.apply(nn.Sequential.forward, (model, x))  # by the reference, whose sums are others
        torch.testing.assert_close(found, model(x), rtol=2e-2, atol=2e-2)
        assert_same(model, before)
        for codebook in CODEBOOKS.values():
            weight = quantize(torch.randn(65, 66, dtype=torch.bfloat16), codebook)
            assert_same_bits(child.apply(QuantizedTensor.clone, (weight,)), weight)
        child.apply(QuantizedTensor.map, (model[0].weight, torch.zero_))  # writes zeros over every part
    assert not any(part.any() for part in parts(model[0].weight).values())


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


@codebooks
def test_it_is_compiled_in_one_piece(codebook):
    model = network(codebook)
    x = torch.randn(3, K, requires_grad=True)
    torch._dynamo.reset()
    found, expected = torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    (ours,), (theirs,) = (torch.autograd.grad(y, x, torch.ones_like(y)) for y in (found, expected))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)


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


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # what PEFT says of any layer it is told of
def test_peft_adapts_it_when_told_how(tmp_path):
    """Its adapter computes and trains as ours does, and opens here."""

    def model() -> Any:
        torch.manual_seed(3)
        return nn.Sequential(layer(dtype=torch.float32), nn.ReLU(), layer(dtype=torch.float32).requires_grad_(False))

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
    with pytest.raises(ValueError, match="is not supported"):
        peft.get_peft_model(model(), config)
    config._register_custom_module({QuantizedLinear: peft.tuners.lora.Linear})
    theirs: Any = peft.get_peft_model(model(), config)
    theirs.save_pretrained(tmp_path)
    ours: Any = load_adapter_(model(), tmp_path)
    x = torch.randn(5, K)
    theirs.base_model.model[0](x).square().sum().backward()
    ours[0](x).square().sum().backward()
    assert torch.allclose(theirs.base_model.model[0](x), ours[0](x), atol=1e-5)
    assert torch.allclose(theirs.base_model.model[0].lora_A["default"].weight.grad, ours[0].lora_A.grad, atol=1e-4)
    assert torch.allclose(theirs.base_model.model[0].lora_B["default"].weight.grad, ours[0].lora_B.grad, atol=1e-4)
    with pytest.raises(AttributeError, match="'QuantizedTensor' object has no attribute"):
        theirs.merge_and_unload()
