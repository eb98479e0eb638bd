"""A packed weight as the operators take it: the names, dtypes, shapes and checks of its seven operands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights, and of what they are multiplied by
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SCALES_PER_BLOCK = 256  # scales that share one of the second level
# The operands in the schema of an operator, in the order of ``Packed``.
SCHEMA = (
    "Tensor packed, Tensor scales, Tensor? absmax2, Tensor? offset, Tensor values, SymInt[] shape, SymInt block_size"
)


class Packed(NamedTuple):
    """The operands of a packed weight. All tensors are on one device.

    Attributes:
        packed: uint8 [(numel + 1) // 2, 1]; two codes a byte in row-major order, the first in the high nibble. Codes of
            other than 4 bits take a byte each: [numel, 1].
        scales: the scale of each block: float32 [blocks], or uint8 [blocks] when the scales are quantized too.
        absmax2: float32 [ceil(blocks / 256)], the second-level scales, or None.
        offset: float32 [], the mean that was subtracted from the scales, or None.
        values: float32 [2**bits], the codebook in the order of the codes; a user's own may have fewer. Float32 [rows,
            2**bits] where each row of the weight has its own.
        shape: of the weight, [N, K] where it is multiplied.
        block_size: consecutive weights that share a scale.
    """

    packed: Tensor
    scales: Tensor
    absmax2: Tensor | None
    offset: Tensor | None
    values: Tensor
    shape: Sequence[int]
    block_size: int

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The operands that are tensors, which come first."""
        return self[:5]

    @property
    def layout(self) -> tuple[Sequence[int], int]:
        """The others: shape and block size."""
        return self[5:]

    def is_regular(self, dtype: torch.dtype) -> bool:
        """Whether it is what ``quantize`` makes with 16 values, and becomes one of ``DTYPES``. Kernels check nothing.

        (This runs for every layer and token, hence ``numel`` and no loops.)
        """
        packed, scales, absmax2, offset, values, shape, block_size = self
        if dtype not in DTYPES or block_size not in BLOCK_SIZES or not has_16_values(values):
            return False
        numel = math.prod(shape)
        blocks = -(-numel // block_size)
        if (
            numel == 0
            or packed.dtype != torch.uint8
            or packed.numel() != (numel + 1) // 2
            or scales.dtype != (torch.float32 if absmax2 is None else torch.uint8)
            or scales.numel() != blocks
            or not (packed.is_contiguous() and scales.is_contiguous())
        ):
            return False
        return absmax2 is None or (
            offset is not None
            and absmax2.dtype == offset.dtype == torch.float32
            and offset.numel() == 1
            and absmax2.numel() == -(-blocks // SCALES_PER_BLOCK)
            and absmax2.is_contiguous()
        )

    def meets(self, x: Tensor, axis: int) -> bool:
        """Whether the weight is a regular matrix on the device of x [..., size], of that size along an axis."""
        return (
            len(self.shape) == 2
            and x.shape[-1:] == (self.shape[axis],)
            and x.device == self.packed.device
            and self.is_regular(x.dtype)
        )


def has_16_values(values: Tensor) -> bool:
    """Whether a codebook is one that kernels take: float32 [16], contiguous."""
    return values.dtype == torch.float32 and values.shape == (16,) and values.is_contiguous()
