"""What kernels with an adapter share: its low-rank terms as arguments, its rank in tiles, its matrices as operands.

The matrices A and B are kept in float32, for the optimizer, and multiply in the dtype of x. A kernel reads them as they
are kept and rounds what it has read, so that no copy of them is made, and no launch is spent on one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lookup import INTERPRETED
from .rounding import round_to, to_float32

_INTERPRETED = tl.constexpr(INTERPRETED)


@dataclass(frozen=True)
class LowRank:
    """h B', what an adapter adds to y.

    Attributes:
        h: the dtype of x, [tokens, r].
        B: float32 [N, r].
    """

    h: Tensor
    B: Tensor

    def check(self, x: Tensor, tokens: int, N: int) -> None:
        """Raises ValueError unless it fits beside x W', x of so many tokens and W of so many rows."""
        r = _rank("B", self.B)
        expect("h", self.h, (tokens, r), x.dtype, x.device)
        expect("B", self.B, (N, r), torch.float32, x.device)


@dataclass(frozen=True)
class MaskedLowRank:
    """keep∘(G A), what an adapter adds to dx.

    Attributes:
        G: the dtype of x, [tokens, r].
        A: float32 [r, K].
        seed: int64 [] or [1]; of no effect when p is 0.
        p: dropout probability, in [0, 1).
    """

    G: Tensor
    A: Tensor
    seed: Tensor
    p: float

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


def expect_seed(seed: Tensor, device: torch.device) -> None:
    """Raises ValueError unless a tensor is the seed of a mask."""
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
        raise ValueError(f"seed must be one torch.int64 on {device}, not {seed.dtype} {list(seed.shape)} {seed.device}")


def rank_tiles(r: int) -> tuple[int, int]:
    """How the fused kernels cut the rank: the constants RANK, columns of a tile, and RANKS, their number.

    One tile of 16 or 64, and for higher ranks as many of 32 as it takes: a loop over tiles of 64 keeps more in
    registers than there are, beside 128 tokens. A rank of 0, which stands for no adapter, has none.
    """
    if r <= 64:
        return (16 if r <= 16 else 64), min(r, 1)
    return 32, -(-r // 32)


@triton.jit
def operand(x, dtype: tl.constexpr):
    """A tile as an operand of ``tl.dot``: rounded to dtype, as the other operand is. In the interpreter, which cannot
    multiply in bfloat16, float32 of this value."""
    if _INTERPRETED:
        return to_float32(round_to(to_float32(x), dtype))
    return x.to(dtype)


def _rank(name: str, tensor: Tensor) -> int:
    """The second dimension of a matrix."""
    if tensor.dim() != 2 or tensor.shape[1] == 0:
        raise ValueError(f"{name} must be a matrix of 1 column or more, not {list(tensor.shape)}")
    return tensor.shape[1]
