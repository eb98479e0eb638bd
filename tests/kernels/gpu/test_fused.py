"""A measured decision sends the operators' products to the fused kernels; nothing else does."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.nn import functional as F

import qloralab as ql
from qloralab.kernels.gpu import choice, fused, operators, two_pass
from qloralab.nf4 import reference

SHAPE = (64, 128)
CLOSE = 0.006  # bfloat16 products with weights that are rounded elsewhere, root mean square over that of the result


@pytest.fixture(autouse=True)
def own_record(monkeypatch, tmp_path):
    monkeypatch.setattr(choice, "record_path", lambda: tmp_path / choice.FILE)
    choice.forget()
    fused.release()
    yield
    choice.forget()
    fused.release()
    two_pass.release()


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The names of the fused kernels that were launched."""
    names: list[str] = []
    for name in ("_linear", "_linear_grad_input"):
        right = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *args, name=name, right=right: names.append(name) or right(*args))
    return names


def decide_for_fused(device: str, fused_ms: float = 1.0) -> None:
    buckets = {"4": {"fused": fused_ms, "two-pass": 2.0}}
    keys = [choice.weight_key(operation, *SHAPE) for operation in choice.OPERATIONS]
    choice.save(choice.device_name(torch.device(device)), dict.fromkeys(keys, buckets))


def weight(device: str, **options) -> ql.QuantizedTensor:
    return ql.quantize(torch.randn(SHAPE), **options).to(device)


def inputs(device: str, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, grad, bias = (torch.randn(*shape, device=device).to(dtype) for shape in ((3, 128), (3, 64), (64,)))
    return x, grad, bias


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected.double()).norm() / expected.double().norm())


def test_a_decision_for_fused_is_followed(device, launched):
    decide_for_fused(device)
    operands = weight(device).operands()
    x, grad, bias = inputs(device)
    W = reference.dequantize(*operands, torch.float32)
    y, dx = operators.linear(x, *operands, bias), operators.linear_grad_input(grad, *operands)
    assert launched == ["_linear", "_linear_grad_input"]
    assert error(y, F.linear(x.float(), W, bias.float())) < CLOSE
    assert error(dx, grad.float() @ W) < CLOSE
    assert two_pass.release() == 0  # it was not used


@pytest.mark.parametrize("decision", [None, 3.0], ids=["not measured", "measured slower"])
def test_without_one_products_are_two_pass(decision, device, launched):
    if decision:
        decide_for_fused(device, decision)
    operands = weight(device).operands()
    x, grad, _ = inputs(device)
    W = reference.dequantize(*operands, torch.bfloat16)
    assert torch.equal(operators.linear(x, *operands, None), F.linear(x, W))
    assert torch.equal(operators.linear_grad_input(grad, *operands), grad @ W)
    assert launched == []
    assert fused.release() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_are_two_pass(dtype, device, launched):
    decide_for_fused(device)
    operands = weight(device).operands()
    x, _, bias = inputs(device, dtype)
    assert operators.linear(x, *operands, bias).dtype == dtype
    assert launched == []


def test_tiles_of_inference_tensors(device):
    with torch.inference_mode():
        quantized = weight(device)
        assert quantized.packed.is_inference()
        made = fused.tiles(quantized.operands())
    assert fused.tiles(quantized.operands()) is made is not None


def test_a_weight_that_cannot_be_tiled_is_two_pass(device, launched):
    decide_for_fused(device)
    operands = weight(device, block_size=32).operands()
    x, grad, _ = inputs(device)
    W = reference.dequantize(*operands, torch.bfloat16)
    for _ in range(2):  # the second time it is known
        assert torch.equal(operators.linear(x, *operands, None), F.linear(x, W))
    assert torch.equal(operators.linear_grad_input(grad, *operands), grad @ W)
    assert launched == []
    assert fused.release() == 0


def test_tiles_are_made_once_and_go_with_the_weight(device):
    first, second = weight(device), weight(device)
    made = fused.tiles(first.operands())
    assert made is not None
    assert fused.tiles(first.operands()) is made
    assert fused.tiles(second.operands()) is not made
    del second
    gc.collect()
    assert fused.release() == 1
    assert fused.tiles(first.operands()) is not made


def test_tiles_are_made_again_when_the_codes_were_written_to(device):
    quantized = weight(device)
    before = fused.tiles(quantized.operands())
    quantized.packed.bitwise_xor_(0x11)
    after = fused.tiles(quantized.operands())
    assert before is not None
    assert after is not None
    assert not torch.equal(before.words, after.words)
