"""Packed codes -> weights in full, both levels of scales decoded in the one launch::

    scale[b]  = map[scale code[b]] * absmax2[b / 256] + offset   two float32 roundings; or as it is stored
    weight[i] = round(values[code[i]] * scale[i / block_size])   the float32 product, rounded once to the result's dtype

The results have the bits of ``nf4/blockwise.py`` and ``nf4/double_quant.py``: any codebook of 16 values, any shape,
blocks that cross rows, a last block that is short, a last byte of one code.

**The bytes** of a weight, in bfloat16 with double quantization: 1/2 of code, 1/64 of its scale's, 2 of result; 2.516.

**The layout.** A program has 8,192 weights, a thread 64 of them. A thread loads 16 bytes of codes, which are 32 weights
in a row. Were it to store those, the lanes of a warp would write 64 bytes apart. So the codes, a quarter of the size of
the weights, change hands through shared memory: a thread then has the 4 bytes of eight weights, which are the 16 bytes
of one store, and neighbours write neighbours.

**The look-up.** The 16 values lie in shared memory, in 16 different banks, so that no two lanes collide whatever their
codes are. It is exact for any codebook, which a table of bfloat16 in registers (``lookup.py``) is not. The instructions
for a word of eight codes:

====================  ==  =================================================================
shift, mask           15  the code times 4 is the address
LDS                    8  the value
FFMA                   8  times the scale
FADD                   8  plus 0, which turns -0.0 into +0.0
F2FP                   4  two are rounded and packed at once
STG                    1
====================  ==  =================================================================

44, or 5.5 per weight. The rest of a program, the addresses, the loads and 128 scales, one by each thread, is shared by
the 64 weights of a thread and adds 2.1: 7.6 as counted for sm_90.

**The limit** is memory: an H100 that moves 3.0 TB/s has 25 slots to issue an instruction, and 6 for a load from shared
memory, in the time of each weight's 2.516 bytes.

**Why FFMA.** The product is written as ``fma(value, scale, 0)``. The compiler may contract a product and the sum after
it into one rounding, but leaves an fma alone; the zero changes at most the sign of a zero. The FADD that follows is not
superfluous: where the exact product is too small for any float32, the fma of a negative one is -0.0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qloralab.nf4 import blockwise, double_quant, packed
from qloralab.nf4.codebook import codebook_values, dynamic_map

from . import self_check
from .case import Budget, Case
from .interpreter import round_to
from .launch import launch
from .program import resident

TILE = 8192  # weights of a program: whole blocks of any size, no more of them than share an absmax2
SCALES_PER_BLOCK = tl.constexpr(packed.SCALES_PER_BLOCK)  # of the second level


@triton.jit
def _dequantize(
    packed, scales, absmax2, offset, scale_map, values, out, numel, nbytes,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, DOUBLE_QUANT: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = TILE // BLOCK_SIZE
    tile = tl.program_id(0).to(tl.int64)
    # All that is as large as the weight is in 64 bits, and the same for the whole program; within a tile 32 bits do.
    left = tl.minimum(numel - tile * TILE, TILE).to(tl.int32)
    left_bytes = tl.minimum(nbytes - tile * (TILE // 2), TILE // 2).to(tl.int32)

    byte = tl.arange(0, TILE // 2)
    codes = tl.load(packed + tile * (TILE // 2) + byte, mask=byte < left_bytes, other=0).to(tl.int32)
    # Four bytes are one register again; the shifts of the sum cost nothing. The first code of a byte is the high one.
    words = tl.sum(tl.reshape(codes, (TILE // 8, 4)) << (tl.arange(0, 4) * 8)[None, :], axis=1)
    shifts = (tl.arange(0, 8) ^ 1) * 4
    codes = tl.reshape((words[:, None] >> shifts[None, :]) & 15, (TILE,))
    value = tl.gather(tl.load(values + tl.arange(0, 16)), codes, 0)

    block = tl.arange(0, BLOCKS)
    is_block = block * BLOCK_SIZE < left
    scale = tl.load(scales + tile * BLOCKS + block, mask=is_block, other=0)
    if DOUBLE_QUANT:
        shared = tl.load(absmax2 + tile * BLOCKS // SCALES_PER_BLOCK)
        scale = tl.fma(tl.load(scale_map + scale.to(tl.int32)), shared, 0.0) + tl.load(offset)  # each is rounded

    weight = tl.fma(tl.reshape(value, (BLOCKS, BLOCK_SIZE)), scale[:, None], 0.0) + 0.0  # never -0.0
    i = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    tl.store(out + tile * TILE + i, round_to(weight, out.dtype.element_ty), mask=i < left)


def dequantize(
    packed: Tensor,
    scales: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    values: Tensor,
    shape: Sequence[int],
    block_size: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """A packed weight in full, bit for bit that of ``nf4/ops.py``.

    What it is given, ``operators.py`` has checked. Loads and stores are 16 bytes wide where the tensors begin at a
    multiple of 16 bytes and the counts of weights and of bytes are multiples of 16; everything else is correct, and
    slower. The first call on a device copies the map of the scales there, so it must not be within the capture of a
    CUDA graph.

    Args:
        packed: uint8 [(numel + 1) // 2, 1], contiguous.
        scales: float32 [blocks], or uint8 [blocks] with absmax2 and offset.
        absmax2: float32 [ceil(blocks / 256)] or None.
        offset: float32 [] or None.
        values: the codebook, float32 [16].
        shape: of the weight.
        block_size: weights that share a scale, a power of two from 32 to 4096.
        dtype: float32, bfloat16 or float16.
        out: where the result goes, of this dtype and shape, contiguous. None: new memory.

    Returns:
        out: dtype, shape.
    """
    numel = math.prod(shape)
    if out is None:
        out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    double_quant = absmax2 is not None
    if numel:
        scale_map = map_on(packed.device) if double_quant else None
        given = packed, scales, absmax2, offset, scale_map, values, out, numel, packed.numel()
        launch(_dequantize, (-(-numel // TILE),), *given, BLOCK_SIZE=block_size, TILE=TILE, DOUBLE_QUANT=double_quant)
    return out


@functools.cache
def map_on(device: torch.device) -> Tensor:
    """What the 8-bit codes of scales stand for, float32 [256] on a device; copied there once."""
    return resident(dynamic_map().to(device))


def _check(
    launch: Any,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    block_size: int = self_check.BLOCK_SIZE,
    levels: int = 2,
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    weight, values = self_check.weight(device), codebook_values("nf4").to(device)
    packed, absmax = blockwise.quantize_blockwise(weight, values, block_size)
    second, decoded = (absmax, None, None), absmax
    if levels == 2:
        second = double_quant.quantize_scales(absmax)
        decoded = double_quant.dequantize_scales(*second)
    expected = blockwise.dequantize_blockwise(packed, decoded, values, block_size, weight.numel())
    result = launch(packed, *second, values, weight.shape, block_size, dtype)
    return (result,), (expected.to(dtype).view(weight.shape),)


CHECKS = {"dequantize": _check}


def _case(name: str, dtype: str, double_quant: bool, budget: Budget) -> Case:
    second = dict.fromkeys(("absmax2", "offset", "scale_map"))
    signature = {"packed": "*u8", "values": "*fp32", "out": f"*{dtype}", "numel": "i32", "nbytes": "i32"}
    signature |= {"scales": "*u8", **dict.fromkeys(second, "*fp32")} if double_quant else {"scales": "*fp32"}
    constexprs = {"BLOCK_SIZE": 64, "TILE": TILE, "DOUBLE_QUANT": double_quant} | ({} if double_quant else second)
    return Case(name, _dequantize, signature, constexprs, weights=TILE, budget=budget)


# 25 instructions could be issued while 2.5625 bytes arrive and leave. 8 leaves two thirds of that to waiting.
CASES = (
    _case("dequantize", "bf16", True, Budget(8, registers=128, forbids=("SHFL",))),
    # Its FADD turns -0.0 into +0.0: without a second level there is no other.
    _case("dequantize one level", "bf16", False, Budget(8, 128, needs=("FFMA", "FADD"), forbids=("SHFL",))),
    _case("dequantize to float32", "fp32", True, Budget(9, registers=128, forbids=("SHFL",))),  # writes twice the bytes
)
