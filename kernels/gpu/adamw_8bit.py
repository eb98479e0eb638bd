"""AdamW of many tensors in one launch, moments in 8 bits."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ..adamw import ADAMW, Rates
from ..moment_codes import BLOCK_SIZE, moment_tables
from ..rule import Segments
from .adamw import SCALARS, arguments, find_segment, pointer, product, update
from .case import Budget, Case
from .interpreter import round_to, to_float32
from .quantize import _is_extreme, _largest
from .segments import launches
from .update_check import RATES, check

TILE = 2048  # elements of a program
_BLOCK_SIZE = tl.constexpr(BLOCK_SIZE)
_ENTRIES = tl.constexpr(2**15)  # of a table `below`


@triton.jit
def _decode(codes, values, absmax, minus_zero, TILE: tl.constexpr):
    """A moment, float32 [blocks, 256], of its codes, uint8 [blocks, 256], and scales, float32 [blocks]."""
    table = tl.load(values + tl.arange(0, 256))
    value = tl.gather(table, tl.reshape(codes, (TILE,)).to(tl.int32), 0)
    return product(tl.reshape(value, (TILE // _BLOCK_SIZE, _BLOCK_SIZE)), absmax[:, None], minus_zero)


@triton.jit
def _encode(x, thresholds, below, SHIFT: tl.constexpr, TILE: tl.constexpr):
    """The codes, uint8 [blocks, 256], and scales, float32 [blocks], of a moment, float32 [blocks, 256]."""
    scale = _largest(x)
    extreme = _is_extreme(scale)
    q = x * tl.div_rn(1.0, tl.where((scale == 0) | extreme, 1.0, scale))[:, None]
    if tl.max(extreme.to(tl.int32), axis=0) != 0:
        q = tl.where(extreme[:, None], tl.div_rn(x, tl.where(extreme, scale, 1.0)[:, None]), q)
    q = tl.reshape(q, (TILE,))
    bin_ = (q.to(tl.int32, bitcast=True) >> SHIFT) & (_ENTRIES - 1)
    rank = tl.load(below + bin_).to(tl.int32)
    threshold = tl.gather(tl.load(thresholds + tl.arange(0, 256)), rank, 0)
    code = rank + tl.where(q > threshold, 1, 0)
    return tl.reshape(code.to(tl.uint8), (TILE // _BLOCK_SIZE, _BLOCK_SIZE)), scale


@triton.jit
def _adamw_8bit(
    table,
    segment_of,
    values,
    thresholds,
    below,
    decay,
    beta2,
    lerp,
    one_minus_beta2,
    eps,
    minus_zero,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCKS: tl.constexpr = TILE // _BLOCK_SIZE
    row, program = find_segment(table, segment_of)  # pyright: ignore[reportGeneralTypeIssues]
    start = program * TILE
    left = tl.minimum(tl.load(row + 4) - start, TILE).to(tl.int32)
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    block = tl.arange(0, BLOCKS)
    i = block[:, None] * _BLOCK_SIZE + tl.arange(0, _BLOCK_SIZE)[None, :]
    inside = i < left
    is_block = block * _BLOCK_SIZE < left

    params = pointer(row, 0, TYPE, ALIGNED) + start + i
    m_codes = pointer(row, 2, tl.uint8, ALIGNED) + start + i
    v_codes = pointer(row, 3, tl.uint8, ALIGNED) + start + i
    m_absmax = pointer(row, 8, tl.float32, False) + program * BLOCKS + block
    v_absmax = pointer(row, 9, tl.float32, False) + program * BLOCKS + block
    p = to_float32(tl.load(params, mask=inside, other=0.0))
    g = to_float32(tl.load(pointer(row, 1, TYPE, ALIGNED) + start + i, mask=inside, other=0.0))
    codes, scale = tl.load(m_codes, mask=inside, other=0), tl.load(m_absmax, mask=is_block, other=0.0)
    m = tl.where(inside, _decode(codes, values, scale, minus_zero, TILE), 0.0)  # stays 0 past the end
    codes, scale = tl.load(v_codes, mask=inside, other=0), tl.load(v_absmax, mask=is_block, other=0.0)
    v = tl.where(inside, _decode(codes, values + 256, scale, minus_zero, TILE), 0.0)

    p, m, v = update(row, p, g, m, v, decay, beta2, lerp, one_minus_beta2, eps, minus_zero)
    tl.store(params, round_to(p, TYPE), mask=inside)

    codes, scale = _encode(m, thresholds, below, 17, TILE)
    tl.store(m_codes, codes, mask=inside)
    tl.store(m_absmax, scale, mask=is_block)
    codes, scale = _encode(v, thresholds + 256, below + _ENTRIES, 16, TILE)
    tl.store(v_codes, codes, mask=inside)
    tl.store(v_absmax, scale, mask=is_block)


def adamw_8bit(segments: Segments, rates: Rates) -> None:
    """The update of ``kernels/adamw.py``, in place, on the current stream. It checks nothing."""
    for one in launches(segments, rates, TILE):
        with one.on_its_device():
            common = arguments(one, rates, TILE) | _tables(one.table.device)
            _adamw_8bit[(len(one.segment_of),)](one.table, one.segment_of, **common)


@functools.cache
def _tables(device: torch.device) -> dict[str, Any]:
    values, thresholds, below = (table.to(device) for table in moment_tables())
    return {"values": values, "thresholds": thresholds, "below": below}


def _case(name: str, dtype: tl.dtype, budget: Budget, aligned: bool = True) -> Case:
    signature = {"table": "*i64", "segment_of": "*i32", "values": "*fp32", "thresholds": "*fp32", "below": "*u8"}
    constexprs = {"TYPE": dtype, "ALIGNED": aligned, "TILE": TILE}
    return Case(name, _adamw_8bit, signature | SCALARS, constexprs, weights=TILE, budget=budget)


# 99 can be issued while 10 bytes arrive and leave; of these, a third is for scales that are hardly ever met.
CASES = (
    _case("adamw_8bit", tl.bfloat16, Budget(160, registers=128, loaded=6)),
    _case("adamw_8bit of float32", tl.float32, Budget(160, registers=128, loaded=10)),
    _case("adamw_8bit anywhere", tl.bfloat16, Budget(205, registers=255, loaded=6, width=8), aligned=False),
)
CHECKS = {"adamw_8bit": partial(check, ADAMW, RATES, True)}
