"""Moments, distances, histograms and errors, each beside a value that is known or computed naively."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from qloralab.inspection.statistics import (
    PROBABILITIES,
    blocks_absmax,
    codes_of,
    distribution,
    entropy,
    largest_blocks,
    relative_error,
)
from qloralab.nf4.tensor import quantize


def quantiles_of(law, shape=(200, 500)):
    """A weight whose distribution function is as near to a law's as that of so many numbers can be, shuffled."""
    n = math.prod(shape)
    values = law.ppf((np.arange(n) + 0.5) / n)
    return torch.from_numpy(np.random.default_rng(0).permutation(values)).float().view(shape)


@pytest.mark.parametrize(
    ("law", "kurtosis"),
    [(stats.norm(0.3, 2.0), 0.0), (stats.uniform(-1, 2), -1.2), (stats.laplace(0, 0.02), 3.0)],
    ids=["normal", "uniform", "Laplace"],
)
def test_a_known_distribution(law, kurtosis):
    found = distribution(quantiles_of(law))
    assert found.excess_kurtosis == pytest.approx(kurtosis, abs=0.02)
    # The rows are samples, so their mean differs by chance; the estimate of 500 heavy-tailed numbers is low.
    assert found.row_excess_kurtosis == pytest.approx(kurtosis, abs=0.35)
    x = np.linspace(-6, 6, 100_001) * law.std() + law.mean()
    gap = np.abs(law.cdf(x) - stats.norm(law.mean(), law.std()).cdf(x)).max()
    assert found.ks_distance == pytest.approx(gap, abs=1e-3)
    assert (found.mean, found.std) == pytest.approx((law.mean(), law.std()), abs=0.01 * law.std())


def test_rows_of_different_spread_are_heavy_tailed_together_and_normal_alone():
    rows = quantiles_of(stats.norm(), (64, 1024)) * torch.logspace(-1, 1, 64)[:, None]
    found = distribution(rows)
    assert found.excess_kurtosis > 3
    assert abs(found.row_excess_kurtosis) < 0.1


def test_the_quantiles_are_in_standard_deviations():
    found = distribution(quantiles_of(stats.norm(5, 3), (300, 1000)))
    inner = [(p, q) for p, q in zip(PROBABILITIES, found.quantiles, strict=True) if 1e-3 < p < 1 - 1e-3]
    assert len(inner) > 20
    for p, q in inner:
        assert q == pytest.approx(stats.norm.ppf(p), abs=0.01)
    assert sorted(PROBABILITIES) == list(PROBABILITIES)


def test_a_constant_weight_has_no_shape():
    found = distribution(torch.full((4, 64), 0.25))
    assert (found.mean, found.std, found.norm) == (0.25, 0.0, 4.0)
    assert (found.excess_kurtosis, found.row_excess_kurtosis, found.ks_distance) == (0.0, 0.0, 0.0)
    assert distribution(torch.zeros(4, 64)).norm == 0.0


def test_the_largest_blocks():
    weight = torch.ones(8, 64)
    weight[5, 3], weight[2, 60] = -7.0, 3.0
    found = largest_blocks(blocks_absmax(weight, 64), 2)
    assert [(one.index, one.absmax, one.ratio) for one in found] == [(5, 7.0, 7.0), (2, 3.0, 3.0)]
    assert len(largest_blocks(torch.ones(3), 5)) == 3
    assert largest_blocks(torch.tensor([0.0, 0.0, 1.0]), 1)[0].ratio == math.inf


@pytest.mark.parametrize("data_type", ["nf4", "nf3", "bof4-s", "any4"])
def test_the_histogram_counts_every_code(data_type):
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(0))
    packed = quantize(weight, data_type)
    found = codes_of(packed)
    assert sum(found.histogram) == weight.numel()
    naive = [int((packed.codes() == code).sum()) for code in range(packed.values.shape[-1])]
    assert list(found.histogram) == naive
    assert (found.values is None) == (data_type == "any4")
    assert 0 < found.entropy <= packed.bits


def test_the_entropy_of_codes_used_equally_often_is_their_bits():
    assert entropy(torch.full((16,), 7)) == pytest.approx(4.0)
    assert entropy(torch.tensor([0, 9, 0, 0])) == 0.0
    assert entropy(torch.tensor([1, 1, 2])) == pytest.approx(1.5)


def test_the_relative_error():
    exact, found = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert relative_error(found, exact) == pytest.approx(0.25 / 25)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf
