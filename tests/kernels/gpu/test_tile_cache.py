"""A measured decision sends the operators' products to the fused kernels, tiled or not; nothing else does."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from torch.nn import functional as F

import qloralab as ql
from qloralab.kernels.gpu import canonical, choice, operators, tile_cache, two_pass
from qloralab.lora import ops as lora_ops
from qloralab.nf4 import ops

SHAPE = (64, 128)
CLOSE = 0.006  # bfloat16 products with weights that are rounded elsewhere, root mean square over that of the result


@pytest.fixture(autouse=True)
def own_record(monkeypatch, tmp_path):
    monkeypatch.setattr(choice, "record_path", lambda: tmp_path / choice.FILE)
    choice.forget()
    tile_cache.release()
    yield
    choice.forget()
    tile_cache.release()
    two_pass.release()


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The names of the fused kernels that were launched."""
    names: list[str] = []
    for module, name in itertools.product((tile_cache, canonical), ("linear", "linear_grad_input")):
        place, what = (name, f"canonical {name}") if module is canonical else (f"_{name}", f"fused {name}")
        right = getattr(module, place)
        monkeypatch.setattr(
            module, place, lambda *args, what=what, right=right, **named: names.append(what) or right(*args, **named)
        )
    return names


def decide_for_fused(device: str, ms: float = 1.0, kernel: str = "fused") -> None:
    buckets = {"4": {kernel: ms, "two-pass": 2.0}}
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
    W = ops.dequantize.reference(*operands, torch.float32)
    y, dx = operators.linear(x, *operands, bias), operators.linear_grad_input(grad, *operands)
    assert launched == ["fused linear", "fused linear_grad_input"]
    assert error(y, F.linear(x.float(), W, bias.float())) < CLOSE
    assert error(dx, grad.float() @ W) < CLOSE
    assert two_pass.release() == 0  # it was not used


def test_an_adapter_is_in_the_fused_products(device, launched):
    decide_for_fused(device)
    operands = weight(device).operands()
    x, grad, bias = inputs(device)
    A, B = torch.randn(5, 128, device=device) / 8, torch.randn(64, 5, device=device) / 8
    seed, p, scaling = torch.tensor(3, device=device), 0.2, 2.0
    y, h = operators.adapted_linear(x, *operands, bias, A, B, scaling, p, seed)
    dx, dA, dB = operators.adapted_linear_backward(grad, x, h, *operands, A, B, scaling, p, seed, True)
    assert launched == ["fused linear", "fused linear_grad_input"]
    assert two_pass.release() == 0  # it was not used
    expected = lora_ops.adapted_linear.reference(x, *operands, bias, A, B, scaling, p, seed)
    gradients = lora_ops.adapted_linear_backward.reference(grad, x, h, *operands, A, B, scaling, p, seed, True)
    for found, right in zip((y, h, dx, dA, dB), (*expected, *gradients), strict=True):
        assert (found.dtype, found.shape) == (right.dtype, right.shape)
        assert error(found, right) < CLOSE


MEASURED = {
    "forward is faster fused": (1.0, 4.0),
    "backward is": (4.0, 1.0),
    "the sum is": (1.0, 2.5),
    "both are": (1.0, 1.0),
}


@pytest.mark.parametrize("tokens", [3, 30, 60])
@pytest.mark.parametrize("fused_ms", MEASURED.values(), ids=MEASURED)
def test_both_directions_multiply_by_the_same_bits(fused_ms, tokens, device):
    """Whatever was measured. Rows of the unit matrix read the weight out of each direction."""
    keys = [choice.weight_key(operation, *SHAPE) for operation in choice.OPERATIONS]
    times = [{str(choice.bucket(tokens)): {"fused": ms, "two-pass": 2.0}} for ms in fused_ms]
    choice.save(choice.device_name(torch.device(device)), dict(zip(keys, times, strict=True)))
    operands = weight(device).operands()
    y = operators.linear(torch.eye(128, dtype=torch.bfloat16, device=device)[:tokens], *operands, None)
    dx = operators.linear_grad_input(torch.eye(64, dtype=torch.bfloat16, device=device)[:tokens], *operands)
    assert torch.equal(y[:, :tokens].T, dx[:, :tokens])


@pytest.mark.parametrize("way", choice.KERNELS)
def test_no_result_is_a_view(way, device, launched):
    """Autograd would refuse to change it in place."""
    operands = weight(device).operands()
    x, grad, bias = (tensor.expand(2, *tensor.shape) if tensor.dim() > 1 else tensor for tensor in inputs(device))
    A, B = torch.randn(5, 128, device=device), torch.randn(64, 5, device=device)
    rest = A, B, 2.0, 0.2, torch.tensor(3, device=device)
    with choice.use(way):
        y, h = operators.adapted_linear(x, *operands, bias, *rest)
        results = [
            operators.linear(x, *operands, bias),
            operators.linear_grad_input(grad, *operands),
            *(y, *operators.adapted_linear_backward(grad, x, h, *operands, *rest, True)),
        ]
    assert not any(result._is_view() for result in results)
    assert set(launched) == (set() if way == "two-pass" else {f"{way} linear", f"{way} linear_grad_input"})


@pytest.mark.parametrize("decision", [None, 3.0], ids=["not measured", "measured slower"])
def test_without_one_products_are_two_pass(decision, device, launched):
    if decision:
        decide_for_fused(device, decision)
    operands = weight(device).operands()
    x, grad, _ = inputs(device)
    W = ops.dequantize.reference(*operands, torch.bfloat16)
    assert torch.equal(operators.linear(x, *operands, None), F.linear(x, W))
    assert torch.equal(operators.linear_grad_input(grad, *operands), grad @ W)
    assert launched == []
    assert tile_cache.release() == 0


NOT_TILED = {"blocks of 32": (torch.bfloat16, 32), "float16": (torch.float16, 64)}
not_tiled = pytest.mark.parametrize(("dtype", "block_size"), NOT_TILED.values(), ids=NOT_TILED)


@not_tiled
def test_what_cannot_be_tiled_is_canonical_where_that_was_measured_to_be_faster(dtype, block_size, device, launched):
    decide_for_fused(device, kernel="canonical")
    operands = weight(device, block_size=block_size).operands()
    x, grad, bias = inputs(device, dtype)
    A, B = torch.randn(5, 128, device=device) / 8, torch.randn(64, 5, device=device) / 8
    rest = A, B, 2.0, 0.2, torch.tensor(3, device=device)
    W = ops.dequantize.reference(*operands, dtype).float()
    y, dx = operators.linear(x, *operands, bias), operators.linear_grad_input(grad, *operands)
    adapted, h = operators.adapted_linear(x, *operands, bias, *rest)
    gradients = operators.adapted_linear_backward(grad, x, h, *operands, *rest, True)
    assert launched == ["canonical linear", "canonical linear_grad_input"] * 2
    assert two_pass.release() == 0  # it was not used
    right = lora_ops.adapted_linear_backward.reference(grad, x, h, *operands, *rest, True)
    expected = lora_ops.adapted_linear.reference(x, *operands, bias, *rest)
    for found, other in zip((y, dx), (F.linear(x.float(), W, bias.float()), grad.float() @ W), strict=True):
        assert error(found, other) < CLOSE
    for found, other in zip((adapted, h, *gradients), (*expected, *right), strict=True):
        assert (found.dtype, found.shape) == (other.dtype, other.shape)
        assert error(found, other) < CLOSE


@not_tiled
def test_a_decision_for_tiles_is_not_one_for_what_cannot_be_tiled(dtype, block_size, device, launched):
    decide_for_fused(device)
    operands = weight(device, block_size=block_size).operands()
    x, grad, _ = inputs(device, dtype)
    W = ops.dequantize.reference(*operands, dtype)
    assert torch.equal(operators.linear(x, *operands, None), F.linear(x, W))
    assert torch.equal(operators.linear_grad_input(grad, *operands), grad @ W)
    assert launched == []
    assert tile_cache.release() == 0


@pytest.mark.parametrize("kernel", ["fused", "canonical"])
def test_float32_is_two_pass(kernel, device, launched):
    decide_for_fused(device, kernel=kernel)
    operands = weight(device).operands()
    x, _, bias = inputs(device, torch.float32)
    assert operators.linear(x, *operands, bias).dtype == torch.float32
    assert launched == []


def test_a_codebook_that_cannot_be_ordered_is_two_pass(device, launched):
    decide_for_fused(device)
    packed, scales, absmax2, offset, values, shape, block_size = weight(device).operands()
    values = values.abs() + 0.1
    values[0] = -1  # its signs do not pair
    operands = packed, scales, absmax2, offset, values, shape, block_size
    x, grad, _ = inputs(device)
    W = ops.dequantize.reference(*operands, torch.bfloat16)
    for _ in range(2):  # the second time it is known
        assert torch.equal(operators.linear(x, *operands, None), F.linear(x, W))
    assert torch.equal(operators.linear_grad_input(grad, *operands), grad @ W)
    assert launched == []
    assert tile_cache.release() == 0


def test_tiles_of_inference_tensors(device):
    with torch.inference_mode():
        quantized = weight(device)
        assert quantized.packed.is_inference()
        made = tile_cache.tiles(quantized.operands())
    assert tile_cache.tiles(quantized.operands()) is made is not None


def test_tiles_are_made_once_and_go_with_the_weight(device):
    first, second = weight(device), weight(device)
    made = tile_cache.tiles(first.operands())
    assert made is not None
    assert tile_cache.tiles(first.operands()) is made
    assert tile_cache.tiles(second.operands()) is not made
    del second
    gc.collect()
    assert tile_cache.release() == 1
    assert tile_cache.tiles(first.operands()) is not made


def test_tiles_are_made_again_when_the_codes_were_written_to(device):
    quantized = weight(device)
    before = tile_cache.tiles(quantized.operands())
    quantized.packed.bitwise_xor_(0x11)
    after = tile_cache.tiles(quantized.operands())
    assert before is not None
    assert after is not None
    assert not torch.equal(before.words, after.words)
