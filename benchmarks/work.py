"""The least that an operation has to do: bytes that it reads and writes, floating-point operations.

A multiplication and an addition count as two. Dequantization's arithmetic is not counted, nor dropout's. An adapted
layer goes both ways: each reads the weight and the adapter once; its matrices are float32, as their gradients are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

BLOCK_SIZE = 64
SCALES = 256  # of the first level, to one of the second
RANK = 16  # of the adapter


class Work(NamedTuple):
    """Bytes read, bytes written, floating-point operations."""

    read: int
    written: int
    flops: int

    @property
    def nbytes(self) -> int:
        """Bytes moved."""
        return self.read + self.written


def packed_bytes(numel: int) -> int:
    """A packed weight of so many elements: codes, 8-bit scales, float32 scales of these, the offset."""
    blocks = math.ceil(numel / BLOCK_SIZE)
    return math.ceil(numel / 2) + blocks + 4 * math.ceil(blocks / SCALES) + 4


def least(
    operation: str, shape: Sequence[int], M: int | None, dense: bool, itemsize: int = 2, rank: int = RANK
) -> Work:
    """What a provider has to do at least.

    Args:
        operation: one of ``case.OPERATIONS``.
        shape: [N, K] of the weight.
        M: rows, where there are any.
        dense: whether the weight is not packed; then it has no adapter either.
        itemsize: bytes of an element of the input, and of a dense weight.
        rank: of the adapter.
    """
    N, K = shape
    full, M = N * K * itemsize, M or 0
    weight = full if dense else packed_bytes(N * K)
    x, y, flops = itemsize * M * K, itemsize * M * N, 2 * M * N * K
    match operation:
        case "dequantize":
            return Work(weight, full, 0)
        case "quantize":
            return Work(full, weight, 0)
        case "linear":
            return Work(weight + x, y, flops)
        case "input gradient":
            return Work(weight + y, x, flops)
    adapter = 0 if dense else rank * (N + K)
    return Work(2 * (weight + 4 * adapter) + x + y, x + y + 4 * adapter, 2 * flops + 3 * 2 * M * adapter)
