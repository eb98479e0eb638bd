"""Norms and ranks of updates, beside those of the product of the matrices; adapters in files."""

from __future__ import annotations

import math

import pytest
import torch

from qloralab.inspection.adapter import inspect_adapter, update
from qloralab.lora.config import LoraConfig
from qloralab.lora.files import save_adapter
from qloralab.lora.inject import adapters, inject_


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_update_is_that_of_the_product():
    A, B = random(4, 40), random(24, 4, seed=1)
    found = update("layer", A, B, 0.5, base_norm=10.0)
    product = 0.5 * B.double() @ A.double()
    s = torch.linalg.svdvals(product)
    assert found.norm == pytest.approx(float(product.norm()))
    assert found.share == pytest.approx(float(product.norm()) / 10)
    assert found.singular_values == pytest.approx(s[:4].tolist())
    p = s[:4] / s[:4].sum()
    assert found.effective_rank == pytest.approx(math.exp(-float((p * p.log()).sum())))
    assert found.stable_rank == pytest.approx(float(product.norm() ** 2 / s[0] ** 2))
    assert (found.shape, found.rank) == ((24, 40), 4)


def test_a_rank_1_update_has_rank_1_whatever_r_is():
    A, B = random(8, 40), random(24, 1) @ random(1, 8, seed=1)
    found = update("layer", A, B, 2.0)
    assert (found.effective_rank, found.stable_rank) == pytest.approx((1.0, 1.0))
    assert found.rank == 8


def test_equal_singular_values_give_the_full_rank():
    found = update("layer", torch.eye(5, 40), 3 * torch.eye(24, 5), 1.0)
    assert (found.effective_rank, found.stable_rank) == pytest.approx((5.0, 5.0))


def test_an_update_of_zero_has_no_rank():
    found = update("layer", random(4, 40), torch.zeros(24, 4), 1.0, base_norm=2.0)
    assert (found.norm, found.effective_rank, found.stable_rank, found.share) == (0.0, 0.0, 0.0, 0.0)


def test_a_rank_above_the_size_of_the_layer():
    found = update("layer", random(16, 8), random(4, 16, seed=1), 1.0)
    assert len(found.singular_values) <= 8
    assert found.norm == pytest.approx(float((random(4, 16, seed=1).double() @ random(16, 8).double()).norm()))


@pytest.fixture
def saved(tmp_path, model_dir):
    """A model with an adapter, and the directory of the adapter."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(model_dir)
    inject_(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    for index, layer in enumerate(adapters(model).values()):
        torch.nn.init.normal_(layer.lora_B, std=0.01 * (index + 1), generator=torch.Generator().manual_seed(index))
    save_adapter(model, tmp_path / "adapter")
    return model, tmp_path / "adapter"


@pytest.mark.parametrize("given", [True, False], ids=["--base", "named in the file"])
def test_an_adapter_beside_its_base(saved, model_dir, silent, given):
    model, directory = saved
    found = inspect_adapter(directory, model_dir if given else None, silent)
    assert found.base == model_dir
    layers = adapters(model)
    assert {one.layer for one in found.updates} == set(layers)
    for one in found.updates:
        layer = layers[one.layer]
        product = layer.config.scaling * layer.lora_B.detach() @ layer.lora_A.detach()
        assert one.norm == pytest.approx(float(product.norm()), rel=1e-5)
        assert one.share == pytest.approx(
            float(product.norm() / model.get_parameter(f"{one.layer}.base_layer.weight").norm()), rel=1e-5
        )


def test_an_adapter_whose_base_is_not_here(saved, silent):
    _, directory = saved
    config = directory / "adapter_config.json"
    config.write_text(config.read_text().replace("base_model_name_or_path", "revision"))
    found = inspect_adapter(directory, None, silent)
    assert found.base is None
    assert all(one.share is None for one in found.updates)
    assert any("--base" in note for note in found.notes)


def test_a_base_of_other_shapes_is_refused(saved, write_model, silent, refusal):
    other = write_model("other", head_dim=32)
    message = refusal(inspect_adapter, saved[1], other, silent)
    assert "adapts model.layers.0.self_attn.q_proj as [64, 64]" in message
    assert "it is [128, 64]" in message
