"""Codebooks fitted to a weight by k-means: one for the tensor, or one for each row (any4, arXiv 2507.04610).

In one dimension a cluster is an interval, so with the numbers sorted, the sums over a cluster are differences of
cumulative sums. An iteration costs two searches and no pass over the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codebook import normal_float

_ITERATIONS = 60
_ROWS = 1 << 22  # numbers that are sorted at a time


def kmeans(x: Tensor, importance: Tensor) -> Tensor:
    """Lloyd's iteration from NF4: 16 values that make ``sum(importance * (x - value)**2)`` small, row by row.

    Args:
        x: float32 [rows, n], in [-1, 1].
        importance: float32 [rows, n], 0 or more; a weight's error counts with its scale squared.

    Returns:
        float32 [rows, 16], ascending, rounded to float16, as which a file would keep them.
    """
    slab = max(_ROWS // max(x.shape[1], 1), 1)
    parts = [_fit(some, weights) for some, weights in zip(x.split(slab), importance.split(slab), strict=True)]
    return torch.cat(parts).half().float()


def _fit(x: Tensor, importance: Tensor) -> Tensor:
    ascending, order = x.sort(dim=1)
    weight = importance.gather(1, order).double()
    below = torch.nn.functional.pad(weight.cumsum(1), (1, 0))  # [rows, n + 1]: over the numbers before each
    sums = torch.nn.functional.pad((weight * ascending).cumsum(1), (1, 0))
    values = normal_float(4).to(x.device).double().repeat(len(x), 1)
    for _ in range(_ITERATIONS):
        edges = torch.searchsorted(ascending, ((values[:, 1:] + values[:, :-1]) / 2).float(), right=True)
        edges = torch.nn.functional.pad(edges, (1, 0))
        edges = torch.cat([edges, edges.new_full((len(x), 1), x.shape[1])], dim=1)  # [rows, 17]
        total = below.gather(1, edges).diff(dim=1)
        values = torch.where(total > 0, sums.gather(1, edges).diff(dim=1) / total, values)  # an empty cluster stays
    return values.float().sort(dim=1).values


def nearest_of_rows(x: Tensor, values: Tensor) -> Tensor:
    """The code of the nearest value of each row's codebook, uint8 [rows, n]; of two equally near ones the lower."""
    return torch.searchsorted((values[:, 1:] + values[:, :-1]) / 2, x, out_int32=True).to(torch.uint8)
