"""The two products that read the gradient of y, in one pass over it; see ``lora/ops.py`` for the definition::

    G  = factor * dy B      [tokens, r]      dy [tokens, N], factor = scaling / (1 - q)
    dB = dy' h              [N, r]

dy is large, and everything else is small: for 4,096 tokens and N = 14336 it has 117 MB in bfloat16, so that two
products of cuBLAS read 235 MB. Here a tile of dy is in shared memory once, and both products take it from there.

**A program** has a range of columns of dy and a range of its tokens. B of its columns stays in shared memory, dB of
them in registers, and G of a tile of tokens is complete, for these columns, after each step::

    for tiles of 64 tokens in the range:    dB += tile' h        part of G = factor * tile B, is stored

Both are parts of sums: G over ``blocks`` ranges of columns, dB over ``splits`` ranges of tokens. The parts are float32
in a workspace and are added in a fixed order (``split.py``): equal inputs give equal bits.

**What the parts cost.** They are written once and read once::

    8 r (blocks M + splits N)     bytes, where there is more than one of a kind; against the 2 M N of a second pass

Both ranges should be long. That of the columns ends at 512, where their dB has 32 registers a thread at rank 16, and a
tile, twice, 128 KiB of shared memory; that of the tokens ends where there are too few programs for the GPU. Bytes of
the workspace, and of the traffic that parts and the second pass make, for 4,096 tokens:

======  ==  ==============  ======  =================  ==============
N       r   blocks, splits  parts   parts' traffic     second pass
======  ==  ==============  ======  =================  ==============
14336   16  28, 4           11 MB   22 MB              117 MB
14336   32  28, 4           22 MB   44 MB              117 MB
4096    16  8, 16           6.3 MB  12.6 MB            33.6 MB
4096    32  8, 16           12.6 MB 25.2 MB            33.6 MB
1024    16  8, 16           3.1 MB  6.3 MB             8.4 MB
======  ==  ==============  ======  =================  ==============

**The rule** (``plan_of``) is that comparison: one pass where the parts' traffic is less. A rank above 32 has two
products always. At 64 and N = 14336, 512 columns would make 88 MB of traffic, and spill registers, on sm_90 too; 256
columns make 132 MB, more than the second pass; and two tiles of the rank read dy twice. Where there are few tokens
there is one range of them, and what is saved are launches: one or two in place of four. float32 has two products too,
for want of tensor cores. At 3.0 TB/s the first row is 46 microseconds in place of 78: predicted, not measured.

**Instructions**, an element of dy, for sm_90 with triton 3.7.1: 3.6 in tiles of 512 columns, of the 20 that can be
issued while it arrives. There, and on sm_100, tiles arrive asynchronously and are read by the tensor cores where they
lie. sm_80 and sm_120 bring them through registers, 4.5 bytes staged for each element; there 256 columns at rank 16
leave room for two programs, of which one computes while the other waits.

**Numbers.** B is rounded to the dtype of dy, as the definition does. Sums are float32; ``factor`` multiplies those of
G, which are rounded once. The definition rounds dB to the dtype of dy; here it stays float32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import self_check
from .adapter_operands import expect
from .case import Budget, Case
from .interpreter import bound, operand, round_to
from .launch import launch
from .split import add_parts, steps_of

TOKENS = 64  # of a tile: what the tensor cores of sm_90 take at once
WIDEST = 32  # columns of the rank, of a program
WIDTHS = (512, 256, 128)  # columns of dy, of a program
SHARED = 180_224  # bytes of shared memory that 512 columns take at rank 32
PROGRAMS = 132  # multiprocessors of an H100: with 512 columns, each holds one program; with fewer, two
FEWEST_STEPS = 4  # of a program, when the tokens are split


class Plan(NamedTuple):
    """How one pass cuts dy."""

    columns: int  # of a program, one of `WIDTHS`
    splits: int  # ranges of the tokens

    def parts(self, M: int, N: int, r: int) -> int:
        """Bytes of the workspace."""
        blocks = -(-N // self.columns)
        return 4 * r * ((blocks * M if blocks > 1 else 0) + (self.splits * N if self.splits > 1 else 0))


@triton.jit(do_not_specialize=["M", "steps"])
def _grad_B(
    dy, B, h, G, dB, M, N, r, steps, factor,
    TOKENS: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """G[m, j] = factor * sum_n dy[m, n] B[n, j], dB[n, j] = sum_m dy[m, n] h[m, j].

    G[block, m, j] where N is cut into blocks, dB[split, n, j] where the tokens are split.
    """
    n = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    j = tl.program_id(1) * RANK + tl.arange(0, RANK)
    first = tl.program_id(2) * steps
    last = tl.minimum(first + steps, tl.cdiv(M, TOKENS))
    b = tl.load(B + n[:, None] * r + j[None, :], mask=(n[:, None] < N) & (j[None, :] < r), other=0.0)
    b = operand(b, dy.dtype.element_ty)
    total = tl.zeros((COLUMNS, RANK), tl.float32)
    for step in range(bound(first), bound(last)):
        m = tl.cast(step, tl.int64) * TOKENS + tl.arange(0, TOKENS)
        g = tl.load(dy + m[:, None] * N + n[None, :], mask=(m[:, None] < M) & (n[None, :] < N), other=0.0)
        low = tl.load(h + m[:, None] * r + j[None, :], mask=(m[:, None] < M) & (j[None, :] < r), other=0.0)
        g = operand(g, dy.dtype.element_ty)
        total = tl.dot(tl.trans(g), operand(low, h.dtype.element_ty), total, input_precision="ieee")
        part = tl.dot(g, b, input_precision="ieee") * factor
        at = G + tl.program_id(0).to(tl.int64) * M * r + m[:, None] * r + j[None, :]
        tl.store(at, round_to(part, G.dtype.element_ty), mask=(m[:, None] < M) & (j[None, :] < r))
    at = dB + tl.program_id(2).to(tl.int64) * N * r + n[:, None] * r + j[None, :]
    tl.store(at, total, mask=(n[:, None] < N) & (j[None, :] < r))


def grad_B(dy: Tensor, h: Tensor, B: Tensor, factor: float, plan: Plan | None = None) -> tuple[Tensor, Tensor]:
    """factor * dy B and dy' h: in one pass over dy where that moves fewer bytes, else by two products of cuBLAS.

    Args:
        dy: float32, bfloat16 or float16 [tokens, N], any strides.
        h: the dtype of dy, [tokens, r].
        B: float32 [N, r].
        factor: on the sums of the first.
        plan: of the one pass, for bfloat16 and float16. None: ``plan_of`` decides.

    Returns:
        G: the dtype of dy, [tokens, r].
        dB: float32 [N, r].

    Raises:
        ValueError: an argument has another dtype, shape or device.
    """
    if dy.dim() != 2 or B.dim() != 2:
        raise ValueError(f"dy and B must be matrices, not {list(dy.shape)} and {list(B.shape)}")
    (M, N), r = dy.shape, B.shape[1]
    expect("h", h, (M, r), dy.dtype, dy.device)
    expect("B", B, (N, r), torch.float32, dy.device)
    if plan is None and dy.dtype != torch.float32 and 0 not in (M, N, r):
        plan = plan_of(M, N, r, widest(dy.device))
    if plan is None:
        return _two_products(dy, h, B, factor)
    return _one_pass(dy.contiguous(), h.contiguous(), B.contiguous(), factor, plan)


@functools.lru_cache(1024)
def plan_of(M: int, N: int, r: int, widest: int = WIDTHS[0]) -> Plan | None:
    """How one pass cuts dy [M, N] for a rank of r; None: two products move fewer bytes.

    Args:
        widest: columns that a program can have.
    """
    if r > WIDEST:
        return None
    plans = [_plan(M, N, columns) for columns in WIDTHS if columns <= widest]
    enough = (plan for plan in plans if -(-N // plan.columns) * plan.splits >= PROGRAMS // 2)
    plan = next(enough, plans[-1])
    return plan if 2 * plan.parts(M, N, r) < 2 * M * N else None


def _plan(M: int, N: int, columns: int) -> Plan:
    """As many ranges of tokens as the GPU has room for, each of `FEWEST_STEPS` tiles or more."""
    tiles, programs = -(-M // TOKENS), PROGRAMS if columns == WIDTHS[0] else 2 * PROGRAMS
    wished = min(programs // -(-N // columns), tiles // FEWEST_STEPS)
    return Plan(columns, -(-tiles // steps_of(1, tiles, wished)))


@functools.cache
def widest(device: torch.device) -> int:
    """The columns that a program can have on a device."""
    if device.type != "cuda":
        return WIDTHS[0]
    shared = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)  # NVIDIA's have it
    return WIDTHS[0] if shared >= SHARED else WIDTHS[1]


def _one_pass(dy: Tensor, h: Tensor, B: Tensor, factor: float, plan: Plan) -> tuple[Tensor, Tensor]:
    (M, N), r = dy.shape, B.shape[1]
    G, dB = dy.new_empty((M, r), dtype=dy.dtype), dy.new_empty((N, r), dtype=torch.float32)
    blocks, tiles = -(-N // plan.columns), -(-M // TOKENS)
    steps = steps_of(1, tiles, plan.splits)
    splits = -(-tiles // steps)
    G_parts = G if blocks == 1 else dy.new_empty((blocks, M, r), dtype=torch.float32)
    dB_parts = dB if splits == 1 else dy.new_empty((splits, N, r), dtype=torch.float32)
    rank = 16 if r <= 16 else WIDEST
    launch(
        _grad_B, (blocks, -(-r // rank), splits),
        dy, B, h, G_parts, dB_parts, M, N, r, steps, factor,
        TOKENS=TOKENS, RANK=rank, COLUMNS=plan.columns, **_options(plan.columns),
    )  # fmt: skip
    for parts, out in ((G_parts, G), (dB_parts, dB)):
        if parts is not out:
            add_parts(parts, out)
    return G, dB


def _two_products(dy: Tensor, h: Tensor, B: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    G = torch.empty_like(h)
    torch.addmm(G, dy, B.to(dy.dtype), beta=0, alpha=factor, out=G)  # beta 0: what G holds is not read
    return G, (dy.T @ h).to(B.dtype)


def _options(columns: int) -> dict[str, int]:
    return {"num_warps": 4, "num_stages": 3} if columns == WIDTHS[-1] else {"num_warps": 8, "num_stages": 2}


def _check(
    launch: Any, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    columns, r = widest(device), 3
    M, N = self_check.SHAPE[0], 2 * columns - 3
    dy, h, B = (self_check.whole(*size, device) for size in ((M, N), (M, r), (N, r)))
    plan = None if dtype == torch.float32 else Plan(columns, 2)
    found = launch(dy.to(dtype), h.to(dtype), B, 0.5, plan)
    return found, (self_check.product(dy, B).mul(0.5).to(dtype), self_check.product(dy.T, h))


CHECKS = {"grad_B": _check}


def _case(name: str, rank: int, columns: int, budget: Budget) -> Case:
    return Case(
        name=f"grad_B {name}",
        kernel=_grad_B,
        signature={"dy": "*bf16", "B": "*fp32", "h": "*bf16", "G": "*fp32", "dB": "*fp32"}
        | {"M": "i32", "N": "i32", "r": "i32", "steps": "i32", "factor": "fp32"},
        constexprs={"TOKENS": TOKENS, "RANK": rank, "COLUMNS": columns},
        weights=TOKENS * columns,  # elements of dy
        divisible=("dy", "B", "h", "G", "dB", "N", "r"),
        budget=budget,
        **_options(columns),
    )


# An element of dy is 2 bytes: 20 instructions can be issued while they arrive. Its tile is not staged again.
CASES = (
    _case("512 columns", 16, 512, Budget(4, 128, loaded=2, staged=0.2, needs=("HGMMA",))),
    _case("512 columns, rank 32", 32, 512, Budget(4, 255, loaded=2, staged=0.3, needs=("HGMMA",))),
    _case("256 columns", 16, 256, Budget(5, 128, loaded=2, staged=0.3, needs=("HGMMA",))),
    _case("256 columns, rank 32", 32, 256, Budget(5, 128, loaded=2, staged=0.6, needs=("HGMMA",))),
    _case("128 columns", 16, 128, Budget(5, 128, loaded=2, staged=0.6, needs=("HGMMA",))),
    _case("128 columns, rank 32", 32, 128, Budget(6, 200, loaded=2, staged=1.2, needs=("HGMMA",))),
)
