"""y = x W'^T + bias with a packed 4-bit weight: dequantized in registers, multiplied there by the tensor cores.

**The product is turned round.** ``y^T = W' x^T``: the weight is the left operand, which WGMMA (sm_90) takes from
registers, and x the right one, from shared memory. So a dequantized weight never leaves the registers of the thread
that looked it up. Tokens are the columns of the product, 16 at least.

**The weight is read as files have it** (``canonical.py``): of a row, each lane c of a quad has 16 columns of a step of
64, or 32 of 128. So the sum runs over k in an order of its own, and x is copied in that order, 4 bytes at a time::

    k = 8 WORDS c + 8 j + 4 hi + 2 q + kp    for the column (j, hi, q, c, kp) of the multiplication; j is the word

**One program** has 128 rows of W, for 128 tokens 256, a tile of tokens, and a range of K. A step of its loop::

    words     copied asynchronously (cp.async) two steps ahead, 16 bytes a time
    decode    21 instructions for 8 weights, 4 to scale them                           3.125 a weight
    multiply  WGMMA of 64 rows x tokens x 16 columns                                   0.125
    scales    about 20 instructions for 64 weights, and 4 shuffles                     0.4
    the rest  copies, barriers, addresses, the loop                                    0.9 to 2.0

Counted for sm_90 with triton 3.7.1, in all: 4.5 for 16 tokens, 4.7 for 32, 5.1 for 64, 5.6 for 128; 5.1 for 16 where K
is no multiple of 128. Of these, PRMT, LOP3 and SHF are 2.7.

**Bytes.** 0.5 per weight and 0.016 for its scale. With few tokens the weight is all the traffic there is. While its
bytes arrive, an H100 that reads 3.0 TB/s issues 5.1 instructions, of which 2.55 may be PRMT, LOP3 or SHF: their unit is
the limit, closely followed by memory. With 128 tokens and more it is the tensor cores.

**Accuracy.** A weight is the bfloat16 product of ``bf16(c v)`` and ``bf16(s / c)``, where c is the factor of the table:
off by 2.3e-3 for NF4 (root mean square, relative); the definition's, a float32 product rounded to bfloat16, by 1.65e-3.
These are the bits that ``linear_grad_input.py`` multiplies, for any number of tokens. Sums are float32. One rounding to
bfloat16 follows. NF4 itself is 9e-2 away from the weight that was quantized.

**An adapter** adds h B', and its term is where the sums start: before the loop, one or more products of the rows of B,
rounded to bfloat16, and the tile's h, of 16, 32 or 64 columns. It takes no pass over y, and no registers in the loop.
Where the weight has too few rows to fill the GPU, K is split (``split.py``), and the first part has that term.

**Other targets.** sm_100 has its weights in tensor memory. sm_80 and sm_120 multiply by mma.sync, with another order of
k (``canonical.mma_sync``): 16 tokens take 5.6 and 4.6 instructions a weight, 32 take 6.4. With 64 the compiler
exchanges weights through shared memory, and with 128 it would spill registers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qloralab.nf4 import ops
from qloralab.nf4.packed import Packed

from . import canonical, self_check
from .adapter_operands import LowRank, rank_tiles
from .canonical import of_four_lanes, pair, scale_of
from .case import PACKED, Budget, Case
from .interpreter import bound, operand, round_to
from .launch import launch
from .lookup import decode
from .split import in_parts


@triton.jit(do_not_specialize=["M", "steps", *canonical.SCALARS])
def _linear(
    x, packed, scales, absmax2, offset, scale_map, bias, out, M, N, tiles, steps, shift, inverse,
    t0, t1, t2, t3, t4, t5, t6, t7, t8,
    h, B, r,
    TOKENS: tl.constexpr, WARPS: tl.constexpr, WORDS: tl.constexpr, MMA_SYNC: tl.constexpr, DOUBLE: tl.constexpr,
    BIAS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """out[m, n] = sum_j B[n, j] h[m, j] + sum_k x[m, k] W'[n, k] + bias[n]; out[split, m, n] where K is split.

    tiles is K / 64, and WORDS what a lane has of each row in a step. Rows of the product are (rep, warp, p, g).
    """
    ROWS: tl.constexpr = 32 * WARPS
    COLUMNS: tl.constexpr = 32 * WORDS
    BLOCKS: tl.constexpr = COLUMNS // 64
    K = tiles * 64
    first = tl.program_id(2) * steps
    last = tl.minimum(first + steps, tiles // BLOCKS)
    tl.assume(first < last)
    top = tl.program_id(0) * ROWS
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    # Rows and tokens behind the last one are the last once more: what is read again is not stored.
    k = tl.arange(0, COLUMNS)
    if MMA_SYNC:  # j hi c q kp, else j hi q c kp
        k = k // 4 % 4 * (8 * WORDS) + k // 32 * 8 + k // 16 % 2 * 4 + k % 4
    else:
        k = k // 2 % 4 * (8 * WORDS) + k // 32 * 8 + k // 16 % 2 * 4 + k // 8 % 2 * 2 + k % 2
    x_at = (tl.minimum(m, M - 1) - tl.program_id(1) * TOKENS)[None, :] * K + k[:, None]
    x += (tl.program_id(1) * TOKENS).to(tl.int64) * K + first * COLUMNS
    i = tl.arange(0, 4 * WORDS * ROWS)  # rep p warp g c j
    row = i // (64 * WORDS * WARPS) * (16 * WARPS) + i // (32 * WORDS * WARPS) % 2 * 8
    row += i // (32 * WORDS) % WARPS * 16 + i // (4 * WORDS) % 8
    words_at = (tl.minimum(top + row, N - 1) - top) * (tiles * 8) + i % (4 * WORDS)
    words = packed.to(tl.pointer_type(tl.int32)) + top.to(tl.int64) * (tiles * 8) + first * (4 * WORDS)
    i = tl.arange(0, ROWS)  # warp g rep p
    row = i // 2 % 2 * (16 * WARPS) + i % 2 * 8 + i // 32 * 16 + i // 4 % 8
    blocks = tl.minimum(top + row, N - 1) * tiles
    if DOUBLE:
        offset = tl.load(offset) * inverse
    s = scale_of(scales, absmax2, offset, scale_map, inverse, (blocks + first * BLOCKS) >> shift, DOUBLE)
    u = s
    if BLOCKS == 2:
        u = scale_of(scales, absmax2, offset, scale_map, inverse, (blocks + first * 2 + 1) >> shift, DOUBLE)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    if RANKS:
        total = _low_rank(total, h, B, M, N, r, m, RANK, RANKS, ROWS)
    for step in range(bound(first), bound(last)):
        w = tl.load(words + words_at)
        xs = operand(tl.load(x + x_at), tl.bfloat16)
        by_lane = of_four_lanes(pair(s, s), WARPS)
        if BLOCKS == 2:
            by_lane = tl.where((tl.arange(0, 4) < 2)[None, None, None, :], by_lane, of_four_lanes(pair(u, u), WARPS))
        by_lane = tl.reshape(by_lane, (2, 2, WARPS, 8, 4, 1))
        w = tl.reshape(w, (2, 2, WARPS, 8, 4, WORDS))
        d = decode(w, tl.broadcast_to(by_lane, w.shape), t0, t1, t2, t3, t4, t5, t6, t7, t8)
        # rep p warp g c j hi q kp -> rep warp p g, and the order of k above
        if MMA_SYNC:
            d = tl.permute(d, (0, 2, 1, 3, 5, 6, 4, 7, 8))
        else:
            d = tl.permute(d, (0, 2, 1, 3, 5, 6, 7, 4, 8))
        total = tl.dot(tl.reshape(d, (ROWS, COLUMNS)), xs, total)
        words += 4 * WORDS
        x += COLUMNS
        ahead = blocks + tl.minimum(step + 1, last - 1) * BLOCKS
        s = scale_of(scales, absmax2, offset, scale_map, inverse, ahead >> shift, DOUBLE)
        if BLOCKS == 2:
            u = scale_of(scales, absmax2, offset, scale_map, inverse, (ahead + 1) >> shift, DOUBLE)
    n = top + tl.arange(0, ROWS)
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = out + (tl.program_id(2).to(tl.int64) * M + m)[None, :] * N + n[:, None]
    tl.store(at, round_to(total, out.dtype.element_ty), mask=(m[None, :] < M) & (n[:, None] < N))


@triton.jit
def _low_rank(total, h, B, M, N, r, m, RANK: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr):
    """total + B h'; of the parts of a split sum, the first has it."""
    if tl.program_id(2) == 0:
        n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        h_at = h + m.to(tl.int64)[None, :] * r
        for first in tl.range(0, RANK * RANKS, RANK, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
            j = first + tl.arange(0, RANK)
            b = tl.load(B + n[:, None] * r + j[None, :], mask=(n[:, None] < N) & (j[None, :] < r), other=0.0)
            hs = tl.load(h_at + j[:, None], mask=(m[None, :] < M) & (j[:, None] < r), other=0.0)
            total = tl.dot(operand(b, tl.bfloat16), operand(hs, tl.bfloat16), total)
    return total


def linear(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None = None,
    splits: int | None = None,
    adapter: LowRank | None = None,
) -> Tensor:
    """x W'^T + bias, plus h B' of an adapter.

    Args:
        x: bfloat16 [..., K], on the weight's device.
        weight: W [N, K].
        bias: bfloat16 [N] or None.
        splits: into how many ranges K is cut; None: ``split.steps_of`` decides.
        adapter: what is added before the result is rounded; None: nothing is.

    Returns:
        bfloat16 [..., N].

    Raises:
        ValueError: x, bias or the adapter has another dtype, shape or device; or ``canonical.why_not`` has a reason.
    """
    N, K = weight.shape
    canonical.check("x", x, K, weight)
    if bias is not None:
        canonical.check("bias", bias, N, weight)
        if bias.dim() != 1:
            raise ValueError(f"bias must have 1 dimension, not {bias.dim()}")
        bias = bias.contiguous()
    operands = canonical.arguments(weight)
    x, M = x.contiguous(), math.prod(x.shape[:-1])
    if adapter is not None:
        adapter.check(x, M, N)
    out = x.new_empty((*x.shape[:-1], N))
    if M == 0:
        return out
    h, B = (None, None) if adapter is None else (adapter.h.contiguous(), adapter.B.contiguous())
    r = 0 if B is None else B.shape[1]
    sync = canonical.mma_sync(x.device)
    # The sums of 128 tokens, each stored by itself, would spill registers.
    tokens = min(canonical.token_tile(M, sync), 64 if N % 16 else 128)
    rank, ranks = rank_tiles(r, 64 if tokens < 64 else 16)
    warps, words = _shape(tokens, K, sync)

    def run(grid: tuple[int, int, int], to: Tensor, steps: int) -> None:
        launch(
            _linear, grid,
            x=x, bias=x if bias is None else bias, out=to, M=M, N=N, steps=steps, h=h, B=B, r=r, **operands,
            TOKENS=tokens, WARPS=warps, WORDS=words, MMA_SYNC=sync,
            BIAS=bias is not None and to is out, RANK=rank, RANKS=ranks, num_warps=warps,
        )  # fmt: skip

    in_parts(run, out, (-(-N // (32 * warps)), -(-M // tokens)), K // (32 * words), splits, tokens, bias)
    return out


def _shape(tokens: int, K: int, sync: bool) -> tuple[int, int]:
    """Of a program: its warps, with 32 rows each, and the words that a lane has of a row, 32 columns each."""
    return (8 if tokens == 128 else 4), (4 if tokens <= (32 if sync else 64) and K % 128 == 0 else 2)


def whole_weight(device: torch.device, double: bool, block_size: int) -> tuple[Packed, Tensor]:
    """A weight for the checks at first use, and the same as float32 [192, 256]: whole numbers, no two codes alike.

    The scales have no period, so that no lane may take its neighbour's.
    """
    N, K = 192, 256
    values = torch.tensor([-8.0, -7, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8], device=device)
    packed = (torch.arange(N * K // 2, device=device) * 37 % 251).to(torch.uint8)[:, None]
    some = (torch.arange(N * K // block_size, device=device) ** 2 % 509 % 4).float()
    if double:
        scales = torch.where(some < 2, 127, 255).to(torch.uint8)  # where the map has 0 and 1
        levels = torch.arange(-(-len(scales) // 256), dtype=torch.float32, device=device)
        weight = Packed(packed, scales, 2 - 3 * levels, torch.ones((), device=device), values, (N, K), block_size)
    else:
        weight = Packed(packed, some - 1.5, None, None, values, (N, K), block_size)
    return weight, ops.dequantize.reference(*weight, torch.float32)


LEVELS = ((True, 64), (False, 128))  # of the checks: double quantization or not, and the block size


def _check(launch: Any, device: torch.device) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    found, expected = list[Tensor](), list[Tensor]()
    x, bias, h, B = (self_check.whole(*size, device) for size in ((5, 256), (1, 192), (5, 3), (192, 3)))
    for double, block_size in LEVELS:
        weight, W = whole_weight(device, double, block_size)
        given, y = x.bfloat16(), self_check.product(x, W.T)
        found += launch(given, weight, bias[0].bfloat16()), launch(given, weight, adapter=LowRank(h.bfloat16(), B))
        expected += (y + bias).bfloat16(), (y + self_check.product(h, B.T)).bfloat16()
    return found, expected


CHECKS = {"linear": _check}


def product_budget(instructions: float, registers: int) -> Budget:
    """Dequantized weights stay in registers: nothing is stored to shared memory.

    The limits are within 0.2 of what is counted. Weights that were exchanged by shuffles, or multiplications that wait
    for each other, would add that much or more.
    """
    return Budget(instructions, registers, PACKED, staged=0, needs=("HGMMA",))


def _case(
    tokens: int, instructions: float, registers: int = 255, rank: int = 0, K: int = 128, sync: bool = False,
    double: bool = True,
) -> Case:  # fmt: skip
    adapter = {"h": "*bf16", "B": "*fp32"}
    weight, constants = canonical.weight_of_a_case(double)
    pointers = {**dict.fromkeys(("x", "bias", "out"), "*bf16"), **weight, **(adapter if rank else {})}
    rank_tile, ranks = rank_tiles(rank, 64 if tokens < 64 else 16)
    warps, words = _shape(tokens, K, sync)
    name = f"linear, {tokens} tokens" + (f", rank {rank}" if rank else "") + (", K of 64" if K == 64 else "")
    return Case(
        name=name + ("" if double else ", float32 scales"),
        kernel=_linear,
        signature=pointers | dict.fromkeys(("M", "N", "steps", *canonical.SCALARS, "r"), "i32") | {"inverse": "fp32"},
        constexprs={"TOKENS": tokens, "WARPS": warps, "WORDS": words, "MMA_SYNC": sync, "BIAS": True, **constants}
        | {"RANK": rank_tile, "RANKS": ranks, **({} if rank else dict.fromkeys(adapter))},
        weights=32 * warps * 32 * words,
        num_warps=warps,
        divisible=(*pointers, "N", *(("r",) if rank else ())),
        budget=product_budget(instructions, registers),
    )


# 5.1 instructions can be issued while 0.516 bytes arrive. From 64 tokens on, the tensor cores leave more.
CASES: tuple[Case, ...] = ()  # none for all targets: the order of k is one of two
CASES_SM_90 = CASES_SM_100 = (
    _case(16, 4.7, 176),
    _case(16, 4.5, 168, double=False),
    _case(16, 5.2, 96, K=64),
    _case(32, 4.9, 192),
    _case(64, 5.3),
    _case(128, 5.8),
    _case(16, 4.7, 176, rank=64),  # what is before the loop must not spill
    _case(64, 5.3, rank=128),
    _case(128, 5.8, rank=128),
)
CASES_SM_80 = CASES_SM_120 = tuple(
    _case(tokens, 0, rank=rank, sync=True) for tokens in (16, 32, 64) for rank in (0, 64, 128)
)
