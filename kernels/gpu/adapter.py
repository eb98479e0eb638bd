"""The products of an adapter with x and with its gradient, dropout inside; see ``lora/ops.py`` for the definition::

    project           h  = factor * (x∘keep) A'        [tokens, r]      x is read once
    grad_A            dA = G' (x∘keep)                 [r, K]           x is read once
    masked_low_rank   dx = keep∘(G A)                  [tokens, K]      dx is written once

``linear.py`` and ``linear_grad_input.py`` add h B' and keep∘(G A) to a fused product, ``two_pass.py`` lets cuBLAS add
the product to them. What is left, dB = dy' h and G = factor * dy B, is in ``grad_B.py``.

**The mask** is made where x is: in registers, from seed and index (``adapter_operands.py``). No dropped-out copy of
x is written, and no mask. The seed is read by the kernel, so nothing waits for the device.

**Bytes and instructions**, an element of x, in bfloat16, for a rank of 16. It is read or written once: 2 bytes, in
whose time an H100 (3.0 TB/s, 1.755 GHz) issues 20 instructions. Counted for sm_90 with triton 3.6.0:

=================  ============  ========  =====================================================================
kernel             with dropout  without   with dropout
=================  ============  ========  =====================================================================
project            12.3          3.1       5.5 hash, 4 compare and select, the rest is the loop
grad_A             15.0          4.2       1.5 more: pairs are taken apart and put together for a transposed read
masked_low_rank    20.0          cuBLAS    counted whole; the mask changes threads, from rows to the product's order
=================  ============  ========  =====================================================================

So the first two are bound by memory, as a plain copy would be, and the third is at the limit of both. What they save is
the rest: PEFT's dropout reads x, writes a mask and a copy, and the copy is read again, forward and backward.

**Each layer projects x by itself.** q, k and v have one x, gate and up another, and one pass over it could serve them
all: 4 M K bytes less for q, k and v, 22 microseconds for 4,096 tokens and K = 4,096 at 3.0 TB/s, of the 700 or so that
those of Llama 3 8B take both ways, and two launches. But with dropout each layer has a mask of its own, and what is
shared would be hidden between layers that are called one by one.

**Few programs.** Where there are few tokens (project) or few columns (grad_A), the sum is split, and the parts are
added in a fixed order: equal inputs give equal bits.

**Numbers.** A is rounded to the dtype of x, as the definition does. Sums are float32, ``factor`` multiplies them, and
h and dx are rounded once. float32 operands are multiplied in float32, not in TF32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qloralab.lora.dropout import keep_mask, seed_of

from . import self_check
from .adapter_operands import (
    coins,
    expect,
    expect_seed,
    limit,
    quad_terms,
    rank_tiles,
    row_terms,
    row_words,
    threshold,
)
from .case import Budget, Case
from .interpreter import bound, operand, round_to
from .launch import launch
from .split import in_parts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 128  # columns of the rank, of a program

_NOT_SPECIALIZED = ["M", "steps", "threshold"]


@triton.jit
def _kept(x, terms, quads, threshold):
    """x∘keep, for a tile [rows, 4 quads]."""
    numbers = coins(terms[:, None] + quads[None, :])
    return tl.where(tl.reshape(numbers, x.shape) >= limit(threshold), x, 0.0)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _project(
    x, A, seed, out, M, K, r, steps, words, threshold, factor,
    DROPOUT: tl.constexpr, TOKENS: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[m, j] = factor * sum_k keep[m, k] x[m, k] A[j, k]; out[split, m, j] where K is split."""
    m = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    j = tl.program_id(1).to(tl.int64) * RANK + tl.arange(0, RANK)
    first = tl.program_id(2) * steps
    last = tl.minimum(first + steps, tl.cdiv(K, COLUMNS))
    if DROPOUT:
        terms = row_terms(seed, m, words)
    total = tl.zeros((TOKENS, RANK), tl.float32)
    for step in range(bound(first), bound(last)):
        k = step * COLUMNS + tl.arange(0, COLUMNS)
        xs = tl.load(x + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
        a = tl.load(A + j[None, :] * K + k[:, None], mask=(j[None, :] < r) & (k[:, None] < K), other=0.0)
        if DROPOUT:
            quads = quad_terms(step * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4))
            xs = _kept(xs, terms, quads, threshold)
        total = tl.dot(operand(xs, x.dtype.element_ty), operand(a, x.dtype.element_ty), total, input_precision="ieee")
    at = out + tl.program_id(2).to(tl.int64) * M * r + m[:, None] * r + j[None, :]
    tl.store(at, round_to(total * factor, out.dtype.element_ty), mask=(m[:, None] < M) & (j[None, :] < r))


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _grad_A(
    G, x, seed, out, M, K, r, steps, words, threshold,
    DROPOUT: tl.constexpr, TOKENS: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[j, k] = sum_m G[m, j] keep[m, k] x[m, k]; out[split, j, k] where the tokens are split.

    The product is turned round, (x∘keep)' G: its left operand has 64 rows or more.
    """
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    j = tl.program_id(1).to(tl.int64) * RANK + tl.arange(0, RANK)
    first = tl.program_id(2) * steps
    last = tl.minimum(first + steps, tl.cdiv(M, TOKENS))
    if DROPOUT:
        quads = quad_terms(tl.program_id(0) * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4))
    total = tl.zeros((COLUMNS, RANK), tl.float32)
    for step in range(bound(first), bound(last)):
        m = tl.cast(step, tl.int64) * TOKENS + tl.arange(0, TOKENS)
        xs = tl.load(x + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
        g = tl.load(G + m[:, None] * r + j[None, :], mask=(m[:, None] < M) & (j[None, :] < r), other=0.0)
        if DROPOUT:
            xs = _kept(xs, row_terms(seed, m, words), quads, threshold)
        total = tl.dot(
            tl.trans(operand(xs, x.dtype.element_ty)), operand(g, G.dtype.element_ty), total, input_precision="ieee"
        )
    at = out + (tl.program_id(2).to(tl.int64) * r + j)[None, :] * K + k[:, None]
    tl.store(at, total, mask=(j[None, :] < r) & (k[:, None] < K))


@triton.jit(do_not_specialize=["M", "threshold"])
def _masked_low_rank(
    G, A, seed, out, M, K, r, words, threshold,
    TOKENS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[m, k] = keep[m, k] sum_j G[m, j] A[j, k]."""
    m = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for first in tl.range(0, RANK * RANKS, RANK, num_stages=1):
        j = tl.cast(first, tl.int64) + tl.arange(0, RANK)
        g = tl.load(G + m[:, None] * r + j[None, :], mask=(m[:, None] < M) & (j[None, :] < r), other=0.0)
        a = tl.load(A + j[:, None] * K + k[None, :], mask=(j[:, None] < r) & (k[None, :] < K), other=0.0)
        total = tl.dot(operand(g, G.dtype.element_ty), operand(a, G.dtype.element_ty), total, input_precision="ieee")
    quads = quad_terms(tl.program_id(1) * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4))
    kept = _kept(round_to(total, out.dtype.element_ty), row_terms(seed, m, words), quads, threshold)
    tl.store(out + m[:, None] * K + k[None, :], kept, mask=(m[:, None] < M) & (k[None, :] < K))


def project(x: Tensor, A: Tensor, seed: Tensor | None, p: float, factor: float, splits: int | None = None) -> Tensor:
    """factor * (x∘keep) A'.

    Args:
        x: float32, bfloat16 or float16 [tokens, K].
        A: float32 [r, K].
        seed: int64 [] or [1]; of no effect when p is 0, where None will do.
        p: dropout probability, in [0, 1).
        factor: on the sums; ``scaling / (1 - rate(p))`` makes h of it.
        splits: into how many ranges K is cut; None: ``split.steps_of`` decides.

    Returns:
        h: the dtype of x, [tokens, r].

    Raises:
        ValueError: an argument has another dtype, shape or device.
    """
    (M, K), (r, _) = _shape("x", x), _shape("A", A)
    expect("A", A, (r, K), torch.float32, x.device)
    seed = seed_of(seed, p)
    expect_seed(seed, x.device)
    h = x.new_empty((M, r), dtype=x.dtype)
    if not (M and K and r):
        return h.zero_()
    x, A = x.contiguous(), A.contiguous()
    tokens, rank = _project_tokens(M, x.dtype), _rank(r)
    columns, dropped = 64 if rank < WIDEST else 32, threshold(p)

    def run(grid: tuple[int, int, int], to: Tensor, steps: int) -> None:
        launch(
            _project, grid,
            x, A, seed, to, M, K, r, steps, row_words(K), dropped, factor,
            DROPOUT=dropped > 0, TOKENS=tokens, RANK=rank, COLUMNS=columns,
            num_warps=8 if tokens == 128 else 4, num_stages=_stages(x.dtype),
        )  # fmt: skip

    in_parts(run, h, (-(-M // tokens), -(-r // rank)), -(-K // columns), splits)
    return h


def grad_A(G: Tensor, x: Tensor, seed: Tensor | None, p: float, splits: int | None = None) -> Tensor:
    """G' (x∘keep).

    Args:
        G: the dtype of x, [tokens, r].
        x: float32, bfloat16 or float16 [tokens, K].
        seed, p: as in ``project``.
        splits: into how many ranges the tokens are cut; None: ``split.steps_of`` decides.

    Returns:
        dA: float32 [r, K].

    Raises:
        ValueError: an argument has another dtype, shape or device.
    """
    (M, K), (_, r) = _shape("x", x), _shape("G", G)
    expect("G", G, (M, r), x.dtype, x.device)
    seed = seed_of(seed, p)
    expect_seed(seed, x.device)
    dA = x.new_empty((r, K), dtype=torch.float32)
    if not (M and K and r):
        return dA.zero_()
    G, x = G.contiguous(), x.contiguous()
    columns, rank, dropped = 128, _rank(r), threshold(p)
    tokens = 64 if rank < WIDEST and x.dtype != torch.float32 else 32

    def run(grid: tuple[int, int, int], to: Tensor, steps: int) -> None:
        launch(
            _grad_A, grid,
            G, x, seed, to, M, K, r, steps, row_words(K), dropped,
            DROPOUT=dropped > 0, TOKENS=tokens, RANK=rank, COLUMNS=columns,
            num_warps=8, num_stages=_stages(x.dtype),
        )  # fmt: skip

    in_parts(run, dA, (-(-K // columns), -(-r // rank)), -(-M // tokens), splits)
    return dA


def masked_low_rank(G: Tensor, A: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """keep∘(G A). Where p drops nothing, by cuBLAS.

    Args:
        G: float32, bfloat16 or float16 [tokens, r].
        A: float32 [r, K].
        seed, p: as in ``project``.

    Returns:
        the dtype of G, [tokens, K].

    Raises:
        ValueError: an argument has another dtype, shape or device.
    """
    (M, r), (_, K) = _shape("G", G), _shape("A", A)
    expect("A", A, (r, K), torch.float32, G.device)
    seed = seed_of(seed, p)
    expect_seed(seed, G.device)
    if seed is None or 0 in (M, K, r):
        return G @ A.to(G.dtype)
    out = G.new_empty((M, K), dtype=G.dtype)
    G, A = G.contiguous(), A.contiguous()
    tokens, columns = 64 if M > 16 else 16, 128
    rank, ranks = rank_tiles(r)
    launch(
            _masked_low_rank, (-(-M // tokens), -(-K // columns)),
        G, A, seed, out, M, K, r, row_words(K), threshold(p),
        TOKENS=tokens, RANK=rank, RANKS=ranks, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return out


def _shape(name: str, tensor: Tensor) -> tuple[int, int]:
    """That of a matrix, of a dtype that the kernels multiply in."""
    if tensor.dtype not in DTYPES or tensor.dim() != 2:
        raise ValueError(
            f"{name} must be a matrix of float32, bfloat16 or float16, not {tensor.dtype} {list(tensor.shape)}"
        )
    return tensor.shape[0], tensor.shape[1]


def _project_tokens(M: int, dtype: torch.dtype) -> int:
    """Tokens of a program: with more of them A is read less often, from the cache of the GPU."""
    return 16 if M <= 16 else 64 if M <= 64 or dtype == torch.float32 else 128


def _rank(r: int) -> int:
    """Columns of the rank, of a program: all of them, up to `WIDEST`."""
    return min(max(1 << (r - 1).bit_length(), 16), WIDEST)


def _stages(dtype: torch.dtype) -> int:
    """Of the software pipeline; float32 takes twice the shared memory, of which some GPUs have 99 KiB."""
    return 2 if dtype == torch.float32 else 3


_P, _SEED = 0.3, 0x0123456789ABCDEF  # of the checks


def _given(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x without what its mask drops, A, G, the seed and the mask."""
    (M, K), r = self_check.SHAPE, 3
    x, A, G = (self_check.whole(*size, device) for size in ((M, K), (r, K), (M, r)))
    seed = torch.tensor(_SEED, device=device)
    return x, A, G, seed, keep_mask(seed, M, K, _P)


def _check_project(
    launch: Any, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    x, A, _, seed, keep = _given(device)
    h = launch(x.to(dtype), A, seed, _P, 0.5)
    return (h,), (self_check.product(torch.where(keep, x, 0), A.T).mul(0.5).to(dtype),)


def _check_grad_A(
    launch: Any, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    x, _, G, seed, keep = _given(device)
    dA = launch(G.to(dtype), x.to(dtype), seed, _P)
    return (dA,), (self_check.product(G.T, torch.where(keep, x, 0)),)


def _check_masked_low_rank(
    launch: Any, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    _, A, G, seed, keep = _given(device)
    return (launch(G.to(dtype), A, seed, _P),), (torch.where(keep, self_check.product(G, A), 0).to(dtype),)


CHECKS = {"project": _check_project, "grad_A": _check_grad_A, "masked_low_rank": _check_masked_low_rank}


def _case(name: str, kernel: Any, pointers: dict[str, str], num_warps: int, budget: Budget, **constexprs: Any) -> Case:
    scalars = {name: "fp32" if name == "factor" else "i32" for name in kernel.arg_names}
    types = {**scalars, "seed": "*i64", **pointers}
    return Case(
        name=f"adapter {name}",
        kernel=kernel,
        signature={name: kind for name, kind in types.items() if name not in constexprs},
        constexprs=constexprs,
        weights=constexprs["TOKENS"] * constexprs["COLUMNS"],  # elements of x
        num_warps=num_warps,
        divisible=(*pointers, "K", "r", "words"),
        budget=budget,
    )


# An element of x here is 2 bytes: 20 instructions can be issued while they arrive or leave. 5 hash the mask.
def _budget(instructions: float, registers: int = 128, loaded: float = 2, **more: Any) -> Budget:
    return Budget(instructions, registers, loaded, **{"needs": ("HGMMA",), **more})


_TO_H = {"x": "*bf16", "A": "*fp32", "out": "*fp32"}
_TO_A = {"G": "*bf16", "x": "*bf16", "out": "*fp32"}
_TO_X = {"G": "*bf16", "A": "*fp32", "out": "*bf16"}
_LARGE = {"TOKENS": 128, "RANK": 16, "COLUMNS": 64, "DROPOUT": True}
_WIDE = {"TOKENS": 64, "RANK": 16, "COLUMNS": 128}
_GRAD = {**_WIDE, "DROPOUT": True}
_DRY = {"DROPOUT": False}

CASES = (
    _case("project", _project, _TO_H, 8, _budget(14), **_LARGE),
    _case("project without dropout", _project, _TO_H, 8, _budget(4, 64, staged=0.5), **_LARGE | _DRY),
    _case("project, rank 64", _project, _TO_H, 8, _budget(15, 168), **_LARGE | {"RANK": 64}),
    # A, in float32, is as large as x.
    _case("project, 16 tokens", _project, _TO_H, 4, _budget(24, needs=("HMMA",)), **_LARGE | {"TOKENS": 16}),
    _case("grad_A", _grad_A, _TO_A, 8, _budget(17), **_GRAD),
    _case("grad_A without dropout", _grad_A, _TO_A, 8, _budget(5, 64, staged=0.1), **_GRAD | _DRY),
    _case("grad_A, rank 64", _grad_A, _TO_A, 8, _budget(17), **_GRAD | {"RANK": 64}),
    _case("masked_low_rank", _masked_low_rank, _TO_X, 4, _budget(21, loaded=0), **_WIDE, RANKS=1),  # counted whole
)
