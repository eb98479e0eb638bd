"""A packed weight in the order of the tensor cores: converted once, read by the forward and the backward kernel alike.

**Why another order.** The canonical layout (``blockwise.py``) has two neighbouring weights of a row in a byte. A tensor
core wants a weight matrix in pieces: lane l of a warp holds, of a 16 x 16 piece, the rows l / 4 and l / 4 + 8 and the
columns 2 (l % 4), + 1, + 8, + 9. Here each lane finds the codes of its own weights in the words that it loads, so
that the dequantized weights are born in the registers in which the multiplication reads them: nothing is exchanged.

**The unit.** The backward product reads the same weights transposed: pairs along n, not along k. Both are served by a
unit of 4 x 4 weights: rows n, n + 1, n + 8, n + 9 and columns k, k + 1, k + 8, k + 9 for even n and k. It takes 64
bits, two words p; a word holds two squares q, the low and the high half; a square holds its weights (i, kp) as four
nibbles::

              k   k+1       k+8 k+9
        n    [0]  [1]       [4]  [5]          the nibbles of word p = 0, lowest first
        n+1  [2]  [3]       [6]  [7]

        n+8  [0]  [1]       [4]  [5]          and of word p = 1
        n+9  [2]  [3]       [6]  [7]

Forward, a lane's pairs are nibbles (0, 1) and (2, 3); backward (0, 2) and (1, 3). The unit is its own transpose, but
for the order of words and squares, which is a matter of naming registers.

**The tile.** 64 x 64 weights, 512 words, 2 KiB. The bits of a word's address and of a nibble's place in it are those of
n and k, dealt out::

    n = 64 tile + 32 n32 + 16 n16 + 8 p + 2 u + i             k = 64 tile + 32 k32 + 16 k16 + 8 q + 2 c + kp
    words   [N/64, K/64] [n32:2, k32:2, n16:2, u:4, c:4, k16:2, p:2]       nibbles  [q:2, i:2, kp:2]

Forward, the lane (n16, u, c) reads 16 bytes, k16 and p; backward, the lane (k16, c, u) reads 8 bytes, p.

**The scales.** One for each row n and each 64 columns, and each divided by the factor of the table (``lookup.py``)::

    scales  [N/64, K/64] [u:4, n32:2, n16:2, p:2, i:2]

twice: in float32 for the forward kernel, whose asynchronous copies have 4 bytes or more, and which rounds them; in
bfloat16 for the backward one. Forward a thread reads the four of (p, i); backward the sixteen of one u. They cost 0.75
bits per weight.

**What can be packed.** K is a multiple of 64, and so is the block size: then the 64 columns share one scale, even where
a block spans rows. N is padded to a multiple of 64, with the code of 0 and scale 0. In any other shape a block's border
crosses a tile in a different column of each row; such weights stay in the canonical layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from qloralab.nf4 import blockwise, double_quant

from .lookup import Table, table

TILE = 64  # weights, in both directions
TILE_WORDS = TILE * TILE // 8

_SLAB = 1 << 24  # weights converted at a time


@dataclass(frozen=True)
class TiledWeight:
    """A packed weight in the order above."""

    words: Tensor  # int32 [ceil(N / 64), K / 64, 512]
    scales: Tensor  # float32 [ceil(N / 64), K / 64, 64]
    scales_bf16: Tensor  # the same, rounded
    table: Table  # what the codes in words mean
    shape: tuple[int, int]  # (N, K)


def why_not(values: Tensor, shape: Sequence[int], block_size: int) -> str | None:
    """Why a weight cannot be packed into tiles, in words; None if it can.

    Args:
        values: the codebook, float32 [2**bits], in the order of the codes.
        shape: of the weight.
        block_size: weights that share a scale.
    """
    if len(shape) != 2:
        return f"a weight has 2 dimensions, not {len(shape)}"
    if shape[1] % TILE:
        return f"K must be a multiple of {TILE}, not {shape[1]}"
    if block_size % TILE:
        return f"the block size must be a multiple of {TILE}, not {block_size}"
    try:
        table(values)
    except ValueError as error:
        return str(error)
    return None


def tile(
    packed: Tensor,
    scales: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    values: Tensor,
    shape: Sequence[int],
    block_size: int,
) -> TiledWeight:
    """Convert a weight from the canonical layout, on its device.

    Args:
        packed: uint8 [N * K / 2, 1], two codes a byte, the first in the high nibble.
        scales: float32 [blocks], or uint8 [blocks] with absmax2 and offset.
        absmax2: float32 [ceil(blocks / 256)] or None.
        offset: float32 [] or None.
        values: the codebook, float32 [16].
        shape: (N, K).
        block_size: weights that share a scale.

    Raises:
        ValueError: ``why_not`` has a reason.
    """
    if reason := why_not(values, shape, block_size):
        raise ValueError(reason)
    N, K = shape
    look_up = table(values)
    absmax = scales if absmax2 is None or offset is None else double_quant.dequantize_scales(scales, absmax2, offset)
    tiled = _tile_scales(absmax / look_up.factor, N, K, block_size)
    order = torch.tensor(look_up.order, device=packed.device)
    kernels_code = order.argsort().to(torch.uint8)
    zero = kernels_code[blockwise.nearest(values.new_zeros(1), values).long()]
    words = [
        _tile_codes(kernels_code[blockwise.unpack(part, 2 * len(part)).int()].view(-1, K), zero)
        for part in packed.flatten().split(_rows_of_a_slab(K) * K // 2)
    ]
    return TiledWeight(torch.cat(words), tiled, tiled.bfloat16(), look_up, (N, K))


def _rows_of_a_slab(K: int) -> int:
    return max(_SLAB // (TILE * K), 1) * TILE


def _tile_codes(codes: Tensor, zero: Tensor) -> Tensor:
    """uint8 [rows, K], the kernels' codes -> int32 [ceil(rows / 64), K / 64, 512]."""
    rows, K = codes.shape
    codes = torch.cat([codes, zero.expand(-rows % TILE, K)])
    #                 tile n32 n16 p  u  i  tile    k32 k16 q  c  kp
    split = codes.view(-1, 2, 2, 2, 4, 2, K // TILE, 2, 2, 2, 4, 2)
    low, high = split.permute(0, 6, 1, 7, 2, 4, 10, 8, 3, 9, 5, 11).unbind(-1)  # kp: nibbles of a byte
    return (low | high << 4).reshape(-1, K // TILE, TILE_WORDS * 4).view(torch.int32)


def _tile_scales(absmax: Tensor, N: int, K: int, block_size: int) -> Tensor:
    """float32 [blocks] -> float32 [ceil(N / 64), K / 64, 64]."""
    columns = K // TILE
    each = absmax.repeat_interleave(block_size // TILE)[: N * columns].view(N, columns)
    split = pad(each, (0, 0, 0, -N % TILE)).view(-1, 2, 2, 2, 4, 2, columns)  # tile n32 n16 p u i tile
    return split.permute(0, 6, 4, 1, 2, 3, 5).reshape(-1, columns, TILE)
