"""A measured choice sends the operators' products to the fused kernels; nothing else does."""

from __future__ import annotations

import gc
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import qloralab as ql
from qloralab.kernels.gpu import choice, few_tokens, fused, operators, self_check, two_pass
from qloralab.lora import ops as lora_ops
from qloralab.nf4 import ops

N, K = SHAPE = (64, 128)
CLOSE = 0.006  # bfloat16 products with weights that are rounded elsewhere, root mean square over that of the result


@pytest.fixture(autouse=True)
def launched(monkeypatch) -> list[str]:
    """The names of the fused kernels that were launched, and "two-pass" for a weight that was dequantized."""
    names: list[str] = []

    def noted(module, name: str, what: str) -> None:
        right = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **named: names.append(what) or right(*args, **named))

    noted(fused, "_linear", "linear")
    noted(fused, "_linear_grad_input", "linear_grad_input")
    noted(two_pass, "dequantize", "two-pass")
    monkeypatch.setattr(two_pass, "_workspaces", {})
    return names


@pytest.fixture
def measured(device, monkeypatch) -> Iterator[Callable[[int], None]]:
    """``measured(tokens)``: on this device, weights of SHAPE are fused up to so many."""

    def up_to(tokens: int) -> None:
        monkeypatch.setattr(choice, "MEASURED", {choice.device(torch.device(device)).name: {SHAPE: tokens}})
        choice._limit.cache_clear()

    yield up_to
    choice._limit.cache_clear()


def weight(device: str, **options) -> ql.QuantizedTensor:
    return ql.quantize(torch.randn(SHAPE), **options).to(device)


def inputs(device: str, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, grad, bias = (torch.randn(*shape, device=device).to(dtype) for shape in ((3, K), (3, N), (N,)))
    return x, grad, bias


def adapter(device: str) -> tuple[torch.Tensor, torch.Tensor, float, float, torch.Tensor]:
    A, B = torch.randn(5, K, device=device) / 8, torch.randn(N, 5, device=device) / 8
    return A, B, 2.0, 0.2, torch.tensor(3, device=device)


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected.double()).norm() / expected.double().norm())


def test_a_measured_choice_is_followed(device, launched, measured):
    measured(4)
    operands = weight(device).operands()
    x, grad, bias = inputs(device)
    W = ops.dequantize.reference(*operands, torch.float32)
    y, dx = operators.linear(x, *operands, bias), operators.linear_grad_input(grad, *operands)
    assert launched == ["linear", "linear_grad_input"]
    assert error(y, F.linear(x.float(), W, bias.float())) < CLOSE
    assert error(dx, grad.float() @ W) < CLOSE


def test_few_tokens_take_their_own_kernel_where_it_serves(device, launched, measured, monkeypatch):
    measured(4)
    operands, (x, grad, bias) = weight(device).operands(), inputs(device)
    y = torch.zeros(3, N, device=device)
    monkeypatch.setattr(few_tokens, "serves", lambda x, M, weight: M == 3)
    monkeypatch.setattr(few_tokens, "few_tokens", lambda *given: launched.append("few") or y)
    assert operators.linear(x, *operands, bias) is y
    operators.linear_grad_input(grad, *operands)
    operators.linear(x[:2], *operands, bias)
    assert launched == ["few", "linear_grad_input", "linear"]


def test_an_adapter_is_in_the_fused_products(device, launched, measured):
    measured(4)
    operands, rest = weight(device).operands(), adapter(device)
    x, grad, bias = inputs(device)
    y, h = operators.adapted_linear(x, *operands, bias, *rest)
    results = y, h, *operators.adapted_linear_backward(grad, x, h, *operands, *rest, True)
    assert launched == ["linear", "linear_grad_input"]
    expected = lora_ops.adapted_linear.reference(x, *operands, bias, *rest)
    gradients = lora_ops.adapted_linear_backward.reference(grad, x, h, *operands, *rest, True)
    for found, right in zip(results, (*expected, *gradients), strict=True):
        assert (found.dtype, found.shape) == (right.dtype, right.shape)
        assert error(found, right) < CLOSE


@pytest.mark.parametrize("tokens", [3, 30, 60])
@pytest.mark.parametrize("up_to", [0, 64], ids=["two-pass", "fused"])
def test_both_directions_multiply_by_the_same_bits(up_to, tokens, device, measured):
    """Rows of the unit matrix read the weight out of each direction."""
    measured(up_to)
    operands = weight(device).operands()
    y = operators.linear(torch.eye(K, dtype=torch.bfloat16, device=device)[:tokens], *operands, None)
    dx = operators.linear_grad_input(torch.eye(N, dtype=torch.bfloat16, device=device)[:tokens], *operands)
    assert torch.equal(y[:, :tokens].T, dx[:, :tokens])


@pytest.mark.parametrize("way", choice.KERNELS)
def test_no_result_is_a_view(way, device, launched):
    """Autograd would refuse to change it in place."""
    operands, rest = weight(device).operands(), adapter(device)
    x, grad, bias = (tensor.expand(2, *tensor.shape) if tensor.dim() > 1 else tensor for tensor in inputs(device))
    with choice.use(way):
        y, h = operators.adapted_linear(x, *operands, bias, *rest)
        results = [
            operators.linear(x, *operands, bias),
            operators.linear_grad_input(grad, *operands),
            *(y, *operators.adapted_linear_backward(grad, x, h, *operands, *rest, True)),
        ]
    assert not any(result._is_view() for result in results)
    assert set(launched) == ({"two-pass"} if way == "two-pass" else {"linear", "linear_grad_input"})


def elsewhere(operands: Any) -> Any:
    packed = operands.packed.new_empty(len(operands.packed) + 1, 1)[1:].copy_(operands.packed)
    return operands._replace(packed=packed)


# What is measured, the dtype of x, options of the weight, and what is done to its operands.
TWO_PASS = {
    "not measured": (None, torch.bfloat16, {}, tuple),
    "more tokens": (2, torch.bfloat16, {}, tuple),
    "blocks of 32": (4, torch.bfloat16, {"block_size": 32}, tuple),
    "float16": (4, torch.float16, {}, tuple),
    "float32": (4, torch.float32, {}, tuple),
    "codes that begin anywhere": (4, torch.bfloat16, {}, elsewhere),
}


@pytest.mark.parametrize(("up_to", "dtype", "options", "change"), TWO_PASS.values(), ids=TWO_PASS)
def test_everything_else_is_two_pass(up_to, dtype, options, change, device, launched, measured):
    if up_to is not None:
        measured(up_to)
    operands: Any = change(weight(device, **options).operands())
    x, grad, _ = inputs(device, dtype)
    W = ops.dequantize.reference(*operands, dtype)
    for _ in range(2):  # the second time it is known
        assert torch.equal(operators.linear(x, *operands, None), F.linear(x, W))
    assert torch.equal(operators.linear_grad_input(grad, *operands), grad @ W)
    assert launched == ["two-pass"] * 3


@pytest.mark.parametrize("kernel", ["linear", "linear_grad_input"])
def test_a_kernel_that_fails_its_check_makes_both_directions_two_pass(kernel, device, launched, measured, monkeypatch):
    measured(4)
    monkeypatch.setitem(self_check._passed, (kernel, torch.device(device)), "ptxas has failed")
    monkeypatch.setattr(self_check, "_warned", set())
    operands = weight(device).operands()
    x, grad, _ = inputs(device)
    with pytest.warns(
        RuntimeWarning, match=f"kernel of {kernel} is not in use: ptxas has failed\nIts products are two-"
    ):
        operators.linear(x, *operands, None)
    operators.linear_grad_input(grad, *operands)
    assert launched == ["two-pass"] * 2


class Allocations(TorchDispatchMode):
    """Sums up the memory of what operations make, but for triton's interpreter, and keeps weak references to it."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes, self.made = 0, list[weakref.ref[torch.Tensor]]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        callers = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_stack(None)}
        if "triton.runtime.interpreter" in callers or not isinstance(result, torch.Tensor):
            return result
        if result.untyped_storage().data_ptr() not in known:
            self.nbytes += result.untyped_storage().nbytes()
            self.made.append(weakref.ref(result))
        return result


@pytest.mark.parametrize("rows", [192, 200], ids=["whole steps", "a copy of dy"])
def test_no_memory_grows_with_the_weight_and_none_is_kept(rows, device):
    """What the two products of one token allocate are vectors; parts of a split sum are as many as there are splits."""
    large, small = ql.quantize(torch.randn(rows, 256)).to(device), weight(device)
    with choice.use("fused"):
        for quantized, counted in ((small, False), (large, True)):
            operands = quantized.operands()
            x, grad = (torch.randn(1, size, device=device).bfloat16() for size in reversed(quantized.shape))
            with Allocations() as allocations:
                y, dx = operators.linear(x, *operands, None), operators.linear_grad_input(grad, *operands)
            if counted:
                assert 0 < allocations.nbytes <= 4 * 5 * (y.numel() + dx.numel())
                assert allocations.nbytes < operands.packed.nbytes / 2
                del y, dx
                gc.collect()
                assert [made() for made in allocations.made if made() is not None] == []
