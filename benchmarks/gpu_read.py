"""A kernel that reads memory and next to nothing else: the rate that a product with few rows can reach.

A copy turns the memory bus from reading to writing and back, which costs it a part of its rate, and a product with few
rows writes next to nothing. Here each program adds up 64 KiB, 16 bytes a thread and load, and writes one sum.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from qloralab.kernels.gpu.case import Case

BLOCK = 16384  # of four bytes, a program
WARPS = 8


@triton.jit
def _read(source, sums, numel, BLOCK: tl.constexpr):
    """sums[i] = the sum of the i-th BLOCK of the source."""
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums + program, tl.sum(tl.load(source + at, mask=at < numel, other=0), axis=0))


def read(source: Tensor) -> Tensor:
    """The sums of the blocks of int32 [numel]: int32 [blocks]."""
    blocks, kernel = math.ceil(source.numel() / BLOCK), cast(Any, _read)
    sums = torch.empty(blocks, dtype=torch.int32, device=source.device)
    kernel[(blocks,)](source, sums, source.numel(), BLOCK, num_warps=WARPS)
    return sums


CASES = [
    Case(
        "read", _read, {"source": "*i32", "sums": "*i32", "numel": "i32"}, {"BLOCK": BLOCK}, weights=BLOCK,
        num_warps=WARPS,
    )
]  # fmt: skip
