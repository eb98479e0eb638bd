"""dX = dY W' from the same tiled copy of the weight: the backward of ``linear.py``, equally without leaving registers.

``dX^T = W'^T dY^T``: the rows of the product are now columns of W, the sum goes over its rows. The look-up joins
pairs along n instead of k, which is another constant in two of its instructions (``lookup.py``); nothing else about the
stored words changes. A step of the loop is 64 rows of W, of 128 columns that the program has.

**Scales** change along the sum, so they cannot wait for it: each pair of weights is multiplied by the pair of its
scales, in bfloat16, inside the look-up.

**Counted**, per weight, for sm_90 with triton 3.6.0: 2.375 for the look-up, 0.5 for the scales, 0.125 for the
multiplications, 1.6 to 2.6 for the rest of the loop; in all 4.6 for 16 tokens, 4.7 for 32, 5.0 for 64, 5.6 for 128.
0.53 bytes: 0.5, and 1/32 for the scale. Words are read 8 bytes at a time, in whole segments of 256
bytes: of the 16 bytes that a lane has forward, its own backward are two halves, in two lanes. The limits are those of
the forward kernel.

**Accuracy.** A weight is the bfloat16 product of the table's value and the rounded scale: off by 2.5e-3 (root mean
square, relative). These are the bits that the forward kernel multiplies.

**An adapter** adds keep∘(G A), again where the sums start, since the mask is on this term alone. The mask is made in
registers (``adapter_operands.py``): 15 instructions for each element of dx, once, where a loop over 4,096 rows takes
180.

A sum over many rows and few columns is split as in the forward kernel, and added in a fixed order. Where N is no
multiple of 64, dY is first copied and padded with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from qloralab.lora.dropout import keep_mask, seed_of
from qloralab.nf4.product import reshaped

from . import self_check
from .adapter_operands import MaskedLowRank, halves, limit, quad_terms, rank_tiles, row_terms, row_words, threshold
from .case import Case
from .interpreter import INTERPRETED, bound, operand, round_to, to_float32
from .linear import check, product_budget, token_tile, whole_weight
from .lookup import TABLE_ARGUMENTS, decode_transposed
from .packing import TILE, TiledWeight
from .split import in_parts

COLUMNS = 128  # of a program


@triton.jit(do_not_specialize=["M", "steps", "threshold", *TABLE_ARGUMENTS])
def _linear_grad_input(
    grad, words, scales, out, M, N, K, steps,
    t0, t1, t2, t3, t4, t5, t6, t7,
    G, A, seed, r, row_words, threshold,
    TOKENS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """out[m, k] = keep[m, k] sum_j A[j, k] G[m, j] + sum_n grad[m, n] W'[n, k]; out[split, m, k] where the second sum
    is split. N is a multiple of 64: that of the tiles, and grad has as many columns.

    Names of dimensions as in ``packing.py``; "tile" is which of the two tiles of columns. Words are loaded in the order
    (n32, n16, tile, k32, k16, c, u, p), pairs of scales in (tile, n32, n16, u, p). Rows of the product come in the
    order (q, tile, k32, kp, k16, c).
    """
    tiles = K // 64
    first = tl.program_id(2) * steps
    last = tl.minimum(first + steps, N // 64)
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    total = tl.zeros((128, TOKENS), tl.float32)
    if RANKS:
        total = _low_rank(total, G, A, seed, M, K, r, row_words, threshold, m, TOKENS, RANK, RANKS, DROPOUT)
    grad_at = grad + m.to(tl.int64)[None, :] * N + (first * 64 + tl.arange(0, 64))[:, None]
    i = tl.arange(0, 1024)
    # The tile right of the last one is the last once more, and not stored.
    word_tile = first.to(tl.int64) * tiles + tl.minimum(tl.program_id(0) * 2 + i // 128 % 2, tiles - 1)
    inside = i // 512 * 256 + i // 64 % 2 * 128 + i // 256 % 2 * 64 + i // 2 % 4 * 16 + i // 8 % 4 * 4
    words_at = words + word_tile * 512 + inside + i // 32 % 2 * 2 + i % 2
    row = tl.arange(0, 64)
    scale_tile = first.to(tl.int64) * tiles + tl.minimum(tl.program_id(0) * 2 + row // 32, tiles - 1)
    scales_at = scales + scale_tile * 32 + row // 2 % 4 * 8 + row // 16 % 2 * 4 + row // 8 % 2 * 2 + row % 2
    for _ in range(bound(first), bound(last)):
        w = tl.load(words_at)
        s = tl.load(scales_at)
        g = tl.load(grad_at, mask=m[None, :] < M, other=0.0)
        if INTERPRETED:
            g = to_float32(g)
        w = tl.reshape(w, (2, 2, 2, 2, 2, 4, 4, 2))
        s = tl.permute(tl.reshape(s, (2, 2, 2, 4, 2)), (1, 2, 0, 3, 4))
        s = tl.broadcast_to(tl.reshape(s, (2, 2, 2, 1, 1, 1, 4, 2)), (2, 2, 2, 2, 2, 4, 4, 2))
        d = decode_transposed(w, s, t0, t1, t2, t3, t4, t5, t6, t7)
        # n32 n16 tile k32 k16 c u i p kp q -> q tile k32 kp k16 c, n32 n16 p u i
        d = tl.permute(d, (10, 2, 3, 9, 4, 5, 0, 1, 8, 6, 7))
        total = tl.dot(tl.reshape(d, (128, 64)), g, total)
        words_at += tiles * 512
        scales_at += tiles * 32
        grad_at += 64
    total = tl.permute(tl.reshape(total, (2, 2, 2, 2, 2, 4, TOKENS)), (1, 2, 4, 0, 5, 3, 6))
    total = tl.reshape(total, (128, TOKENS))
    k = tl.program_id(0) * 128 + tl.arange(0, 128)
    row = tl.program_id(2).to(tl.int64) * M + m
    at = out + row[None, :] * K + k[:, None]
    tl.store(at, round_to(total, out.dtype.element_ty), mask=(m[None, :] < M) & (k[:, None] < K))


@triton.jit
def _low_rank(
    total, G, A, seed, M, K, r, row_words, threshold, m,
    TOKENS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """keep∘(total + A' G'), its rows in the order of the product; of the parts of a split sum, the first has it."""
    if tl.program_id(2) == 0:
        k = tl.program_id(0) * 128 + tl.arange(0, 128)
        G_at = G + m.to(tl.int64)[None, :] * r
        for first in tl.range(0, RANK * RANKS, RANK, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
            j = first + tl.arange(0, RANK)
            a_at = A + j.to(tl.int64)[None, :] * K + k[:, None]
            a = tl.load(a_at, mask=(k[:, None] < K) & (j[None, :] < r), other=0.0)
            g = tl.load(G_at + j[:, None], mask=(m[None, :] < M) & (j[:, None] < r), other=0.0)
            # tile k32 k16 q c kp -> q tile k32 kp k16 c
            a = tl.permute(tl.reshape(operand(a, tl.bfloat16), (2, 2, 2, 2, 4, 2, RANK)), (3, 0, 1, 5, 2, 4, 6))
            total = tl.dot(tl.reshape(a, (128, RANK)), operand(g, tl.bfloat16), total)
        if DROPOUT:
            total = _kept(total, seed, m, row_words, threshold, TOKENS)
    return total


@triton.jit
def _kept(total, seed, m, row_words, threshold, TOKENS: tl.constexpr):
    """total where the mask keeps it.

    A thread has rows kp = 0 and 1, which are half of a word of the mask: each word is hashed by two threads, which
    takes fewer registers than to exchange it, and there are none to spare.
    """
    i = tl.arange(0, 64)  # q tile k32 k16 c
    quad = i // 16 % 2 * 16 + i // 8 % 2 * 8 + i // 4 % 2 * 4 + i // 32 * 2 + i // 2 % 2
    quad += tl.program_id(0) * 32
    low, high = halves(  # pyright: ignore[reportGeneralTypeIssues]
        row_terms(seed, m.to(tl.int64), row_words)[None, :] + quad_terms(quad)[:, None]
    )
    half = tl.where((i % 2 == 0)[:, None], low, high)
    keep = tl.join((half << 16) >= limit(threshold), half >= limit(threshold))
    # q tile k32 k16 c tokens kp -> q tile k32 kp k16 c tokens
    keep = tl.permute(tl.reshape(keep, (2, 2, 2, 2, 4, TOKENS, 2)), (0, 1, 2, 6, 3, 4, 5))
    return tl.where(tl.reshape(keep, (128, TOKENS)), total, 0.0)


def linear_grad_input(
    grad: Tensor, weight: TiledWeight, splits: int | None = None, adapter: MaskedLowRank | None = None
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
        ValueError: grad or the adapter has another dtype, shape or device.
    """
    N, K = weight.shape
    check("grad", grad, N, weight)
    flat = grad.reshape(-1, N)
    flat = (pad(flat, (0, -N % TILE)) if N % TILE else flat).contiguous()  # pad copies where there is nothing to pad
    M = len(flat)
    if adapter is not None:
        adapter.check(flat, M, K)
    out = flat.new_empty((M, K))
    if M == 0 or N == 0 or K == 0:
        return reshaped(out.zero_(), (*grad.shape[:-1], K))
    G, A, seed, r, dropped = None, None, None, 0, 0
    if adapter is not None:
        G, A, seed, dropped = (
            adapter.G.contiguous(),
            adapter.A.contiguous(),
            seed_of(adapter.seed, adapter.p),
            threshold(adapter.p),
        )
        r = A.shape[0]
    rank, ranks = rank_tiles(r)
    tokens = token_tile(M, grad.device)
    if dropped and ranks > 1:
        tokens = min(tokens, 64)  # with 128, a loop over the rank and the mask together spill registers
    tiles = -(-N // TILE)
    kernel: Any = _linear_grad_input

    def launch(grid: tuple[int, int, int], to: Tensor, steps: int) -> None:
        kernel[grid](
            flat, weight.words, weight.scales_bf16.view(torch.int32), to, M, tiles * TILE, K, steps,
            *weight.table.words,
            G, A, seed, r, row_words(K), dropped,
            TOKENS=tokens, RANK=rank, RANKS=ranks, DROPOUT=dropped > 0,
            num_warps=4, num_stages=_stages(tokens),
        )  # fmt: skip

    in_parts(launch, out, (-(-K // COLUMNS), -(-M // tokens)), tiles, splits, tokens)
    return reshaped(out, (*grad.shape[:-1], K))


def _stages(tokens: int) -> int:
    return 4 if tokens <= 64 else 3


def _check(launch: Any, device: torch.device) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    weight, W = whole_weight(device)
    grad, G, A = (self_check.whole(*size, device) for size in ((5, 192), (5, 3), (3, 128)))
    seed, p = torch.tensor(0x0123456789ABCDEF, device=device), 0.3
    given, dx = grad.bfloat16(), self_check.product(grad, W)
    found = launch(given, weight), launch(given, weight, adapter=MaskedLowRank(G.bfloat16(), A, seed, p))
    low_rank = torch.where(keep_mask(seed, 5, 128, p), self_check.product(G, A), 0)
    return found, (dx.bfloat16(), (dx + low_rank).bfloat16())


CHECKS = {"linear_grad_input": _check}


def _case(tokens: int, instructions: float, registers: int = 255, rank: int = 0) -> Case:
    adapter = {"G": "*bf16", "A": "*fp32", "seed": "*i64"}
    pointers = {"grad": "*bf16", "out": "*bf16", "words": "*i32", "scales": "*i32"}
    rank_tile, ranks = rank_tiles(rank)
    return Case(
        name=f"linear_grad_input, {tokens} tokens" + (f", rank {rank}" if rank else ""),
        kernel=_linear_grad_input,
        signature=pointers
        | dict.fromkeys(("M", "N", "K", "steps", *TABLE_ARGUMENTS, "r", "row_words", "threshold"), "i32")
        | (adapter if rank else {}),
        constexprs={"TOKENS": tokens, "RANK": rank_tile, "RANKS": ranks, "DROPOUT": rank > 0}
        | ({} if rank else dict.fromkeys(adapter)),
        weights=COLUMNS * TILE,
        num_stages=_stages(tokens),
        divisible=(*pointers, "N", "K", *((*adapter, "r", "row_words") if rank else ())),
        # Across the rows, a thread's share of the packed weights lies in pieces of 8 bytes.
        budget=product_budget(instructions, tokens, registers, width=64),
    )


CASES = (
    _case(16, 5, 128),
    _case(32, 5, 128),
    _case(64, 5.5, 168),
    _case(16, 5, 128, rank=64),
    _case(64, 5.5, 168, rank=128),
)
CASES_SM_90 = (_case(128, 6), _case(128, 6, rank=64))  # without WGMMA it spills registers
