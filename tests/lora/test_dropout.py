"""The dropout mask: its bits, and whether they are the coins that dropout throws; and the operator that applies it.

The statistical tests draw from the seed of the test, so they pass or fail for good. Their bounds say how surprising a
correct generator would have to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from qloralab.lora import ops
from qloralab.lora.dropout import keep_mask, rate

# The first words of splitmix64 from the seed 1234567, as other implementations publish them for their tests.
PUBLISHED = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]

# Two-sided probability of a statistic this far out. Each test here draws a few times; a correct one never gets there.
SURPRISE = 1e-5
rates = pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.9])


def splitmix64(seed: int, number: int) -> int:
    """The definition again, in Python's own integers."""
    mask = (1 << 64) - 1
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
    return z ^ z >> 31


def kept(seed: int, m: int, k: int, columns: int, threshold: int) -> bool:
    words = 8 * math.ceil(columns / 32)
    word = splitmix64(seed, m * words + k // 4)
    return word >> 16 * (k % 4) & 0xFFFF >= threshold


def mask_of(rows: int, columns: int, p: float, seed: int | None = None) -> np.ndarray:
    """bool [rows, columns], True where dropped; the seed drawn as layers draw it, if not given."""
    drawn = torch.randint(2**63 - 1, ()) if seed is None else torch.tensor(seed)
    return ~keep_mask(drawn, rows, columns, p).numpy()


def test_the_mask_reads_the_published_words_from_their_lowest_bits():
    lanes = [word >> shift & 0xFFFF for word in PUBLISHED for shift in (0, 16, 32, 48)]
    for p in (0.1, 0.5, 0.9):
        assert keep_mask(torch.tensor(1234567), 1, 20, p)[0].tolist() == [n >= round(p * 65536) for n in lanes]


def test_a_lane_equal_to_the_threshold_is_kept():
    lane = PUBLISHED[0] & 0xFFFF
    seed = torch.tensor(1234567)
    assert keep_mask(seed, 1, 1, lane / 65536).item()
    assert not keep_mask(seed, 1, 1, (lane + 1) / 65536).item()


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    rows=st.integers(0, 4),
    columns=st.integers(0, 70),
    p=st.floats(0, 1, exclude_max=True),
)
@example(seed=-1, rows=3, columns=33, p=0.5)
@example(seed=2**63 - 1, rows=2, columns=64, p=0.999999)
@example(seed=-(2**63), rows=2, columns=31, p=0.05)
def test_the_mask_is_the_definition(seed, rows, columns, p):
    threshold = min(round(p * 65536), 65535)
    found = keep_mask(torch.tensor(seed), rows, columns, p)
    assert found.dtype == torch.bool
    assert found.shape == (rows, columns)
    assert found.tolist() == [[kept(seed, m, k, columns, threshold) for k in range(columns)] for m in range(rows)]


# Earlier runs are repeated, and other implementations compared, by these bits. The key is (seed, rows, columns, p);
# a row reads from column 0, 1 is kept.
PINNED = {
    (0, 1, 40, 0.5): ["1011011001001011001010100010110110001001"],
    (20230523, 2, 33, 0.25): ["111101011111101010110111110110110", "111111111111111111101111011111110"],
    (-1, 3, 8, 0.9): ["00000011", "00000000", "00001000"],
}


@pytest.mark.parametrize(("drawn", "rows"), PINNED.items(), ids=str)
def test_these_bits_stay(drawn, rows):
    seed, m, k, p = drawn
    found = ops.dropout(torch.ones(m, k), torch.tensor(seed), p) != 0
    assert ["".join("01"[bit] for bit in row) for row in found.tolist()] == rows


@pytest.mark.gpu
def test_a_gpu_draws_the_same_bits():
    for columns in (33, 1024):
        expected = keep_mask(torch.tensor(-7), 50, columns, 0.3)
        assert torch.equal(keep_mask(torch.tensor(-7, device="cuda"), 50, columns, 0.3).cpu(), expected)


@pytest.mark.parametrize(
    ("p", "q"),
    [(0.0, 0), (1e-9, 0), (1e-5, 1 / 65536), (0.05, 3277 / 65536), (0.5, 0.5), (1 - 1e-9, 65535 / 65536)],
    ids=str,
)
def test_the_rate_applied_is_the_nearest_of_65536(p, q):
    assert rate(p) == q


@rates
def test_as_many_as_coins_would(p):
    assert stats.binomtest(int(mask_of(1000, 1000, p).sum()), 1_000_000, rate(p)).pvalue > SURPRISE


@rates
@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (1, 64), (13, 65)], ids=str)
def test_each_index_is_as_likely_as_another(shape, p):
    rows, columns = shape
    draws = 2_000
    counts = np.sum([mask_of(rows, columns, p) for _ in range(draws)], axis=0)
    bound = SURPRISE / (rows * columns) / 2
    assert stats.binom.ppf(bound, draws, rate(p)) <= counts.min()
    assert counts.max() <= stats.binom.isf(bound, draws, rate(p))


APART: dict[str, Callable[[float], tuple[np.ndarray, np.ndarray]]] = {
    **{f"columns, {d}": lambda p, d=d: ((m := mask_of(1000, 1000, p))[:, :-d], m[:, d:]) for d in (1, 2, 3, 4, 7, 32)},
    **{f"rows, {d}": lambda p, d=d: ((m := mask_of(1000, 1000, p))[:-d], m[d:]) for d in (1, 2, 7)},
    **{
        f"seeds, {d}": lambda p, d=d: (mask_of(1000, 1000, p, seed=5), mask_of(1000, 1000, p, seed=5 + d))
        for d in (1, 2, 2**16, 2**32, 2**62)
    },
}


@rates
@pytest.mark.parametrize("distance", APART)
def test_elements_apart_are_independent(p, distance):
    first, second = APART[distance](p)
    table = [[np.sum(first & second), np.sum(first & ~second)], [np.sum(~first & second), np.sum(~first & ~second)]]
    result: Any = stats.chi2_contingency(table, correction=False)
    assert result.pvalue > SURPRISE


@pytest.mark.parametrize("run", [ops.dropout.reference, ops.dropout], ids=["reference", "operator"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1000,), (3, 5, 7), (63, 65), (0, 8), (8, 0)], ids=str)
def test_dropped_are_zero_and_kept_are_scaled(run, shape, p, dtype):
    x = torch.randn(shape).to(dtype)
    before, seed = x.clone(), torch.tensor(11)
    y = run(x, seed, p)
    keep = keep_mask(seed, math.prod(shape[:-1]), shape[-1], p).view(shape)
    factor = torch.tensor(1 / (1 - rate(p))).double()
    assert y.dtype == dtype
    assert torch.equal(y, torch.where(keep, (x.double() * factor).float().to(dtype), 0))
    assert torch.equal(x, before)


@pytest.mark.parametrize("view", [lambda x: x.t(), lambda x: x[:, ::2], lambda x: x[1:]], ids=["t", "step", "part"])
def test_a_view_is_dropped_by_its_own_rows_and_columns(view):
    x, seed = view(torch.randn(40, 48)), torch.tensor(3)
    assert torch.equal(
        ops.dropout(x, seed, 0.5), ops.dropout(x.clone(memory_format=torch.contiguous_format), seed, 0.5)
    )


def test_dropped_infinity_is_zero():
    x = torch.full((4, 64), math.inf)
    keep = keep_mask(torch.tensor(3), 4, 64, 0.5)
    for value in (math.inf, -math.inf, math.nan):
        y = ops.dropout(x.fill_(value), torch.tensor(3), 0.5)
        assert (y[~keep] == 0).all()
        assert not y[keep].isfinite().any()


@pytest.mark.parametrize("p", [0.0, 1e-9, 1e-300], ids=str)
def test_a_tiny_probability_drops_nothing(p):
    x = torch.randn(9, 65)
    y = ops.dropout(x, torch.tensor(3), p)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()


def test_the_gradient_goes_through_the_same_mask():
    x = torch.randn(9, 65, dtype=torch.float64, requires_grad=True)
    seed = torch.tensor(3)
    y = ops.dropout(x, seed, 0.5)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, 2.0 * keep_mask(seed, 9, 65, 0.5))
    assert torch.autograd.gradcheck(lambda x: ops.dropout(x, seed, 0.3), (x,))
    assert torch.autograd.gradgradcheck(lambda x: ops.dropout(x, seed, 0.3), (x,))
