"""k-means codebooks, by brute force: less weighted error than where they start, per row no more than per tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qloralab.nf4.codebook import normal_float
from qloralab.nf4.kmeans import kmeans, nearest_of_rows


def weighted_error(x: Tensor, importance: Tensor, values: Tensor) -> Tensor:
    """The least weighted squared error of each row, by looking at every value: float64 [rows]."""
    distance = (x[:, :, None].double() - values[:, None, :].double()).square().amin(-1)
    return (importance.double() * distance).sum(1)


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    """x [6, 4000] of different distributions, and importances."""
    x = torch.randn(6, 4000) * torch.tensor([0.1, 0.2, 0.3, 0.3, 0.3, 0.3])[:, None]
    x[3] = x[3].abs()
    x[4] = torch.rand(4000) * 2 - 1
    return x.clamp(-1, 1), torch.rand(6, 4000)


def test_the_error_is_below_that_of_the_start(rows):
    x, importance = rows
    start = normal_float(4).expand(6, 16)
    fitted = kmeans(x, importance)
    assert (fitted.dtype, fitted.shape) == (torch.float32, (6, 16))
    assert (fitted.diff() >= 0).all()
    assert torch.equal(fitted, fitted.half().float())
    assert (weighted_error(x, importance, fitted) < 0.97 * weighted_error(x, importance, start)).all()


def test_a_codebook_for_each_row_is_no_worse_than_one_for_all(rows):
    x, importance = rows
    of_all = kmeans(x.flatten()[None], importance.flatten()[None]).expand(6, 16)
    each, all_ = (weighted_error(x, importance, values) for values in (kmeans(x, importance), of_all))
    assert each.sum() < all_.sum()
    assert (each < 0.9 * all_)[[0, 3, 4]].all()  # the rows that differ from the others


def test_each_value_is_the_weighted_mean_of_what_is_nearest(rows):
    x, importance = rows[0][5:], rows[1][5:]
    fitted = kmeans(x, importance)
    cluster = (x[0, :, None] - fitted[0]).abs().argmin(1)
    for value in range(16):
        inside = cluster == value
        mean = (x[0][inside] * importance[0][inside]).double().sum() / importance[0][inside].double().sum()
        assert fitted[0, value].item() == pytest.approx(mean.item(), abs=3e-3)  # 60 iterations, float16


def test_numbers_of_no_importance_do_not_count():
    x = torch.cat([torch.full((1, 100), 0.25), torch.full((1, 100), -0.75)], dim=1)
    importance = torch.cat([torch.ones(1, 100), torch.zeros(1, 100)], dim=1)
    assert 0.25 in kmeans(x, importance)[0]
    assert -0.75 not in kmeans(x, importance)[0]


def test_a_row_of_one_number_and_none_at_all():
    assert torch.equal(kmeans(torch.zeros(1, 0), torch.zeros(1, 0))[0], normal_float(4).half().float())
    assert 0.5 in kmeans(torch.full((1, 1), 0.5), torch.ones(1, 1))


def test_the_nearest_of_a_row_is_found_and_a_tie_goes_to_the_lower():
    values = torch.stack([normal_float(4), torch.linspace(-1, 1, 16)])
    x = torch.rand(2, 1000) * 2 - 1
    expected = (x[:, :, None].double() - values[:, None].double()).abs().argmin(-1)
    assert torch.equal(nearest_of_rows(x, values).long(), expected)
    ties = (values[:, 1:] + values[:, :-1]) / 2
    assert nearest_of_rows(ties, values).tolist() == [list(range(15))] * 2


def test_rows_in_parts_are_the_same(monkeypatch, rows):
    whole = kmeans(*rows)
    monkeypatch.setattr("qloralab.nf4.kmeans._ROWS", 9000)  # two rows at a time
    assert torch.equal(kmeans(*rows), whole)
