"""PiSSA and LoftQ: what the adapters begin with, on the quantizer that follows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from qloralab import LoraConfig, inject_, linear_names, quantize, quantize_
from qloralab.lora.inject import adapters
from qloralab.lora.residual import METHODS, residual_, start_

CONFIG = LoraConfig(r=8, lora_alpha=16)
OPTIONS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "fp4": {"codebook": "fp4", "block_size": 128},
    "float32 scales": {"double_quant": False},
}


def model(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    layers = nn.ModuleDict(
        {"wide": nn.Linear(256, 64), "tall": nn.Linear(64, 256), "left": nn.Linear(64, 64), "head": nn.Linear(64, 8)}
    )
    return layers.to(dtype)


def started(method: str, config: LoraConfig = CONFIG, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The dense model, the one that begins, and how."""
    dense = model(dtype)
    ours = copy.deepcopy(dense)
    given = {name: options[name] for name in options if name != "iterations"}
    starts = residual_(ours, config, method, **options)
    quantize_(ours, compute_dtype=torch.float32, **given)
    inject_(ours, config)
    start_(ours, starts)
    return dense, ours, starts


def error(dense: nn.Module, ours: nn.Module, name: str) -> float:
    layer: Any = adapters(ours)[name]
    W = dense.get_parameter(f"{name}.weight").detach().float()
    held = layer.base_layer.weight.dequantize(torch.float32)
    held = held + layer.config.scaling * layer.lora_B.detach() @ layer.lora_A.detach()
    return float((W - held).norm() / W.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_the_reported_error_is_that_of_base_and_adapter(method, options, dtype):
    """After quantize_, to the last bits of float32: the quantizer of the iteration is the one of the run."""
    dense, ours, starts = started(method, dtype=dtype, **OPTIONS[options])
    assert starts.keys() == set(linear_names(dense))
    for name, start in starts.items():
        assert error(dense, ours, name) == pytest.approx(start.errors[-1], rel=1e-4, abs=1e-7)
        weight = dense.get_parameter(f"{name}.weight").detach()
        plain = weight.float() - quantize(weight, **{"codebook": "nf4", **OPTIONS[options]}).dequantize(torch.float32)
        assert start.errors[0] == pytest.approx(float(plain.norm() / weight.detach().float().norm()), rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_less_is_lost_than_by_quantizing_alone(method):
    _, _, starts = started(method)
    for name in ("wide", "tall", "left"):
        assert starts[name].errors[-1] < starts[name].errors[0]


def test_loftq_gets_better_with_iterations():
    (_, _, once), (_, _, often) = started("loftq", iterations=1), started("loftq", iterations=5)
    for name in ("wide", "tall", "left"):
        assert len(often[name].errors) == 6
        assert often[name].errors[:2] == once[name].errors
        assert often[name].errors[-1] < once[name].errors[-1]


def test_pissa_takes_the_largest_directions():
    dense, ours, _ = started("pissa")
    for name, layer in adapters(ours).items():
        W = dense.get_parameter(f"{name}.weight")
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        nearest = (U[:, :8] * S[:8]) @ V[:8]
        product = layer.config.scaling * layer.lora_B @ layer.lora_A
        torch.testing.assert_close(product, nearest, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.lora_A.norm(), layer.lora_B.norm())


def test_an_adapter_of_full_rank_loses_nothing():
    """W = Q + s B A, for B A can be anything; beyond the rank of the head the adapter is zero."""
    dense, ours, starts = started("loftq", LoraConfig(r=64, lora_alpha=16, use_rslora=True))
    assert all(start.errors[-1] < 1e-5 for start in starts.values())
    assert not starts["head"].A[8:].any()
    x = torch.randn(5, 64)
    for name in ("tall", "left", "head"):
        torch.testing.assert_close(ours[name](x), dense[name](x), rtol=1e-4, atol=1e-4)


def test_shared_weights_share_their_start():
    torch.manual_seed(0)
    dense: Any = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    dense[1].weight = dense[0].weight
    before = dense[0].weight.detach().clone()
    starts = residual_(dense, CONFIG, "pissa")
    assert starts["0"] is starts["1"]
    left = CONFIG.scaling * starts["0"].B @ starts["0"].A + dense[0].weight.detach()
    torch.testing.assert_close(left, before, rtol=1e-5, atol=1e-6)


def test_a_weight_of_zeros_stays_one():
    zeros: Any = nn.Sequential(nn.Linear(64, 64))
    nn.init.zeros_(zeros[0].weight)
    starts = residual_(zeros, CONFIG)
    assert not starts["0"].A.any()
    assert not zeros[0].weight.any()


def test_only_targets_change():
    ours, dense = model(), model()
    residual_(ours, LoraConfig(r=4, lora_alpha=8, target_modules=["left"]))
    assert not torch.equal(ours["left"].weight, dense["left"].weight)
    assert torch.equal(ours["wide"].weight, dense["wide"].weight)


def test_what_is_refused():
    ours = model()
    with pytest.raises(ValueError, match="method is 'olora'; it must be one of loftq, pissa"):
        residual_(ours, CONFIG, "olora")
    with pytest.raises(ValueError, match="no linear layer matches 'q_proj'"):
        residual_(ours, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    assert torch.equal(ours["left"].weight, model()["left"].weight)
    starts = residual_(ours, CONFIG)
    with pytest.raises(ValueError, match="is quantized already"):
        residual_(quantize_(model()), CONFIG)
    inject_(quantize_(ours), LoraConfig(r=4, lora_alpha=8))
    with pytest.raises(ValueError, match="has rank 4, its start 8"):
        start_(ours, starts)
    with pytest.raises(ValueError, match="has no adapter"):
        start_(ours, {**starts, "other": starts["left"]})


def test_a_layer_that_is_skipped_stays_whole():
    """It has an adapter all the same, which begins as ``inject_`` makes it."""
    dense, ours, starts = started("loftq", skip=["left"])
    assert "left" not in starts
    layer = adapters(ours)["left"]
    assert torch.equal(layer.get_parameter("base_layer.weight"), dense["left"].weight)
    assert not layer.lora_B.any()
