"""Which chunks stay, which one comes next, and which one goes: the policy of paging.

An optimizer uses its chunks in the same order at every step, so the future is known. Two things follow.

**A part stays.** When everything is used once in turn, keeping what was used last is of no use: each chunk is evicted
just before its turn. A fixed part that never leaves saves all of its traffic. So of the chunks that a budget has room
for, all but a few stay for good; the others *stream* through the few slots that are left.

**The next is fetched early.** With W slots for chunks that stream, one is being updated, those after it are on their
way in, those before it on their way out::

    slot 1      update 5 |  evict 5  |  fetch 9
    slot 2      fetch 6  |  update 6 |  evict 6
    slot 3      fetch 7  |  .......  |  update 7
    slot 4      evict 4  |  fetch 8  |  .......

A fetch begins when the eviction that makes room for it is over, so the budget holds at any time. The order wraps
around: at the end of a step the first chunks of the next one are fetched, while the model runs.

Where the order turns out different (parameters without a gradient, an update in backward), the new one is expected from
then on, and what it leaves out is not, until it is used again. A chunk that was fetched in vain, and is not among the
next ones, is given up for one that is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from .arena import Ranges, StreamedArena, Ticket

FEWEST_SLOTS = 4
MOST_SLOTS = 8  # for chunks that stream; more hide no more


@dataclass(frozen=True, eq=False)
class Chunk:
    """A part of an arena that comes and goes as one.

    Attributes:
        arena: where it is.
        ranges: its bytes.
    """

    arena: StreamedArena
    ranges: Ranges

    @property
    def nbytes(self) -> int:
        return sum(end - first for first, end in self.ranges)


@dataclass
class Counters:
    """What a pager has done; ``paging.py`` says what each number counts."""

    prefetches: int = 0
    misses: int = 0
    stalls: int = 0
    stalled: float = 0.0
    fetched: int = 0
    evicted: int = 0


@dataclass
class _Streaming:
    """The slots: the chunks in them, by the order of arrival, and those that are leaving, the oldest first."""

    here: dict[Chunk, Ticket] = field(default_factory=dict)
    leaving: deque[tuple[Chunk, Ticket]] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self.here) + len(self.leaving)


def divide(count: int, slots: int) -> tuple[int, int]:
    """How many of ``count`` chunks stay, and in how many slots the others stream.

    Raises:
        ValueError: there are too few slots for the chunks, and too few to stream in.
    """
    if count <= slots:
        return count, 0
    if slots < FEWEST_SLOTS:
        raise ValueError(f"paging needs room for {FEWEST_SLOTS} chunks; there is room for {max(slots, 0)}")
    width = min(slots, MOST_SLOTS)
    return slots - width, width


class Pager:
    """Streams chunks through a few slots.

    A chunk may be touched between ``acquire`` and ``release``, one at a time.

    Args:
        slots: how many chunks may be resident at once, `FEWEST_SLOTS` at least.
        counters: to count in what is done.
    """

    def __init__(self, slots: int, counters: Counters):
        self.counters = counters
        self._width = slots
        self._expected: list[Chunk] = []
        self._index: dict[Chunk, int] = {}  # in _expected
        self._used: list[Chunk] = []  # since the sweep began
        self._using: Chunk | None = None  # acquired, and not released yet
        self._position = 0  # in _expected: the first that is not behind
        self._streaming = _Streaming()

    def add(self, chunks: Sequence[Chunk]) -> None:
        """Stream these too. They are expected behind those that were there, in this order."""
        self._expect(self._expected + list(chunks))
        self._fetch_ahead()

    def acquire(self, chunk: Chunk) -> None:
        """Let the chunk be there for what follows.

        Raises:
            OSError, RuntimeError: it cannot be read.
        """
        self._used.append(chunk)
        self._seek(chunk)
        prefetched = chunk in self._streaming.here
        if prefetched:
            self.counters.prefetches += 1
        else:
            self.counters.misses += 1
            self._fetch(chunk)
        try:
            waited = self._wait(chunk)
        except Exception:
            if not prefetched:
                raise
            self._fetch(chunk)  # what failed a while ago may do now
            waited = self._wait(chunk)
        if waited > 0:
            self.counters.stalls += 1
            self.counters.stalled += waited
        self._using = chunk
        self._fetch_ahead()

    def release(self, chunk: Chunk) -> None:
        """The chunk has been changed and is not needed before its next turn."""
        self._using = None
        self._leave(chunk)
        self._fetch_ahead()

    def end_of_sweep(self) -> None:
        """Expect the next step to use the chunks of this one, in its order."""
        used, self._used = self._used, []
        if used and used != self._expected:
            self._expect(list(dict.fromkeys(used)))
        self._position = 0
        self._fetch_ahead()

    def settle(self) -> None:
        """Wait until nothing is on its way.

        Raises:
            OSError, RuntimeError: something could not be read or written back.
        """
        for chunk, ticket in [*self._streaming.here.items(), *self._streaming.leaving]:
            chunk.arena.wait(ticket)

    def _expect(self, chunks: list[Chunk]) -> None:
        self._expected = chunks
        self._index = {chunk: index for index, chunk in enumerate(chunks)}

    def _seek(self, chunk: Chunk) -> None:
        """Stand behind a chunk in the expected order, where it is expected."""
        if chunk in self._index:
            self._position = (self._index[chunk] + 1) % len(self._expected)

    def _fetch_ahead(self) -> None:
        """Fetch what is expected next, as far as there is room without giving up what is expected as soon."""
        count = len(self._expected)
        soon = [self._expected[(self._position + ahead) % count] for ahead in range(min(self._width - 1, count))]
        for chunk in soon:
            if chunk in self._streaming.here:
                continue
            if len(self._streaming) >= self._width and not self._streaming.leaving:
                vain = [other for other in self._streaming.here if other is not self._using and other not in soon]
                if not vain:
                    return
                self._leave(max(vain, key=self._distance))
            if any(chunk is other for other, _ in self._streaming.leaving):
                return  # it comes back when it has left
            self._fetch(chunk)

    def _fetch(self, chunk: Chunk) -> None:
        streaming, after = self._streaming, None
        back = next((pair for pair in streaming.leaving if pair[0] is chunk), None)
        if back is not None:
            streaming.leaving.remove(back)
            after = back[1]
        elif len(streaming) >= self._width:
            if not streaming.leaving:
                self._leave(max((other for other in streaming.here if other is not self._using), key=self._distance))
            after = streaming.leaving.popleft()[1]
        streaming.here[chunk] = chunk.arena.fetch(chunk.ranges, after)
        self.counters.fetched += chunk.nbytes

    def _wait(self, chunk: Chunk) -> float:
        """The seconds until a chunk was there. One that does not come is not here: its next turn fetches it again."""
        try:
            return chunk.arena.wait(self._streaming.here[chunk])
        except Exception:
            self._leave(chunk)
            raise

    def _distance(self, chunk: Chunk) -> int:
        """How many others are expected before a chunk."""
        count = len(self._expected)
        return (self._index[chunk] - self._position) % count if chunk in self._index else count

    def _leave(self, chunk: Chunk) -> None:
        arrival = self._streaming.here.pop(chunk)
        self._streaming.leaving.append((chunk, chunk.arena.evict(chunk.ranges, arrival)))
        self.counters.evicted += chunk.nbytes
