"""KL beside the definition, outputs beside naive products, weights that come back, sums that add up."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from qloralab.data.encoding import Encoded
from qloralab.errors import UserError
from qloralab.evaluate.measure import evaluate
from qloralab.inspection.budget import ROUNDINGS, error_budget, groups, rounding_budget, scales_alone
from qloralab.inspection.run_model import Pieces, Runner, Swapped, linear_layers
from qloralab.nf4.data_type import DATA_TYPES, data_type
from qloralab.nf4.tensor import quantize

NF4 = DATA_TYPES["nf4"]


def documents(count=3, length=20):
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(256, (length - 2 * i,), generator=g).tolist() for i in range(count)]
    return [Encoded(one, [-100] * 4 + one[4:], f"document {i}") for i, one in enumerate(ids)]


@pytest.fixture
def model(model_dir):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(model_dir).eval()


@pytest.fixture
def runner(model):
    return Runner(model, Pieces.of(documents(), 9))


def bits_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_divergence_is_that_of_evaluate(model, model_dir, runner):
    from transformers import LlamaForCausalLM

    reference = runner.states()
    other = LlamaForCausalLM.from_pretrained(model_dir).eval()
    layers = linear_layers(model)
    with Swapped(layers) as swapped:
        swapped.put(lambda path, dense: quantize(dense, NF4).dequantize(), layers)
        found = evaluate(model, documents(), 64, 32, reference=other).kl
        states = runner.states()
        assert runner.kl(states, reference) == pytest.approx(found, rel=1e-4)
        assert runner.kl(states, reference, exact=True) == pytest.approx(found, rel=1e-4)
    assert runner.kl(reference, reference) == 0.0


def test_the_divergence_of_a_model_that_caps_its_logits(model_dir):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    make: Any = Gemma2Config
    config = make(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=2.0,
    )  # fmt: skip
    config._attn_implementation = "eager"
    capped = Gemma2ForCausalLM(config).eval()
    runner = Runner(capped, Pieces.of(documents(), 9))
    reference = runner.states()
    assert reference.shape == (sum(20 - 2 * i - 4 for i in range(3)), 260)
    budget = error_budget(runner, linear_layers(capped), NF4, "kind")
    assert budget.whole > 0


def test_output_errors_are_those_of_naive_products(model, runner):
    layers = linear_layers(model)
    seen = {}

    def keep(path):
        return lambda module, inputs, output: seen.setdefault(path, []).append(inputs[0][0])

    handles = [layer.register_forward_hook(keep(path)) for path, layer in layers.items()]
    for one in documents():  # one by one, without padding
        model(input_ids=torch.tensor([one.input_ids]))
    for handle in handles:
        handle.remove()

    def variants(path, weight):
        low = quantize(weight, NF4).dequantize(torch.float32)
        return {"nf4": lambda x: F.linear(x, low), "same": lambda x: F.linear(x, weight)}

    found = runner.output_errors(layers, F.linear, variants)
    assert set(found["nf4"]) == set(layers)
    for path, layer in layers.items():
        x, w = torch.cat(seen[path]).detach().double(), layer.weight.detach()
        low = quantize(w, NF4).dequantize(torch.float32)
        naive = (x @ (low - w).double().T).square().sum() / (x @ w.double().T).square().sum()
        assert found["nf4"][path] == pytest.approx(float(naive), rel=1e-3)
        assert found["same"][path] == 0.0


@pytest.mark.parametrize("by", ["block", "module", "kind"])
def test_the_budget_leaves_the_model_as_it_was(model, runner, by):
    before = bits_of(model)
    budget = error_budget(runner, linear_layers(model), NF4, by)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert [len(budget.parts), sum(part.layers for part in budget.parts)] == [
        {"block": 2, "module": 14, "kind": 7}[by],
        14,
    ]
    assert sum(part.weights for part in budget.parts) == sum(
        layer.weight.numel() for layer in linear_layers(model).values()
    )


def test_an_error_on_the_way_leaves_the_model_as_it_was(model, runner):
    before, layers = bits_of(model), linear_layers(model)

    def fails(path, dense):
        if path == "model.layers.1.mlp.up_proj":
            assert not torch.equal(
                layers["model.layers.0.mlp.up_proj"].weight, before["model.layers.0.mlp.up_proj.weight"]
            )
            raise KeyboardInterrupt
        return dense * 2

    with Swapped(layers) as swapped, pytest.raises(KeyboardInterrupt):
        swapped.put(fails, layers)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_each_part_of_the_budget_is_the_divergence_of_its_layers(model, runner):
    layers = linear_layers(model)
    budget = error_budget(runner, layers, NF4, "block")
    reference = runner.states()

    def kl(paths):
        with Swapped(layers) as swapped:
            swapped.put(lambda path, dense: quantize(dense, NF4).dequantize(), paths)
            return runner.kl(runner.states(), reference)

    of_block = groups(list(layers), "block")
    first, second = budget.parts
    assert (first.group, second.group) == ("model.layers.0", "model.layers.1")
    assert budget.whole == pytest.approx(kl(layers))
    assert first.alone == second.rest == pytest.approx(kl(of_block["model.layers.0"]))
    assert second.alone == first.rest == pytest.approx(kl(of_block["model.layers.1"]))
    assert budget.sum_alone == pytest.approx(first.alone + second.alone)
    assert budget.sum_saved == pytest.approx(2 * budget.whole - first.rest - second.rest)


def test_one_group_alone_is_the_whole(model, runner):
    layers = dict(list(linear_layers(model).items())[:1])
    budget = error_budget(runner, layers, NF4, "module")
    assert budget.whole == budget.parts[0].alone == budget.sum_alone == budget.sum_saved > 0
    assert budget.parts[0].rest == 0.0


def test_the_roundings(model, runner):
    before, layers = bits_of(model), linear_layers(model)
    found = {one.name: one for one in rounding_budget(runner, layers, NF4)}
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert list(found) == list(ROUNDINGS)
    for measure in ("kl", "output_error"):
        value = {name: getattr(one, measure) for name, one in found.items()}
        assert 0 < value["float32"] < value["bfloat16"] < value["both"]
        assert 0 < value["scales"] < value["codes"]
        assert value["both"] == pytest.approx(value["codes"], rel=0.1)


def test_float32_scales_round_nothing(model, runner):
    exact = data_type("nf4", double_quant=False)
    found = {one.name: one for one in rounding_budget(runner, linear_layers(model), exact)}
    assert found["scales"].output_error < 1e-12
    assert found["both"].kl == found["codes"].kl


@pytest.mark.parametrize("name", ["nf4", "bof4-s", "mxfp4", "nvfp4", "any4"])
def test_scales_alone_moves_each_block_by_one_factor(name):
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    kind = DATA_TYPES[name]
    exact = dataclasses.replace(kind, encoding="float32")
    factor = (scales_alone(weight, exact, kind) / weight).view(-1, kind.block_size)
    assert torch.allclose(factor, factor.mean(1, keepdim=True), rtol=1e-5)
    assert not torch.allclose(factor, torch.ones(1), rtol=1e-4)
    assert torch.allclose(factor, torch.ones(1), rtol=0.5 if name == "mxfp4" else 0.1)
    assert torch.allclose(scales_alone(weight, exact, exact), weight, rtol=1e-6)


def test_groups():
    layers = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.10.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
        "proj",
    ]
    assert groups(layers, "block") == {
        "model.layers.0": [layers[0], layers[2]], "model.layers.10": [layers[1]], "proj": ["proj"]
    }  # fmt: skip
    assert list(groups(layers, "kind")) == ["self_attn.q_proj", "mlp.up_proj", "proj"]
    assert list(groups(layers, "module")) == layers
    assert groups(["0.w", "1.w"], "block") == {"0": ["0.w"], "1": ["1.w"]}


def test_pieces_are_at_most_a_window_long_and_count_once():
    long = Encoded([1] * 600, [1] * 600, "long")
    found = Pieces.of([long, *documents(1)], 9)
    assert [len(one.input_ids) for one in found.pieces] == [256, 256, 90, 20]
    assert found.counted == 599 + 16
    assert Pieces.of([long], 2).counted == 510
    with pytest.raises(UserError, match="no token to predict"):
        Pieces.of([Encoded([1], [1], "short")], 1)
