"""The dropout mask of ``lora/dropout.py`` inside a kernel: made from the seed where it is used, never stored.

Element (m, k) of x [tokens, K] is kept where 16 bits of a hashed counter are at least the threshold::

    words = 8 * ceil(K / 32)
    z     = seed + (m * words + k // 4 + 1) * G      modulo 2**64, G = 0x9E3779B97F4A7C15
    word  = splitmix64's two rounds of z
    kept  where bits 16 * (k % 4) ... + 15 of word >= threshold

The argument of the hash is a sum, ``row_terms(m) + quad_terms(k // 4)``: the products with G are taken once for each
row and each four columns, and a word costs

====================  ==  =========================================
IADD3                  2  the sum
SHF, LOP3             12  three times z ^ z >> n
IMAD                   6  two products with a constant
====================  ==  =========================================

20 instructions, or 5 for each of its four elements, and 2 to 3 to compare and to select. A mask in memory would have to
be written, and read by each of the three kernels; at one byte an element that is half of the traffic of x in bfloat16.

**Sixteen bits without a mask.** ``lo >> 16 >= threshold`` and ``lo >= threshold << 16`` are the same; the lower half is
shifted up and compared likewise. So ``coins`` returns 32-bit numbers whose upper halves are the 16 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qloralab.lora.dropout import threshold as threshold  # the argument ``threshold`` of the kernels

_G = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND = tl.constexpr(0x94D049BB133111EB)


def row_words(columns: int) -> int:
    """64-bit words to a row of x: the argument ``words`` of the kernels."""
    return -(-columns // 32) * 8


@triton.jit
def row_terms(seed, m, words):
    """What the rows add to the argument of the hash: uint64, for the rows m (int64), from the seed behind a pointer."""
    return tl.load(seed).to(tl.uint64) + (m * words).to(tl.uint64) * _G


@triton.jit
def quad_terms(quad):
    """What four columns add to it: uint64, for quad = k // 4."""
    return (quad.to(tl.uint64) + 1) * _G


@triton.jit
def coins(z):
    """The four numbers of the elements 4 quad, 4 quad + 1, + 2, + 3: uint64 [...] -> uint32 [..., 2, 2].

    An element is kept where its number is at least ``threshold << 16``, see ``limit``.
    """
    low, high = halves(z)  # pyright: ignore[reportGeneralTypeIssues]
    return tl.join(tl.join(low << 16, high << 16), tl.join(low, high))


@triton.jit
def halves(z):
    """splitmix64's word for each argument, as two uint32: the first two elements of a quad, and the others."""
    z = (z ^ (z >> 30)) * _FIRST
    z = (z ^ (z >> 27)) * _SECOND
    z = z ^ (z >> 31)
    return z.to(tl.uint32), (z >> 32).to(tl.uint32)


@triton.jit
def limit(threshold):
    """What the numbers are compared with."""
    return threshold.to(tl.uint32) << 16
