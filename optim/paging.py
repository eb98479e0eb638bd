"""What an optimizer's state takes, and what paging it has cost so far: the answer of ``PagedAdamW.paging()``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paging:
    """What an optimizer's state takes, and what its pager has done since the start.

    Attributes:
        where: the kinds of memory that the state is in.
        state_bytes: all of it that may page.
        budget: the most that may be resident, bytes; None: no limit.
        resident_bytes: what is in fast memory now, as the system says (``mincore``).
        rss_bytes: what of a mapped file counts in this process's resident set; None where there is none.
        prefetches: chunks that were on their way before they were asked for.
        misses: chunks that were not.
        stalls: chunks that had not arrived when they were needed.
        stalled: seconds spent waiting for them.
        fetched, evicted: bytes that came and went; on a GPU, that its kernels read and wrote in the host's memory.
    """

    where: str
    state_bytes: int
    budget: int | None
    resident_bytes: int
    rss_bytes: int | None
    prefetches: int
    misses: int
    stalls: int
    stalled: float
    fetched: int
    evicted: int

    @property
    def evicted_bytes(self) -> int:
        """What is not resident now."""
        return self.state_bytes - self.resident_bytes

    def __str__(self) -> str:
        line = f"optimizer state {self.state_bytes / 1e6:.0f} MB, {self.resident_bytes / 1e6:.0f} resident"
        if not self.fetched:
            return line
        if not self.prefetches + self.misses:
            return f"{line}; {self.fetched / 1e9:.1f} GB in and {self.evicted / 1e9:.1f} GB out, over the link"
        return f"{line}; {self.prefetches} prefetches, {self.stalls} stalls, {self.stalled:.1f} s"
