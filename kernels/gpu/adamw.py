"""AdamW of many tensors in one launch, moments in float32."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ..adamw import ADAMW, Rates
from ..rule import Segments
from .case import Budget, Case
from .interpreter import round_to, to_float32
from .segments import WIDTH, Launch, launches
from .update_check import RATES, check

TILE = 1024  # elements of a program
MINUS_ZERO = -(2**31)  # its bits, as int32
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_WIDTH = tl.constexpr(WIDTH)


@triton.jit
def find_segment(table, segment_of):
    """The row of this program's segment, and the number of the program among those of the segment."""
    row = table + tl.load(segment_of + tl.program_id(0)).to(tl.int64) * _WIDTH
    return row, tl.program_id(0) - tl.load(row + 5)


@triton.jit
def pointer(row, WORD: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A word of the row as the address of a tensor."""
    address = tl.load(row + WORD).to(tl.pointer_type(TYPE))  # pyright: ignore[reportArgumentType]
    return tl.multiple_of(address, 16) if ALIGNED else address


@triton.jit
def product(x, y, minus_zero):
    """x * y, rounded by itself: no part of a multiply-add with what it is added to.

    The compiler leaves an fma alone that it could simplify only if it knew what is added: minus_zero is an argument of
    the kernel, as the bits of -0.0. A literal is +0.0 to Triton, as is an argument to its interpreter, and that would
    change the sign of a product of -0.0.
    """
    return tl.fma(x, y, minus_zero.to(tl.float32, bitcast=True))


@triton.jit
def update(row, p, g, m, v, decay, beta2, lerp, one_minus_beta2, eps, minus_zero):
    """The new p, m and v of float32 elements, each operation rounded by itself."""
    step_size = tl.load(row + 6).to(tl.int32).to(tl.float32, bitcast=True)
    root = tl.load(row + 7).to(tl.int32).to(tl.float32, bitcast=True)
    m = tl.where(lerp > 0, m, g) + product(g - m, lerp, minus_zero)
    v = product(v, beta2, minus_zero) + product(g * one_minus_beta2, g, minus_zero)
    quotient = tl.div_rn(m * step_size, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    return product(p, decay, minus_zero) - quotient, m, v


@triton.jit
def _adamw(
    table,
    segment_of,
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
    row, program = find_segment(table, segment_of)  # pyright: ignore[reportGeneralTypeIssues]
    start = program * TILE
    left = tl.minimum(tl.load(row + 4) - start, TILE).to(tl.int32)
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    i = tl.arange(0, TILE)
    params = pointer(row, 0, TYPE, ALIGNED) + start + i
    m_at = pointer(row, 2, tl.float32, ALIGNED) + start + i
    v_at = pointer(row, 3, tl.float32, ALIGNED) + start + i
    p = to_float32(tl.load(params, mask=i < left, other=0.0))
    g = to_float32(tl.load(pointer(row, 1, TYPE, ALIGNED) + start + i, mask=i < left, other=0.0))
    m = tl.load(m_at, mask=i < left, other=0.0)
    v = tl.load(v_at, mask=i < left, other=0.0)
    p, m, v = update(row, p, g, m, v, decay, beta2, lerp, one_minus_beta2, eps, minus_zero)
    tl.store(params, round_to(p, TYPE), mask=i < left)
    tl.store(m_at, m, mask=i < left)
    tl.store(v_at, v, mask=i < left)


def adamw(segments: Segments, rates: Rates) -> None:
    """The update of ``kernels/adamw.py``, in place, on the current stream. It checks nothing."""
    for one in launches(segments, rates, TILE):
        with one.on_its_device():
            _adamw[(len(one.segment_of),)](one.table, one.segment_of, **arguments(one, rates, TILE))


def arguments(launch: Launch, rates: Rates, tile: int) -> dict[str, Any]:
    """Those that this kernel and the one for 8 bits have in common, by name."""
    kind = {"TYPE": TYPES[launch.dtype], "ALIGNED": launch.aligned, "TILE": tile}
    return kind | dict(zip(SCALARS, (*rates.constants, MINUS_ZERO), strict=True))


SCALARS = dict.fromkeys(("decay", "beta2", "lerp", "one_minus_beta2", "eps"), "fp32") | {"minus_zero": "i32"}


def _case(name: str, dtype: tl.dtype, budget: Budget, aligned: bool = True) -> Case:
    signature = {"table": "*i64", "segment_of": "*i32", **SCALARS}
    return Case(name, _adamw, signature, {"TYPE": dtype, "ALIGNED": aligned, "TILE": TILE}, weights=TILE, budget=budget)


# Per element, the slow paths of divisions and roots included. 217 can be issued while 22 bytes arrive and leave.
CASES = (
    _case("adamw", tl.bfloat16, Budget(75, registers=72, loaded=12)),
    _case("adamw of float32", tl.float32, Budget(70, registers=72, loaded=16)),
    _case("adamw anywhere", tl.bfloat16, Budget(85, registers=80, loaded=12, width=16), aligned=False),
)
CHECKS = {"adamw": partial(check, ADAMW, RATES, False)}
