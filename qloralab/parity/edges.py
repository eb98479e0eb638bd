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


Show = Callable[[QuantizedTensor, Tensor], str]


def _both(weight: Tensor, show: Show, double_quant: bool = False) -> Callable[[], tuple[str, str]]:
    """What ``show`` says of our codes and weight, and of theirs: it takes a packed tensor and the weight it becomes."""

    def observe() -> tuple[str, str]:
        try:
            q = quantize(weight, "nf4", 64, double_quant)
            ours = show(q, q.dequantize())
        except ValueError as error:
            ours = f"ValueError: {re.split(';|, whose', str(error))[0]}"
        packed, state = peer.quantize(weight, "nf4", 64, double_quant)
        return ours, show(_unchecked(packed, state), peer.dequantize(packed, state))

    return observe


def _unchecked(packed: Tensor, state: Any) -> QuantizedTensor:
    """Codes and scales as they are; ``from_bitsandbytes`` refuses some of those met here."""
    nested = state.state2 is not None
    return QuantizedTensor(
        packed, state.absmax, state.state2.absmax if nested else None, state.offset if nested else None, state.code,
        state.shape, state.dtype, state.quant_type, state.blocksize,
    )  # fmt: skip


def _codes(q: QuantizedTensor) -> list[int]:
    return unpack(q.packed, q.shape.numel()).tolist()


def _zero(x: Tensor) -> str:
    """+0.0, -0.0 or what else there is."""
    if not (x == 0).all():
        return f"{float(x.abs().max()):g}"
    return "-0.0" if x.signbit().any() else "+0.0"


def _with_one(value: float) -> Tensor:
    weight = torch.linspace(-1, 1, 128).view(2, 64)
    weight[1, 3] = value
    return weight


def _blocks(first: float, last: float, of: tuple[int, int] = (1, 1), dtype: torch.dtype = torch.float32) -> Tensor:
    """Blocks of 64 equal weights: some of the first value, some of the last."""
    return torch.tensor([first] * of[0] + [last] * of[1], dtype=dtype)[:, None].repeat(1, 64)


def _show_zeros(q: QuantizedTensor, back: Tensor) -> str:
    return f"scale {float(q.absmax()[0]):g}, code {', '.join(map(str, sorted(set(_codes(q)))))}, reads {_zero(back)}"


def _show_nans(q: QuantizedTensor, back: Tensor) -> str:
    return f"{int(back[1].isnan().sum())} of the block's 64 weights are NaN"


def _show_infinity(q: QuantizedTensor, back: Tensor) -> str:
    return f"reads {float(back[1, 3]):+g}, {int(back[1].isnan().sum())} others NaN"


def _show_infinities(q: QuantizedTensor, back: Tensor) -> str:
    return f"{int(back.isinf().sum())} weights read inf"


ALL = (
    Edge(
        "block of zeros",
        "scale 0, code 7, reads +0.0",
        "scale 0, code 7, reads +0.0",
        "a zero stays the zero it was",
        _both(torch.zeros(1, 64), _show_zeros),
    ),
    Edge(
        "short last block of zeros",
        "scale 0",
        "scale 1e-38",
        "one rule for every block",
        _both(torch.cat([torch.ones(64), torch.zeros(32)]), lambda q, back: f"scale {float(q.absmax()[-1]):g}"),
    ),
    Edge(
        "NaN",
        "ValueError: weight[1, 3] is nan",
        "64 of the block's 64 weights are NaN",
        "a broken weight is told at once, with its place",
        _both(_with_one(torch.nan), _show_nans),
    ),
    Edge(
        "-infinity",
        "ValueError: weight[1, 3] is -inf",
        "reads +inf, 63 others NaN",
        "a broken weight is told at once, with its place",
        _both(_with_one(-torch.inf), _show_infinity),
    ),
    Edge(
        "scale of 1e-39",
        "the largest weight has code 15",
        "the largest weight has code 8",
        "where the scale is subnormal the true quotient is taken",
        _both(torch.tensor([[1e-39] + [1e-40] * 63]), lambda q, back: f"the largest weight has code {_codes(q)[0]}"),
    ),
    Edge(
        "one dimension",
        "shape [128]",
        "shape [1, 128]",
        "a weight keeps its shape",
        _both(torch.linspace(-1, 1, 128), lambda q, back: f"shape {list(back.shape)}"),
    ),
    Edge(
        "decoded scale below 0",
        "a block of zeros reads +0.0",
        "a block of zeros reads -0.0",
        "a zero stays the zero it was",
        _both(_blocks(0, 10, (2, 1)), lambda q, back: f"a block of zeros reads {_zero(back[0])}", double_quant=True),
    ),
    Edge(  # the largest float16; decoded, its scale is 65571
        "decoded scale above the dtype",
        "ValueError: weight: a scale, quantized and decoded, would be infinite in torch.float16",
        "128 weights read inf",
        "a weight that would become infinite is told at once",
        _both(
            _blocks(0, 65504, (1, 2), torch.float16),
            lambda q, back: f"{int(back.isinf().sum())} weights read inf",
            True,
        ),
    ),
    Edge(
        "sum of scales above float32",
        "reads 3e+38",
        "reads nan",
        "the mean of the scales is taken in float64",
        _both(torch.full((4, 64), 3e38), lambda q, back: f"reads {float(back[0, 0]):g}", double_quant=True),
    ),
)
