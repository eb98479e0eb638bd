"""What a weight is like before it is quantized, and what quantizing does to it.

**How normal.** NF4 assumes that weights are normal (QLoRA, section 3, appendix F, where rows are tested).

    excess kurtosis   E[(w - mean)**4] / std**4 - 3              0 for a normal distribution, 3 for Laplace's
    of rows           the same of each row by itself, as a mean. Rows of different spread make a tensor heavy-tailed
                      whose rows are normal; blocks lie within rows, so this is the number that matters to NF4
    KS distance       max |F(w) - Phi((w - mean) / std)|         Kolmogorov-Smirnov, from the normal distribution with
                      the weight's own mean and standard deviation: the largest gap between two distribution functions

It is a distance, no test: of a million weights, any deviation is significant, and which ones matter is the question.

**What is lost.** The relative squared error ``|W' - W|**2 / |W|**2``, summed in float64.

**What codes carry.** The entropy of the codes in bits: 4 where all 16 are used equally often. NF4 is built for that;
the error is not least there (``nf4/codebook.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qloralab.nf4.blockwise import in_blocks
from qloralab.nf4.tensor import QuantizedTensor

SAMPLE = 1 << 20  # weights of which the distribution function is taken; drawn where there are more
# Probabilities of the quantiles of a Q-Q picture: evenly spaced, and closer together in the tails.
_TO_THE_MEDIAN = (*np.geomspace(1e-5, 0.02, 12).round(7).tolist(), *np.linspace(0.04, 0.5, 13).round(7).tolist())
PROBABILITIES = (*_TO_THE_MEDIAN, *(1 - p for p in reversed(_TO_THE_MEDIAN[:-1])))


@dataclass(frozen=True)
class Distribution:
    """How the weights of a layer are distributed.

    Attributes:
        mean, std: of the weights.
        norm: square root of the sum of squares.
        excess_kurtosis, row_excess_kurtosis, ks_distance: see above.
        quantiles: at ``PROBABILITIES``, in standard deviations from the mean.
    """

    mean: float
    std: float
    norm: float
    excess_kurtosis: float
    row_excess_kurtosis: float
    ks_distance: float
    quantiles: tuple[float, ...]


def distribution(weight: Tensor) -> Distribution:
    """How a weight is distributed. Of one that is constant, kurtosis and distance are 0.

    Args:
        weight: floating-point, [N, K], finite.
    """
    from scipy import stats

    values = weight.double().numpy()
    mean, std = float(values.mean()), float(values.std())
    norm = float(np.sqrt(np.square(values).sum()))
    if std <= 1e-12 * abs(mean):
        return Distribution(mean, std, norm, 0.0, 0.0, 0.0, (0.0,) * len(PROBABILITIES))
    flat = values.reshape(-1)
    if flat.size > SAMPLE:
        flat = np.random.default_rng(0).choice(flat, SAMPLE, replace=False)
    some = (np.sort(flat) - mean) / std
    distance = stats.ks_1samp(some, stats.norm.cdf, method="asymp")
    return Distribution(
        mean, std, norm,
        excess_kurtosis=float(stats.kurtosis(values.reshape(-1))),
        row_excess_kurtosis=_of_rows(values),
        ks_distance=float(distance.statistic),  # pyright: ignore[reportAttributeAccessIssue]
        quantiles=tuple(np.quantile(some, PROBABILITIES).tolist()),
    )  # fmt: skip


def _of_rows(values: np.ndarray) -> float:
    """The mean excess kurtosis of rows, without the bias that short rows have; constant rows are left out."""
    from scipy import stats

    spread = values.std(axis=1) > 1e-12 * np.abs(values).max(axis=1)
    if values.shape[1] < 4 or not spread.any():
        return 0.0
    return float(np.mean(stats.kurtosis(values[spread], axis=1, bias=False)))


@dataclass(frozen=True)
class Block:
    """A block whose scale stands out.

    Attributes:
        index: of the block: weights ``index * block_size`` and after it, in row-major order.
        absmax: its largest magnitude.
        ratio: that over the median of all blocks; infinite where that is 0.
    """

    index: int
    absmax: float
    ratio: float


def largest_blocks(absmax: Tensor, count: int) -> list[Block]:
    """The blocks of largest scale, the largest first.

    Args:
        absmax: of each block, [blocks].
        count: of blocks, at most.
    """
    median = float(absmax.abs().median())
    top = absmax.abs().topk(min(count, len(absmax)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [Block(index, value, value / median if median else float("inf")) for index, value in pairs]


def blocks_absmax(weight: Tensor, block_size: int) -> Tensor:
    """The largest magnitude of each block, float32 [blocks]."""
    return in_blocks(weight.float().flatten(), block_size).abs().amax(dim=1)


@dataclass(frozen=True)
class Codes:
    """How often each code is used.

    Attributes:
        histogram: by code, in the order of the codebook.
        values: the codebook; None where each row has its own.
        entropy: of a code, in bits.
    """

    histogram: tuple[int, ...]
    values: tuple[float, ...] | None
    entropy: float


def codes_of(weight: QuantizedTensor) -> Codes:
    """The histogram of the codes of a weight."""
    histogram = torch.bincount(weight.codes().flatten(), minlength=weight.values.shape[-1])
    values = tuple(weight.values.tolist()) if weight.values.dim() == 1 else None
    return Codes(tuple(histogram.tolist()), values, entropy(histogram))


def entropy(histogram: Tensor) -> float:
    """Of a code, in bits: ``-sum(p log2 p)``."""
    p = histogram.double() / histogram.sum()
    return float(torch.special.entr(p).sum() / np.log(2))


def relative_error(found: Tensor, exact: Tensor) -> float:
    """``|found - exact|**2 / |exact|**2``, both [...]; 0 where both are 0."""
    return ratio(
        float((found - exact).square().sum(dtype=torch.float64)), float(exact.square().sum(dtype=torch.float64))
    )


def ratio(error: float, size: float) -> float:
    """The quotient of two sums of squares; 0 / 0 is 0."""
    return error / size if size else 0.0 if error == 0 else float("inf")
