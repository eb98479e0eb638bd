"""Which layers are found, and that quantizing them frees them and changes nothing else."""

from __future__ import annotations

import copy
import gc
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrizations, prune, weight_norm
from transformers.pytorch_utils import Conv1D

from qloralab.lora.config import LoraConfig
from qloralab.lora.inject import adapters, inject_, trainable
from qloralab.lora.layer import LoRALinear
from qloralab.nf4.linear import QuantizedLinear
from qloralab.nf4.model import left_out, linear_names, quantize_
from qloralab.nf4.processor import compute_dtype
from qloralab.nf4.tensor import quantize

from ..lora.models import LLAMA_LINEAR, llama

CONFIG = LoraConfig(4, 8)
changes = pytest.mark.parametrize(
    "change", [quantize_, lambda model: inject_(model, CONFIG)], ids=["quantize_", "inject_"]
)


class MLP(nn.Module):
    """up [32, 16], down [16, 32], head [10, 16]."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.up(x).relu()))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_language_model_without_its_head(tied):
    assert linear_names(llama(tied)) == LLAMA_LINEAR


def test_the_names_do_not_change_as_the_layers_do():
    model = llama()
    assert linear_names(quantize_(model)) == LLAMA_LINEAR
    assert linear_names(inject_(model, CONFIG)) == LLAMA_LINEAR


@pytest.mark.parametrize(
    ("skip", "names"),
    [
        (None, ["blocks.0.up", "blocks.0.down", "blocks.0.head", "blocks.1.up", "blocks.1.down", "blocks.1.head"]),
        (["head"], ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]),
        ("head", ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]),
        (["blocks.1"], ["blocks.0.up", "blocks.0.down", "blocks.0.head"]),
        (["1", "0.head"], ["blocks.0.up", "blocks.0.down"]),
        (["blocks"], []),
    ],
    ids=str,
)
def test_skip(skip, names):
    assert linear_names(nn.ModuleDict({"blocks": nn.ModuleList([MLP(), MLP()])}), skip) == names


@pytest.mark.parametrize("skip", [["lm_head"], ["ead"], ["head", "nope"], ["up.head"]], ids=str)
def test_skip_that_matches_nothing(skip):
    with pytest.raises(ValueError, match=f"^skip: no module is called {skip[-1]!r}"):
        linear_names(MLP(), skip)


def test_a_linear_layer_tied_to_an_embedding_is_left_out():
    model: Any = nn.ModuleDict({"wte": nn.Embedding(10, 16), "mlp": MLP()})
    model["mlp"].head.weight = model["wte"].weight
    assert linear_names(model) == ["mlp.up", "mlp.down"]
    quantize_(model)
    assert model["mlp"].head.weight is model["wte"].weight


def test_layers_that_share_a_weight_share_the_packed_one():
    model: Any = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)])
    model[2].weight = model[0].weight
    biases = [layer.bias.detach().to(compute_dtype().dtype) for layer in model]
    assert linear_names(model) == ["0", "1", "2"]
    assert linear_names(model, skip=["2"]) == ["1"], "quantized on one side only"
    quantize_(model)
    assert model[0].weight is model[2].weight
    assert model[0].weight is not model[1].weight
    assert all(torch.equal(layer.bias, bias) for layer, bias in zip(model, biases, strict=True))
    other = copy.deepcopy(model).requires_grad_(False)
    other.load_state_dict(quantize_(nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])).state_dict())
    for changed in (model.double(), other, copy.deepcopy(model), model.to("meta"), inject_(model, CONFIG)):
        assert changed[0].weight is changed[2].weight
        assert changed[0].weight is not changed[1].weight
    assert {layer.base_layer.compute_dtype for layer in model} == {compute_dtype("meta").dtype}


def test_a_module_at_two_paths_stays_one():
    model: Any = nn.ModuleDict({"a": MLP(), "b": MLP()})
    model["b"].up = model["a"].up
    assert linear_names(model) == ["a.up", "a.down", "a.head", "b.down", "b.head"]
    quantize_(model)
    assert isinstance(model["a"].up, QuantizedLinear)
    assert model["b"].up is model["a"].up
    inject_(model, CONFIG)
    assert isinstance(model["a"].up, LoRALinear)
    assert model["b"].up is model["a"].up
    assert len(trainable(model)) == 10


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * super().forward(x)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.proj.weight.T


def old_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it deprecated
        return weight_norm(nn.Linear(16, 16))


def patched() -> nn.Module:
    layer: Any = nn.Linear(16, 16)
    layer.forward = lambda x: nn.Linear.forward(layer, x)
    return layer


BESIDE = "beside or instead of its weight"
UNUSUAL: dict[str, Any] = {
    "Scaled, with a forward of its own": lambda: Scaled(16, 16),
    "Linear, with a forward of its own": patched,
    f"it holds weight_g, weight_v {BESIDE}": old_norm,
    f"it holds weight_mask, weight_orig {BESIDE}": lambda: prune.random_unstructured(nn.Linear(16, 16), "weight", 0.5),
    f"it holds parametrizations {BESIDE}": lambda: parametrizations.orthogonal(nn.Linear(16, 16)),
    "Conv1D, not an nn.Linear": lambda: Conv1D(16, 16),
    "its weight is read by Reader.forward": Reader,
    "its weight is read by MultiheadAttention.forward": lambda: nn.MultiheadAttention(16, 2),
}


@pytest.mark.parametrize("reason", UNUSUAL)
def test_what_is_not_used_as_a_linear_layer_is_left_out_and_said_so(reason):
    make = UNUSUAL[reason]
    model: Any = nn.ModuleList([nn.Linear(16, 16), make()])
    assert linear_names(model) == ["0"]
    (name,) = (name for name, said in left_out(model).items() if said == reason)
    assert name in ("1", "1.proj", "1.out_proj")
    with pytest.raises(ValueError, match=rf"no linear layer matches '{name}'; {name} is left out: {reason}"):
        inject_(model, LoraConfig(4, 8, target_modules=[name]))
    inject_(quantize_(model), CONFIG)
    assert linear_names(model) == list(adapters(model)) == ["0"]
    with pytest.raises(ValueError, match=rf"no linear layer to quantize; left out: .*1 \({reason}\)"):
        quantize_(nn.ModuleList([make()]))
    with pytest.raises(ValueError, match=rf"no linear layer to adapt; left out: .*1 \({reason}\)"):
        inject_(nn.ModuleList([make()]), CONFIG)


def test_a_layer_without_a_shape_yet_is_left_out():
    model: Any = nn.Sequential(nn.Linear(16, 16), nn.LazyLinear(16), nn.LazyConv1d(4, 3))
    reasons = {"1": "its weight is a UninitializedParameter", "2": "LazyConv1d, not an nn.Linear"}
    assert left_out(model) == reasons
    assert left_out(quantize_(model)) == reasons


def test_a_subclass_that_only_starts_otherwise_is_taken():
    class Renamed(nn.Linear):
        def reset_parameters(self) -> None:
            nn.init.eye_(self.weight)

    model: Any = nn.Sequential(Renamed(16, 8), nn.Linear(8, 4))
    assert linear_names(model) == ["0", "1"]
    assert isinstance(quantize_(model)[0], QuantizedLinear)


@changes
def test_a_model_with_adapters_of_peft_is_refused(change):
    model: Any = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["up_proj"]))
    before = [id(module) for module in model.modules()]
    for inner, path in ((model, "base_model.model.model"), (model.base_model.model, "model")):
        with pytest.raises(
            ValueError, match=rf"^{path}\.layers\.0\.mlp\.up_proj is a Linear of PEFT .*merge_and_unload"
        ):
            change(inner)
    assert [id(module) for module in model.modules()] == before
    merged = model.merge_and_unload()
    assert list(adapters(inject_(merged, CONFIG))) == LLAMA_LINEAR


@changes
@pytest.mark.parametrize(
    "make",
    [nn.ReLU, lambda: nn.Sequential(nn.Conv1d(1, 1, 1)), lambda: nn.Linear(16, 16)],
    ids=["relu", "conv", "itself"],
)
def test_nothing_to_quantize_or_adapt(make, change):
    model = make()
    with pytest.raises(ValueError, match=r"no linear layer to (quantize|adapt); left out: "):
        change(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_hooks_stay_in_their_place():
    model: Any = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    seen: list[tuple[str, type]] = []
    handles = [
        model[0].register_forward_hook(lambda module, args, y: seen.append(("after", type(module)))),
        model[0].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(("before", type(module))), with_kwargs=True
        ),
        model[0].register_full_backward_hook(lambda module, dx, dy: seen.append(("backward", type(module)))),
    ]
    x = torch.randn(3, 16, requires_grad=True)
    for change, kind in ((quantize_, QuantizedLinear), (lambda m: inject_(m, CONFIG), LoRALinear)):
        change(model)(x).sum().backward()
        assert seen == [("before", kind), ("after", kind), ("backward", kind)]
        seen.clear()
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    assert not seen


@pytest.mark.parametrize("asked", [None, torch.float16], ids=str)
def test_each_weight_is_that_of_quantize(asked):
    model = llama(tied=True)
    before = copy.deepcopy(model)
    assert quantize_(model, block_size=32, double_quant=False, compute_dtype=asked) is model
    for name in LLAMA_LINEAR:
        layer = model.get_submodule(name)
        assert type(layer) is QuantizedLinear
        expected = quantize(before.get_submodule(name).weight, block_size=32, double_quant=False)
        assert torch.equal(layer.weight.packed, expected.packed), name
        assert torch.equal(layer.weight.scales, expected.scales), name
        assert layer.compute_dtype == (asked or compute_dtype().dtype)
        assert layer.follows_device == (asked is None)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_weight_is_freed_before_the_next_is_quantized():
    model = llama()
    weights = [StorageWeakRef(model.get_submodule(name).weight.untyped_storage()) for name in LLAMA_LINEAR]
    seen = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        assert [weight.expired() for weight in weights] == [True] * done + [False] * (total - done)

    quantize_(model, progress=progress)
    assert seen == [(i + 1, 14) for i in range(14)]


def test_quantizing_twice_keeps_the_weights():
    model = quantize_(llama())
    before = {name: model.get_submodule(name).weight for name in LLAMA_LINEAR}
    quantize_(model, block_size=128)
    assert all(model.get_submodule(name).weight is weight for name, weight in before.items())


def with_(dtype: torch.dtype, value: float) -> Tensor:
    """[256, 64] of one value below 85 rows of zeros, which make the scale of float16's largest decode to more."""
    weight = torch.full((256, 64), value, dtype=dtype)
    weight[:85] = 0
    return weight


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (with_(torch.float32, torch.nan), ValueError, r"h\.1\.weight\[85, 0\] is nan"),
        (with_(torch.bfloat16, -torch.inf), ValueError, r"h\.1\.weight\[85, 0\] is -inf"),
        (with_(torch.float16, 65504.0), ValueError, r"h\.1\.weight: a scale, quantized and decoded, would be infinite"),
        (with_(torch.float64, 1.0), TypeError, r"h\.1\.weight is torch\.float64"),
        (with_(torch.int32, 1), TypeError, r"h\.1\.weight is torch\.int32"),
    ],
    ids=["nan", "inf", "scale", "float64", "int32"],
)
def test_a_refusal_leaves_the_model_as_it_was(weight, error, message):
    """Also where the first layers have nothing wrong with them."""
    layers: Any = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 256), nn.Linear(256, 64))
    layers[1].weight = nn.Parameter(weight, requires_grad=False)
    model, before = nn.ModuleDict({"h": layers}), list(layers)
    with pytest.raises(error, match=message):
        quantize_(model)
    with pytest.raises(ValueError, match="block_size is 65"):
        quantize_(layers[:1], block_size=65)
    assert list(layers) == before


def mapped_files() -> str:
    return Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux: /proc/self/maps")
def test_quantizing_lets_go_of_a_mapped_checkpoint(tmp_path):
    """One tensor that still lies in the mapped file would keep the weights that were quantized in memory."""
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in MLP().state_dict().items()}, file)
    model = MLP()
    model.load_state_dict(load_file(file), assign=True)
    expected = {name: tensor.clone() for name, tensor in model.named_parameters() if "head" in name}
    assert expected
    assert str(file) in mapped_files()
    quantize_(model, skip=["head"])
    gc.collect()
    assert str(file) not in mapped_files()
    for name, tensor in expected.items():
        assert torch.equal(model.get_parameter(name), tensor)
