"""The operators with an adapter: products and gradients against float64, what they keep, what they leave out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qloralab.lora import ops as lora_ops
from qloralab.lora.dropout import keep_mask, rate
from qloralab.nf4.tensor import QuantizedTensor, linear, quantize

from ..nf4.weights import assert_near, biases, dtypes

K, N, R = 65, 33, 7  # inputs, outputs, rank
SCALING, SEED = 1.5, torch.tensor(20230523)
# Root-mean-square error relative to float64 for the same W, A and B. float32: sums of up to 130 terms stay within a
# few of its 6e-8. bfloat16 rounds each of two terms, their sum, and h or G: four times at most 2**-9 / sqrt(3).
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}
dropouts = pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])


class Case:
    """A packed weight, a bias, and an adapter that is exact in the low precisions and adds about as much as W."""

    def __init__(self, dtype: torch.dtype = torch.float32, bias: bool = True, shape: tuple[int, int] = (N, K)):
        n, k = shape
        self.weight: QuantizedTensor = quantize(torch.randn(shape) / max(k, 1) ** 0.5)
        self.b = torch.randn(n).to(dtype).requires_grad_() if bias else None
        self.A = (torch.randn(R, k) / max(k, 1) ** 0.5).half().bfloat16().float().requires_grad_()
        self.B = (torch.randn(n, R) / R**0.5).half().bfloat16().float().requires_grad_()

    def __call__(self, x: Tensor, p: float = 0.0, run: Any = lora_ops.adapted_linear) -> Tensor:
        return run(x, *self.weight.operands(), self.b, self.A, self.B, SCALING, p, SEED)[0]

    def leaves(self, x: Tensor) -> dict[str, Tensor]:
        named = {"x": x, "A": self.A, "B": self.B, "bias": self.b}
        return {name: leaf for name, leaf in named.items() if leaf is not None}

    def exact(self, x: Tensor, p: float, grad: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """y and the gradients in float64, by autograd through the formula."""
        leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in self.leaves(x).items()}
        W = self.weight.dequantize(x.dtype).double()
        keep = keep_mask(SEED, math.prod(x.shape[:-1]), x.shape[-1], p).view(x.shape)
        h = SCALING / (1 - rate(p)) * (leaves["x"] * keep) @ leaves["A"].T
        y = leaves["x"] @ W.T + h @ leaves["B"].T + leaves.get("bias", 0)
        return y.detach(), dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad.double()), strict=True))


@dtypes
@dropouts
@biases
@pytest.mark.parametrize("rows", [(), (1,), (0,), (63,), (2, 3), (2, 0), (2, 3, 5)], ids=str)
def test_forward_and_gradients_against_float64(dtype, p, bias, rows):
    case = Case(dtype, bias)
    x = torch.randn(*rows, K).to(dtype).requires_grad_()
    grad = torch.randn(*rows, N).to(dtype)
    y = case(x, p)
    assert y.dtype == dtype
    y64, exact = case.exact(x, p, grad)
    assert_near(y.detach(), y64, TOLERANCE[dtype], "y")
    found = torch.autograd.grad(y, list(case.leaves(x).values()), grad)
    for (name, leaf), gradient in zip(case.leaves(x).items(), found, strict=True):
        assert gradient.dtype == leaf.dtype
        assert_near(gradient, exact[name], TOLERANCE[dtype], name)


def test_the_second_result_is_what_backward_takes():
    case, x = Case(), torch.randn(2, 3, K)
    _, h = lora_ops.adapted_linear(x, *case.weight.operands(), case.b, case.A, case.B, SCALING, 0.3, SEED)
    kept_x = x.double().view(6, K) * keep_mask(SEED, 6, K, 0.3)
    assert_near(h, SCALING / (1 - rate(0.3)) * kept_x @ case.A.detach().double().T, TOLERANCE[torch.float32])
    assert not h.requires_grad


@dropouts
@pytest.mark.parametrize(
    "view",
    [lambda t: t.transpose(0, 1), lambda t: t[:, :1].expand(t.shape), lambda t: t.flip(0)[::2], lambda t: t[:0]],
    ids=["transposed", "expanded", "step", "none"],
)
def test_strides_of_the_input_and_of_the_gradient_do_not_matter(p, view):
    case = Case()
    x, grad = view(torch.randn(4, 6, K)), view(torch.randn(4, 6, N))
    y64, exact = case.exact(x, p, grad)
    x = x.detach().requires_grad_()
    y = case(x, p)
    assert_near(y.detach(), y64, TOLERANCE[torch.float32])
    found = torch.autograd.grad(y, list(case.leaves(x).values()), grad)
    for name, gradient in zip(case.leaves(x), found, strict=True):
        assert_near(gradient, exact[name], TOLERANCE[torch.float32], name)


@pytest.mark.parametrize("shape", [(0, 64), (5, 0)], ids=["no-outputs", "no-inputs"])
@dropouts
def test_an_empty_weight(shape, p):
    case = Case(shape=shape)
    x = torch.randn(3, shape[1], requires_grad=True)
    y = case(x, p)
    assert torch.equal(y, case.b.expand(3, -1))  # pyright: ignore[reportOptionalMemberAccess]
    y.sum().backward()
    for leaf in case.leaves(x).values():
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
    assert not case.A.grad.any()  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("names", [["x"], ["A"], ["B"], ["bias"], ["x", "bias"], ["A", "B"], []], ids=str)
def test_gradients_only_where_asked_for(names):
    case, x = Case(), torch.randn(3, K)
    for name, leaf in case.leaves(x).items():
        leaf.requires_grad_(name in names)
    y = case(x, 0.3)
    assert y.requires_grad == bool(names)
    if names:
        y.sum().backward()
    _, exact = case.exact(x, 0.3, torch.ones(3, N))
    for name, leaf in case.leaves(x).items():
        assert (leaf.grad is not None) == (name in names)
        if leaf.grad is not None:
            assert_near(leaf.grad, exact[name], TOLERANCE[torch.float32], name)


def test_the_gradient_of_the_input_is_left_out_when_not_needed():
    case, x, grad = Case(), torch.randn(3, K), torch.randn(3, N)
    operands = *case.weight.operands(), case.A.detach(), case.B.detach(), SCALING, 0.3, SEED
    with torch.no_grad():
        _, h = lora_ops.adapted_linear(x, *case.weight.operands(), None, case.A, case.B, SCALING, 0.3, SEED)
    _, *expected = lora_ops.adapted_linear_backward(grad, x, h, *operands, True)
    dx, *found = lora_ops.adapted_linear_backward(grad, x, h, *operands, False)
    assert dx.shape == (0,)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@dtypes
@dropouts
@pytest.mark.parametrize("x_grad", [False, True], ids=["x-frozen", "x-trains"])
def test_backward_keeps_the_operands_h_and_the_seed(dtype, p, x_grad):
    """No weight in full, no mask, no second x, no copy of A or B."""
    case = Case(dtype, shape=(256, 512))
    x = torch.randn(64, 512, dtype=dtype, requires_grad=x_grad)
    saved: dict[int, int] = {}

    def note(part: Tensor) -> Tensor:
        saved[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        return part

    with torch.autograd.graph.saved_tensors_hooks(note, lambda part: part):
        y = case(x, p)
    parts = [x, *case.weight.operands()[:5], case.A, case.B, SEED]
    own = {part.untyped_storage().data_ptr() for part in parts if part is not None}
    assert own <= set(saved)
    assert [size for pointer, size in saved.items() if pointer not in own] == [64 * R * x.itemsize]  # h
    y.sum().backward()
    assert case.A.grad is not None


def test_a_second_derivative_is_refused():
    case, x = Case(), torch.randn(3, K, requires_grad=True)
    (first,) = torch.autograd.grad(case(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="qloralab::adapted_linear has a first derivative only"):
        first.sum().backward()


@dtypes
@dropouts
def test_autocast_does_not_change_the_dtype(dtype, p):
    case, x = Case(dtype), torch.randn(5, K).to(dtype).requires_grad_()
    grad = torch.randn(5, N).to(dtype)
    expected = [case(x, p), *torch.autograd.grad(case(x, p), [x, case.A], grad)]
    with torch.autocast("cpu", torch.bfloat16):
        found = [case(x, p), *torch.autograd.grad(case(x, p), [x, case.A], grad)]
        plain = linear(x, case.weight)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert torch.equal(plain, linear(x, case.weight))
