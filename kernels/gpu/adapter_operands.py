"""What kernels with an adapter share: its low-rank terms as arguments, its rank in tiles, its dropout mask.

The matrices A and B are kept in float32, for the optimizer, and multiply in the dtype of x. A kernel reads them as they
are kept and rounds what it has read, so that no copy of them is made, and no launch is spent on one.

**The mask** of ``lora/dropout.py`` is made from the seed where it is used, and never stored.
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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qloralab.lora.dropout import rate

_G = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND = tl.constexpr(0x94D049BB133111EB)


@dataclass(frozen=True)
class LowRank:
    """h B', what an adapter adds to y."""

    h: Tensor  # the dtype of x, [tokens, r]
    B: Tensor  # float32 [N, r]

    def check(self, x: Tensor, tokens: int, N: int) -> None:
        """Raises ValueError unless it fits beside x W', x of so many tokens and W of so many rows."""
        r = _rank("B", self.B)
        expect("h", self.h, (tokens, r), x.dtype, x.device)
        expect("B", self.B, (N, r), torch.float32, x.device)


@dataclass(frozen=True)
class MaskedLowRank:
    """keep∘(G A), what an adapter adds to dx."""

    G: Tensor  # the dtype of x, [tokens, r]
    A: Tensor  # float32 [r, K]
    seed: Tensor | None  # int64 [] or [1]; of no effect when p is 0
    p: float  # dropout probability, in [0, 1)

    def check(self, grad: Tensor, tokens: int, K: int) -> None:
        """Raises ValueError unless it fits beside dy W, dy of so many tokens and W of so many columns."""
        r = _rank("G", self.G)
        expect("G", self.G, (tokens, r), grad.dtype, grad.device)
        expect("A", self.A, (r, K), torch.float32, grad.device)
        expect_seed(self.seed, grad.device)


def expect(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError unless a tensor has this shape and dtype, on this device."""
    if tensor.shape != tuple(shape) or tensor.dtype != dtype or tensor.device != device:
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name} must be {dtype} {list(shape)} on {device}, not {found}")


def expect_seed(seed: Tensor | None, device: torch.device) -> None:
    """Raises ValueError unless a tensor is the seed of a mask; None is, of none."""
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device):
        raise ValueError(f"seed must be one torch.int64 on {device}, not {seed.dtype} {list(seed.shape)} {seed.device}")


def rank_tiles(r: int, widest: int = 64) -> tuple[int, int]:
    """How a rank is cut: the constants RANK, columns of a tile, and RANKS, their number.

    One tile of 16 or 64, and for higher ranks as many of 32 as it takes: a loop over tiles of 64 keeps more in
    registers than there are. Beside 64 tokens or more, the fused kernels have room for 16 (the widest) at a time. A
    rank of 0, which stands for no adapter, has none.
    """
    if r <= widest:
        return (16 if r <= 16 else 64), min(r, 1)
    width = min(widest, 32)
    return width, -(-r // width)


def _rank(name: str, tensor: Tensor) -> int:
    """The second dimension of a matrix."""
    if tensor.dim() != 2 or tensor.shape[1] == 0:
        raise ValueError(f"{name} must be a matrix of 1 column or more, not {list(tensor.shape)}")
    return tensor.shape[1]


def threshold(p: float) -> int:
    """Of 65536, what p in [0, 1) drops: the argument ``threshold`` of the kernels; 0 where nothing is."""
    return round(rate(p) * 65536)


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
