"""AF4, BOF4 and BOF4-S against integrals that are taken anew, published values, and their error on normal weights."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from torch import Tensor

from qloralab import quantize
from qloralab.nf4.block_optimal import af4, bof4, bof4_s
from qloralab.nf4.codebook import normal_float

BLOCK_SIZES = (16, 64, 4096)
# The codes of Yoshida (arXiv 2306.06965) for blocks of 32, to 4 digits; for 64 bitsandbytes has them.
AF4_32 = [-1, -0.7238, -0.5407, -0.3964, -0.2724, -0.1596, -0.0526, 0, 0.0455, 0.1378, 0.2338, 0.3366, 0.4508, 0.5844,
          0.7530, 1]  # fmt: skip


def integral(inner, block_size: int) -> float:
    """Of inner(m) over the density of the largest magnitude m of a block, by ``scipy.integrate.quad``."""
    half = stats.halfnorm

    def of(m: float) -> float:
        return block_size * half.pdf(m) * half.cdf(m) ** (block_size - 1) * inner(m)

    middle = half.ppf(0.5 ** (1 / block_size))
    return quad(of, 0, middle, epsabs=1e-9)[0] + quad(of, middle, 9, epsabs=1e-9)[0]


def cells(values: Tensor, edges_at_zero: bool) -> list[tuple[float, float, float]]:
    """(from, to, value) of each value."""
    v = values.double().numpy()
    edges = np.concatenate([[-1.0], (v[1:] + v[:-1]) / 2, [1.0]])
    low, high = edges[:-1].copy(), edges[1:].copy()
    if edges_at_zero:
        high[6] = low[8] = 0.0
    return list(zip(low.tolist(), high.tolist(), v.tolist(), strict=True))


def weighted_mean(low: float, high: float, block_size: int) -> float:
    """E[M Z] / E[M**2] over the numbers of a block, Z / M in (low, high), Z being one that is not the largest."""

    def part(power: int):
        def inner(m: float) -> float:
            inside = quad(lambda z: z**power * stats.norm.pdf(z), low * m, high * m, epsabs=1e-10)[0]
            return m ** (2 - power) * inside / (2 * stats.norm.cdf(m) - 1)

        return integral(inner, block_size)

    return part(1) / part(0)


@pytest.mark.parametrize("block_size", [64])
@pytest.mark.parametrize(("codebook", "free"), [(bof4, (1, 8, 14)), (bof4_s, (0, 6))], ids=["", "s"])
def test_a_value_of_bof4_is_the_weighted_mean_of_its_cell(codebook, free, block_size):
    found = cells(codebook(block_size), edges_at_zero=False)
    for index in free:
        low, high, value = found[index]
        assert weighted_mean(low, high, block_size) == pytest.approx(value, abs=3e-7)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_value_of_af4_is_the_median_of_its_cell(block_size):
    def below(x: float) -> float:
        return integral(lambda m: stats.norm.cdf(x * m) / (2 * stats.norm.cdf(m) - 1), block_size)

    for index, (low, high, value) in enumerate(cells(af4(block_size), edges_at_zero=True)):
        if index in (1, 6, 8, 14):
            # over a cell the distribution function rises by up to a tenth a cell's width
            assert (below(low) + below(high)) / 2 == pytest.approx(below(value), abs=2e-6)


def test_af4_is_the_published_one():
    assert torch.allclose(af4(64), bnb.get_4bit_type("af4", device="cpu").sort().values, rtol=0, atol=1e-7)
    assert torch.allclose(af4(32), torch.tensor(AF4_32), rtol=0, atol=6e-5)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("codebook", [af4, bof4, bof4_s])
def test_they_ascend_and_hold_what_is_fixed(codebook, block_size):
    values = codebook(block_size)
    assert (values.dtype, values.shape, values.device.type) == (torch.float32, (16,), "cpu")
    assert (values.diff() > 0).all()
    assert values[7] == 0
    assert not values[7].signbit()
    assert values[15] == 1
    assert (values[0] == -1) if codebook is not bof4_s else (-1 < values[0] < -0.6)


def test_changing_what_is_returned_changes_nothing():
    bof4(64).zero_()
    assert bof4(64)[15] == 1


@pytest.fixture(scope="module")
def normal() -> Tensor:
    return torch.randn(1 << 15, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "ratio"), [("bof4", 0.946), ("bof4-s", 0.869)])
def test_the_squared_error_of_normal_weights_is_the_papers(name, ratio, normal):
    """Relative to NF4, blocks of 64; arXiv 2505.06653, table 1."""
    errors = [
        (quantize(normal, one, double_quant=False).dequantize() - normal).square().mean() for one in (name, "nf4")
    ]
    assert (errors[0] / errors[1]).item() == pytest.approx(ratio, abs=0.01)


def test_the_zero_of_af4_costs_more_than_its_medians_gain(normal):
    """The absolute error before the scale, which AF4 is for: the published code is above NF4, and why: its zero."""
    x = (normal / normal.abs().amax(1, keepdim=True)).double()

    def error(values: Tensor) -> float:
        values = values.double()
        return (values[torch.bucketize(x, (values[1:] + values[:-1]) / 2)] - x).abs().mean().item()

    halves = error(af4(64)[af4(64) != 0])  # the 15 values without their zero
    assert 1.02 < error(af4(64)) / error(normal_float(4)) < 1.05
    assert error(af4(64)) < halves


@pytest.mark.parametrize("block_size", [32, 256])
def test_no_neighbour_of_bof4_is_better(block_size):
    """A fixed point is a minimum here: moving any free value either way costs."""
    weight = torch.randn(1 << 20, generator=torch.Generator().manual_seed(1)).view(-1, block_size)
    values, scale = bof4(block_size), weight.abs().amax(1, keepdim=True)
    x = weight / scale

    def error(some: Tensor) -> float:
        chosen = some[torch.bucketize(x, (some[1:] + some[:-1]) / 2)]
        return (chosen * scale - weight).double().square().mean().item()

    best = error(values)
    for index in (1, 4, 8, 12, 14):
        for step in (-0.02, 0.02):
            moved = values.clone()
            moved[index] += step
            assert error(moved) > best
