"""Dequantize into the workspace, then multiply: the definition's results, one buffer, nothing left in it."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from torch.nn import functional as F

import qloralab as ql
from qloralab.kernels.gpu import two_pass
from qloralab.kernels.gpu.adapter_operands import LowRank, MaskedLowRank
from qloralab.kernels.gpu.two_pass import Workspace
from qloralab.lora.dropout import keep_mask
from qloralab.nf4 import ops

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def workspaces(monkeypatch) -> dict:
    """Those of a test; no others."""
    monkeypatch.setattr(two_pass, "_workspaces", {})
    return two_pass._workspaces


def held(workspaces: dict) -> list[int]:
    """Their bytes."""
    return [one._buffer.nbytes for one in workspaces.values()]


def weight(shape: tuple[int, int], device: str, **options) -> ql.QuantizedTensor:
    return ql.quantize(torch.randn(shape), **options).to(device)


def expected(quantized: ql.QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    return ops.dequantize.reference(*quantized.operands(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "block_size"), [((63, 65), 64), ((64, 128), 128), ((1, 1), 32)])
@pytest.mark.parametrize("double_quant", [True, False], ids=["8-bit scales", "float32 scales"])
def test_both_products_are_those_of_the_definitions_weight(dtype, shape, block_size, double_quant, device):
    quantized = weight(shape, device, block_size=block_size, double_quant=double_quant)
    W = expected(quantized, dtype)
    x, bias = torch.randn(3, shape[1], device=device).to(dtype), torch.randn(shape[0], device=device).to(dtype)
    grad = torch.randn(3, shape[0], device=device).to(dtype)
    assert torch.equal(two_pass.linear(x, quantized.operands(), bias), F.linear(x, W, bias))
    assert torch.equal(two_pass.linear(x, quantized.operands()), F.linear(x, W))
    assert torch.equal(two_pass.linear_grad_input(grad, quantized.operands()), grad @ W)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [(), (0,), (17,), (2, 3)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_result_starts_as_the_adapters_term(dtype, tokens, p, device):
    shape, r, M = (33, 65), 5, math.prod(tokens)
    quantized = weight(shape, device, block_size=32)
    W = expected(quantized, dtype).double()
    x, grad = (torch.randn(*tokens, size, device=device).to(dtype) for size in (shape[1], shape[0]))
    h, G = (torch.randn(M, r, device=device).to(dtype) for _ in range(2))
    A, B = torch.randn(r, shape[1], device=device), torch.randn(shape[0], r, device=device)
    bias, seed = torch.randn(shape[0], device=device).to(dtype), torch.tensor(7, device=device)
    y = two_pass.linear(x, quantized.operands(), bias, LowRank(h, B))
    dx = two_pass.linear_grad_input(grad, quantized.operands(), MaskedLowRank(G, A, seed, p))
    keep = keep_mask(seed, M, shape[1], p).view(x.shape)
    exact_y = x.double() @ W.T + (h.double() @ B.to(dtype).double().T + bias.double()).view(*tokens, shape[0])
    exact_dx = grad.double() @ W + torch.where(keep, (G.double() @ A.to(dtype).double()).view(x.shape), 0)
    limit = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-6}[dtype]  # the start is rounded too
    for found, exact in ((y, exact_y), (dx, exact_dx)):
        assert (found.dtype, found.shape) == (dtype, exact.shape)
        assert (found.double() - exact).norm() <= limit * exact.norm()


@pytest.mark.parametrize("tokens", [(), (0,), (2, 3), (1, 0, 2)], ids=str)
def test_any_shape_of_tokens(tokens, device):
    quantized = weight((32, 64), device)
    x, grad = torch.randn(*tokens, 64, device=device), torch.randn(*tokens, 32, device=device)
    W = expected(quantized, torch.float32)
    torch.testing.assert_close(two_pass.linear(x, quantized.operands()), F.linear(x, W))
    torch.testing.assert_close(two_pass.linear_grad_input(grad, quantized.operands()), grad @ W)


def test_one_buffer_serves_weights_of_every_shape_and_grows_to_the_largest(device, workspaces):
    x = torch.randn(2, 64, device=device)
    sizes = []
    for rows in (16, 64, 8, 64):
        quantized = weight((rows, 64), device)
        y = two_pass.linear(x, quantized.operands())
        assert torch.equal(y, F.linear(x, expected(quantized, torch.float32)))  # nothing of the larger one before
        sizes += held(workspaces)
    assert sizes == [16 * 64 * 4, 64 * 64 * 4, 64 * 64 * 4, 64 * 64 * 4]


def test_each_dtype_has_its_own(device, workspaces):
    quantized = weight((16, 64), device)
    for dtype in DTYPES:
        two_pass.linear(torch.randn(2, 64, device=device).to(dtype), quantized.operands())
    assert held(workspaces) == [16 * 64 * size for size in (2, 2, 4)]


def test_a_result_does_not_change_with_the_next_product(device):
    first, second = weight((16, 64), device), weight((16, 64), device)
    x = torch.eye(64, device=device)
    y = two_pass.linear(x, first.operands())
    kept = y.clone()
    two_pass.linear(x, second.operands())
    assert torch.equal(y, kept)


def test_the_buffer_is_one_products_at_a_time():
    there = Workspace(torch.device("cpu"), torch.float32)
    order = []

    def second() -> None:
        order.append("asks")
        with there.borrow(4):
            order.append("second")

    thread = threading.Thread(target=second)
    with there.borrow(4):
        thread.start()
        thread.join(0.2)  # it cannot have it yet
        order.append("first is done")
    thread.join()
    assert order == ["asks", "first is done", "second"]


def test_a_failing_product_gives_the_buffer_back():
    there = Workspace(torch.device("cpu"), torch.float32)
    with pytest.raises(RuntimeError, match="no product"), there.borrow(4):
        raise RuntimeError("no product")
    with there.borrow(8) as buffer:
        assert buffer.shape == (8,)


@pytest.mark.gpu
def test_a_captured_product_keeps_a_buffer_of_its_own(workspaces):
    quantized = weight((64, 64), "cuda")
    x = torch.randn(4, 64, device="cuda")
    y = two_pass.linear(x, quantized.operands())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = two_pass.linear(x, quantized.operands())
    workspaces.clear()
    torch.full((64, 64), float("nan"), device="cuda")  # may get the memory that was given back
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, y)
