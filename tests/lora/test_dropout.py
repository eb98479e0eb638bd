"""Dropout by distances: are these the coins that dropout throws?

The statistical tests draw from the seed of the test, so they pass or fail for good. Their bounds say how surprising a
correct generator would have to be.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from qloralab.lora.dropout import draw_positions, drop

CPU = torch.device("cpu")
N = 1_000_000
# Two-sided probability of a statistic this far out. Each test here draws a few times; a correct one never gets there.
SURPRISE = 1e-5
rates = pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.9])


def mask(numel: int, p: float) -> np.ndarray:
    """bool [numel], True where dropped."""
    dropped = np.zeros(numel + 1, dtype=bool)
    dropped[draw_positions(numel, p, CPU).numpy()] = True
    return dropped[:-1]


@rates
def test_as_many_as_coins_would(p):
    assert stats.binomtest(int(mask(N, p).sum()), N, p).pvalue > SURPRISE


@rates
@pytest.mark.parametrize("numel", [1, 2, 63, 64, 65, 1000])
def test_each_place_is_as_likely_as_another(numel, p):
    draws = max(2_000, 4_000 // numel)
    counts = np.sum([mask(numel, p) for _ in range(draws)], axis=0)
    bound = stats.binom.isf(SURPRISE / numel / 2, draws, p), stats.binom.ppf(SURPRISE / numel / 2, draws, p)
    assert bound[1] <= counts.min()
    assert counts.max() <= bound[0]


@rates
@pytest.mark.parametrize("lag", [1, 2, 7, 64])
def test_neighbours_are_independent(p, lag):
    dropped = mask(N, p)
    first, second = dropped[:-lag], dropped[lag:]
    table = [[np.sum(first & second), np.sum(first & ~second)], [np.sum(~first & second), np.sum(~first & ~second)]]
    result: Any = stats.chi2_contingency(table, correction=False)
    assert result.pvalue > SURPRISE


@rates
def test_distances_are_geometric(p):
    distances = np.diff(np.flatnonzero(mask(N, p)), prepend=-1)
    longest = int(stats.geom.isf(20 / len(distances), p)) + 1  # everything longer is one class
    edges = np.unique(np.linspace(1, longest, 30).astype(int))
    expected = np.diff(stats.geom.cdf(edges - 1, p), append=1) * len(distances)
    found = [np.sum((distances >= low) & (distances < high)) for low, high in zip(edges, [*edges[1:], N], strict=True)]
    assert stats.chisquare(found, expected * sum(found) / expected.sum()).pvalue > SURPRISE


@given(numel=st.integers(0, 3000), p=st.floats(1e-6, 0.999), seed=st.integers(0, 2**32))
def test_positions_ascend_once_each_and_reach_the_end(numel, p, seed):
    torch.manual_seed(seed)
    positions = draw_positions(numel, p, CPU)
    assert positions.dtype == torch.int64
    inside = positions[positions < numel]
    assert (inside >= 0).all()
    assert (inside.diff() > 0).all()
    assert (positions[len(inside) :] == numel).all()
    assert len(inside) < len(positions), "the draw ends before the last element"


def test_how_many_are_drawn_depends_on_nothing_random():
    assert {len(draw_positions(1000, 0.1, CPU)) for _ in range(20)} == {math.ceil(100 + 80 + 32)}


def test_few_are_drawn():
    assert len(draw_positions(N, 0.05, CPU)) < 0.06 * N


def test_same_seed_same_positions():
    torch.manual_seed(7)
    first, second = draw_positions(1000, 0.1, CPU), draw_positions(1000, 0.1, CPU)
    torch.manual_seed(7)
    assert torch.equal(draw_positions(1000, 0.1, CPU), first)
    assert not torch.equal(second, first)


@pytest.mark.parametrize("p", [1e-9, 1e-15, 1e-30, 1e-300], ids=str)
def test_a_tiny_probability_drops_nothing(p):
    assert (draw_positions(1000, p, CPU) == 1000).all()


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_default_dtype_does_not_matter(default):
    torch.manual_seed(7)
    expected = draw_positions(N, 0.05, CPU)
    torch.manual_seed(7)
    torch.set_default_dtype(default)
    try:
        found = draw_positions(N, 0.05, CPU)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1000,), (3, 5, 7), (63, 65), ()], ids=str)
def test_dropped_are_zero_and_kept_are_scaled(shape, p, dtype):
    x = torch.randn(shape).to(dtype)
    before = x.clone()
    positions = draw_positions(x.numel(), p, CPU)
    y = drop(x, positions, p)
    expected = (x.double() * torch.tensor(1 / (1 - p)).double()).float().to(dtype).flatten()
    expected[positions[positions < x.numel()]] = 0
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert torch.equal(y.flatten(), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("view", [lambda x: x.t(), lambda x: x[:, ::2], lambda x: x[1:]], ids=["t", "step", "part"])
def test_positions_are_those_of_the_flattened_view(view):
    x = view(torch.randn(6, 8))
    positions = torch.tensor([0, 5, 11, x.numel()])
    expected = x.flatten() * 2
    expected[positions[:-1]] = 0
    assert torch.equal(drop(x, positions, 0.5).flatten(), expected)


def test_dropped_infinity_is_zero():
    x = torch.tensor([math.inf, 1.0, math.nan])
    assert drop(x, torch.tensor([0, 2, 3]), 0.5).tolist() == [0, 2, 0]


def test_nothing_to_drop_from():
    assert drop(torch.ones(0, 8), draw_positions(0, 0.5, CPU), 0.5).shape == (0, 8)


def test_mean_is_kept():
    x = torch.ones(N)
    mean = drop(x, draw_positions(N, 0.1, CPU), 0.1).double().mean().item()
    assert abs(mean - 1) < 5 * math.sqrt(0.1 / 0.9 / N)
