"""One reference for every operator, with its signature, and made of operators where it contains one."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qloralab.nf4 import ops, reference
from qloralab.nf4.tensor import quantize

OPERATORS = {name: op for name, op in vars(ops).items() if isinstance(op, type(ops.linear))}
N, K, R = 33, 65, 5


class Called(TorchDispatchMode):
    """Notes the operators of the namespace ``qloralab`` that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "qloralab":
            self.names.append(func._schema.name.removeprefix("qloralab::"))
        return func(*args, **(kwargs or {}))


def arguments() -> dict[str, tuple[Any, ...]]:
    """What to call each operator with that contains a product."""
    weight = quantize(torch.randn(N, K)).operands()
    x, grad, h, bias = torch.randn(3, K), torch.randn(3, N), torch.randn(3, R), torch.randn(N)
    adapter = torch.randn(R, K), torch.randn(N, R), 2.0, 0.3, torch.tensor(7)
    return {
        "linear": (x, *weight, bias),
        "linear_grad_input": (grad, *weight),
        "adapted_linear": (x, *weight, bias, *adapter),
        "adapted_linear_backward": (grad, x, h, *weight, *adapter, True),
    }


def test_every_operator_has_a_reference_and_no_other_is_exported():
    assert sorted(OPERATORS) == sorted(reference.__all__)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_reference_is_called_as_the_operator_is(name):
    expected = [argument.name for argument in OPERATORS[name]._opoverload._schema.arguments]
    assert list(inspect.signature(getattr(reference, name)).parameters) == expected


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("linear", "dequantize"),
        ("linear_grad_input", "dequantize"),
        ("adapted_linear", "linear"),
        ("adapted_linear_backward", "linear_grad_input"),
    ],
)
def test_a_faster_inner_operator_serves_the_outer_one(name, inner):
    given = arguments()[name]
    with Called() as called:
        getattr(reference, name)(*given)
    assert called.names == [inner]


@pytest.mark.parametrize("name", arguments())
def test_nothing_that_came_in_is_changed(name):
    given = arguments()[name]
    before = [part.clone() if isinstance(part, torch.Tensor) else part for part in given]
    getattr(reference, name)(*given)
    for part, copy in zip(given, before, strict=True):
        assert torch.equal(part, copy) if isinstance(part, torch.Tensor) else part == copy


def test_the_reference_works_alone():
    """With no operator declared: W is the identity, so that y is x + h B' and dx is grad."""
    code = """
import sys, torch
from qloralab.nf4 import reference
values = torch.linspace(-1, 1, 17)[1:]
packed, scales = reference.quantize_blockwise(torch.eye(64), values, 64)
weight = packed, scales, None, None, values, (64, 64), 64
x, A, B, seed = torch.arange(192.0).view(3, 64), torch.ones(1, 64), torch.ones(64, 1), torch.tensor(0)
assert torch.equal(reference.linear(x, *weight, None), x)
assert torch.equal(reference.linear_grad_input(x, *weight), x)
y, h = reference.adapted_linear(x, *weight, None, A, B, 1.0, 0.0, seed)
assert torch.equal(y, x + x.sum(1, keepdim=True))
dx, _, _ = reference.adapted_linear_backward(x, x, h, *weight, A, B, 1.0, 0.0, seed, True)
assert torch.equal(dx, y)
assert "qloralab.nf4.ops" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
