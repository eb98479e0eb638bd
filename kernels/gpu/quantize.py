"""Weights -> packed codes and scales in one pass; scales -> 8-bit codes in a small second kernel.

The steps, and the bits, are those of ``nf4/blockwise.py`` and ``nf4/double_quant.py``::

    absmax[b] = max |w[b, :]|
    code[b, i] = codes[how many thresholds are below w[b, i] * (1 / absmax[b])]

**The search.** A weight scaled to [-1, 1] is rounded to a number s from 0 to 31.75 in steps of 1/8, by one FFMA: the
constant it adds is so large that the steps are the last place of the sum. The whole part of s is one of 32 bins, bits 3
to 7 of that sum. A table in shared memory has an entry of 8 bytes for each bin: how many thresholds are below the bin,
and the threshold in it. One comparison with it, exact, decides. That does for NF4, no two of whose thresholds are as
close as a bin is wide; a codebook with up to 3, 7 or 15 thresholds in a bin takes 1, 2 or 3 further steps of bisection,
each a look-up and a comparison (`_search_of`). Where the codes of a codebook do not ascend with its values, one more
look-up makes codes of ranks. The tables are made on the CPU from the values, so a call waits for these to arrive there.

**The count.** A program has 8,192 weights, a thread 64 of them, bfloat16 in 16-byte loads. Instructions per weight:

==========================  ====  ============================================================
to float32                  1     IMAD or LOP3: a bfloat16 is the upper half of a float32
magnitude, largest          1.6   LOP3; VIMNMX, some of which compare three
times the reciprocal        1     FMUL
bin                         2     FFMA; LOP3, whose result is 8 times the bin, the address
entry                       1     LDS of 8 bytes
compare, add                3     FSETP, VIADD, a predicated move
into the word of 8 codes    1     IMAD or LEA
==========================  ====  ============================================================

10.6. The reciprocals, which each lane makes for itself, one for 8 weights, add 1.7; exchange between lanes, addresses,
loads and stores the rest: 15.4 as counted for sm_90, 19.5 from float32, the slow path of the division left out.

**The bytes**, for each weight in bfloat16: 2 read, 1/2 of code and 4/64 of scale written: 2.5625. An H100 that moves
3.0 TB/s has 25 slots to issue an instruction in that time, so memory is the limit.

**Extreme blocks.** Where the scale or its reciprocal is below 2**-126, the codes are those of the true quotient. No
weights of a model are like that, and a division is 12 instructions, so it is not in the kernel above: a second one
looks at the scales alone, and goes over such blocks once more. float16 has none.

Both divisions are IEEE's (``div_rn``), not the approximation that ``/`` is in Triton. NaN and infinity show in the
scale: the largest magnitude is found among integers, where NaN is above infinity. The codes of such a block mean
nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qloralab.nf4 import blockwise, double_quant
from qloralab.nf4.codebook import codebook_values, decision_table, dynamic_map
from qloralab.nf4.packed import SCALES_PER_BLOCK

from . import self_check
from .case import Budget, Case
from .interpreter import to_float32

TILE = 8192  # weights of a program: whole blocks of any size
SPAN = 512  # scales that one program looks at for extreme ones
BINS = 32
STRETCH = 15.75  # bins in a unit; less than 16, so that 1 and -1 are inside the first and the last
STEP = 1 / 8  # of the rounding that finds the bin

_BINS = tl.constexpr(BINS)
_STRETCH = tl.constexpr(STRETCH)
_SHIFT = tl.constexpr(1.5 * 2**23 * STEP + BINS / 2)  # between 2**20 and 2**21 the last place of a float32 is 1/8
_BIN_BITS = tl.constexpr(3)  # of them are below the whole part
_SMALLEST_NORMAL = tl.constexpr(2.0**-126)
_SCALES_PER_BLOCK = tl.constexpr(SCALES_PER_BLOCK)


@triton.jit
def _code(x, entries, thresholds, codes, STEPS: tl.constexpr, ORDERED: tl.constexpr):
    """The codes, int32 [n], of scaled weights, float32 [n]."""
    FIRST: tl.constexpr = 2 ** (STEPS - 1)
    bin_ = (tl.fma(x, _STRETCH, _SHIFT).to(tl.int32, bitcast=True) >> _BIN_BITS) & (_BINS - 1)
    entry = tl.gather(tl.load(entries + tl.arange(0, _BINS)), bin_, 0)
    threshold = entry.to(tl.int32).to(tl.float32, bitcast=True)
    rank = (entry >> 32).to(tl.int32) + tl.where(x > threshold, FIRST, 0)
    if STEPS > 1:
        table = tl.load(thresholds + tl.arange(0, 32))
        for step in tl.static_range(1, STEPS):  # pyright: ignore[reportGeneralTypeIssues]
            half = 1 << (STEPS - 1 - step)
            rank += tl.where(x > tl.gather(table, rank + (half - 1), 0), half, 0)
    return rank if ORDERED else tl.gather(tl.load(codes + tl.arange(0, 16)), rank, 0)


@triton.jit
def _pack(code, N: tl.constexpr):
    """Codes, int32 [N], as bytes, uint8 [N / 2]: the first of two in the high nibble.

    Eight at a time are put into a register first, which then holds the bytes as they are stored.
    """
    words = tl.sum(tl.reshape(code, (N // 8, 8)) << ((tl.arange(0, 8) ^ 1) * 4)[None, :], axis=1)
    return tl.reshape((words[:, None] >> (tl.arange(0, 4) * 8)[None, :]).to(tl.uint8), (N // 2,))


@triton.jit
def _largest(x):
    """The largest magnitude along the last dimension of a matrix; NaN where there is one."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def _is_extreme(scale):
    """Whether the scale, or its float32 reciprocal, is positive and below 2**-126."""
    return ((scale > 0) & (scale < _SMALLEST_NORMAL)) | (scale > 1 / _SMALLEST_NORMAL)


@triton.jit
def _quantize(
    weight, entries, thresholds, codes, packed, absmax, numel, nbytes,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = TILE // BLOCK_SIZE
    tile = tl.program_id(0).to(tl.int64)
    left = tl.minimum(numel - tile * TILE, TILE).to(tl.int32)
    left_bytes = tl.minimum(nbytes - tile * (TILE // 2), TILE // 2).to(tl.int32)

    block = tl.arange(0, BLOCKS)
    i = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    x = to_float32(tl.load(weight + tile * TILE + i, mask=i < left, other=0.0))
    scale = _largest(x)
    tl.store(absmax + tile * BLOCKS + block, scale, mask=block * BLOCK_SIZE < left)

    # A block of zeros stays one. The codes of other scales as small are written by the kernel below.
    reciprocal = tl.div_rn(1.0, tl.where(scale < _SMALLEST_NORMAL, 1.0, scale))
    x = tl.reshape(x * reciprocal[:, None], (TILE,))
    code = _code(x, entries, thresholds, codes, STEPS, ORDERED)
    byte = tl.arange(0, TILE // 2)
    tl.store(packed + tile * (TILE // 2) + byte, _pack(code, TILE), mask=byte < left_bytes)


@triton.jit
def _quantize_extreme(
    weight, entries, thresholds, codes, packed, absmax, numel, nbytes, blocks,
    BLOCK_SIZE: tl.constexpr, SPAN: tl.constexpr, STEPS: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * SPAN
    left = tl.minimum(blocks - first, SPAN).to(tl.int32)
    k = tl.arange(0, SPAN)
    scales = tl.load(absmax + first + k, mask=k < left, other=0.0)
    if tl.max(_is_extreme(scales).to(tl.int32), axis=0) != 0:
        for block in range(SPAN):
            scale = tl.load(absmax + first + block, mask=block < left, other=0.0)
            if _is_extreme(scale):
                i = (first + block) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
                x = to_float32(tl.load(weight + i, mask=i < numel, other=0.0))
                code = _code(tl.div_rn(x, scale), entries, thresholds, codes, STEPS, ORDERED)
                byte = (first + block) * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)
                tl.store(packed + byte, _pack(code, BLOCK_SIZE), mask=byte < nbytes)


@triton.jit
def _quantize_scales(absmax, offset, thresholds, codes, absmax2, blocks):
    """256 scales: subtract the offset, scale to [-1, 1], and count the thresholds below, of 255, by bisection."""
    first = tl.program_id(0).to(tl.int64) * _SCALES_PER_BLOCK
    left = tl.minimum(blocks - first, _SCALES_PER_BLOCK).to(tl.int32)
    i = tl.arange(0, _SCALES_PER_BLOCK)
    x = tl.load(absmax + first + i, mask=i < left, other=0.0) - tl.load(offset)
    x = tl.where(i < left, x, 0.0)
    scale = tl.max(_largest(x[None, :]), axis=0)
    tl.store(absmax2 + tl.program_id(0), scale)
    if _is_extreme(scale):
        x = tl.div_rn(x, scale)
    else:
        x = x * tl.div_rn(1.0, tl.where(scale == 0, 1.0, scale))
    code = tl.zeros((_SCALES_PER_BLOCK,), tl.int32)
    for step in tl.static_range(8):  # pyright: ignore[reportGeneralTypeIssues]
        half = 128 >> step
        code += tl.where(x > tl.load(thresholds + code + (half - 1)), half, 0)
    tl.store(codes + first + i, code.to(tl.uint8), mask=i < left)


def quantize_blockwise(weight: Tensor, values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize a tensor to a codebook of 16 values, bit for bit as ``nf4/blockwise.py`` does.

    What it is given, ``operators.py`` has checked. Loads and stores are 16 bytes wide where weight begins at a multiple
    of 16 bytes and the counts of weights and of bytes are multiples of 16; everything else is correct, and slower.

    Args:
        weight: float32, bfloat16 or float16, any shape, contiguous. NaN and infinity show in the scale of their block.
        values: the codebook, float32 [16], on the same device.
        block_size: weights that share a scale, a power of two from 32 to 4096.

    Returns:
        packed: uint8 [(numel + 1) // 2, 1], the first of two codes in the high nibble; an odd count is completed by the
            code of 0.
        absmax: float32 [blocks].
    """
    numel = weight.numel()
    blocks = -(-numel // block_size)
    packed = torch.empty((numel + 1) // 2, 1, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    if not numel:
        return packed, absmax
    search = _search(values)
    given = weight, search.entries, search.thresholds, search.codes, packed, absmax, numel, len(packed)
    constants: dict[str, Any] = {"BLOCK_SIZE": block_size, "STEPS": search.steps, "ORDERED": search.ordered}
    whole: Any = _quantize
    whole[(-(-numel // TILE),)](*given, **constants, TILE=TILE)
    if weight.dtype != torch.float16:  # whose magnitudes are 0, or between 2**-24 and 2**16
        extreme: Any = _quantize_extreme
        extreme[(-(-blocks // SPAN),)](*given, blocks, **constants, SPAN=SPAN)
    return packed, absmax


def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the scales of a tensor to 8 bits, bit for bit as ``nf4/double_quant.py`` does. The mean is torch's.

    Args:
        absmax: float32 [blocks], contiguous.

    Returns:
        codes: uint8 [blocks], indices into ``dynamic_map()``.
        absmax2: float32 [ceil(blocks / 256)].
        offset: float32 [], the mean of absmax (0 when there is none).
    """
    blocks = len(absmax)
    offset = absmax.double().mean().float() if blocks else absmax.new_zeros(())
    codes = torch.empty(blocks, dtype=torch.uint8, device=absmax.device)
    absmax2 = torch.empty(-(-blocks // SCALES_PER_BLOCK), dtype=torch.float32, device=absmax.device)
    if blocks:
        _quantize_scales[(len(absmax2),)](absmax, offset, _scale_thresholds(absmax.device), codes, absmax2, blocks)
    return codes, absmax2, offset


class _Search(NamedTuple):
    """How to find a code among 16."""

    entries: Tensor  # int64 [BINS]; high half: thresholds certainly below the bin, low half: bits of the one in it
    thresholds: Tensor  # float32 [32], ascending, completed by infinity
    codes: Tensor  # int32 [16], by rank among the values, completed by 0
    steps: int  # of bisection: 2**steps - 1 is no less than the number of thresholds in any bin
    ordered: bool  # whether rank and code are the same


_searches = WeakTensorKeyDictionary()  # by a codebook: the version of it that was read, and its tables


def _search(values: Tensor) -> _Search:
    """The tables of a codebook, on its device.

    The values are read, which waits for the device, when the tensor is new or was changed: ``nf4.quantize`` makes a new
    one at each call. Who keeps the tensor quantizes without a wait, and a CUDA graph can capture it.
    """
    version = None if values.is_inference() else values._version  # inference tensors count no changes
    known = _searches.get(values)
    if known is None or version is None or known[0] != version:
        known = version, _search_of(tuple(values.tolist()), values.device)
        _searches[values] = known
    return known[1]


@functools.lru_cache(maxsize=64)
def _search_of(values: tuple[float, ...], device: torch.device) -> _Search:
    """The tables of a codebook.

    x goes to bin k when ``STRETCH * x + BINS / 2``, rounded to a multiple of STEP, is from k to below k + 1. Where
    exactly the border lies depends on how the sum is rounded, and on ties. So a threshold counts as inside each bin
    that it is within a step of; that costs nothing unless it brings a bin to two of them.
    """
    thresholds, codes = decision_table(torch.tensor(values, dtype=torch.float32, device="cpu"))
    place = thresholds.double() * STRETCH + BINS / 2
    bins = torch.arange(BINS, device="cpu")[:, None]
    below = (place < bins - STEP).sum(dim=1)  # [BINS]
    inside = (place < bins + 1 + STEP).sum(dim=1) - below
    steps = max(1, int(inside.max()).bit_length())
    table = torch.cat([thresholds, thresholds.new_full((32 - len(thresholds),), torch.inf)])
    first = table[below + (1 << steps - 1) - 1]
    entries = below << 32 | first.view(torch.int32).long() & 0xFFFFFFFF
    codes = codes.int()
    ordered = torch.equal(codes, torch.arange(16, dtype=torch.int32, device="cpu"))
    codes = torch.cat([codes, codes.new_zeros(16 - len(codes))])
    return _Search(entries.to(device), table.to(device), codes.to(device), steps, ordered)


@functools.cache
def _scale_thresholds(device: torch.device) -> Tensor:
    return decision_table(dynamic_map())[0].to(device)


def _check_weights(
    launch: Any,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    block_size: int = self_check.BLOCK_SIZE,
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    given = self_check.weight(device).to(dtype), codebook_values("nf4").to(device), block_size
    return launch(*given), blockwise.quantize_blockwise(*given)


def _check_scales(launch: Any, device: torch.device) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    absmax = self_check.weight(device).float().abs().flatten()
    return launch(absmax), double_quant.quantize_scales(absmax)


CHECKS = {"quantize_blockwise": _check_weights, "quantize_scales": _check_scales}


def _case(name: str, budget: Budget, kernel: Any = _quantize, dtype: str = "bf16", **constexprs: int) -> Case:
    signature = {"weight": f"*{dtype}", "entries": "*i64", "thresholds": "*fp32", "codes": "*i32", "packed": "*u8"}
    signature |= {"absmax": "*fp32", "numel": "i32", "nbytes": "i32"}
    if kernel is _quantize_extreme:
        signature["blocks"] = "i32"
    constexprs = {"BLOCK_SIZE": 64, "STEPS": 1, "ORDERED": True} | constexprs
    return Case(name, kernel, signature, constexprs, constexprs.get("TILE", 4096), budget=budget)


_OF_SCALES = {"absmax": "*fp32", "offset": "*fp32", "thresholds": "*fp32", "codes": "*u8", "absmax2": "*fp32"}
CASES = (
    # The largest of each block, a quotient, the bin and one comparison per weight.
    _case("quantize", Budget(22, registers=128, loaded=2), TILE=TILE),
    _case("quantize from float32", Budget(22, registers=128, loaded=4), dtype="fp32", TILE=TILE),
    # A search in 4 steps: values that no table of bins separates.
    _case("quantize any codebook", Budget(40, loaded=2), TILE=TILE, STEPS=4, ORDERED=False),
    # Scales whose reciprocal is no normal number.
    _case("quantize extreme blocks", Budget(30, 128, loaded=2), _quantize_extreme, SPAN=SPAN, BLOCK_SIZE=4096),
    Case(
        "quantize scales",
        _quantize_scales,
        {**_OF_SCALES, "blocks": "i32"},
        {},
        weights=64 * SCALES_PER_BLOCK,  # those behind the scales
        budget=Budget(3, registers=64, loaded=4 / 64, width=32),
    ),
)
