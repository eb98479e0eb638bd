"""Dequantize into the workspace, then multiply: the definition's results, one buffer, nothing left in it."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.nn import functional as F

import qloralab as ql
from qloralab.kernels.gpu import two_pass
from qloralab.kernels.gpu.two_pass import Workspace
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
