"""y = x W'^T + bias with a tiled 4-bit weight: dequantized in registers, multiplied there by the tensor cores.

**The product is turned round.** ``y^T = W' x^T``: the weight is the left operand, which WGMMA (sm_90) takes from
registers, and x the right one, from shared memory. So a dequantized weight never leaves the registers of the thread
that looked it up: no store to shared memory, no shuffle. Tokens are the columns of the product, 16 at least.

**One program** has 128 rows of W, a tile of tokens, and a range of K. A step of its loop is 64 columns::

    words     1024 x 4 bytes, copied asynchronously (cp.async) some steps ahead, 16 bytes a time
    decode    19 instructions for 8 weights                                            2.375 a weight
    multiply  8 WGMMA of 64 rows x tokens x 16 columns                                 0.125
    scale     two weights times their scale in bfloat16, one HMUL2                     0.5
    the rest  copies, barriers, addresses, the loop                                    1.1 to 2.1

Counted for sm_90 with triton 3.7.1, in all: 4.5 for 16 tokens, 4.6 for 32, 4.7 for 64, 5.0 for 128. Of the weights,
only the packed words and the scales go through shared memory.

**Bytes.** 0.5 per weight and 0.0625 for its scale. With few tokens the weight is all the traffic there is, and the
limits are memory and, close to it, the unit that PRMT and LOP3 share. With 128 tokens and more it is the tensor cores.

**Accuracy.** A weight is the bfloat16 product of ``bf16(c v)`` and ``bf16(s / c)``, where c is the factor of the table:
off by 2.5e-3 for NF4 (root mean square, relative); the definition's, a float32 product rounded to bfloat16, by 1.65e-3.
These are the bits that ``linear_grad_input.py`` multiplies, for any number of tokens. Sums are float32. One rounding to
bfloat16 follows. NF4 itself is 9e-2 away from the weight that was quantized.

With few tokens the scale could multiply the sum of 64 products instead, at tokens / 64 instructions, with weights that
are off by 1.0e-3. But the backward product has no such sum: its gradient would be that of another weight.

**Few programs.** Where the weight has too few rows to fill the GPU, K is split (``split.py``).

**An adapter** adds h B', and its term is where the sums start: before the loop, one or more products of 128 rows of B,
rounded to bfloat16, and the tile's h, of 16, 32 or 64 columns. It takes 100 to 400 instructions of a thread, once, no
pass over y, and no registers in the loop, which is the same. Where K is split, the first part has it.

**Measured** on an H100 (``benchmarks/README.md``), up to 32 tokens with the scale on the sums: with few
tokens a large weight takes 1.7 times its traffic at the copy rate, since programs wait between their steps, for words
and for the tensor cores; with many tokens it is 0.7 of cuBLAS.

**Other targets.** sm_80, sm_100 and sm_120 have no WGMMA. The kernel compiles there, but the compiler exchanges weights
between threads or through shared memory, and at 128 tokens it spills registers: there a tile has 64 at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qloralab.nf4 import ops
from qloralab.nf4.product import reshaped

from . import self_check
from .adapter_operands import LowRank, rank_tiles
from .case import PACKED, Budget, Case
from .interpreter import INTERPRETED, bound, operand, round_to, to_float32
from .lookup import TABLE_ARGUMENTS, decode, table
from .packing import TILE, TiledWeight, tile
from .split import in_parts

ROWS = 128  # of a program
TOKEN_TILES = (16, 32, 64, 128)


@triton.jit(do_not_specialize=["M", "steps", *TABLE_ARGUMENTS])
def _linear(
    x, words, scales, bias, out, M, N, K, steps,
    t0, t1, t2, t3, t4, t5, t6, t7,
    h, B, r,
    TOKENS: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """out[m, n] = sum_j B[n, j] h[m, j] + sum_k x[m, k] W'[n, k] + bias[n]; out[split, m, n] where K is split.

    Names of dimensions as in ``packing.py``; "tile" is which of the two tiles of rows. Words are loaded in the order
    (k32, tile, n32, n16, u, c, k16, p), which gives each warp the 16 rows of its part of the multiplication. Rows of
    the product come in the order (p, tile, n32, i, n16, u) and are put in order before they are stored.
    """
    tiles = K // 64
    first = tl.program_id(2) * steps
    last = tl.minimum(first + steps, tiles)
    top = tl.program_id(0) * 2
    # Two tiles of rows, or one and the same twice, at the bottom: what is read again is not stored.
    second = tl.minimum(top + 1, (N + 63) // 64 - 1) - top
    upper = top.to(tl.int64) * tiles + first
    words += upper * 512
    scales += upper * 64
    x += (tl.program_id(1) * TOKENS).to(tl.int64) * K + first * 64
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    x_at = tl.arange(0, TOKENS)[None, :] * K + tl.arange(0, 64)[:, None]
    i = tl.arange(0, 1024)
    words_at = i // 256 % 2 * second * (tiles * 512) + i // 128 % 2 * 256 + i // 512 * 128 + i % 128
    row = tl.arange(0, 128)
    scales_at = row // 32 % 2 * second * (tiles * 64) + row % 4 * 16 + row // 16 % 2 * 8
    scales_at += row // 4 % 2 * 4 + row // 64 * 2 + row // 8 % 2
    total = tl.zeros((128, TOKENS), tl.float32)
    if RANKS:
        total = _low_rank(total, h, B, M, N, r, m, RANK, RANKS)
    for _ in range(bound(first), bound(last)):
        w = tl.load(words + words_at)
        xs = tl.load(x + x_at, mask=m[None, :] < M, other=0.0)
        if INTERPRETED:
            xs = to_float32(xs)
        d = decode(tl.reshape(w, (2, 2, 2, 2, 4, 4, 2, 2)), t0, t1, t2, t3, t4, t5, t6, t7)
        # k32 tile n32 n16 u c k16 kp p i q -> p tile n32 i n16 u, k32 k16 q c kp
        d = tl.reshape(tl.permute(d, (8, 1, 2, 9, 3, 4, 0, 6, 10, 5, 7)), (128, 64))
        s = tl.load(scales + scales_at)
        if INTERPRETED:
            d = operand(d * operand(s, tl.bfloat16)[:, None], tl.bfloat16)
        else:
            d = d * s.to(tl.bfloat16)[:, None]
        total = tl.dot(d, xs, total)
        words += 512
        scales += 64
        x += 64
    total = tl.permute(tl.reshape(total, (2, 2, 2, 2, 2, 4, TOKENS)), (1, 2, 4, 0, 5, 3, 6))
    total = tl.reshape(total, (128, TOKENS))
    n = tl.program_id(0) * 128 + tl.arange(0, 128)
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    row = tl.program_id(2).to(tl.int64) * M + m
    at = out + row[None, :] * N + n[:, None]
    tl.store(at, round_to(total, out.dtype.element_ty), mask=(m[None, :] < M) & (n[:, None] < N))


@triton.jit
def _low_rank(total, h, B, M, N, r, m, RANK: tl.constexpr, RANKS: tl.constexpr):
    """total + B h', its rows in the order of the product; of the parts of a split sum, the first has it."""
    if tl.program_id(2) == 0:
        row = tl.arange(0, 128)
        n = row // 32 % 2 * 64 + row // 16 % 2 * 32 + row // 4 % 2 * 16 + row // 64 * 8 + row % 4 * 2 + row // 8 % 2
        n = tl.program_id(0).to(tl.int64) * 128 + n
        h_at = h + m.to(tl.int64)[None, :] * r
        for first in tl.range(0, RANK * RANKS, RANK, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
            j = first + tl.arange(0, RANK)
            b = tl.load(B + n[:, None] * r + j[None, :], mask=(n[:, None] < N) & (j[None, :] < r), other=0.0)
            hs = tl.load(h_at + j[:, None], mask=(m[None, :] < M) & (j[:, None] < r), other=0.0)
            total = tl.dot(operand(b, tl.bfloat16), operand(hs, tl.bfloat16), total)
    return total


def linear(
    x: Tensor,
    weight: TiledWeight,
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
        ValueError: x, bias or the adapter has another dtype, shape or device.
    """
    N, K = weight.shape
    check("x", x, K, weight)
    if bias is not None:
        check("bias", bias, N, weight)
        if bias.dim() != 1:
            raise ValueError(f"bias must have 1 dimension, not {bias.dim()}")
        bias = bias.contiguous()
    flat = x.reshape(-1, K).contiguous()
    M = len(flat)
    if adapter is not None:
        adapter.check(flat, M, N)
    out = flat.new_empty((M, N))
    if M == 0 or N == 0 or K == 0:
        return reshaped(out.zero_() if bias is None else out.copy_(bias.expand(M, N)), (*x.shape[:-1], N))
    h, B = (None, None) if adapter is None else (adapter.h.contiguous(), adapter.B.contiguous())
    r = 0 if B is None else B.shape[1]
    rank, ranks = rank_tiles(r)
    tokens = token_tile(M, x.device)
    kernel: Any = _linear

    def launch(grid: tuple[int, int, int], to: Tensor, steps: int) -> None:
        kernel[grid](
            flat, weight.words, weight.scales, flat if bias is None else bias, to, M, N, K, steps,
            *weight.table.words,
            h, B, r,
            TOKENS=tokens, BIAS=bias is not None and to is out, RANK=rank, RANKS=ranks,
            num_warps=4, num_stages=stages(tokens),
        )  # fmt: skip

    in_parts(launch, out, (-(-N // ROWS), -(-M // tokens)), K // TILE, splits, tokens, bias)
    return reshaped(out, (*x.shape[:-1], N))


def token_tile(M: int, device: torch.device) -> int:
    """How many tokens a program takes: the smallest tile that holds them all, at most 128, or 64 without WGMMA."""
    wgmma = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9
    tiles = TOKEN_TILES if wgmma else TOKEN_TILES[:-1]
    return next((tokens for tokens in tiles if tokens >= M), tiles[-1])


def stages(tokens: int) -> int:
    """Of the software pipeline, as measured on an H100."""
    return 4 if tokens == 64 else 3


def check(name: str, tensor: Tensor, columns: int, weight: TiledWeight) -> None:
    """Raises ValueError unless a tensor is bfloat16 [..., columns] on the weight's device."""
    if tensor.dtype != torch.bfloat16:
        raise ValueError(f"{name} must be bfloat16, not {tensor.dtype}")
    if tensor.dim() == 0 or tensor.shape[-1] != columns:
        raise ValueError(f"the last dimension of {name} must be {columns}; its shape is {tuple(tensor.shape)}")
    if tensor.device != weight.words.device:
        raise ValueError(f"{name} is on {tensor.device}, the weight on {weight.words.device}")


def whole_weight(device: torch.device) -> tuple[TiledWeight, Tensor]:
    """A weight for the checks at first use, and the same as float32 [192, 128]: whole numbers, no two codes alike."""
    values = torch.tensor([-8.0, -7, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8], device=device)
    packed = (torch.arange(192 * 128 // 2, device=device) * 37 % 251).to(torch.uint8)[:, None]
    scales = torch.tensor([1.0, 2.0, -1.0], device=device).repeat(128) * table(values).factor
    operands = packed, scales, None, None, values, (192, 128), 64
    return tile(*operands), ops.dequantize.reference(*operands, torch.float32)


def _check(launch: Any, device: torch.device) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    weight, W = whole_weight(device)
    x, bias, h, B = (self_check.whole(*size, device) for size in ((5, 128), (1, 192), (5, 3), (192, 3)))
    given, y = x.bfloat16(), self_check.product(x, W.T)
    found = launch(given, weight, bias[0].bfloat16()), launch(given, weight, adapter=LowRank(h.bfloat16(), B))
    return found, ((y + bias).bfloat16(), (y + self_check.product(h, B.T)).bfloat16())


CHECKS = {"linear": _check}


def product_budget(instructions: float, tokens: int, registers: int = 255, width: int = 128) -> Budget:
    """A matrix product in tiles of 128 weights along the output, so each bf16 of x is loaded once for 128 weights.

    Dequantized weights stay in registers: no shuffles, and what is staged are the scales.
    """
    loaded = PACKED + (2 * tokens / 128 if width == 128 else 0)
    return Budget(instructions, registers, loaded, width, staged=0.1, needs=("HGMMA",), forbids=("SHFL",))


def _case(tokens: int, instructions: float, registers: int = 255, rank: int = 0) -> Case:
    adapter = {"h": "*bf16", "B": "*fp32"}
    pointers = {**dict.fromkeys(("x", "bias", "out"), "*bf16"), "words": "*i32", "scales": "*fp32"}
    rank_tile, ranks = rank_tiles(rank)
    return Case(
        name=f"linear, {tokens} tokens" + (f", rank {rank}" if rank else ""),
        kernel=_linear,
        signature=pointers
        | dict.fromkeys(("M", "N", "K", "steps", *TABLE_ARGUMENTS, "r"), "i32")
        | (adapter if rank else {}),
        constexprs={"TOKENS": tokens, "BIAS": True, "RANK": rank_tile, "RANKS": ranks}
        | ({} if rank else dict.fromkeys(adapter)),
        weights=ROWS * TILE,
        num_stages=stages(tokens),
        divisible=(*pointers, "N", "K", *((*adapter, "r") if rank else ())),
        budget=product_budget(instructions, tokens, registers),
    )


# 5.6 instructions can be issued while 0.5625 bytes arrive. From 64 tokens on, the tensor cores leave more.
CASES = (
    _case(16, 4.8, 128),
    _case(32, 5, 128),
    _case(64, 5.5, 168),
    _case(16, 4.8, 128, rank=64),  # with an adapter the loop is the same, and what is before it must not spill
)
# Without WGMMA, 128 tokens spill registers.
CASES_SM_90 = (_case(128, 6), _case(128, 6, rank=64), _case(128, 6, rank=128))
