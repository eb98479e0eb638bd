"""The dropout mask: a function of a 64-bit seed and of the index of an element.

So backward makes it again from the seed, and every implementation, on every device, in any order, draws the same bits.
Element (m, k) uses 16 bits of a 64-bit word::

    words = 8 * ceil(K / 32)                        64-bit words to a row: 32 elements are 64 bytes
    word  = splitmix64(seed, number = m * words + k // 4)
    dropped  where bits 16 * (k % 4) ... 16 * (k % 4) + 15 of word < threshold = round(p * 65536)

splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) hashes a counter, so
its n-th word comes without the words before it::

    z = seed + (number + 1) * 0x9E3779B97F4A7C15    modulo 2**64, as all that follows
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9
    z = (z ^ z >> 27) * 0x94D049BB133111EB
    z ^ z >> 31

Sixteen bits resolve a probability to 1/65536. The rate that is applied, q = threshold / 65536, is also the one that is
corrected for, so the mean stays right.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LANES = 4  # 16-bit lanes of a word
_ROW_ALIGNMENT = 32  # elements


def threshold(p: float) -> int:
    """How many of 65536 elements dropout drops when p, in [0, 1), is asked for: the nearest number, below 65536."""
    return max(0, min(round(p * 65536), 65535))


def rate(p: float) -> float:
    """The dropout rate that is applied when p is asked for: the nearest multiple of 1/65536 below 1."""
    return threshold(p) / 65536


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Which elements dropout keeps.

    Args:
        seed: int64 [], any value.
        rows, columns: of the matrix.
        p: probability to drop an element, in [0, 1).

    Returns:
        bool [rows, columns] on the device of seed, True where kept.
    """
    words = -(-columns // _ROW_ALIGNMENT) * (_ROW_ALIGNMENT // _LANES)
    z = _splitmix64(seed, rows * words)
    lanes = z.view(torch.int16).view(rows, words * _LANES)[:, :columns]  # little-endian: the lowest bits come first
    return lanes.add(-32768) >= threshold(p) - 32768  # both shifted: int16 compares with a sign, and wraps


def seed_of(seed: Tensor | None, p: float) -> Tensor | None:
    """The seed, where p drops something, else None.

    Raises:
        ValueError: something is dropped, and there is no seed.
    """
    if not threshold(p):
        return None
    if seed is None:
        raise ValueError(f"dropout of {p} needs a seed")
    return seed


def mask(x: Tensor, seed: Tensor | None, p: float) -> Tensor | None:
    """The mask for x [..., K]: bool [tokens, K], or None where nothing is dropped. Raises as ``seed_of``."""
    seed = seed_of(seed, p)
    return None if seed is None else keep_mask(seed, math.prod(x.shape[:-1]), x.shape[-1], p)


def kept(rows: Tensor, keep: Tensor | None) -> Tensor:
    """The rows where keep is True, zero elsewhere; the rows themselves where keep is None."""
    return rows if keep is None else torch.where(keep, rows, 0)


def _splitmix64(seed: Tensor, count: int) -> Tensor:
    """The first ``count`` words from a seed: int64 [count], the 64 bits of each as torch can hold them."""
    z = torch.arange(1, count + 1, dtype=torch.int64, device=seed.device)
    z.mul_(_signed(0x9E3779B97F4A7C15)).add_(seed)
    z.bitwise_xor_(_shifted(z, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    z.bitwise_xor_(_shifted(z, 27)).mul_(_signed(0x94D049BB133111EB))
    return z.bitwise_xor_(_shifted(z, 31))


def _shifted(z: Tensor, bits: int) -> Tensor:
    """z >> bits with zeros coming in; torch repeats the sign."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """The int64 that has the bits of an unsigned 64-bit number."""
    return word - (1 << 64) if word >> 63 else word
