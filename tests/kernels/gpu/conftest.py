"""GPU kernels without a GPU: triton's interpreter runs them on CPU tensors, in memory that tells who wrote past it.

``TRITON_INTERPRET`` is read by every ``@triton.jit`` when it is executed, those inside triton included (``tl.sum``),
so it is set before triton is imported. Where there is a GPU, the same tests compile the kernels and run on it.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRET = not torch.cuda.is_available()
if INTERPRET:
    os.environ["TRITON_INTERPRET"] = "1"

MARGIN = 4096  # bytes
Guarded = Callable[..., Tensor]
Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Sequence[int], int]


def few(*shape: int) -> Tensor:
    """A few whole numbers, bfloat16: their sums are exact in any order."""
    return torch.randint(-2, 3, shape).bfloat16()


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


class Watched:
    """triton's interpreter, which may not read around some tensors."""

    def __init__(self, interpreter: Any, forbidden: list[tuple[int, int]]):
        self._interpreter = interpreter
        self._forbidden = forbidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._interpreter, name)

    def load(self, addresses: Any, mask: Any, *others: Any) -> Any:
        read = addresses[mask.astype(bool)]
        for start, end in self._forbidden:
            assert not ((read >= start) & (read < end)).any(), "something is read beside a tensor"
        return self._interpreter.load(addresses, mask, *others)


@pytest.fixture
def guarded_twice(guarded: Guarded, monkeypatch: pytest.MonkeyPatch, device: str) -> Guarded:
    """``guarded``, which sees what is written beside a tensor; in the interpreter also what is read there.

    What the launchers allocate lies in such memory too, and is NaN until it is written.
    """
    forbidden: list[tuple[int, int]] = []
    original = Tensor.new_empty

    def allocate(*what: Any, **options: Any) -> Tensor:
        tensor = guarded(*what, **options)
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        forbidden.extend([(start - MARGIN, start), (end, end + MARGIN)])
        return tensor

    def new_empty(self: Tensor, size: Any, **options: Any) -> Tensor:
        if "device" in options:  # triton's interpreter
            return original(self, size, **options)
        return allocate(*size, dtype=options.get("dtype", self.dtype))

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    if device == "cpu":
        from triton.runtime import interpreter

        monkeypatch.setattr(interpreter, "_interpreter", Watched(interpreter._interpreter, forbidden))
    return allocate


@pytest.fixture
def break_check(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """``break_check(name, message)`` lets the check of a kernel raise."""
    from qloralab.kernels.gpu import self_check

    right, messages = self_check._check, dict[str, str]()

    def check(name: str) -> Any:
        def broken(*_: Any) -> None:
            raise RuntimeError(messages[name])

        return broken if name in messages else right(name)

    monkeypatch.setattr(self_check, "_check", check)
    return messages.__setitem__
