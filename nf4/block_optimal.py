"""Codebooks that minimize the error of normally distributed weights, for a block size: AF4, BOF4 and BOF4-S.

The weights of a block are divided by the largest of them, so what a codebook meets is not normally distributed: it lies
in [-1, 1], and the larger the block, the narrower it is. Let M be the largest magnitude of B independent N(0, 1)
numbers, and Z any of the others. Given M = m, Z is a normal number that is known to lie in (-m, m)::

    g(m)        = B * 2 phi(m) * P(m)**(B - 1)               density of M;   P(m) = 2 Phi(m) - 1
    p(z | m)    = phi(z) / P(m)                              density of Z,   |z| < m
    F(x)        = integral of g(m) * (Phi(x m) - Phi(-m)) / P(m) dm          distribution of X = Z / M

A codebook of least error has each value at the centre of its cell, the numbers that are nearest to it, and each edge of
a cell half way between two values:

=======  ========================  =============================  ==============================================
name     fixed values              error                          centre of a cell (a, b)
=======  ========================  =============================  ==============================================
af4      -1, 0, 1                  E |X - X'|                     the median: F(centre) = (F(a) + F(b)) / 2
bof4     -1, 0, 1                  E (M X - M X')**2              E[M Z; a M < Z < b M] / E[M**2; a M < Z < b M]
bof4-s   0, 1                      the same                       the same
=======  ========================  =============================  ==============================================

AF4 (Yoshida, arXiv 2306.06965) measures the error before the scale is multiplied in, BOF4 (Blumenberg et al., arXiv
2505.06653) after, where it counts: hence the weight M**2. The block's largest weight is always at -1 or 1. BOF4-S
divides by that weight with its sign, so that it is always at 1, and no value is spent on -1.

AF4 as published, and as bitsandbytes has it, is built from two halves whose cells end at 0, as if 0 were an edge and no
value. So the cell of 0 is narrow, its neighbours are close, and the error of normal weights is above that of NF4: the
mean absolute error of X by 3 %, for blocks of 64. With half-way edges there too it would be just below NF4's.

Lloyd's iteration makes both true in turn, centres and edges, but takes a thousand rounds to settle. Here a few rounds
come near, and ``scipy.optimize.root`` finds the values that the next round would not move. The integrals over m are
sums over the nodes of a Gauss-Legendre rule, those over z have closed forms; nothing is sampled. All in float64,
rounded to float32 at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

_LARGEST = 9.0  # no normal number of a block is larger: one in 10**19 is
_NODES = 256
_ROUNDS = 30  # of Lloyd's iteration, before its fixed point is solved for
_SETTLED = 1e-10  # what one more round may move a value by


def af4(block_size: int = 64) -> Tensor:
    """AF4, "AbnormalFloat" (arXiv 2306.06965): float32 [16], ascending. That of 64 is the table of bitsandbytes."""
    return _ascending(block_size, (-1.0, 0.0, 1.0), _median, edges_at=(0.0,)).clone()


def bof4(block_size: int = 64) -> Tensor:
    """BOF4 for the mean squared error of the weights (arXiv 2505.06653): float32 [16], ascending."""
    return _ascending(block_size, (-1.0, 0.0, 1.0), _weighted_mean).clone()


def bof4_s(block_size: int = 64) -> Tensor:
    """BOF4-S (arXiv 2505.06653), to be used with signed scales: float32 [16], ascending, the lowest above -1."""
    return _ascending(block_size, (0.0, 1.0), _weighted_mean).clone()


_Centre = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # of the cells from a to b, and their values


@cache
def _ascending(
    block_size: int, fixed: tuple[float, ...], rule: Callable[[int], _Centre], edges_at: tuple[float, ...] = ()
) -> Tensor:
    """The 16 values: 7 below 0 and 8 above, those of ``fixed`` among them; cells end at the values in ``edges_at``."""
    from scipy.optimize import root

    values = np.concatenate([np.linspace(-1, 0, 8)[:-1], np.linspace(0, 1, 9)])
    if -1.0 not in fixed:
        values[0] = -0.9
    free, centre = ~np.isin(values, fixed), rule(block_size)

    def next_round(some: np.ndarray) -> np.ndarray:
        """The free values, moved to the centres of their cells."""
        values[free] = some
        edges = np.concatenate([[-1.0], (values[:-1] + values[1:]) / 2, [1.0]])
        low, high = edges[:-1].copy(), edges[1:].copy()
        for at in np.flatnonzero(np.isin(values, edges_at)):
            high[at - 1] = low[at + 1] = values[at]
        return centre(low, high, values)[free]

    some = values[free]
    for _ in range(_ROUNDS):
        some = next_round(some)
    some = root(lambda some: next_round(some) - some, some, tol=1e-13).x
    moved = np.abs(next_round(some) - some).max()
    if not moved < _SETTLED:
        raise ArithmeticError(f"no codebook was found for blocks of {block_size}: a round moves a value by {moved}")
    # 7 digits are what float32 holds; so no last digit of a machine's exp or erf shows
    return torch.from_numpy(values.copy()).round(decimals=7).float()


def _largest(block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes m [n, 1], and g(m) / P(m) times the weights of the quadrature [n]."""
    from scipy.special import erf

    node, weight = np.polynomial.legendre.leggauss(_NODES)
    m = (node + 1) * _LARGEST / 2
    density = block_size * 2 * _phi(m) * erf(m / np.sqrt(2)) ** (block_size - 2)
    return m[:, None], density * weight * _LARGEST / 2


def _phi(x: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi)


def _weighted_mean(block_size: int) -> _Centre:
    from scipy.special import ndtr

    m, density = _largest(block_size)

    def centre(a: np.ndarray, b: np.ndarray, before: np.ndarray) -> np.ndarray:
        product = density @ (m * (_phi(a * m) - _phi(b * m)))
        square = density @ (m * m * (ndtr(b * m) - ndtr(a * m)))
        return product / square

    return centre


def _median(block_size: int) -> _Centre:
    from scipy.special import ndtr

    m, density = _largest(block_size)

    def centre(a: np.ndarray, b: np.ndarray, before: np.ndarray) -> np.ndarray:
        below_a, below, below_b = (density @ ndtr(x * m) for x in (a, before, b))
        step = ((below_a + below_b) / 2 - below) / (density @ (m * _phi(before * m)))  # of Newton's
        return np.clip(before + step, a, b)

    return centre
