"""Training through the quantizer: the forward of the merged weight, the gradients of its formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qloralab.lora.config import LoraConfig
from qloralab.lora.inject import inject_, train_merge_aware_
from qloralab.lora.merge import merge_
from qloralab.lora.merged_weight import merged_quantized
from qloralab.nf4.model import quantize_

from .models import adapted, llama, logits


def layer(dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    model: Any = adapted(quantize_(nn.Sequential(nn.Linear(64, 32)), compute_dtype=dtype, **fields), r=2, lora_alpha=6)
    train_merge_aware_(model)
    return model[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_forward_is_that_of_the_merged_weight(dtype):
    one, x = layer(dtype), torch.randn(3, 5, 64)
    packed = merged_quantized(one.base_layer.weight, one.lora_A, one.lora_B, 3.0)
    assert not torch.equal(packed.packed, one.base_layer.weight.packed)
    alone: Any = quantize_(nn.Sequential(nn.Linear(64, 32)), compute_dtype=dtype)[0]
    alone.weight, alone.bias = packed, one.bias
    assert torch.equal(one(x), alone(x))
    assert one(x).dtype == torch.float32


def test_gradients_pass_the_quantizer_straight():
    one, x = layer(codebook="fp4", double_quant=False), torch.randn(2, 5, 64, requires_grad=True)
    weights = torch.randn(2, 5, 32)
    (one(x) * weights).sum().backward()
    grad, rows = weights.flatten(0, 1).double(), x.detach().flatten(0, 1).double()
    A, B = one.lora_A.detach().double(), one.lora_B.detach().double()
    packed = merged_quantized(one.base_layer.weight, one.lora_A, one.lora_B, 3.0)
    expected = {
        "x": (x.grad, (grad @ packed.dequantize(torch.float32).double()).view(x.shape)),
        "A": (one.lora_A.grad, 3.0 * B.T @ grad.T @ rows),
        "B": (one.lora_B.grad, 3.0 * grad.T @ rows @ A.T),
    }
    for name, (found, exact) in expected.items():
        assert found is not None
        assert (found - exact).norm() < 1e-5 * exact.norm(), name


def test_before_the_first_step_it_is_the_base():
    model, base = inject_(quantize_(llama()), LoraConfig(4, 8)), quantize_(llama())
    train_merge_aware_(model)
    assert torch.equal(logits(model), logits(base))


def test_merge_puts_the_quantized_sum_in():
    model = adapted(quantize_(llama(), compute_dtype=torch.float32))
    plain = logits(model)
    train_merge_aware_(model)
    expected = logits(model)
    found = logits(merge_(model))
    assert (found - expected).abs().max() < 1e-4
    assert (found - plain).abs().max() > 1e-2


def test_what_cannot_be_trained_so_is_refused():
    for model, why in (
        (adapted(), "is dense; merge-aware training takes weights in nf4 or fp4"),
        (adapted(quantize_(llama(), "int4")), "is int4; merge-aware"),
        (adapted(quantize_(llama()), lora_dropout=0.1), "has dropout; merge-aware training has none"),
    ):
        with pytest.raises(ValueError, match=why):
            train_merge_aware_(model)
