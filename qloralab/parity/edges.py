"""Inputs on which bitsandbytes and this library are known to part, and what each of them makes of it on a CPU.

Each edge is observed anew: what is found on either side has to be the text that stands here. Where bitsandbytes comes
to do what we do, the row says "now equal". The texts about bitsandbytes are those of versions 0.49 and 0.50 on CPUs.
As read in their source, its CUDA kernels do other things again: a block of zeros becomes -0.0, a NaN the negative
scale.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qloralab.nf4.blockwise import unpack
from qloralab.nf4.tensor import QuantizedTensor, quantize

from . import peer
from .rows import EDGES, NOW_EQUAL, Rows


@dataclasses.dataclass(frozen=True)
class Edge:
    """One input.

    Attributes:
        name: what is special about it.
        ours, theirs: what comes of it here, and in bitsandbytes.
        why: ours is as it is.
        observe: does it; the two texts as they are found.
    """

    name: str
    ours: str
    theirs: str
    why: str
    observe: Callable[[], tuple[str, str]]


def compare_edges(rows: Rows) -> None:
    """Observe every edge."""
    for edge in ALL:
        ours, theirs = edge.observe()
        row = rows.row(EDGES, edge.name)
        same = ours == theirs
        is_documented = ours == edge.ours and (same or theirs == edge.theirs)
        if same and is_documented and edge.ours != edge.theirs:
            row.note = NOW_EQUAL
        row.add(
            edge.name,
            compared=1,
            differing=int(not same or not is_documented),
            allowed={"edge": int(not same and is_documented)},
            first=f"{ours}; bitsandbytes: {theirs}",
            found=(ours, theirs),
            documented={"ours": edge.ours, "bitsandbytes": edge.theirs, "why": edge.why},
        )


def _both(weight: Tensor, show: Callable[[QuantizedTensor, Tensor], str], double_quant: bool = False):
    """What ``show`` says of our codes and weight, and of theirs: it takes a packed tensor and the weight it becomes."""
    try:
        q = quantize(weight, "nf4", 64, double_quant)
        ours = show(q, q.dequantize())
    except ValueError as error:
        ours = f"ValueError: {re.split(';|, whose', str(error))[0]}"
    packed, state = peer.quantize(weight, "nf4", 64, double_quant)
    theirs = show(_unchecked(packed, state), peer.dequantize(packed, state))
    return ours, theirs


def _unchecked(packed: Tensor, state: Any) -> QuantizedTensor:
    """Codes and scales as they are; ``from_bitsandbytes`` refuses some of those met here."""
    nested = state.state2 is not None
    return QuantizedTensor(
        packed, state.absmax, state.state2.absmax if nested else None, state.offset if nested else None, state.code,
        state.shape, state.dtype, state.quant_type, state.blocksize,
    )  # fmt: skip


def _codes(q: QuantizedTensor) -> Tensor:
    return unpack(q.packed, q.shape.numel())


def _zero_block() -> tuple[str, str]:
    def show(q: QuantizedTensor, back: Tensor) -> str:
        codes = sorted(set(_codes(q).tolist()))
        return f"scale {float(q.absmax()[0]):g}, code {', '.join(map(str, codes))}, reads {_zero(back)}"

    return _both(torch.zeros(1, 64), show)


def _zero_tail() -> tuple[str, str]:
    weight = torch.cat([torch.ones(64), torch.zeros(32)])
    return _both(weight, lambda q, back: f"scale {float(q.absmax()[-1]):g}")


def _with_one(value: float) -> Tensor:
    weight = torch.linspace(-1, 1, 128).view(2, 64)
    weight[1, 3] = value
    return weight


def _not_a_number() -> tuple[str, str]:
    return _both(
        _with_one(torch.nan), lambda q, back: f"{int(back[1].isnan().sum())} of the block's 64 weights are NaN"
    )


def _infinity() -> tuple[str, str]:
    def show(q: QuantizedTensor, back: Tensor) -> str:
        return f"reads {float(back[1, 3]):+g}, {int(back[1].isnan().sum())} others NaN"

    return _both(_with_one(-torch.inf), show)


def _subnormal_scale() -> tuple[str, str]:
    weight = torch.full((1, 64), 1e-40)
    weight[0, 0] = 1e-39
    return _both(weight, lambda q, back: f"the largest weight has code {int(_codes(q)[0])}")


def _one_dimension() -> tuple[str, str]:
    return _both(torch.linspace(-1, 1, 128), lambda q, back: f"shape {list(back.shape)}")


def _negative_scale() -> tuple[str, str]:
    weight = torch.zeros(3, 64)
    weight[2] = 10
    return _both(weight, lambda q, back: f"a block of zeros reads {_zero(back[0])}", double_quant=True)


def _infinite_scale() -> tuple[str, str]:
    weight = torch.zeros(3, 64, dtype=torch.float16)
    weight[1:] = 65504  # the largest float16; decoded, their scale is 65571
    return _both(weight, lambda q, back: f"{int(back.isinf().sum())} weights read inf", double_quant=True)


def _infinite_mean() -> tuple[str, str]:
    return _both(torch.full((4, 64), 3e38), lambda q, back: f"reads {float(back[0, 0]):g}", double_quant=True)


def _zero(x: Tensor) -> str:
    """+0.0, -0.0 or what else there is."""
    if not (x == 0).all():
        return f"{float(x.abs().max()):g}"
    return "-0.0" if x.signbit().any() else "+0.0"


ALL = (
    Edge(
        "block of zeros",
        "scale 0, code 7, reads +0.0",
        "scale 0, code 7, reads +0.0",
        "a zero stays the zero it was",
        _zero_block,
    ),
    Edge(
        "short last block of zeros",
        "scale 0",
        "scale 1e-38",
        "one rule for every block",
        _zero_tail,
    ),
    Edge(
        "NaN",
        "ValueError: weight[1, 3] is nan",
        "64 of the block's 64 weights are NaN",
        "a broken weight is told at once, with its place",
        _not_a_number,
    ),
    Edge(
        "-infinity",
        "ValueError: weight[1, 3] is -inf",
        "reads +inf, 63 others NaN",
        "a broken weight is told at once, with its place",
        _infinity,
    ),
    Edge(
        "scale of 1e-39",
        "the largest weight has code 15",
        "the largest weight has code 8",
        "where the scale is subnormal the true quotient is taken",
        _subnormal_scale,
    ),
    Edge(
        "one dimension",
        "shape [128]",
        "shape [1, 128]",
        "a weight keeps its shape",
        _one_dimension,
    ),
    Edge(
        "decoded scale below 0",
        "a block of zeros reads +0.0",
        "a block of zeros reads -0.0",
        "a zero stays the zero it was",
        _negative_scale,
    ),
    Edge(
        "decoded scale above the dtype",
        "ValueError: weight: a scale, quantized and decoded, would be infinite in torch.float16",
        "128 weights read inf",
        "a weight that would become infinite is told at once",
        _infinite_scale,
    ),
    Edge(
        "sum of scales above float32",
        "reads 3e+38",
        "reads nan",
        "the mean of the scales is taken in float64",
        _infinite_mean,
    ),
)
