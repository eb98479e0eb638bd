"""The figures of what survives, against formulas written out and cases whose answer is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from qloralab.data.encoding import Encoded
from qloralab.lora.config import LoraConfig
from qloralab.lora.inject import inject_
from qloralab.lora.merged_weight import merged_quantized
from qloralab.merge.survival import Outputs, Survival, outputs, overall, survival
from qloralab.nf4.model import quantize_
from qloralab.nf4.tensor import quantize


def delta(size: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 64), torch.randn(32, 2) * size


def test_figures_are_their_formulas():
    base = quantize(torch.randn(32, 64))
    A, B = delta(0.2)
    merged = merged_quantized(base, A, B, 2.0)
    found = survival("layer", base, merged, 2 * B @ A)
    wanted, left = (2 * B @ A).double(), merged.dequantize().double() - base.dequantize().double()
    assert found.cosine == pytest.approx(float((wanted * left).sum() / wanted.norm() / left.norm()), rel=1e-5)
    assert found.kept == pytest.approx(float((wanted * left).sum() / wanted.square().sum()), rel=1e-5)
    assert found.norm_ratio == pytest.approx(float(left.norm() / wanted.norm()), rel=1e-5)
    assert found.codes_changed == pytest.approx(float((merged.codes() != base.codes()).float().mean()))
    assert 0.5 < found.cosine < 1
    assert 0.1 < found.codes_changed < 1


def test_of_a_large_update_nearly_all_survives_and_of_a_small_one_little():
    base = quantize(torch.randn(32, 64))
    cosines = []
    for size in (0.003, 0.03, 0.3, 3.0):
        A, B = delta(size)
        cosines.append(survival("", base, merged_quantized(base, A, B, 1.0), B @ A).cosine)
    assert cosines == sorted(cosines)
    assert cosines[0] < 0.3
    assert cosines[-1] > 0.99


def test_without_an_update_the_base_itself_is_the_merged_weight():
    """Quantizing what it dequantizes to would not be: double quantization takes another mean."""
    base = quantize(torch.randn(64, 256))
    again = quantize(base.dequantize(torch.float32))
    assert torch.equal(again.packed, base.packed)
    assert not torch.equal(again.absmax(), base.absmax())
    merged = merged_quantized(base, torch.randn(2, 256), torch.zeros(64, 2), 2.0)
    found = survival("", base, merged, torch.zeros(64, 256))
    assert (found.cosine, found.norm_ratio, found.codes_changed) == (1.0, 0.0, 0.0)


def test_layers_are_added_and_then_divided():
    parts = [Survival("a", 10, 1, 4.0, 1.0, 1.0, Outputs(1, 2, 4)), Survival("b", 30, 3, 0.0, 0.0, 0.0)]
    whole = overall([*parts, Survival("c", 10, 6, 5.0, 3.0, 2.0, Outputs(2, 4, 2))])
    assert whole.cosine == pytest.approx(3 / math.sqrt(9 * 4))
    assert whole.norm_ratio == pytest.approx(math.sqrt(4 / 9))
    assert (whole.codes_changed, whole.output_error, whole.update_error) == (0.2, 0.5, 0.5)
    assert overall(parts[1:]).output_error is None
    assert Survival("", 1, 1, 0.0, 1.0, 0.0, Outputs(1, 1, 0)).as_json() == {
        "layer": "", "weights": 1, "codes_changed": 1.0, "kept": 1.0, "cosine": 0.0, "norm_ratio": None,
        "output_error": 1.0, "update_error": None,
    }  # fmt: skip


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 64)
        self.up = nn.Linear(64, 32)
        self.down = nn.Linear(32, 32)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        return self.down(self.up(self.embedding(input_ids)).relu())


@torch.no_grad()
def test_outputs_are_those_of_base_and_adapter_on_what_each_layer_sees():
    model: Any = inject_(quantize_(_Model(), compute_dtype=torch.float32), LoraConfig(2, 4))
    for layer in (model.up, model.down):
        nn.init.normal_(layer.lora_B, std=0.1)
    ids = [[1, 2, 3], [4, 5]]
    found = outputs(model, [Encoded(one, one, "") for one in ids])
    first = model.embedding(torch.tensor([*ids[0], *ids[1]]))
    for name, x in (("up", first), ("down", model.up(first).relu())):
        layer = getattr(model, name)
        D = 2 * layer.lora_B @ layer.lora_A
        merged = merged_quantized(layer.base_layer.weight, layer.lora_A, layer.lora_B, 2.0).dequantize()
        exact = layer.base_layer.weight.dequantize() + D
        sums = [x @ (merged - exact).T, x @ exact.T, x @ D.T]
        for value, expected in zip(vars(found[name]).values(), sums, strict=True):
            assert value == pytest.approx(float(expected.double().square().sum()), rel=1e-4)
    assert not model.up._forward_hooks


def test_outputs_are_of_layers_in_4_bits_alone_and_progress_counts_them_in_each_text():
    model = _Model()
    model = inject_(quantize_(model, compute_dtype=torch.float32, skip=["down"]), LoraConfig(2, 4))
    calls: list[tuple[int, int]] = []
    found = outputs(model, [Encoded(one, one, "") for one in ([1, 2], [3], [4])], lambda *done: calls.append(done))
    assert [*found] == ["up"]
    assert calls == [(1, 3), (2, 3), (3, 3)]
