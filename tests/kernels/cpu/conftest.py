"""The compiled library for each instruction set, weights that make sums exact, and memory that tells who wrote past it.

**Exact sums.** The rounding of a float32 sum depends on its order, so a test of a product usually allows for an error,
and a small mistake hides in it. Here the codebook, the scales, x and the adapter are small whole numbers: every partial
sum is a whole number below 2**24, exact in float32 in any order, on any path. What is left is the one rounding at the
end, and results are compared bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from qloralab.kernels.cpu.library import Library
from qloralab.nf4.codebook import dynamic_map
from qloralab.nf4.processor import supported_isas

Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Sequence[int], int]
Allocate = Callable[..., Tensor]

WHOLE = torch.tensor([-8.0, -7, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8])  # no two codes mean the same
ZERO, ONE = 127, 255  # where the dynamic map has 0 and 1
MARGIN = 4096  # bytes


@pytest.fixture(scope="session", params=supported_isas())
def library(request: pytest.FixtureRequest) -> Library:
    """The library for each instruction set of this machine, from the user's cache."""
    return Library(request.param)


@pytest.fixture
def whole_weight() -> Callable[..., Operands]:
    """Makes a weight of whole numbers from -16 to 16: (shape, block_size=64, double_quant=True) -> its operands.

    Its scales are 1, 2 or -1, by block.
    """

    def make(shape: Sequence[int], block_size: int = 64, double_quant: bool = True) -> Operands:
        numel = math.prod(shape)
        blocks = -(-numel // block_size)
        packed = torch.randint(256, ((numel + 1) // 2, 1), dtype=torch.uint8)
        if not double_quant:
            scales = torch.tensor([1.0, 2.0, -1.0])[torch.randint(3, (blocks,))]
            return packed, scales, None, None, WHOLE, torch.Size(shape), block_size
        assert dynamic_map()[[ZERO, ONE]].tolist() == [0, 1]
        codes = torch.tensor([ZERO, ONE], dtype=torch.uint8)[torch.randint(2, (blocks,))]
        absmax2 = torch.tensor([1.0, -2.0])[torch.randint(2, (-(-blocks // 256),))]
        return packed, codes, absmax2, torch.tensor(1.0), WHOLE, torch.Size(shape), block_size

    return make


@pytest.fixture
def empty(monkeypatch) -> Iterator[Allocate]:
    """Allocates like ``torch.empty(*shape, dtype=…)``, in the middle of more memory.

    After the test the memory on both sides is as it was. The library's workspace is allocated so too.
    """
    margins: list[Tensor] = []

    def allocate(*shape: int, dtype: torch.dtype = torch.float32, align: bool = False) -> Tensor:
        # No more than the alignment of an element, unless asked for: nobody promises more.
        before = MARGIN if align else MARGIN + dtype.itemsize
        size = math.prod(shape) * dtype.itemsize
        memory = torch.full((before + size + MARGIN,), 0xA5, dtype=torch.uint8)
        margins.extend([memory[:before], memory[before + size :]])
        return memory[before : before + size].fill_(0xFF).view(dtype).view(shape)  # NaN, until it is written

    make = Library._workspace

    def workspace(self: Library, *problem: Any) -> Tensor:
        return allocate(len(make(self, *problem)), dtype=torch.uint8, align=True)

    monkeypatch.setattr(Library, "_workspace", workspace)
    yield allocate
    assert all((margin == 0xA5).all() for margin in margins), "something wrote past its memory"
