"""bitsandbytes is called as promised, and the oracle is right where the answer can be worked out by hand."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from qloralab.nf4.codebook import codebook_values
from qloralab.nf4.tensor import quantize
from qloralab.parity import peer


def test_without_bitsandbytes_the_user_is_told_how_to_bring_it(monkeypatch, refusal):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name))
    peer.functional.cache_clear()
    try:
        assert "pip install" in refusal(peer.functional)
    finally:
        peer.functional.cache_clear()


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_nested_is_what_their_own_double_quantization_makes(codebook):
    weight = torch.randn(70, 640, dtype=torch.bfloat16)
    packed, single = peer.quantize(weight, codebook, 64)
    packed2, double = peer.quantize(weight, codebook, 64, double_quant=True)
    ours, theirs = peer.tensors(packed, peer.nested(single)), peer.tensors(packed2, double)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_product_is_that_of_training_and_leaves_the_weight_as_it_is():
    weight = torch.randn(64, 128, dtype=torch.bfloat16)
    packed, state = peer.quantize(weight, "nf4", 64)
    before = packed.clone(), state.absmax.clone(), peer.dequantize(packed, state)
    x, grad = torch.randn(3, 128, dtype=torch.bfloat16), torch.randn(3, 64, dtype=torch.bfloat16)
    y, dx = peer.product(x, packed, state, grad)
    assert not getattr(state, "packing_format_for_cpu", False)
    assert all(map(torch.equal, before, (packed, state.absmax, peer.dequantize(packed, state))))
    assert torch.equal(y, torch.nn.functional.linear(x, before[2]))
    assert torch.equal(dx, grad @ before[2])


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float64], ids=str)
def test_the_state_dict_is_that_of_a_layer_with_a_bias(storage):
    weight = torch.randn(16, 64)
    found = peer.state_dict(weight, "nf4", True, storage)
    assert found["weight"].dtype == storage
    assert found["bias"].shape == (16,)
    packed, state = peer.quantize(weight, "nf4", 64, double_quant=True)
    expected = peer.tensors(packed, state)
    assert found.keys() == expected.keys() | {"bias"}
    assert torch.equal(found["weight"].view(torch.uint8).flatten(), packed.flatten())
    assert torch.equal(found["weight.absmax"], expected["weight.absmax"])


def test_the_oracle_by_hand():
    values = codebook_values("nf4")
    packed = torch.tensor([[0xF0], [0x7F], [0x80]], dtype=torch.uint8)
    absmax = torch.tensor([2.0])
    weight = peer.oracle(packed, absmax, values, 32, torch.Size([5]), torch.float32)
    assert weight.tolist() == [2.0, -2.0, 0.0, 2.0, 2 * values[8].item()]
    negative = peer.oracle(packed, -absmax, values, 32, torch.Size([5]), torch.float32)
    assert torch.equal(negative, -weight)
    assert not negative[2].signbit()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_oracle_agrees_with_what_it_did_not_look_at(dtype):
    q = quantize(torch.randn(33, 70).to(dtype), block_size=32)
    weight = peer.oracle(q.packed, q.absmax(), q.values, q.block_size, q.shape, q.dtype)
    assert torch.equal(weight, q.dequantize())
    exact = q.values[int(q.packed[0, 0]) >> 4].double() * q.absmax()[0].double()
    assert weight[0, 0] == exact.float().to(dtype)
