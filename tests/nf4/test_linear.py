"""A linear layer in 4 bits: its product, its state dict, and what moves and casts do to its bits."""

from __future__ import annotations

import copy
import io
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn
from torch.nn import functional as F

from qloralab.lora.inject import load_adapter_
from qloralab.nf4 import linear as module
from qloralab.nf4.linear import QuantizedLinear
from qloralab.nf4.processor import ComputeDtype
from qloralab.nf4.tensor import QuantizedTensor, quantize

K, N = 66, 63
# Root-mean-square error relative to float64: of one rounding to the dtype, and of sums of 66 terms in float32.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
double_quants = pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
biases = pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
PAYLOAD = "weight.quant_state.bitsandbytes__nf4"


def layer(double_quant: bool = True, bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> QuantizedLinear:
    return QuantizedLinear.from_linear(nn.Linear(K, N, bias=bias), double_quant=double_quant, compute_dtype=dtype)


def parts(weight: QuantizedTensor) -> dict[str, Tensor]:
    named = {name: getattr(weight, name) for name in ("packed", "scales", "absmax2", "offset", "values")}
    return {name: part for name, part in named.items() if part is not None}


def assert_same_bits(a: QuantizedTensor, b: QuantizedTensor) -> None:
    assert parts(a).keys() == parts(b).keys()
    for name, part in parts(a).items():
        assert part.dtype == parts(b)[name].dtype, name
        assert part.numpy().tobytes() == parts(b)[name].numpy().tobytes(), name
    assert (a.shape, a.dtype, a.codebook, a.block_size) == (b.shape, b.dtype, b.codebook, b.block_size)


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


@biases
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_the_product_with_the_dequantized_weight_in_the_compute_dtype(given, compute, bias):
    dense = nn.Linear(K, N, bias=bias)
    found = QuantizedLinear.from_linear(dense, compute_dtype=compute)
    x = torch.randn(2, 5, K, dtype=given, requires_grad=True)
    weight = quantize(dense.weight).dequantize(compute).double()
    exact = F.linear(x.to(compute).double(), weight, None if dense.bias is None else dense.bias.to(compute).double())
    tolerance = max(TOLERANCE[given], TOLERANCE[compute])
    y = found(x)
    assert y.dtype == given
    assert error(y.detach(), exact.detach()) < tolerance
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.dtype == given
    assert error(dx, dy.to(compute).double() @ weight) < tolerance


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
    open_, chosen = (QuantizedLinear.from_linear(nn.Linear(K, N), compute_dtype=d) for d in (None, torch.float16))
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


def test_from_linear_leaves_the_layer_and_shares_nothing():
    dense = nn.Linear(K, N)
    before = copy.deepcopy(dense.state_dict())
    found = QuantizedLinear.from_linear(dense, block_size=128, double_quant=False, compute_dtype=torch.float32)
    assert_same_bits(found.weight, quantize(dense.weight, block_size=128, double_quant=False))
    assert dense.weight.requires_grad
    assert dense.bias.requires_grad
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert (found.in_features, found.out_features) == (K, N)


def test_a_bad_weight_is_named():
    dense = nn.Linear(K, N)
    with torch.no_grad():
        dense.weight[2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"^h\.0\.up\.weight\[2, 3\] is nan"):
        QuantizedLinear.from_linear(dense, name="h.0.up")
    with pytest.raises(TypeError, match=r"^h\.0\.up\.weight is torch\.float64"):
        QuantizedLinear.from_linear(dense.double(), name="h.0.up")


@double_quants
@biases
def test_state_dict_comes_back(double_quant, bias):
    saved, loaded = layer(double_quant, bias), layer(double_quant, bias)
    assert not torch.equal(saved.weight.packed, loaded.weight.packed)
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    assert str(loaded.load_state_dict(torch.load(file, weights_only=True))) == "<All keys matched successfully>"
    assert_same_bits(loaded.weight, saved.weight)
    x = torch.randn(3, K)
    assert torch.equal(loaded(x), saved(x))


def test_state_dict_of_another_kind_of_scales_is_taken():
    loaded = layer(double_quant=True)
    saved = layer(double_quant=False)
    loaded.load_state_dict(saved.state_dict())
    assert_same_bits(loaded.weight, saved.weight)


def test_state_dict_inside_a_model():
    models: list[Any] = [nn.Sequential(layer(), nn.ReLU(), nn.ModuleDict({"up": nn.Linear(N, 3)})) for _ in "ab"]
    saved, loaded = models
    loaded.load_state_dict(saved.state_dict(prefix="m."), strict=False)
    assert not torch.equal(loaded[0].weight.packed, saved[0].weight.packed)
    loaded.load_state_dict(saved.state_dict())
    assert_same_bits(loaded[0].weight, saved[0].weight)


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


@double_quants
@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_a_cast_keeps_the_bits(cast, double_quant):
    model: Any = nn.Sequential(layer(double_quant), nn.LayerNorm(N))
    before = model[0].weight
    getattr(model, cast)()
    assert_same_bits(model[0].weight, before)
    assert model[1].weight.dtype == getattr(torch, cast)


@double_quants
def test_to_a_dtype_keeps_the_bits_and_to_a_device_carries_them(double_quant):
    model = layer(double_quant)
    before = model.weight
    model.to(torch.float16)
    assert_same_bits(model.weight, before)
    model.to("meta")
    assert {part.device.type for part in parts(model.weight).values()} == {"meta"}


def test_a_copy_has_its_own_memory():
    model = layer()
    twin = copy.deepcopy(model)
    assert_same_bits(twin.weight, model.weight)
    for name, part in parts(twin.weight).items():
        assert part.data_ptr() != parts(model.weight)[name].data_ptr(), name
    assert torch.equal(twin(torch.ones(1, K)), model(torch.ones(1, K)))


def test_shared_memory():
    model = layer()
    before = model.weight
    model.share_memory()
    assert all(part.is_shared() for part in parts(model.weight).values())
    assert_same_bits(model.weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cast", ["half", "bfloat16", "float"])
def test_a_cast_of_the_model_does_not_break_the_forward(cast, dtype):
    model = layer(dtype=dtype)
    x = torch.randn(3, K)
    expected = model(x)
    getattr(model, cast)()
    assert torch.allclose(model(x), expected, rtol=0.02, atol=0.02)  # the bias may have been rounded once more


def test_a_missing_weight_is_missing():
    state = layer().state_dict()
    rest = {"bias": state["bias"]}
    assert layer().load_state_dict(rest, strict=False).missing_keys == ["weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"up\.weight"'):
        nn.ModuleDict({"up": layer()}).load_state_dict({"up.bias": state["bias"]})


@pytest.mark.parametrize("key", ["weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", PAYLOAD])
def test_a_missing_part_is_named(key):
    model = layer()
    before = model.weight
    state = layer().state_dict()
    del state[key]
    with pytest.raises(RuntimeError, match=key.removesuffix("nf4").replace(".", r"\.")):
        model.load_state_dict(state)
    assert_same_bits(model.weight, before)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weight", torch.zeros(5, 1, dtype=torch.uint8), r"tensor 'weight': is torch\.uint8 \[5, 1\]"),
        ("weight.absmax", torch.zeros(65), r"tensor 'weight\.absmax': is torch\.float32"),
        (PAYLOAD, torch.tensor(list(b"{"), dtype=torch.uint8), "is not JSON"),
        ("weight.quant_map", torch.zeros(16), "is not the nf4 codebook"),
        ("extra", torch.zeros(1), 'Unexpected key.*"extra"'),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_a_malformed_part_is_reported(key, value, message):
    with pytest.raises(RuntimeError, match=message):
        layer().load_state_dict({**layer().state_dict(), key: value})


def test_a_weight_of_another_shape_is_reported():
    other = QuantizedLinear.from_linear(nn.Linear(N, K)).state_dict()
    with pytest.raises(RuntimeError, match=r"weight is \[66, 63\] in the checkpoint; the layer is \[63, 66\]"):
        layer(bias=False).load_state_dict({key: value for key, value in other.items() if key != "bias"})


def test_a_dense_checkpoint_is_refused():
    with pytest.raises(RuntimeError, match="a 4-bit weight has exactly one"):
        layer().load_state_dict(nn.Linear(K, N).state_dict())


def test_repr_says_how_it_is_held():
    assert "in_features=66, out_features=63, bias=True, nf4, block_size=64, double_quant=True" in repr(layer())


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
