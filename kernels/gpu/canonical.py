"""A packed weight as files have it, read by the fused kernels: which lane takes which codes, and how a scale is made.

**The layout** is that of ``nf4/packed.py``: the codes of a row one after the other, two in a byte, the first in the
high nibble; a scale for each ``block_size`` weights in a row, 8 bits of it where the scales are quantized too. No other
copy of a weight is on the GPU: 4.13 bits a weight are resident, or 4.5 with float32 scales. The codes begin at a
multiple of 16 bytes.

**The lanes.** A tensor core wants a weight matrix in pieces of 16 rows and 16 columns: lane 4 g + c of a warp holds, of
the rows g and g + 8, the columns 2 c, 2 c + 1, 2 c + 8, 2 c + 9. In the canonical layout a lane that loads 4 bytes has
8 weights of one row. But which column of the weight a column of the piece stands for is free, as long as the other
operand agrees. So each lane multiplies what it has loaded, and nothing is exchanged:

* forward, the sum runs over k, and x is read in the order in which the lanes hold k;
* backward, the sum runs over n, the columns k are rows of the product, and the product is put in order once.

**The scales.** K and the block size are multiples of 64, so 64 columns of a row share one scale, even where a block
spans rows. It is decoded where it is used, and divided by the factor of the table (``lookup.py``)::

    scale = map[code] * (absmax2 / factor) + offset / factor        one fma; or the float32 scale / factor

then rounded to bfloat16. Forward, four lanes share the four rows that a lane has, so each decodes one of them, and a
shuffle gives it to the others; backward, the lanes of a warp share 64 rows, and each decodes two. The code of a step is
loaded a step ahead. About 20 instructions a scale are so divided by 64 weights.
"""

from __future__ import annotations

import operator
import weakref
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qloralab.nf4.packed import Packed

from .dequantize import SCALES_PER_BLOCK, map_on
from .interpreter import INTERPRETED, round_to
from .lookup import TABLE_ARGUMENTS, joined, table, version

TILE = 64  # columns that share a scale; rows of a step backward
SCALARS = ("tiles", "shift", *TABLE_ARGUMENTS)  # integers of a weight, arguments of the kernels


def why_not(weight: Packed) -> str | None:
    """Why a weight cannot be in a fused product, in words; None if it can. The first call with a weight waits."""
    found = _plan(weight)
    return found if isinstance(found, str) else None


def arguments(weight: Packed) -> dict[str, Any]:
    """A weight as the kernels take it, by the names of their parameters.

    Raises:
        ValueError: ``why_not`` has a reason.
    """
    found = _plan(weight)
    if isinstance(found, str):
        raise ValueError(found)
    return {"packed": weight.packed, **found}


class _Plan(NamedTuple):
    """What was found out about a weight, as long as its packed codes live."""

    packed: weakref.ref[Tensor]
    address: int
    version: int  # of the codebook
    others: tuple[Any, ...]
    found: dict[str, Any] | str  # the arguments but for the codes, which would not end then

    def is_of(self, weight: Packed) -> bool:
        """Whether it is that of a weight, as it is now: another has other tensors, or its codes elsewhere."""
        packed, *others = weight
        return (
            self.packed() is packed
            and self.address == packed.data_ptr()
            and self.version == version(weight.values)
            and all(map(operator.is_, self.others[:4], others))
            and self.others[4:] == (tuple(weight.shape), weight.block_size)
        )


_plans: dict[int, _Plan] = {}  # by the identity of the packed codes


def _plan(weight: Packed) -> dict[str, Any] | str:
    """The arguments, or why there are none: found out once for a weight."""
    key = id(weight.packed)
    known = _plans.get(key)
    if known is None or not known.is_of(weight):
        packed, *others = weight
        found = _reason(weight) or _arguments(weight)
        gone = weakref.ref(packed, lambda _: _plans.pop(key, None))
        others = (*others[:4], tuple(weight.shape), weight.block_size)
        known = _plans[key] = _Plan(gone, packed.data_ptr(), version(weight.values), others, found)
    return known.found


def _reason(weight: Packed) -> str | None:
    if len(weight.shape) != 2:
        return f"a weight has 2 dimensions, not {len(weight.shape)}"
    N, K = weight.shape
    if N < TILE:
        return f"N must be at least {TILE}, not {N}"
    if K % TILE or not K:
        return f"K must be a multiple of {TILE}, not {K}"
    if weight.block_size % TILE:
        return f"the block size must be a multiple of {TILE}, not {weight.block_size}"
    if weight.packed.data_ptr() % 16:
        return "the packed codes do not begin at a multiple of 16 bytes"
    if weight.values.shape != (16,):
        return f"the look-up takes 16 values, not {weight.values.numel()}"
    return None


def _arguments(weight: Packed) -> dict[str, Any]:
    packed, scales, absmax2, offset, values, (_, K), block_size = weight
    look_up, double = table(values), absmax2 is not None
    return {
        "scales": scales,
        "absmax2": absmax2,
        "offset": offset,
        "scale_map": map_on(packed.device) if double else None,
        "tiles": K // TILE,
        "shift": (block_size // TILE).bit_length() - 1,
        "inverse": 1 / look_up.factor,
        **dict(zip(TABLE_ARGUMENTS, look_up.words, strict=True)),
        "DOUBLE": double,
    }


def mma_sync(device: torch.device) -> bool:
    """Whether a GPU's tensor cores multiply for a warp (sm_80, sm_120), not for four (sm_90, sm_100).

    Then Triton has a lane of a warp hold four columns in a row, 4 c to 4 c + 3, of a piece: the order of k or n within
    16 is another one.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] not in (9, 10)


def token_tile(M: int, sync: bool) -> int:
    """How many tokens a program takes: the smallest tile that holds them all, at most 128, or 64 with ``mma_sync``."""
    tiles = (16, 32, 64) if sync else (16, 32, 64, 128)
    return next((tokens for tokens in tiles if tokens >= M), tiles[-1])


def weight_of_a_case(double: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """Triton's types of a weight's pointers, and its constants, for a ``Case``."""
    types, second = {"packed": "*u8", "scales": "*u8" if double else "*fp32"}, ("absmax2", "offset", "scale_map")
    more = dict.fromkeys(second, "*fp32") if double else {}
    return types | more, {"DOUBLE": double, **dict.fromkeys(set(second) - more.keys())}


def check(name: str, tensor: Tensor, columns: int, weight: Packed) -> None:
    """Raises ValueError unless a tensor is bfloat16 [..., columns] on the weight's device."""
    if tensor.dtype != torch.bfloat16:
        raise ValueError(f"{name} must be bfloat16, not {tensor.dtype}")
    if tensor.dim() == 0 or tensor.shape[-1] != columns:
        raise ValueError(f"the last dimension of {name} must be {columns}; its shape is {tuple(tensor.shape)}")
    if tensor.device != weight.packed.device:
        raise ValueError(f"{name} is on {tensor.device}, the weight on {weight.packed.device}")


@triton.jit
def scale_of(scales, absmax2, offset, scale_map, inverse, block, DOUBLE: tl.constexpr):
    """The scales of blocks, divided by the factor: float32. offset is a number, divided by it already."""
    scale = tl.load(scales + block)
    if DOUBLE:
        level = tl.load(absmax2 + block // SCALES_PER_BLOCK) * inverse
        return tl.fma(tl.load(scale_map + scale.to(tl.int32)), level, offset)
    return scale * inverse


@triton.jit
def pair(low, high):
    """float32 [...], twice -> int32 [...]: both rounded to bfloat16."""
    low = round_to(low, tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
    high = round_to(high, tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
    return (low & 0xFFFF) | (high << 16)


_LANE = "shfl.sync.idx.b32 ${to}, ${of}, {lane}, {within}, 0xffffffff;"
_FROM_4 = tl.constexpr("\n".join(_LANE.format(to=i, of=4, lane=i, within="0x1c1f") for i in range(4)))
_FROM_8 = tl.constexpr("\n".join(_LANE.format(to=i, of=8, lane=4 * i, within="0x031f") for i in range(8)))
_4_TO_1 = tl.constexpr(",".join(["=&r"] * 4 + ["r"]))
_8_TO_1 = tl.constexpr(",".join(["=&r"] * 8 + ["r"]))


@triton.jit
def of_four_lanes(x, WARPS: tl.constexpr):
    """int32 [warp, g, c], one to each thread -> [c:4, WARPS, g:8, 4]: each lane has those of the four of its g."""
    if INTERPRETED:
        x = tl.permute(tl.reshape(x, (WARPS, 8, 4, 1)), (2, 0, 1, 3))
        return tl.broadcast_to(x, (4, WARPS, 8, 4))
    o = tl.inline_asm_elementwise(_FROM_4, _4_TO_1, [x], (tl.int32,) * 4, True, 1)  # pyright: ignore[reportArgumentType]
    x0, x1, x2, x3 = o
    x = tl.permute(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (1, 2, 0))
    return tl.reshape(x, (4, WARPS, 8, 4))


@triton.jit
def of_eight_lanes(x, WARPS: tl.constexpr):
    """int32 [warp, g, c], one to each thread -> [g:8, WARPS, 8, c:4]: each lane has those of the eight of its c."""
    if INTERPRETED:
        x = tl.permute(tl.reshape(x, (WARPS, 8, 1, 4)), (1, 0, 2, 3))
        return tl.broadcast_to(x, (8, WARPS, 8, 4))
    o = tl.inline_asm_elementwise(_FROM_8, _8_TO_1, [x], (tl.int32,) * 8, True, 1)  # pyright: ignore[reportArgumentType]
    x0, x1, x2, x3, x4, x5, x6, x7 = o
    x = tl.permute(joined(x0, x1, x2, x3, x4, x5, x6, x7), (1, 2, 3, 0))
    return tl.reshape(x, (8, WARPS, 8, 4))
