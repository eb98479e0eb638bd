"""The sixteen values of NF4, derived from the normal distribution, and the 8-bit map of its scales.

**NormalFloat** (QLoRA, arXiv 2305.14314, section 3 and appendix E). Trained weights are close to normally distributed
with mean 0. A data type with ``2**bits`` values wastes nothing when each value is used equally often, so the values
are placed at quantiles of N(0, 1) and scaled to [-1, 1]. A symmetric set of 16 quantiles has no zero, yet a zero must
be represented exactly (padding, pruned weights). So the two halves are built apart: 8 positive values, 7 negative
ones, and one 0::

    positive   Q(linspace(offset, 1/2,  9))[:8]       Q = inverse of the normal distribution function
    negative  -Q(linspace(offset, 1/2,  8))[:7]
    offset     the mean of 1 - 1/(2 * 16) and 1 - 1/(2 * 15), to 7 digits: 0.9677083

``offset`` stands in for the probability 1 whose quantile is infinite; equation 4 of the paper as printed would need
that infinity. bitsandbytes ships the result as a literal table. The table comes out bit for bit only with its order
of roundings: the probabilities in float32, Q in float64, the cast to float32, and only then the division by the
largest value.

**The dynamic map** (Dettmers, arXiv 1511.04561; used by bitsandbytes for second-level scales and optimizer states)
spends its 256 values
on seven decades: 2, 4, ..., 128 values (both signs together) in (1e-7, 1e-6], ..., (0.1, 1], each decade cut evenly,
plus 0 and 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODEBOOKS = ("nf4",)


def normal_float(bits: int = 4) -> Tensor:
    """The NormalFloat codebook of a given width.

    Args:
        bits: 2 to 8.

    Returns:
        float32 [2**bits], ascending, from -1 to 1, with an exact 0 at index ``2**(bits-1) - 1``. For 4 bits it equals
        the table of the paper's appendix E, and of bitsandbytes, bit for bit.

    Raises:
        ValueError: bits is outside 2 to 8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"a NormalFloat has 2 to 8 bits, not {bits}")
    half = 2 ** (bits - 1)
    offset = round(1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2, 7)
    positive = _normal_quantile(_linspace(offset, 0.5, half + 1)[:-1])
    negative = -_normal_quantile(_linspace(offset, 0.5, half)[:-1])
    values = torch.cat([negative, positive.new_zeros(1), positive.flip(0)])
    return values / values.max()


def _linspace(start: float, end: float, steps: int) -> Tensor:
    # float32 on the CPU whatever the defaults in force: the bits of the codebook depend on it
    return torch.linspace(start, end, steps, dtype=torch.float32, device="cpu")


def _normal_quantile(probability: Tensor) -> Tensor:
    """Q, the inverse of the standard normal distribution function: evaluated in float64, returned in float32."""
    # scipy.stats.norm.ppf evaluates this same function; importing scipy.stats takes ten times as long.
    from scipy.special import ndtri

    return torch.from_numpy(ndtri(probability.double().numpy())).float()


def dynamic_map() -> Tensor:
    """The signed 8-bit dynamic map.

    Returns:
        float32 [256], ascending, from -0.99297 to 1, with an exact 0 at index 127: the ``nested_quant_map`` of
        bitsandbytes, bit for bit.
    """
    values = [_linspace(0, 1, 2)]
    for decade in range(7):
        edges = _linspace(0.1, 1, 2**decade + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        values += [middles, -middles]
    return torch.cat(values).sort().values


def codebook_values(name: str) -> Tensor:
    """The values of a codebook by its name.

    Args:
        name: one of ``CODEBOOKS``.

    Returns:
        float32 [16], ascending.

    Raises:
        ValueError: there is no such codebook.
    """
    if name == "nf4":
        return normal_float(4)
    raise ValueError(f"unknown codebook {name!r}; known: {', '.join(CODEBOOKS)}")


def thresholds(values: Tensor) -> Tensor:
    """The decision thresholds of a codebook: the float32 midpoints of neighbouring values.

    Args:
        values: float32 [n], ascending.

    Returns:
        float32 [n - 1]. A number equal to a threshold goes to the lower index.
    """
    return (values[:-1] + values[1:]) / 2
