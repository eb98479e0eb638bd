"""Rounding float32 to the dtype of a result, to nearest, ties to even: by the GPU, and by hand in the interpreter.

Triton's interpreter cuts the low bits off where a GPU rounds to bfloat16. There the rounding is done on the bits: half
of the last place that is kept, less one where that place is even, is added and carries into it. Under that switch is
nothing but the conversion to bfloat16; float16 and float32 are converted in the same way in both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .lookup import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 -> bfloat16, float16 or float32. A NaN stays one."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, bits, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def to_float32(x):
    """bfloat16, float16 or float32 -> float32, exactly.

    A bfloat16 is the upper half of a float32. It is moved there as an integer, which also holds in the interpreter; its
    own conversion loses the numbers below 2**-126.
    """
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)
