"""Both products with a weight straight from the canonical layout: for every shape, codebook and dtype, no second copy.

The fused kernels (``linear.py``, ``linear_grad_input.py``) read tiles, which ask for a K and blocks of multiples of 64,
for x in bfloat16 and for a codebook that ``lookup.py`` can order. These two ask for nothing: any N and K, blocks that
cross rows, any 16 values, x in float32, bfloat16 or float16. They repack nothing and have no workspace for the weight::

    y^T  = W' x^T        a program has ROWS of W and steps along K
    dX^T = W'^T dY^T     a program has COLUMNS of W and steps along N

**The weights are the definition's**, bit for bit: the float32 product of value and scale, rounded once to the dtype of
x (``nf4/reference.py``). So they may stand beside ``two_pass.py`` in one layer: forward and backward multiply by the
same W' whichever of the two serves them. Sums are float32; one rounding of the result follows.

**A segment** is what is decoded at a time: 64 weights of a row, or 32. A block has 32 weights or more, so a segment
of 32 lies in one block or in two, wherever it begins: two scales, and one comparison per weight to choose. There are
three kinds, which the shape decides (``_constants``):

========  ==========================  ===============================================================================
"whole"   K and the blocks are        one scale; codes are loaded 16 bytes at a time
          multiples of it
"even"    K is even                   begins with a byte; codes are loaded byte by byte, no further than the row
"odd"     K is odd                    in every other row it begins within a byte: one byte more for each eight weights,
                                      and eight codes are moved by a nibble at once
========  ==========================  ===============================================================================

**Instructions** per weight of a whole segment, forward:

=====================  ===  ===========================================================================================
codes                  2.0  shift and mask: the address of the value
value                  1.0  LDS: the 16 lie in shared memory, as in ``dequantize.py``
weight                 2.5  FFMA, FADD, half of F2FP (``dequantize.py`` says why these)
the rest               3.7  addresses, copies, barriers; a scale for 64 weights; the product through shared memory
=====================  ===  ===========================================================================================

An even K adds the loads of bytes, their masks, and two for the choice between two scales; an odd K the nibbles.
Counted for sm_90 with triton 3.6.0, forward and backward:

==========================  =====  =====
32 tokens, whole             9.2    9.6
32 tokens, even             16.3   14.9
32 tokens, odd              17.8   16.4
64 tokens, whole             9.4    9.7
64 tokens, odd              22.7   21.4
16 tokens, float32          29.0   32.3
64 tokens, float32          81.8   82.5
64 tokens, float32, odd    104.3  103.4
==========================  =====  =====

In float32 no tensor core keeps the precision: each token costs an FFMA per weight. Loading the values from global
memory costs 7 more than LDS: each load needs an address of 64 bits.

**Bytes** of a weight: 0.516 with double quantization. They arrive once: where two steps of a row share a sector, the
second finds it in the cache.

**The limit** is the issue of instructions. An H100 issues 3.0e13 a second, so 9.4 take 0.32 ps, and the bytes 0.17.
Each further 64 tokens decode the weight again. Two-pass takes 0.84 ps to write a weight of 2 bytes, once, and 0.67 or
more to multiply by it; in float32 1.5 and, at cuBLAS' 67 TFLOP/s, 1.9 for 64 tokens. Were every slot used, two-pass
would win

* above 320 tokens where segments are whole,
* above 64 tokens where they are not, and in float32.

No kernel uses every slot, so the true crossings are lower: these are meant for up to 64 tokens, and correct for any
number.

A sum is split where the grid is small, as in ``linear.py``, and added in a fixed order.

**An adapter**'s h B', or keep∘(G A), is written by a small product before, rounded to the dtype of x as the definition
rounds it. It is added to the float32 sum in the end: 2 bytes read for each of the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qloralab.nf4.product import reshaped

from .adapter import masked_low_rank
from .adapter_operands import LowRank, MaskedLowRank
from .case import Case
from .dequantize import SCALES_PER_BLOCK, map_on, product, second_level
from .linear import add_splits, split
from .lookup import INTERPRETED, bound
from .rounding import round_to, to_float32

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKEN_TILES = (16, 32, 64)
STAGES = 4  # of the pipeline

Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Sequence[int], int]

_INTERPRETED = tl.constexpr(INTERPRETED)
_NOT_SPECIALIZED = ["M", "steps"]


@triton.jit
def _words(packed, first, left, SEGMENT: tl.constexpr, WHOLE: tl.constexpr, ODD: tl.constexpr):
    """The codes of segments, int32 [segments, SEGMENT / 8]: eight in a word, as four bytes of the canonical layout.

    Nothing is read beyond the `left` weights of a segment but the other half of the last byte. What is beyond them in a
    word is any code.
    """
    at = packed + (first >> 1)
    if WHOLE:
        byte = tl.arange(0, SEGMENT // 2)
        codes = tl.load(at[:, None] + byte[None, :], mask=(left > 0)[:, None], other=0).to(tl.int32)
        quads = tl.reshape(codes, (first.shape[0], SEGMENT // 8, 4))
        return tl.sum(quads << (tl.arange(0, 4) * 8)[None, None, :], axis=2)  # costs nothing: loaded as such
    odd = (first & 1).to(tl.int32)
    byte = tl.arange(0, SEGMENT // 8) * 4
    there = (tl.where(left > 0, left + odd + 1, 0) >> 1)[:, None] - byte[None, :]
    at = at[:, None] + byte[None, :]
    # Four loads of one tensor each, so that a thread has the four bytes of a word.
    words = tl.load(at, mask=there > 0, other=0).to(tl.int32)
    words |= tl.load(at + 1, mask=there > 1, other=0).to(tl.int32) << 8
    words |= tl.load(at + 2, mask=there > 2, other=0).to(tl.int32) << 16
    words |= tl.load(at + 3, mask=there > 3, other=0).to(tl.int32) << 24
    if ODD:
        after = tl.load(at + 4, mask=there > 4, other=0).to(tl.int32)
        # Low nibbles become high ones, and the high nibble of the byte after comes in below each.
        moved = ((words << 4) & -0x0F0F0F10) | ((words >> 12) & 0x000F0F0F) | ((after << 20) & 0x0F000000)
        words = tl.where((odd == 0)[:, None], words, moved)
    return words


@triton.jit
def _scale(scales, absmax2, offset, scale_map, block, needed):
    """The scales of blocks, float32 [segments]: any number where they are not needed."""
    scale = tl.load(scales + block, mask=needed, other=0)
    if absmax2 is not None:
        shared = tl.load(absmax2 + block // SCALES_PER_BLOCK, mask=needed, other=0.0)
        scale = second_level(scale, shared, offset, scale_map)
    return scale


@triton.jit
def _decode(
    packed,
    scales,
    absmax2,
    offset,
    scale_map,
    values,
    first,
    left,
    dtype: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SEGMENT: tl.constexpr,
    WHOLE: tl.constexpr,
    ODD: tl.constexpr,
):
    """The weights first, first + 1, ... of each segment: dtype [segments, SEGMENT], float32 in the interpreter.

    first is int64 [segments]. Of a segment, `left` weights are wanted, int32 [segments], 0 or less where there are
    none. The others are finite if the wanted ones are: their scale is that of a wanted one, or made of zeros.
    """
    first = first.to(tl.uint64)  # of which a division is a shift
    words = _words(packed, first, left, SEGMENT, WHOLE, ODD)
    # Halves of a word, bytes of a half, nibbles of a byte, of which the high one is first.
    codes = tl.join(words, words >> 16)
    codes = tl.join(codes, codes >> 8)
    codes = tl.ravel(tl.join(codes >> 4, codes) & 15)
    value = tl.reshape(tl.gather(tl.load(values + tl.arange(0, 16)), codes, 0), (first.shape[0], SEGMENT))
    block = first // BLOCK_SIZE
    scale = _scale(scales, absmax2, offset, scale_map, block, left > 0)[:, None]
    if not WHOLE:
        here = (BLOCK_SIZE - first % BLOCK_SIZE).to(tl.int32)  # weights before the next block
        following = _scale(scales, absmax2, offset, scale_map, block + 1, here < left)[:, None]
        scale = tl.where(tl.arange(0, SEGMENT)[None, :] < here[:, None], scale, following)
    weight = round_to(product(value, scale), dtype)
    if _INTERPRETED:
        weight = to_float32(weight)
    return weight


@triton.jit
def _add_start(total, start, m, column, M, columns):
    """total + start', [columns, tokens]; of the parts of a split sum, the first has it."""
    here = (m[None, :] < M) & (column[:, None] < columns) & (tl.program_id(2) == 0)
    at = start + m.to(tl.int64)[None, :] * columns + column[:, None]
    return total + to_float32(tl.load(at, mask=here, other=0.0))


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _linear(
    x,
    packed,
    scales,
    absmax2,
    offset,
    scale_map,
    values,
    bias,
    start,
    out,
    M,
    N,
    K,
    steps,
    BLOCK_SIZE: tl.constexpr,
    SEGMENT: tl.constexpr,
    WHOLE: tl.constexpr,
    ODD: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BIAS: tl.constexpr,
):
    """out[m, n] = start[m, n] + sum_k x[m, k] W'[n, k] + bias[n]; out[split, m, n] where K is split.

    A step is a segment of each row.
    """
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    begin = tl.program_id(2) * steps
    end = tl.minimum(begin + steps, tl.cdiv(K, SEGMENT))
    i = tl.arange(0, SEGMENT)
    row = n.to(tl.int64) * K
    x_at = x + m.to(tl.int64)[None, :] * K + i[:, None]
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in range(bound(begin), bound(end)):
        k = step * SEGMENT
        w = _decode(
            packed,
            scales,
            absmax2,
            offset,
            scale_map,
            values,
            row + k,
            tl.where(n < N, K - k, 0),
            x.dtype.element_ty,
            BLOCK_SIZE,
            SEGMENT,
            WHOLE,
            ODD,
        )
        is_x = m[None, :] < M
        if not WHOLE:
            is_x = is_x & (i[:, None] < K - k)
        xs = tl.load(x_at + k, mask=is_x, other=0.0)
        if _INTERPRETED:
            xs = to_float32(xs)
        total = tl.dot(w, xs, total, input_precision="ieee")
    if BIAS:
        total += to_float32(tl.load(bias + n, mask=n < N, other=0.0))[:, None]
    if start is not None:
        total = _add_start(total, start, m, n, M, N)  # pyright: ignore[reportGeneralTypeIssues]
    at = out + (tl.program_id(2).to(tl.int64) * M + m)[None, :] * N + n[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=(m[None, :] < M) & (n[:, None] < N))


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _linear_grad_input(
    grad,
    packed,
    scales,
    absmax2,
    offset,
    scale_map,
    values,
    start,
    out,
    M,
    N,
    K,
    steps,
    BLOCK_SIZE: tl.constexpr,
    SEGMENT: tl.constexpr,
    WHOLE: tl.constexpr,
    ODD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """out[m, k] = start[m, k] + sum_n grad[m, n] W'[n, k]; out[split, m, k] where the sum is split.

    A step is ROWS of W. Segments are numbered row by row, COLUMNS / SEGMENT in each.
    """
    ACROSS: tl.constexpr = COLUMNS // SEGMENT
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    begin = tl.program_id(2) * steps
    end = tl.minimum(begin + steps, tl.cdiv(N, ROWS))
    i = tl.arange(0, ROWS)
    segment = tl.arange(0, ROWS * ACROSS)
    k = tl.program_id(0) * COLUMNS + segment % ACROSS * SEGMENT
    grad_at = grad + m.to(tl.int64)[None, :] * N + i[:, None]
    total = tl.zeros((COLUMNS, TOKENS), tl.float32)
    for step in range(bound(begin), bound(end)):
        n = step * ROWS + segment // ACROSS
        w = _decode(
            packed,
            scales,
            absmax2,
            offset,
            scale_map,
            values,
            n.to(tl.int64) * K + k,
            tl.where(n < N, K - k, 0),
            grad.dtype.element_ty,
            BLOCK_SIZE,
            SEGMENT,
            WHOLE,
            ODD,
        )
        w = tl.trans(tl.reshape(w, (ROWS, COLUMNS)))
        g = tl.load(grad_at + step * ROWS, mask=(m[None, :] < M) & (i[:, None] < N - step * ROWS), other=0.0)
        if _INTERPRETED:
            g = to_float32(g)
        total = tl.dot(w, g, total, input_precision="ieee")
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if start is not None:
        total = _add_start(total, start, m, k, M, K)  # pyright: ignore[reportGeneralTypeIssues]
    at = out + (tl.program_id(2).to(tl.int64) * M + m)[None, :] * K + k[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=(m[None, :] < M) & (k[:, None] < K))


def linear(
    x: Tensor,
    operands: Operands,
    bias: Tensor | None = None,
    splits: int | None = None,
    adapter: LowRank | None = None,
) -> Tensor:
    """x W'^T + bias, plus h B' of an adapter.

    What the weight consists of, ``operators.py`` has checked. The first call on a device copies the map of the scales
    there, so it must not be within the capture of a CUDA graph.

    Args:
        x: float32, bfloat16 or float16 [..., K], on the weight's device.
        operands: W, as the operators of ``nf4/ops.py`` take it: packed, scales, absmax2, offset, values, (N, K),
            block_size.
        bias: the dtype of x, [N], or None.
        splits: into how many ranges K is cut; None: ``linear.split`` decides.
        adapter: what is added before the result is rounded; None: nothing is.

    Returns:
        the dtype of x, [..., N].

    Raises:
        ValueError: x, bias or the adapter has another dtype, shape or device.
    """
    N, K = operands[5]
    _check("x", x, K, operands)
    if bias is not None:
        _check("bias", bias, N, operands)
        if bias.dim() != 1:
            raise ValueError(f"bias must have 1 dimension, not {bias.dim()}")
        if bias.dtype != x.dtype:
            raise ValueError(f"bias must be {x.dtype}, as x is, not {bias.dtype}")
        bias = bias.contiguous()
    M = math.prod(x.shape[:-1])
    start = None
    if adapter is not None:
        adapter.check(x, M, N)
        start = adapter.h @ adapter.B.to(x.dtype).T
    if 0 in (M, N, K):
        empty = x.new_zeros((M, N)) if start is None else start
        return reshaped(empty if bias is None else empty + bias, (*x.shape[:-1], N))
    flat = x.reshape(M, K).contiguous()
    constants: dict[str, Any] = _constants(K, operands[6], x.dtype) | _forward(x.dtype)
    tokens = _token_tile(M, x.dtype)
    down, token_tiles, tiles = -(-N // constants["ROWS"]), -(-M // tokens), -(-K // constants["SEGMENT"])
    steps = split(down * token_tiles, tiles, splits)
    depth = -(-tiles // steps)
    out = _empty(M, N, x)
    parts = out if depth == 1 else x.new_empty((depth, M, N), dtype=torch.float32)
    kernel: Any = _linear
    kernel[(down, token_tiles, depth)](
        flat,
        *_weight(operands),
        flat if bias is None else bias,
        start,
        parts,
        M,
        N,
        K,
        steps,
        **constants,
        TOKENS=tokens,
        BIAS=bias is not None and depth == 1,
        num_warps=_warps(constants["WHOLE"], tokens),
        num_stages=STAGES,
    )
    if depth > 1:
        add_splits(parts, bias, out)
    return reshaped(out.to(x.dtype), (*x.shape[:-1], N))


def linear_grad_input(
    grad: Tensor, operands: Operands, splits: int | None = None, adapter: MaskedLowRank | None = None
) -> Tensor:
    """grad W', plus keep∘(G A) of an adapter: the gradient of ``linear`` with respect to x, with the same bits of W'.

    Args:
        grad: float32, bfloat16 or float16 [..., N], on the weight's device.
        operands: W, as for ``linear``.
        splits: into how many ranges N is cut; None: ``linear.split`` decides.
        adapter: what is added before the result is rounded; None: nothing is.

    Returns:
        the dtype of grad, [..., K].

    Raises:
        ValueError: grad or the adapter has another dtype, shape or device.
    """
    N, K = operands[5]
    _check("grad", grad, N, operands)
    M = math.prod(grad.shape[:-1])
    start = None
    if adapter is not None:
        adapter.check(grad, M, K)
        start = masked_low_rank(adapter.G, adapter.A, adapter.seed, adapter.p)
    if 0 in (M, N, K):
        return reshaped(grad.new_zeros((M, K)) if start is None else start, (*grad.shape[:-1], K))
    flat = grad.reshape(M, N).contiguous()
    constants = _constants(K, operands[6], grad.dtype)
    constants |= _backward(grad.dtype, constants["WHOLE"])
    tokens = _token_tile(M, grad.dtype)
    across, token_tiles, tiles = -(-K // constants["COLUMNS"]), -(-M // tokens), -(-N // constants["ROWS"])
    steps = split(across * token_tiles, tiles, splits)
    depth = -(-tiles // steps)
    out = _empty(M, K, grad)
    parts = out if depth == 1 else grad.new_empty((depth, M, K), dtype=torch.float32)
    kernel: Any = _linear_grad_input
    kernel[(across, token_tiles, depth)](
        flat,
        *_weight(operands),
        start,
        parts,
        M,
        N,
        K,
        steps,
        **constants,
        TOKENS=tokens,
        num_warps=_warps(constants["WHOLE"], tokens),
        num_stages=STAGES,
    )
    if depth > 1:
        add_splits(parts, None, out)
    return reshaped(out.to(grad.dtype), (*grad.shape[:-1], K))


def _constants(K: int, block_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """What kind of segments a weight has. In float32 a thread holds all it multiplies in a step: 64 are too many."""
    segment = 64 if K % 64 == 0 and block_size % 64 == 0 and dtype != torch.float32 else 32
    return {"BLOCK_SIZE": block_size, "SEGMENT": segment, "WHOLE": K % segment == 0, "ODD": K % 2 == 1}


def _forward(dtype: torch.dtype) -> dict[str, int]:
    """The rows of a program."""
    return {"ROWS": 64 if dtype == torch.float32 else 128}


def _backward(dtype: torch.dtype, whole: bool) -> dict[str, int]:
    """The rows of a step and the columns of a program."""
    if dtype == torch.float32:
        return {"ROWS": 32, "COLUMNS": 64}
    return {"ROWS": 64 if whole else 32, "COLUMNS": 128}


def _token_tile(M: int, dtype: torch.dtype) -> int:
    """How many tokens a program takes: the smallest tile that holds them all.

    Tensor cores have 32 columns for the price of 16, and with 16 triton 3.7.1 spills registers for sm_100.
    """
    tiles = TOKEN_TILES if dtype == torch.float32 else TOKEN_TILES[1:]
    return next((tokens for tokens in tiles if tokens >= M), tiles[-1])


def _warps(whole: bool, tokens: int) -> int:
    """Of a program. Where x is loaded number by number, 64 tokens take the registers of eight."""
    return 4 if whole or tokens < 64 else 8


def _weight(operands: Operands) -> tuple[Tensor | None, ...]:
    """The arguments of a kernel that make up the weight."""
    packed, scales, absmax2, offset, values, *_ = operands
    return packed, scales, absmax2, offset, None if absmax2 is None else map_on(packed.device), values


def _check(name: str, tensor: Tensor, columns: int, operands: Operands) -> None:
    """Raises ValueError unless a tensor is [..., columns] of one of DTYPES on the weight's device."""
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, not {tensor.dtype}")
    if tensor.dim() == 0 or tensor.shape[-1] != columns:
        raise ValueError(f"the last dimension of {name} must be {columns}; its shape is {tuple(tensor.shape)}")
    if tensor.device != operands[0].device:
        raise ValueError(f"{name} is on {tensor.device}, the weight on {operands[0].device}")


def _empty(M: int, columns: int, like: Tensor) -> Tensor:
    """[M, columns] for a kernel to write: the dtype of a tensor, or float32 in the interpreter (``rounding.py``)."""
    return like.new_empty((M, columns), dtype=torch.float32 if INTERPRETED else like.dtype)


def _case(
    name: str,
    backward: bool,
    tokens: int,
    K: int,
    dtype: str = "bf16",
    double_quant: bool = True,
    adapter: bool = False,
) -> Case:
    second = dict.fromkeys(("absmax2", "offset", "scale_map"))
    x = "grad" if backward else "x"
    signature = {x: f"*{dtype}", "packed": "*u8", "values": "*fp32", "out": f"*{dtype}"}
    signature |= {"scales": "*u8", **dict.fromkeys(second, "*fp32")} if double_quant else {"scales": "*fp32"}
    signature |= dict.fromkeys(("M", "N", "K", "steps"), "i32")
    of = torch.float32 if dtype == "fp32" else torch.bfloat16
    constexprs: dict[str, Any] = _constants(K, 64, of) | {"TOKENS": tokens} | ({} if double_quant else second)
    if adapter:
        signature["start"] = f"*{dtype}"
    else:
        constexprs["start"] = None
    if backward:
        constexprs |= _backward(of, constexprs["WHOLE"])
    else:
        constexprs |= _forward(of) | {"BIAS": True}
        signature["bias"] = f"*{dtype}"
    divisible = [name for name, kind in signature.items() if kind.startswith("*")] + ["N", "K"] * (K % 16 == 0)
    return Case(
        name=f"canonical {name}, {tokens} tokens",
        kernel=_linear_grad_input if backward else _linear,
        signature=signature,
        constexprs=constexprs,
        weights=constexprs["ROWS"] * constexprs["COLUMNS" if backward else "SEGMENT"],
        num_warps=_warps(constexprs["WHOLE"], tokens),
        num_stages=STAGES,
        divisible=tuple(divisible),
    )


CASES: tuple[Case, ...] = (
    _case("linear", False, 32, K=64),
    _case("linear", False, 64, K=64),
    _case("linear, one level", False, 32, K=64, double_quant=False),
    _case("linear, with an adapter", False, 64, K=64, adapter=True),
    _case("linear, float16", False, 32, K=64, dtype="fp16"),
    _case("linear, even K", False, 32, K=100),
    _case("linear, odd K", False, 32, K=101),
    _case("linear, odd K", False, 64, K=101),
    _case("linear, float32", False, 16, K=64, dtype="fp32"),
    _case("linear, float32", False, 64, K=64, dtype="fp32"),
    _case("linear, float32, odd K", False, 64, K=101, dtype="fp32"),
    _case("linear_grad_input", True, 32, K=64),
    _case("linear_grad_input", True, 64, K=64),
    _case("linear_grad_input, with an adapter", True, 64, K=64, adapter=True),
    _case("linear_grad_input, even K", True, 32, K=100),
    _case("linear_grad_input, odd K", True, 32, K=101),
    _case("linear_grad_input, odd K", True, 64, K=101),
    _case("linear_grad_input, float32", True, 16, K=64, dtype="fp32"),
    _case("linear_grad_input, float32", True, 64, K=64, dtype="fp32"),
    _case("linear_grad_input, float32, odd K", True, 64, K=101, dtype="fp32"),
)
