"""Memory that can leave: what the pager asks of an arena, and the arenas there are.

======================  ===========================  ===================================================================
arena                   where a chunk is when away   how it comes and goes
======================  ===========================  ===================================================================
``Memory``              it never is                  nothing pages: no budget, or all of the state is within it
``mapped_file.py``      in a file on a disk          ``madvise``, ``sync_file_range``, ``posix_fadvise``, on two threads
``unified_memory.py``   in the host's memory         ``cudaMemPrefetchAsync``, on two streams
======================  ===========================  ===================================================================

The last two start their work and return at once, with a ticket: a future of a thread, or an event of a stream. The
pager only hands tickets back, so one policy drives both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Ranges = Sequence[tuple[int, int]]  # bytes of an arena: [first, end)
Ticket = Any

ALIGNMENT = 1 << 21  # bytes, of ranges: what the driver of a GPU moves at a time, and many pages of a disk


class Arena(Protocol):
    """A run of memory, parts of which can be elsewhere.

    Attributes:
        bytes: uint8 [nbytes], zero at first. Valid at any time: what is away comes back where it is touched, slowly.
        where: the place, in words, for a report.
        failure: the error of an eviction; those bytes stayed in memory, and may have been lost since.
    """

    bytes: Tensor
    where: str
    failure: Exception | None

    def fetch(self, ranges: Ranges, after: Ticket | None) -> Ticket:
        """Start to bring bytes in, once ``after``, an eviction that makes room for them, is over."""
        ...

    def wait(self, ticket: Ticket) -> float:
        """Let what follows, on this thread or the current stream, begin when the work of a ticket is over.

        Returns:
            the seconds that this took, as far as they are known now.

        Raises:
            OSError, RuntimeError: the bytes did not come.
        """
        ...

    def evict(self, ranges: Ranges) -> Ticket:
        """Start to write bytes back and to give up their memory, once the work on them so far is over."""
        ...

    def recall(self) -> None:
        """Start to bring back what was to stay, if the system took it away."""
        ...

    def resident_bytes(self) -> int:
        """How many of the bytes are in fast memory now, as the system says."""
        ...


class Memory:
    """An ordinary tensor: the arena where nothing pages.

    Args:
        nbytes: its size.
        device: where it is.
    """

    def __init__(self, nbytes: int, device: torch.device):
        self.failure: Exception | None = None
        self.bytes = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self.where = f"memory of {device}"

    def fetch(self, ranges: Ranges, after: Ticket | None) -> Ticket:
        """Nothing: it is there."""

    def wait(self, ticket: Ticket) -> float:
        """0."""
        return 0.0

    def evict(self, ranges: Ranges) -> Ticket:
        """Nothing: it stays."""

    def recall(self) -> None:
        """Nothing: it is there."""

    def resident_bytes(self) -> int:
        """All of them."""
        return len(self.bytes)
