"""The codebooks: NF4 derived from the normal distribution, the data types it is compared with, the map of the scales.

**NormalFloat** (QLoRA, arXiv 2305.14314, section 3, appendix E) places its ``2**bits`` values at quantiles of N(0, 1)
and scales them to [-1, 1], so that normally distributed weights use each value about equally often. Equal use is not
what minimizes the error: the weights of a block are divided by its largest, which changes their distribution with the
block size (Yoshida, arXiv 2306.06965), and other values have less error (BOF4, arXiv 2505.06653). NF4 is the paper's
choice, and that of the files. A symmetric set of 16 quantiles has no zero, yet a zero must be represented exactly
(padding, pruned weights). So the two halves are built apart: 8 positive values, 7 negative ones, and one 0::

    positive   Q(linspace(offset, 1/2,  9))[:8]       Q = inverse of the normal distribution function
    negative  -Q(linspace(offset, 1/2,  8))[:7]
    offset     the mean of 1 - 1/(2 * 16) and 1 - 1/(2 * 15), to 7 digits: 0.9677083

``offset`` stands in for the probability 1 whose quantile is infinite; equation 4 of the paper as printed would need
that infinity. bitsandbytes ships the result as a literal table. The table comes out bit for bit only with its order
of roundings: the probabilities in float32, Q in float64, the cast to float32, and only then the division by the
largest value. The same construction gives 2 to 8 bits (nf2, nf3, nf5, ...).

**The others** are what the paper compares NF4 with (table 2), scaled to [-1, 1] as well: fp4, with the values and the
order of codes of bitsandbytes, fp4_e3m0 and int4.

**The dynamic map** (Dettmers, arXiv 1511.04561; used by bitsandbytes for second-level scales and optimizer states)
spends its 256 values on seven decades: 2, 4, ..., 128 values (both signs together) in (1e-7, 1e-6], ..., (0.1, 1],
each decade cut evenly, plus 0 and 1. Unsigned, all of them are positive.

A codebook is a tensor of values in the order of their codes, which for fp4 and int4 is not ascending.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from . import block_optimal

CUSTOM = "custom"  # the name of a codebook that the user gives
FITTED = ("kmeans", "kmeans_rows")  # codebooks that are fitted to a weight, or to each of its rows (``kmeans.py``)
Codebook = str | Tensor | Sequence[float]  # as functions take it: a name, or values for ``custom``
_SMALLEST = 2.0**-24  # so that its products with scales are as large as kernels/cpu/weight.h expects


def normal_float(bits: int = 4) -> Tensor:
    """The NormalFloat codebook of 2 to 8 bits; others raise ValueError.

    Returns:
        float32 [2**bits], ascending, from -1 to 1, with an exact 0 at index ``2**(bits-1) - 1``. For 4 bits it equals
        the table of the paper's appendix E, and of bitsandbytes, bit for bit.
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


def dynamic_map(signed: bool = True) -> Tensor:
    """The 8-bit dynamic map, that of ``create_dynamic_map`` of bitsandbytes, bit for bit.

    Returns:
        float32 [256], ascending. Signed, from -0.99297 to 1, with an exact 0 at index 127; unsigned, from an exact 0 at
        index 0 to 1, each decade twice as fine.
    """
    values = [_linspace(0, 1, 2)]
    for decade in range(7):
        edges = _linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


def fp4() -> Tensor:
    """The 4-bit floating-point numbers of bitsandbytes, float32 [16]: code = sign << 3 | e << 1 | m.

    A magnitude is m / 16 where e = 0, else (2 + m) * 2**(3 - e), divided by the largest of them, 12. Unlike in IEEE
    types, it falls with e, and the one subnormal number is far below the rest. Codes 0 and 8 are both 0.
    """
    magnitudes = [m / 16 if e == 0 else (2 + m) * 2.0 ** (3 - e) for e in range(4) for m in range(2)]
    return _with_sign_bit(_float32(magnitudes) / max(magnitudes))


def fp4_e3m0() -> Tensor:
    """The 4-bit numbers of three bits of exponent (QLoRA, table 2), float32 [16]: code = sign << 3 | e.

    A magnitude is 0 where e = 0, else 2**(e - 7). Codes 0 and 8 are both 0.
    """
    return _with_sign_bit(_float32([0.0 if e == 0 else 2.0 ** (e - 7) for e in range(8)]))


def int4() -> Tensor:
    """Symmetric 4-bit integers, float32 [16]: the value is q / 7, the code q in two's complement.

    No number in [-1, 1] is nearest to -8 / 7.
    """
    return _float32([*range(8), *range(-8, 0)]) / 7


def e2m1() -> Tensor:
    """The 4-bit floating-point numbers of MXFP4 and NVFP4 (OCP MX 1.0, 5.3.3) over 8, float32 [16]: code = sign << 3 |
    e << 1 | m. The magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4, 6 over 8, which a float32 holds exactly."""
    magnitudes = [m / 2 if e == 0 else (1 + m / 2) * 2.0 ** (e - 1) for e in range(4) for m in range(2)]
    return _with_sign_bit(_float32(magnitudes) / 8)


def _float32(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")


def _with_sign_bit(magnitudes: Tensor) -> Tensor:
    return torch.cat([magnitudes, 0.0 - magnitudes])  # 0 - 0 is +0


_NAMED = {"nf4": normal_float, "fp4": fp4, "fp4_e3m0": fp4_e3m0, "int4": int4, "e2m1": e2m1}
_NAMED |= {f"nf{bits}": partial(normal_float, bits) for bits in (2, 3, 5, 6, 7, 8)}
_OF_BLOCKS = {"af4": block_optimal.af4, "bof4": block_optimal.bof4, "bof4-s": block_optimal.bof4_s}
OTHERS = ("e2m1", "bof4-s")  # need another rule for the scale than absmax (``data_type.py``)
CODEBOOKS = tuple(name for name in (*_NAMED, *_OF_BLOCKS) if name not in OTHERS)


def codebook_values(name: str, block_size: int = 64) -> Tensor:
    """The values of a codebook of ``CODEBOOKS`` or ``OTHERS``, float32 [2**bits]; another name raises ValueError.

    Args:
        name: of the codebook.
        block_size: of the blocks it is used with; the values of af4, bof4 and bof4-s depend on it.
    """
    if name in _OF_BLOCKS:
        return _OF_BLOCKS[name](block_size)
    if name not in _NAMED:
        raise ValueError(f"unknown codebook {name!r}; known: {', '.join(CODEBOOKS)}")
    return _NAMED[name]()


def custom(values: Tensor | Sequence[float]) -> Tensor:
    """A codebook that a user gives, checked: float32 [n], a copy, with +0.0 for a -0.0.

    Args:
        values: 4 to 256 numbers, ascending, in [-1, 1], each 0 or at least 2**-24 in magnitude: a float32 tensor [n],
            or a sequence, of which each number is rounded to float32.

    Raises:
        TypeError: they are no numbers.
        ValueError: they are not such values.
    """
    if not isinstance(values, Tensor):
        try:
            values = _float32(list(values))
        except (TypeError, ValueError, OverflowError):
            raise TypeError(f"a codebook is a name, or 4 to 256 numbers, not {values!r:.60}") from None
    if values.dtype != torch.float32 or values.dim() != 1 or not 4 <= len(values) <= 256:
        found = f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"
        raise ValueError(f"a codebook is float32 [4 to 256], not {found}")
    if not (values.diff() > 0).all() or not (values.abs() <= 1).all():  # nor is NaN
        raise ValueError("the values of a codebook ascend and lie in [-1, 1]: the weights are scaled to that range")
    if ((values != 0) & (values.abs() < _SMALLEST)).any():
        raise ValueError("a value of a codebook is 0 or at least 2**-24 in magnitude; set what is meant as 0 to 0")
    return values.detach() + 0.0


def thresholds(values: Tensor) -> Tensor:
    """The decision thresholds of ascending values, float32 [n - 1]: the midpoints of neighbours. A number equal to one
    goes to the lower value."""
    return (values[:-1] + values[1:]) / 2


def decision_table(values: Tensor) -> tuple[Tensor, Tensor]:
    """How to find the code of a number: count the thresholds below it, and look the count up.

    Returns:
        thresholds: float32 [k - 1], those of the k different values.
        codes: uint8 [k], the codes of those values, ascending by value; of two codes with one value, the lower.
    """
    ascending, codes = values.sort(stable=True)
    different = torch.cat([ascending.new_ones(1, dtype=torch.bool), ascending.diff() != 0])
    return thresholds(ascending[different]), codes[different].to(torch.uint8)
