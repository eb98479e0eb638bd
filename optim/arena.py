"""The memory in which the state of an optimizer is: what the optimizer asks of it, and the three kinds of it.

======================  =================================  =============================================================
arena                   where a chunk is when away         how it is updated then
======================  =================================  =============================================================
``Memory``              it never is                        nothing pages: no budget, or all of the state is within it
``mapped_file.py``      in a file on a disk                it streams through a few slots in memory (``pager.py``)
``unified_memory.py``   in the host's memory               where it is: the kernel reads and writes it over the link
======================  =================================  =============================================================

A processor must wait for a disk, so there the pager moves chunks ahead of their update, and behind it. A GPU hides the
link by itself: thousands of threads wait for their loads, and stores wait for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Ranges = Sequence[tuple[int, int]]  # bytes of an arena: [first, end)
Ticket = Any

ALIGNMENT = 1 << 21  # bytes, of ranges: a large folio of the kernel's cache, and what the driver of a GPU moves at once


def between(nbytes: int, ranges: Ranges) -> list[tuple[int, int]]:
    """The ranges that others, in any order, leave of [0, nbytes)."""
    borders = [0, *(border for pair in sorted(ranges) for border in pair), nbytes]
    return [(first, end) for first, end in zip(borders[::2], borders[1::2], strict=True) if first < end]


class Arena(Protocol):
    """A run of memory, parts of which can be elsewhere.

    Attributes:
        bytes: uint8 [nbytes], zero at first. Valid at any time: what is away comes back where it is touched, slowly.
        where: what the memory is, in words, for a report.
        failure: the error of an eviction; those bytes stayed in memory, and may have been lost since.
    """

    bytes: Tensor
    where: str
    failure: Exception | None

    def recall(self) -> None:
        """Start to bring back what was to stay, if the system took it away."""
        ...

    def resident_bytes(self) -> int:
        """How many of the bytes are in fast memory now, as the system says."""
        ...


class StreamedArena(Arena, Protocol):
    """One that a pager moves in and out.

    Calls start their work and return at once, with a ticket, such as a future. The pager only hands tickets back.
    """

    def fetch(self, ranges: Ranges, after: Ticket | None) -> Ticket:
        """Start to bring bytes in, once ``after``, an eviction that makes room for them, is over."""
        ...

    def wait(self, ticket: Ticket) -> float:
        """Let what follows on this thread begin when the work of a ticket is over.

        Returns:
            the seconds that this took.

        Raises:
            OSError, RuntimeError: the bytes did not come.
        """
        ...

    def evict(self, ranges: Ranges, after: Ticket | None) -> Ticket:
        """Start to write bytes back and to give up their memory, once ``after``, the fetch of them, is over."""
        ...


class Memory:
    """An ordinary tensor: the arena where nothing pages.

    Args:
        nbytes: its size.
        device: where it is.

    Raises:
        MemoryError: a CPU has not that much. (On a GPU it is ``torch.OutOfMemoryError``.)
    """

    def __init__(self, nbytes: int, device: torch.device):
        self.failure: Exception | None = None
        try:
            self.bytes = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        except RuntimeError as error:
            if device.type != "cpu":
                raise
            raise MemoryError(
                f"the optimizer's state needs {nbytes / 1e9:.2f} GB of memory, which there is not: a budget lets it "
                "page to a disk, 8 bits make it a quarter"
            ) from error
        self.where = f"memory of {device}"

    def recall(self) -> None:
        """Nothing: it is there."""

    def resident_bytes(self) -> int:
        """All of them."""
        return len(self.bytes)
