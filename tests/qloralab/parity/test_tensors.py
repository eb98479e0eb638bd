"""The tensors are those that are promised: as many, as hostile, the same for the same seed."""

from __future__ import annotations

import pytest
import torch

from qloralab.checkpoint import models
from qloralab.checkpoint.models import load_model
from qloralab.nf4.codebook import codebook_values
from qloralab.nf4.packed import BLOCK_SIZES
from qloralab.parity.tensors import (
    DISTRIBUTIONS,
    DTYPES,
    LARGEST,
    Sample,
    hostile_samples,
    in_tail,
    linear_weights,
    on_thresholds,
    random_samples,
    real_samples,
    short,
    split_row_samples,
)


@pytest.mark.parametrize("weights", [1, 1_000_000], ids=str)
def test_random_tensors_reach_every_distribution_and_block_size(weights):
    samples = list(random_samples(weights, torch.float32, seed=0))
    assert weights <= sum(sample.weight.numel() for sample in samples) < weights + 40_000
    assert {sample.name for sample in samples} == set(DISTRIBUTIONS)
    assert {sample.block_size for sample in samples} == set(BLOCK_SIZES)
    assert all(sample.has_whole_rows and not sample.tail for sample in samples)


def test_no_random_tensor_is_larger_than_memory_allows():
    first = next(random_samples(9 * LARGEST, torch.bfloat16, seed=0))
    assert first.weight.numel() == LARGEST
    assert (first.block_size, first.weight.dtype) == (64, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_every_tensor_is_finite_and_of_the_dtype(dtype):
    for samples in (random_samples(1, dtype, 3), hostile_samples(dtype, 3), split_row_samples(dtype, 3)):
        for sample in samples:
            assert sample.weight.dtype == dtype, sample
            assert sample.weight.isfinite().all(), sample
    for sample in split_row_samples(dtype, 3):  # which bitsandbytes misreads
        assert (sample.has_whole_rows, sample.tail, sample.weight.shape[1] % 16) == (False, 0, 0)


def test_the_seed_decides():
    def drawn(seed: int) -> list[torch.Tensor]:
        return [
            sample.weight for sample in [*random_samples(1, torch.float32, seed), *hostile_samples(DTYPES[0], seed)]
        ]

    assert all(map(torch.equal, drawn(1), drawn(1)))
    assert not torch.equal(drawn(1)[0], drawn(2)[0])


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_every_threshold_is_met_exactly_and_beside(codebook, block_size):
    rows = on_thresholds(codebook, block_size, (0.25,))
    assert rows.shape[1] == block_size
    assert (rows.abs().amax(1) == 0.25).all()
    quotients = set((rows / 0.25).flatten().tolist())
    values = codebook_values(codebook).unique()
    middle = (values[:-1] + values[1:]) / 2
    for wanted in (middle, middle.nextafter(torch.ones(())), middle.nextafter(-torch.ones(()))):
        assert set(wanted.tolist()) <= quotients


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_in_the_tail_the_product_and_the_quotient_choose_different_codes(codebook):
    weight = in_tail(codebook, torch.Generator().manual_seed(0))
    assert weight.shape == (96,)
    tail = weight[64:]
    scale = tail.abs().max()
    values = codebook_values(codebook).unique()
    middle = (values[:-1] + values[1:]) / 2
    apart = torch.bucketize(tail * (1 / scale), middle) != torch.bucketize(tail / scale, middle)
    assert apart.sum() >= 5


def test_hostile_tensors_reach_the_ends():
    samples = list(hostile_samples(torch.float32, 0))
    assert {sample.block_size for sample in samples} == set(BLOCK_SIZES)
    largest = max(float(sample.weight.abs().max()) for sample in samples)
    subnormal = [sample for sample in samples if 0 < sample.weight.abs().max() < torch.finfo(torch.float32).tiny]
    assert largest > 2.0**126
    assert subnormal
    assert all(sample.has_extremes for sample in subnormal)
    assert any(not sample.weight.is_contiguous() for sample in samples)
    assert {sample.weight.dim() for sample in samples} == {1, 2, 3}


def test_a_sample_tells_what_it_is():
    sample = Sample("normal", torch.zeros(3, 70, dtype=torch.bfloat16), 64)
    assert (str(sample), sample.has_whole_rows, sample.tail) == ("normal bf16/64", False, 18)


def test_the_linear_layers_of_a_model(model_dir, monkeypatch, tmp_path, refusal):
    found = linear_weights(model_dir)
    names = [name for name, _ in found]
    assert len(names) == len(set(names)) == 2 * 7 + 1  # two layers of seven, and the head
    assert "model.layers.1.mlp.down_proj.weight" in names
    assert all(weight.dtype == torch.float32 and weight.dim() == 2 for _, weight in found)
    assert "does not exist" in refusal(linear_weights, tmp_path / "none")

    def broken(*arguments):
        model = load_model(*arguments)
        model.model.layers[1].mlp.up_proj.weight.data[2, 3] = torch.nan
        return model

    monkeypatch.setattr(models, "load_model", broken)
    assert "model.layers.1.mlp.up_proj.weight holds NaN" in refusal(linear_weights, model_dir)


def test_weights_beyond_a_dtype_are_left_out_in_it():
    weights = [("large", torch.tensor([[1e6, 1.0]])), ("small", torch.tensor([[0.1, 1.0]]))]
    assert [sample.name for sample in real_samples(weights, torch.float16)] == ["small"]
    assert [sample.name for sample in real_samples(weights, torch.bfloat16)] == ["large", "small"]
