"""Eager calls go past PyTorch's dispatcher where nothing looks on, and are the same as through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import qloralab as ql
from qloralab.lora import ops as lora_ops
from qloralab.nf4 import ops

N, K, R, TOKENS = 24, 64, 4, 5


@pytest.fixture
def weight() -> Any:
    return ql.quantize(torch.randn(N, K)).operands()


@pytest.fixture
def eager(monkeypatch) -> list[str]:
    """The operators whose implementation was called past the dispatcher."""
    names: list[str] = []
    for operator in (ops.linear, ops.linear_grad_input, lora_ops.adapted_linear, lora_ops.dropout):
        for backend, run in operator.implementations.items():

            def noted(*arguments: Any, run=run, name=operator._name) -> Any:
                names.append(name)
                return run(*arguments)

            monkeypatch.setitem(operator.implementations, backend, noted)
    return names


def linear(x: Tensor, weight: Any) -> Tensor:
    return ops.linear(x, *weight, None)


class Seen(TorchDispatchMode):
    """The names of the operators that the dispatcher was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def arguments(weight: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every differentiable operator with its arguments: x, those of the weight, bias, A and B, the others."""
    x, grad, bias = torch.randn(TOKENS, K), torch.randn(TOKENS, N), torch.randn(N)
    A, B, seed = torch.randn(R, K), torch.randn(N, R), torch.tensor(3)
    return {
        "linear": (ops.linear, (x, *weight, bias)),
        "linear_grad_input": (ops.linear_grad_input, (grad, *weight)),
        "adapted_linear": (lora_ops.adapted_linear, (x, *weight, bias, A, B, 2.0, 0.3, seed)),
        "dropout": (lora_ops.dropout, (x, seed, 0.3)),
    }


def is_wanted(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.requires_grad


@pytest.mark.parametrize("name", ["linear", "linear_grad_input", "adapted_linear", "dropout"])
def test_it_gives_the_bits_of_the_dispatcher(name, weight, eager):
    operator, given = arguments(weight)[name]

    def run(call: Callable[..., Any]) -> list[Tensor]:
        leaves = [one.clone().requires_grad_() if at in (0, *range(8, 11)) and isinstance(one, Tensor) else one
                  for at, one in enumerate(given)]  # fmt: skip
        result = call(*leaves)
        y = result[0] if isinstance(result, tuple) else result
        return [y, *torch.autograd.grad((y * y).sum(), [one for one in leaves if is_wanted(one)])]

    found, through = run(operator), run(operator._opoverload)
    assert name in eager
    assert len(found) > 1
    for ours, theirs in zip(found, through, strict=True):
        assert torch.equal(ours, theirs)


def test_without_a_gradient_it_is_the_implementation_alone(weight, eager):
    x = torch.randn(TOKENS, K)
    assert linear(x, weight).grad_fn is None
    assert eager == ["linear"]
    with torch.no_grad():
        assert not linear(x.requires_grad_(), weight).requires_grad
    assert eager == ["linear"] * 2


def test_a_mode_sees_the_operator(weight, eager):
    with Seen() as seen:
        linear(torch.randn(TOKENS, K), weight)
    assert "qloralab.linear.default" in seen.names
    assert eager == []


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_trace_holds_the_operator(weight, eager):
    traced: Any = torch.jit.trace(lambda x: linear(x, weight), torch.randn(TOKENS, K), check_trace=False)
    assert "qloralab::linear" in str(traced.graph)
    assert eager == []


def test_a_profile_holds_the_operator(weight, eager):
    with torch.profiler.profile() as profile:
        linear(torch.randn(TOKENS, K), weight)
    assert "qloralab::linear" in {event.key for event in profile.key_averages()}
    assert eager == []


def test_a_transform_is_not_passed_by(weight, eager):
    """It would take the result for a constant. The dispatcher refuses."""
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: linear(x, weight).sum())(torch.randn(TOKENS, K))
    assert eager == []


class Counted(nn.Parameter):
    """A subclass, which is to see what is done to it."""


def negated() -> Tensor:
    return torch.complex(torch.zeros(TOKENS, K), torch.randn(TOKENS, K)).conj().imag


# Tensors that are more than their memory.
VIEWS = {
    "negated": negated,
    "zero": lambda: torch._efficientzerotensor((TOKENS, K)),  # pyright: ignore[reportPrivateImportUsage]
    "a subclass": lambda: Counted(torch.randn(TOKENS, K), requires_grad=False),
}


@pytest.mark.parametrize("make", VIEWS.values(), ids=VIEWS)
def test_what_is_more_than_memory_goes_through_the_dispatcher(make, weight, eager):
    x = make()
    dense = torch.zeros(TOKENS, K) + x.detach()
    found = linear(x, weight)
    assert eager == []
    assert torch.equal(found, linear(dense.as_subclass(Tensor), weight))


def test_no_kernel_sees_a_weight_that_is_elsewhere(weight):
    """It would read memory that is not there."""
    x = torch.randn(TOKENS, K)
    assert weight.meets(x, 1)
    assert not weight._replace(packed=weight.packed.to("meta")).meets(x, 1)


def test_what_backward_needs_may_not_be_written_to(weight):
    x = torch.randn(TOKENS, K, requires_grad=True)
    A, B = torch.randn(R, K, requires_grad=True), torch.randn(N, R, requires_grad=True)
    for change in (A, weight.packed):
        y, _ = lora_ops.adapted_linear(x, *weight, None, A, B, 2.0, 0.0, torch.tensor(0))
        with torch.no_grad():
            change.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
