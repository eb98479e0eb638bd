"""GPU kernels without a GPU: triton's interpreter runs them on CPU tensors, in memory that tells who wrote past it.

``TRITON_INTERPRET`` is read by every ``@triton.jit`` when it is executed, those inside triton included (``tl.sum``),
so it is set before triton is imported. Where there is a GPU, the same tests compile the kernels and run on it.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRET = not torch.cuda.is_available()
if INTERPRET:
    os.environ["TRITON_INTERPRET"] = "1"

MARGIN = 4096  # bytes
Guarded = Callable[..., Tensor]


@pytest.fixture(autouse=True, scope="session")
def _interprets() -> None:
    """Says why each of these tests would fail when triton was imported too early to interpret."""
    triton = sys.modules.get("triton")
    if INTERPRET and triton is not None and type(triton.language.sum).__name__ == "JITFunction":
        pytest.fail("triton was imported before TRITON_INTERPRET was set: run tests/kernels/gpu on their own", False)


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels run: "cpu" in the interpreter, "cuda" on a GPU."""
    return "cpu" if INTERPRET else "cuda"


@pytest.fixture
def guarded(device: str) -> Iterator[Guarded]:
    """Memory for a test, in the middle of poisoned memory.

    ``guarded(*shape, dtype=torch.float32, offset=0)`` is like ``torch.empty``; ``guarded(tensor, offset=0)`` copies a
    tensor into such memory. What lies before and after is 0xA5, and the memory itself all ones, NaN in every
    floating-point type, until it is written. `offset` moves the start by bytes from a multiple of 256, to where nothing
    is aligned. After the test the memory around each tensor is as it was.
    """
    margins: list[Tensor] = []

    def allocate(*what: Any, dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
        source = what[0] if what and isinstance(what[0], Tensor) else None
        shape, dtype = (what, dtype) if source is None else (source.shape, source.dtype)
        size = math.prod(shape) * dtype.itemsize
        memory = torch.full((256 + 2 * MARGIN + offset + size,), 0xA5, dtype=torch.uint8, device=device)
        start = MARGIN + -(memory.data_ptr() + MARGIN) % 256 + offset
        margins.extend([memory[:start], memory[start + size :]])
        tensor = memory[start : start + size].fill_(0xFF).view(dtype).view(shape)
        return tensor if source is None else tensor.copy_(source)

    yield allocate
    written = [index for index, margin in enumerate(margins) if not (margin == 0xA5).all()]
    assert not written, f"something wrote {['before', 'after'][written[0] % 2]} tensor {written[0] // 2} of this test"
