"""What the kernels do otherwise in Triton's interpreter, which knows no bfloat16 arithmetic: the tests run there.

The interpreter cuts the low bits off where a GPU rounds to bfloat16, multiplies bfloat16 as integers, and cannot take a
loop's bounds from NumPy. Everything under the switch `INTERPRETED` is here and beside the inline assembly, which has
a second form (``lookup.py``, ``canonical.py``). On a GPU the functions below are a conversion, or nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))  # as it was when the kernels were defined


@triton.jit
def bound(x):
    """A bound of a loop. For the interpreter it becomes a Python number: that of triton 3.6 needs it with NumPy 2.4."""
    if INTERPRETED:
        return x.handle.data.item()
    return x


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 -> bfloat16, float16 or float32, to nearest, ties to even. A NaN stays one.

    In the interpreter, half of the last bit that is kept, less one where that bit is 0, is added to the bits.
    """
    if INTERPRETED and dtype == tl.bfloat16:
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


@triton.jit
def operand(x, dtype: tl.constexpr):
    """A tile as an operand of ``tl.dot``: rounded to dtype, as the other operand is; float32 in the interpreter."""
    if INTERPRETED:
        return to_float32(round_to(to_float32(x), dtype))
    return x.to(dtype)
