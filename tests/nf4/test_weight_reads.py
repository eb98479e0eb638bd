"""Modules whose weight is read and not called, in torch, in transformers and in classes made for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from qloralab.nf4.weight_reads import weights_read


class Block(nn.Module):
    """Six layers; what its subclasses do with them is in their forward."""

    tp = 1
    a: Any
    b: Any
    c: Any
    inner: Any
    rows: Any

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        self.rows = nn.ModuleList([nn.Linear(4, 4)])


def product(x: Tensor, block: Any) -> Tensor:
    return F.linear(x, block.inner.b.weight)


def logged(function):
    import functools

    return functools.wraps(function)(lambda *args: function(*args))


class ByName(Block):
    def forward(self, x):
        return F.linear(x, self.a.weight) + x @ self.inner["a"].weight.T + x @ self.rows[x.ndim].weight


class InAMethod(Block):
    def forward(self, x):
        return self.helper(x)

    @logged
    def helper(self, x):
        """A text that
        goes back to the margin.
        """
        weight = self.b.weight
        return x @ weight

    def unused(self, x):
        return x @ self.c.weight


class InAProperty(Block):
    @property
    def matrix(self):
        return self.a.weight.detach()

    def forward(self, x):
        return x @ self.matrix


class InAFunction(Block):
    def forward(self, x):
        return product(x, self)


class OfAnotherName(Block):
    def forward(self, x):
        for row in self.rows:
            x = x @ row.weight  # which layer that is, the source does not say
        block = self.inner
        return x + self.fold(block.a)

    def fold(self, layer):
        for each in (self,):
            each.inner.b.weight.mul_(2)
        return 0


class Looks(Block):
    def forward(self, x):
        assert self.b.weight is not None
        if isinstance(self.a.weight, Tensor) and hasattr(self.c.weight, "SCB"):
            x = x.to(self.a.weight.dtype).to(self.b.weight.device)
        return self.a(x[..., : self.c.weight.shape[1]]) + self.b.weight.size(0) + self.rows[-1].weight.numel()


class Excluded(Block):
    def forward(self, x):
        if self.tp > 1 and x.ndim:
            return x @ self.a.weight
        x = x @ self.b.weight if self.tp != 1 else self.b(x)
        if self.training:
            x = x @ self.c.weight
        return self.inner["a"](x)

    def _init_weights(self, module):
        module.inner.b.weight.data.zero_()


class Inherited(ByName):
    def reset(self):
        pass


CASES = {
    ByName: {"a": "ByName.forward", "inner.a": "ByName.forward", "rows.0": "ByName.forward"},
    InAMethod: {"b": "InAMethod.helper"},
    InAProperty: {"a": "InAProperty.matrix"},
    InAFunction: {"inner.b": "product"},
    OfAnotherName: {"inner.b": "OfAnotherName.fold"},
    Looks: {},
    Excluded: {"c": "Excluded.forward"},
    Inherited: {"a": "ByName.forward", "inner.a": "ByName.forward", "rows.0": "ByName.forward"},
}


def found(model: nn.Module) -> dict[str, str]:
    read = weights_read(model)
    return {name: read[module] for name, module in model.named_modules() if module in read}


@pytest.mark.parametrize("cls", CASES, ids=lambda cls: cls.__name__)
def test_what_the_source_says(cls):
    assert found(cls()) == CASES[cls]
    inside: Any = nn.Sequential(nn.ReLU(), nn.Sequential(cls()))
    assert found(inside) == {f"1.0.{name}": reader for name, reader in CASES[cls].items()}


def test_a_condition_is_that_of_the_instance():
    block = Excluded()
    block.tp = 2
    assert found(block) == {"a": "Excluded.forward", "b": "Excluded.forward", "c": "Excluded.forward"}


def test_a_module_at_two_paths_is_read_if_it_is_at_one():
    model: Any = nn.ModuleDict({"first": nn.ModuleDict(), "block": InAMethod()})
    model["first"]["layer"] = model["block"].b
    assert found(model) == {"first.layer": "InAMethod.helper"}


def test_a_class_without_source():
    names: dict[str, Any] = {"nn": nn}
    exec(
        "class Typed(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a = nn.Linear(4, 4)\n"
        "    def forward(self, x):\n"
        "        return x @ self.a.weight\n",
        names,
    )
    assert found(names["Typed"]()) == {}


MIXER = {"x_proj", "dt_proj", "out_proj"}
TRANSFORMERS: dict[str, set[str]] = {
    "llama": set(),
    "t5": set(),
    "bloom": set(),  # it has a slow way that reads, for pretraining_tp > 1
    "mamba": MIXER,
    "falcon_mamba": MIXER,
    "mamba2": {"out_proj"},  # by its kernels for GPUs
    "rwkv": {"output", "value"},
    "wavlm": {"q_proj", "k_proj", "v_proj", "out_proj"},
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_models_of_transformers(name):
    options = {} if name == "t5" else {"num_hidden_layers": 2}
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(name, **options))
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {path.rpartition(".")[2] for path in found(model) if path in linear} == TRANSFORMERS[name]


@pytest.mark.parametrize("cls", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_layers_of_torch(cls):
    expected = {"self_attn.out_proj"} | (
        {"linear1", "linear2"} if cls is nn.TransformerEncoderLayer else {"multihead_attn.out_proj"}
    )
    model: Any = cls(16, 2, 32)
    assert {name for name in found(model) if isinstance(model.get_submodule(name), nn.Linear)} == expected
