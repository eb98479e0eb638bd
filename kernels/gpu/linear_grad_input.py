"""dX = dY W' from the packed weight: the backward of ``linear.py``, equally without leaving registers.

``dX^T = W'^T dY^T``: the rows of the product are now columns of W, the sum goes over its rows, whose order is theirs. A
step of the loop is 64 rows of W, of 256 columns that the program has. A lane loads, of each of its 16 rows, the 4 bytes
of 8 columns in a row, which are 8 rows of the product::

    n = 16 s + 8 q + 2 c + i        for the column (s, q, c, i) of the multiplication
    k = 64 warp + 8 g + kk          for the lane (g, c) of a warp; kk is four pieces of 16 rows, two rows of each

For 128 tokens the sums of 8 columns are more than the registers hold. Then a program has twice as many warps, and a
lane 4 of the 8 columns: two lanes load the same word, and each takes half of it, of the rows n and n + 8.

**Pairs** are made of neighbours along n, of two words: ``lookup.py`` deals their codes out first.

**Counted**, per weight, for sm_90 with triton 3.7.1: 2.875 for the look-up, 0.5 to scale, 0.125 for the
multiplications, 0.2 for the scales; in all 4.7 for 16 tokens, 4.8 for 32 and 64, 6.2 for 128. The limits are those of
the forward kernel. The codes of the scales lie a row apart: a step asks the L2 cache for 32 bytes of each of its 64
rows, a quarter of its words' bytes. From memory they come once, for the columns of all programs.

**Accuracy.** The weights are the bits that the forward kernel multiplies.

**An adapter** adds keep∘(G A), again where the sums start, since the mask is on this term alone. The mask is made in
registers (``adapter_operands.py``): 8 instructions for each element of dx, once, where a loop over 4,096 rows takes
180.

A sum over many rows and few columns is split as in the forward kernel, and added in a fixed order. Where N is no
multiple of 64, the last step has the last 64 rows, and dY is copied, with zeros for those that were there before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qloralab.lora.dropout import keep_mask, seed_of
from qloralab.nf4.packed import Packed

from . import canonical, self_check
from .adapter_operands import MaskedLowRank, coins, limit, quad_terms, rank_tiles, row_terms, row_words, threshold
from .canonical import TILE, of_eight_lanes, pair, scale_of
from .case import Case
from .interpreter import bound, operand, round_to
from .launch import launch
from .linear import LEVELS, product_budget, whole_weight
from .lookup import decode_rows, halves
from .split import in_parts

COLUMNS = 256  # of a program


@triton.jit(do_not_specialize=["M", "N", "steps", "threshold", *canonical.SCALARS])
def _linear_grad_input(
    grad, packed, scales, absmax2, offset, scale_map, out, M, N, tiles, steps, shift, inverse,
    t0, t1, t2, t3, t4, t5, t6, t7, t8,
    G, A, seed, r, row_words, threshold,
    TOKENS: tl.constexpr, WARPS: tl.constexpr, MMA_SYNC: tl.constexpr, DOUBLE: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """out[m, k] = keep[m, k] sum_j A[j, k] G[m, j] + sum_n grad[m, n] W'[n, k]; out[split, m, k] where the second sum
    is split. grad has a column for each row of the steps, a multiple of 64.

    tiles is K / 64. Columns are k = (warp, g, high, rep, p), of the product's rows (high, rep, warp, p, g): high has
    two values where a lane takes whole words, else one.
    """
    HIGH: tl.constexpr = 8 // WARPS
    LANES: tl.constexpr = 4 * HIGH  # words of a row that a warp has
    rows = tl.cdiv(N, 64) * 64
    first = tl.program_id(2) * steps
    last = tl.minimum(first + steps, rows // 64)
    tl.assume(first < last)
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    # Tokens and blocks of columns behind the last one are the last once more: what is read again is not stored.
    grad_at = (tl.minimum(m, M - 1) - tl.program_id(1) * TOKENS)[None, :] * rows + tl.arange(0, 64)[:, None]
    grad += (tl.program_id(1) * TOKENS).to(tl.int64) * rows + first * 64
    words = packed.to(tl.pointer_type(tl.int32))
    i = tl.arange(0, 2048)  # s q i warp c lane
    lane = tl.arange(0, 32 * WARPS) % 32
    # n is s q c i, with MMA_SYNC s c q i; a lane has the scales of s q = g.
    Q: tl.constexpr = 2 if MMA_SYNC else 8
    C: tl.constexpr = 4 if MMA_SYNC else 2
    row = i // 512 * 16 + i // 256 % 2 * Q + i // LANES % 4 * C + i // 128 % 2
    scale_row = lane // 8 * 16 + lane // 4 % 2 * Q + lane % 4 * C
    warp = i // (4 * LANES) % WARPS
    block = tl.minimum(tl.program_id(0) * 4 + warp // (WARPS // 4), tiles - 1)
    words_at = row * (tiles * 8) + block * 8 + warp % (WARPS // 4) * LANES + i % LANES
    block = tl.minimum(tl.program_id(0) * 4 + tl.arange(0, 32 * WARPS) // (8 * WARPS), tiles - 1)
    blocks = scale_row * tiles + block
    if DOUBLE:
        offset = tl.load(offset) * inverse
    at = tl.minimum(first * 64, N - 64) * tiles + blocks
    s = scale_of(scales, absmax2, offset, scale_map, inverse, at >> shift, DOUBLE)
    u = scale_of(scales, absmax2, offset, scale_map, inverse, (at + tiles) >> shift, DOUBLE)
    total = tl.zeros((256, TOKENS), tl.float32)
    if RANKS:
        total = _low_rank(
            total, G, A, seed, M, tiles * 64, r, row_words, threshold, m, TOKENS, WARPS, RANK, RANKS, DROPOUT
        )
    for step in range(bound(first), bound(last)):
        w = tl.load(words + tl.minimum(step * 64, N - 64).to(tl.int64) * (tiles * 8) + words_at)
        g = operand(tl.load(grad + grad_at), tl.bfloat16)
        by_lane = tl.reshape(of_eight_lanes(pair(s, u), WARPS), (4, 2, WARPS, 8, 4))
        w = tl.permute(tl.reshape(w, (4, 2, 2, WARPS, 4, LANES)), (0, 1, 3, 5, 4, 2))  # s q warp lane c i
        if WARPS == 4:
            a, b = tl.split(w)
            d = decode_rows(a, b, by_lane, by_lane, t0, t1, t2, t3, t4, t5, t6, t7, t8)
            # s q warp g c high rep p i -> high rep warp p g, and the order of n above
            if MMA_SYNC:
                d = tl.permute(d, (5, 6, 2, 7, 3, 0, 4, 1, 8))
            else:
                d = tl.permute(d, (5, 6, 2, 7, 3, 0, 1, 4, 8))
        else:
            w = tl.broadcast_to(tl.reshape(w, (4, 2, WARPS, LANES, 1, 4, 2)), (4, 2, WARPS, LANES, 2, 4, 2))
            a, b = tl.split(tl.permute(tl.reshape(w, (4, 2, WARPS, 8, 4, 2)), (0, 2, 3, 4, 5, 1)))  # by q
            a, b = tl.split(halves(a, b, (tl.arange(0, 8) % 2)[None, None, :, None, None]))
            low, high = tl.split(tl.permute(by_lane, (0, 2, 3, 4, 1)))
            d = decode_rows(a, b, low, high, t0, t1, t2, t3, t4, t5, t6, t7, t8)
            d = tl.permute(d, (5, 1, 6, 2, 0, 4, 3, 7))  # s warp g c q rep p i -> rep warp p g, s q c i
        total = tl.dot(tl.reshape(d, (256, 64)), g, total)
        grad += 64
        at = tl.minimum(tl.minimum(step + 1, last - 1) * 64, N - 64) * tiles + blocks
        s = scale_of(scales, absmax2, offset, scale_map, inverse, at >> shift, DOUBLE)
        u = scale_of(scales, absmax2, offset, scale_map, inverse, (at + tiles) >> shift, DOUBLE)
    # high rep warp p g -> warp g high rep p
    total = tl.permute(tl.reshape(total, (HIGH, 2, WARPS, 2, 8, TOKENS)), (2, 4, 0, 1, 3, 5))
    total = tl.reshape(total, (256, TOKENS))
    K = tiles * 64
    k = tl.program_id(0) * 256 + tl.arange(0, 256)
    at = out + (tl.program_id(2).to(tl.int64) * M + m)[None, :] * K + k[:, None]
    tl.store(at, round_to(total, out.dtype.element_ty), mask=(m[None, :] < M) & (k[:, None] < K))


@triton.jit
def _low_rank(
    total, G, A, seed, M, K, r, row_words, threshold, m,
    TOKENS: tl.constexpr, WARPS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """keep∘(total + A' G'), its rows in the order of the product; of the parts of a split sum, the first has it."""
    HIGH: tl.constexpr = 8 // WARPS
    if tl.program_id(2) == 0:
        k = tl.program_id(0) * 256 + tl.arange(0, 256)
        G_at = G + m.to(tl.int64)[None, :] * r
        for first in tl.range(0, RANK * RANKS, RANK, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
            j = first + tl.arange(0, RANK)
            a_at = A + j.to(tl.int64)[None, :] * K + k[:, None]
            a = tl.load(a_at, mask=(k[:, None] < K) & (j[None, :] < r), other=0.0)
            g = tl.load(G_at + j[:, None], mask=(m[None, :] < M) & (j[:, None] < r), other=0.0)
            # warp g high rep p -> high rep warp p g
            a = tl.permute(tl.reshape(operand(a, tl.bfloat16), (WARPS, 8, HIGH, 2, 2, RANK)), (2, 3, 0, 4, 1, 5))
            total = tl.dot(tl.reshape(a, (256, RANK)), operand(g, tl.bfloat16), total)
        if DROPOUT:
            total = _kept(total, seed, m, row_words, threshold, TOKENS, WARPS)
    return total


@triton.jit
def _kept(total, seed, m, row_words, threshold, TOKENS: tl.constexpr, WARPS: tl.constexpr):
    """total where the mask keeps it: a thread has the four rows (rep, p) of each word of the mask."""
    HIGH: tl.constexpr = 8 // WARPS
    i = tl.arange(0, 64)  # high warp g
    quad = tl.program_id(0) * 64 + i % (8 * WARPS) * HIGH + i // (8 * WARPS)
    numbers = coins(row_terms(seed, m.to(tl.int64), row_words)[None, :] + quad_terms(quad)[:, None])
    # high warp g tokens rep p -> high rep warp p g tokens
    numbers = tl.permute(tl.reshape(numbers, (HIGH, WARPS, 8, TOKENS, 2, 2)), (0, 4, 1, 5, 2, 3))
    return tl.where(tl.reshape(numbers, (256, TOKENS)) >= limit(threshold), total, 0.0)


def linear_grad_input(
    grad: Tensor, weight: Packed, splits: int | None = None, adapter: MaskedLowRank | None = None
) -> Tensor:
    """grad W', plus keep∘(G A) of an adapter: the gradient of ``linear`` with respect to x.

    Args:
        grad: bfloat16 [..., N], on the weight's device.
        weight: W [N, K].
        splits: into how many ranges N is cut; None: ``split.steps_of`` decides.
        adapter: what is added before the result is rounded; None: nothing is.

    Returns:
        bfloat16 [..., K].

    Raises:
        ValueError: grad or the adapter has another dtype, shape or device; or ``canonical.why_not`` has a reason.
    """
    N, K = weight.shape
    canonical.check("grad", grad, N, weight)
    operands = canonical.arguments(weight)
    M, rest = math.prod(grad.shape[:-1]), N % TILE
    out = grad.new_empty((*grad.shape[:-1], K))
    if rest:
        zeros = grad.new_zeros((*grad.shape[:-1], TILE - rest))
        grad = torch.cat([grad[..., :-rest], zeros, grad[..., -rest:]], -1)
    grad = grad.contiguous()
    if adapter is not None:
        adapter.check(grad, M, K)
    if M == 0:
        return out
    G, A, seed, r, dropped = None, None, None, 0, 0
    if adapter is not None:
        G, A, seed = adapter.G.contiguous(), adapter.A.contiguous(), seed_of(adapter.seed, adapter.p)
        dropped = threshold(adapter.p)
        r = A.shape[0]
    sync = canonical.mma_sync(grad.device)
    tokens = min(canonical.token_tile(M, sync), 32 if sync else 128)
    rank, ranks = rank_tiles(r, 64 if tokens < 64 else 16)
    warps = 8 if tokens == 128 else 4

    def run(grid: tuple[int, int, int], to: Tensor, steps: int) -> None:
        launch(
            _linear_grad_input, grid,
            grad=grad, out=to, M=M, N=N, steps=steps, **operands,
            G=G, A=A, seed=seed, r=r, row_words=row_words(K), threshold=dropped,
            TOKENS=tokens, WARPS=warps, MMA_SYNC=sync, RANK=rank, RANKS=ranks, DROPOUT=dropped > 0, num_warps=warps,
        )  # fmt: skip

    in_parts(run, out, (-(-K // COLUMNS), -(-M // tokens)), -(-N // TILE), splits, tokens)
    return out


def _check(launch: Any, device: torch.device) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    found, expected = list[Tensor](), list[Tensor]()
    grad, G, A = (self_check.whole(*size, device) for size in ((5, 192), (5, 3), (3, 256)))
    seed, p = torch.tensor(0x0123456789ABCDEF, device=device), 0.3
    low_rank = torch.where(keep_mask(seed, 5, 256, p), self_check.product(G, A), 0)
    for double, block_size in LEVELS:
        weight, W = whole_weight(device, double, block_size)
        given, dx = grad.bfloat16(), self_check.product(grad, W)
        found += launch(given, weight), launch(given, weight, adapter=MaskedLowRank(G.bfloat16(), A, seed, p))
        expected += dx.bfloat16(), (dx + low_rank).bfloat16()
    return found, expected


CHECKS = {"linear_grad_input": _check}


def _case(
    tokens: int, instructions: float, registers: int = 255, rank: int = 0, sync: bool = False, double: bool = True
) -> Case:
    adapter = {"G": "*bf16", "A": "*fp32", "seed": "*i64"}
    weight, constants = canonical.weight_of_a_case(double)
    pointers = {"grad": "*bf16", "out": "*bf16", **weight, **(adapter if rank else {})}
    scalars = ("M", "N", "steps", *canonical.SCALARS, "r", "row_words", "threshold")
    rank_tile, ranks = rank_tiles(rank, 64 if tokens < 64 else 16)
    warps = 8 if tokens == 128 else 4
    name = f"linear_grad_input, {tokens} tokens" + (f", rank {rank}" if rank else "")
    return Case(
        name=name + ("" if double else ", float32 scales"),
        kernel=_linear_grad_input,
        signature=pointers | dict.fromkeys(scalars, "i32") | {"inverse": "fp32"},
        constexprs={"TOKENS": tokens, "WARPS": warps, "MMA_SYNC": sync, "DROPOUT": rank > 0, **constants}
        | {"RANK": rank_tile, "RANKS": ranks, **({} if rank else dict.fromkeys(adapter))},
        weights=COLUMNS * TILE,
        num_warps=warps,
        divisible=(*pointers, *(("r", "row_words") if rank else ())),
        budget=product_budget(instructions, registers),
    )


CASES: tuple[Case, ...] = ()
CASES_SM_90 = CASES_SM_100 = (
    _case(16, 4.8, 176),
    _case(16, 4.6, 168, double=False),
    _case(32, 5, 192),
    _case(64, 5),
    _case(128, 6.3),
    _case(16, 4.8, 176, rank=64),
    _case(64, 5, rank=64),
    _case(128, 6.3, rank=128),
)
CASES_SM_80 = CASES_SM_120 = tuple(_case(tokens, 0, rank=rank, sync=True) for tokens in (16, 32) for rank in (0, 64))
