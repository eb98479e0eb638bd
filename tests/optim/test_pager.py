"""Which chunk comes and which goes: never more than there are slots, and what is used in a known order is there early.

The arena of these tests moves nothing. It notes what it is asked for, and begins and ends that work as late as the
protocol allows, or at any moment before; work on the same bytes is done in the order it was asked for. Two things are
asserted at each call, whatever the case is about:

* A slot is handed on: a fetch takes one that was never used, or the one of the eviction that it is to wait for, and no
  eviction makes room twice.
* Counted from the beginning of their fetch (when what it waits for is over) to the end of their eviction, there are at
  no time more chunks than slots.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qloralab.optim.arena import Ranges
from qloralab.optim.mapped_file import MappedFile
from qloralab.optim.pager import FEWEST_SLOTS, MOST_SLOTS, Chunk, Counters, Pager, divide

SIZE = 1000  # bytes of a chunk of these tests, unless it says otherwise
LATE = 0.25  # seconds that a wait takes for what is not over


@dataclass(eq=False)
class Work:
    """A ticket.

    Attributes:
        kind: "fetch" or "evict".
        chunk: the first byte, which tells chunks apart.
        needs: what has to be over before.
        over: whether it is.
        begun: whether the chunk counts from here on.
        used: whether a fetch has been given the slot.
    """

    kind: str
    chunk: int
    needs: list[Work] = field(default_factory=list)
    over: bool = False
    begun: bool = False
    used: bool = False


class Recorder:
    """An arena that keeps a log.

    Args:
        slots: how many chunks may be resident.
        dice: ends work at random moments; None: not before it is waited for.

    Attributes:
        log: ("fetch", first byte, the one that makes room or None), ("evict", first byte) and ("wait", first byte).
        resident: the chunks that count.
        most: how many they were at most.
    """

    def __init__(self, slots: int, dice: random.Random | None = None):
        self.failure: Exception | None = None
        self.where, self.bytes = "nowhere", torch.zeros(0, dtype=torch.uint8)
        self.log: list[tuple[Any, ...]] = []
        self.resident: list[int] = []
        self.most = 0
        self._slots, self._free, self._dice = slots, slots, dice
        self._latest: dict[int, Work] = {}
        self._open: list[Work] = []

    def recall(self) -> None:
        raise AssertionError("the pager recalls nothing")

    def resident_bytes(self) -> int:
        raise AssertionError("the pager does not ask")

    def fetch(self, ranges: Ranges, after: Any) -> Work:
        first, before = ranges[0][0], self._latest.get(ranges[0][0])
        self.log.append(("fetch", first, None if after is None else after.chunk))
        assert before is None or before.kind == "evict", "it is here, or on its way"
        if after is None:
            assert self._free > 0, "there is no free slot, and nothing to wait for"
            self._free -= 1
        else:
            assert (after.kind, after.used) == ("evict", False), "its slot is another's"
            after.used = True
        return self._start(Work("fetch", first, [one for one in (after, before) if one is not None]))

    def wait(self, ticket: Any) -> float:
        self.log.append(("wait", ticket.chunk))
        late = 0.0 if ticket.over else LATE
        self._end(ticket)
        return late

    def evict(self, ranges: Ranges, after: Any) -> Work:
        first = ranges[0][0]
        self.log.append(("evict", first))
        assert self._latest[first].kind == "fetch", "it is not here"
        assert after is self._latest[first]
        return self._start(Work("evict", first, [self._latest[first]]))

    def there(self, chunk: Chunk) -> bool:
        """Whether a chunk has arrived, and nobody has sent it away."""
        latest = self._latest[chunk.ranges[0][0]]
        return latest.kind == "fetch" and latest.over

    @property
    def pending(self) -> int:
        """What is not over."""
        return len(self._open)

    def _start(self, work: Work) -> Work:
        self._latest[work.chunk] = work
        self._open.append(work)
        self._look()
        while self._dice and self._open and self._dice.random() < 0.5:
            self._end(self._dice.choice(self._open))
        return work

    def _end(self, work: Work) -> None:
        if work.over:
            return
        for need in work.needs:
            self._end(need)
        self._open.remove(work)
        work.over = True
        if work.kind == "evict":
            self.resident.remove(work.chunk)
        self._look()

    def _look(self) -> None:
        """Begin the fetches that need not wait any more."""
        for work in self._open:
            if work.kind == "fetch" and not work.begun and all(need.over for need in work.needs):
                work.begun = True
                self.resident.append(work.chunk)
        self.most = max(self.most, len(self.resident))
        assert self.most <= self._slots, "more chunks than slots"


def cut(arena: Recorder, count: int, first: int = 0) -> list[Chunk]:
    """Chunks in two ranges, as those of an optimizer."""
    half = SIZE // 2
    starts = [2 * half * i for i in range(first, first + count)]
    return [Chunk(arena, ((at, at + half), (10**6 + at, 10**6 + at + half))) for at in starts]


def make(slots: int, count: int, dice: random.Random | None = None) -> tuple[Recorder, list[Chunk], Pager]:
    arena = Recorder(slots, dice)
    pager = Pager(slots, Counters())
    chunks = cut(arena, count)
    pager.add(chunks)
    return arena, chunks, pager


def use(pager: Pager, *chunks: Chunk) -> None:
    """Use chunks one behind the other, in the middle of a sweep."""
    for chunk in chunks:
        pager.acquire(chunk)
        pager.release(chunk)


def sweep(arena: Recorder, pager: Pager, chunks: Sequence[Chunk]) -> None:
    """Use chunks, each while it is there."""
    for chunk in chunks:
        pager.acquire(chunk)
        assert arena.there(chunk)
        pager.release(chunk)
        assert not arena.there(chunk)
    pager.end_of_sweep()


def misses(arena: Recorder, pager: Pager, chunks: Sequence[Chunk]) -> int:
    """How many chunks of a sweep nobody had fetched before."""
    before = pager.counters.misses
    sweep(arena, pager, chunks)
    return pager.counters.misses - before


def numbers(log: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """A log with the numbers of chunks for their first bytes."""
    return [(kind, *(None if at is None else at // SIZE for at in chunks)) for kind, *chunks in log]


# how many stay, and how many stream


@pytest.mark.parametrize(
    ("count", "slots", "expected"),
    [
        (0, 0, (0, 0)),
        (3, 3, (3, 0)),
        (3, 100, (3, 0)),
        (5, 4, (0, 4)),
        (9, 8, (0, 8)),
        (10, 9, (1, 8)),
        (1000, 100, (92, 8)),
    ],
)
def test_all_but_eight_slots_are_for_chunks_that_stay(count, slots, expected):
    assert divide(count, slots) == expected


@given(st.integers(0, 1000), st.integers(FEWEST_SLOTS, 1000))
def test_what_stays_and_what_streams_fit_in_the_slots(count, slots):
    stay, width = divide(count, slots)
    assert stay + width <= slots
    if count > slots:
        assert (stay + width, FEWEST_SLOTS <= width <= MOST_SLOTS) == (slots, True)
        assert count - stay > width, "the others would have fitted"
    else:
        assert (stay, width) == (count, 0)


@pytest.mark.parametrize("slots", [-2, 0, 1, 3])
def test_too_few_slots_to_stream_in(slots):
    message = f"^paging needs room for 4 chunks; there is room for {max(slots, 0)}$"
    with pytest.raises(ValueError, match=message):
        divide(max(slots, 0) + 1, slots)


# one order


def test_the_calls_of_the_first_steps():
    arena, chunks, pager = make(4, 6)
    for chunk in chunks[:3]:
        pager.acquire(chunk)
        arena.log.append(("update", *chunk.ranges[0][:1]))
        pager.release(chunk)
    assert numbers(arena.log) == [
        *(("fetch", i, None) for i in range(3)),  # at once, with a slot to spare
        ("wait", 0),
        ("fetch", 3, None),  # the last slot that was free
        ("update", 0),
        ("evict", 0),
        ("wait", 1),
        ("fetch", 4, 0),
        ("update", 1),
        ("evict", 1),
        ("wait", 2),
        ("fetch", 5, 1),
        ("update", 2),
        ("evict", 2),
    ]


@given(st.integers(FEWEST_SLOTS, MOST_SLOTS), st.integers(1, 12), st.integers(1, 4), st.booleans())
def test_in_one_order_all_are_prefetched_and_the_first_ones_of_the_next_sweep(slots, more, sweeps, hurried):
    count = slots + more
    arena, chunks, pager = make(slots, count, random.Random(slots) if hurried else None)
    for _ in range(sweeps):
        sweep(arena, pager, chunks)
    counters = pager.counters
    assert (counters.prefetches, counters.misses) == (sweeps * count, 0)
    assert counters.evicted == SIZE * sweeps * count
    assert counters.fetched == SIZE * (sweeps * count + slots - 1), "the first of the next sweep are coming"


def test_the_counters_have_the_bytes_of_the_log():
    arena, chunks, pager = make(4, 7)
    odd = Chunk(arena, ((7 * SIZE, 7 * SIZE + 1), (9 * SIZE, 9 * SIZE + 2)))
    pager.add([odd])
    for order in ([*chunks, odd], [odd, *reversed(chunks)], [chunks[2]]):
        sweep(arena, pager, order)
    sizes = {chunk.ranges[0][0]: chunk.nbytes for chunk in [*chunks, odd]}
    moved = {kind: sum(sizes[one[1]] for one in arena.log if one[0] == kind) for kind in ("fetch", "evict")}
    assert moved == {"fetch": pager.counters.fetched, "evict": pager.counters.evicted}
    assert moved["evict"] >= 2 * (7 * SIZE + 3) + SIZE, "all that was used has been written back"


# stalls


def test_a_chunk_that_had_not_arrived_is_a_stall_of_so_many_seconds():
    arena, chunks, pager = make(4, 6)
    sweep(arena, pager, chunks)
    assert (pager.counters.stalls, pager.counters.stalled) == (6, 6 * LATE)
    pager.settle()
    pager.acquire(chunks[0])
    assert (pager.counters.stalls, pager.counters.stalled) == (6, 6 * LATE), "it was there"


def test_settling_waits_for_what_comes_and_for_what_goes():
    arena, chunks, pager = make(4, 6)
    pager.settle()
    assert arena.pending == 0
    assert numbers(arena.log)[3:] == [("wait", 0), ("wait", 1), ("wait", 2)]
    use(pager, chunks[0])
    assert arena.pending == 2, "chunk 3 comes, and chunk 0 goes"
    pager.settle()
    assert arena.pending == 0
    assert arena.resident == [0 + SIZE, 2 * SIZE, 3 * SIZE]
    assert pager.counters.stalls == 0


# another order


@given(st.data())
def test_another_order_of_all_chunks_is_known_soon(data):
    slots = data.draw(st.integers(FEWEST_SLOTS, MOST_SLOTS))
    arena, chunks, pager = make(slots, slots + data.draw(st.integers(1, 10)))
    sweep(arena, pager, data.draw(st.permutations(chunks)))
    order = data.draw(st.permutations(chunks))
    sweep(arena, pager, order)
    assert misses(arena, pager, order) <= 1, "one, where its slot has what the sweep before fetched in vain"
    assert [misses(arena, pager, order) for _ in range(2)] == [0, 0]


def test_a_chunk_that_nobody_expected_takes_the_slot_that_is_free_soon():
    arena, chunks, pager = make(4, 9)
    use(pager, chunks[0])
    arena.log.clear()
    pager.acquire(chunks[7])
    assert pager.counters.misses == 1
    assert numbers(arena.log)[:2] == [("fetch", 7, 0), ("wait", 7)]


def test_where_no_slot_is_free_soon_a_chunk_is_given_up():
    arena, chunks, pager = make(4, 9)
    use(pager, chunks[0], chunks[7])
    moves = [one for one in numbers(arena.log) if one[0] != "wait"]
    assert moves[-6:] == [
        ("fetch", 7, 0),
        ("evict", 3),  # of 1, 2 and 3, which came in vain, it is expected last
        ("fetch", 8, 3),
        ("evict", 2),
        ("fetch", 0, 2),
        ("evict", 7),
    ]
    arena.log.clear()
    pager.acquire(chunks[5])
    assert pager.counters.misses == 2
    assert numbers(arena.log)[:2] == [("fetch", 5, 7), ("wait", 5)]


def test_a_miss_gives_up_what_is_expected_last_and_fetches_nothing_again():
    arena, chunks, pager = make(6, 9)
    sweep(arena, pager, [chunks[i] for i in (3, 7, 5)])  # the order that is expected from here on
    arena.log.clear()
    pager.acquire(chunks[4])
    moves = [one[:2] for one in numbers(arena.log) if one[0] != "wait"]
    given_up = [chunk for kind, chunk in moves if kind == "evict"]
    assert given_up
    assert not {chunk for kind, chunk in moves if kind == "fetch"} & {*given_up}


def test_a_chunk_that_is_asked_for_while_it_leaves_comes_back_behind_its_own_eviction():
    arena, chunks, pager = make(4, 9)
    use(pager, *chunks[:2])
    arena.log.clear()
    pager.acquire(chunks[1])
    assert numbers(arena.log)[:2] == [("fetch", 1, 1), ("wait", 1)]
    assert arena.there(chunks[1])
    assert pager.counters.misses == 1


def test_what_a_sweep_leaves_out_is_not_expected_until_it_is_used_again():
    arena, chunks, pager = make(4, 10)
    sweep(arena, pager, chunks)
    used = [chunks[i] for i in (9, 2, 6, 4, 8)]
    sweep(arena, pager, used)
    arena.log.clear()
    assert misses(arena, pager, used) <= 1
    assert {one[1] for one in numbers(arena.log) if one[0] == "fetch"} <= {9, 2, 6, 4, 8}
    others = [chunks[i] for i in (0, 1, 3, 5, 7)]
    assert misses(arena, pager, [*used, *others]) == 5
    assert misses(arena, pager, [*used, *others]) <= 1


# more chunks


def test_what_is_added_in_the_middle_of_a_run_is_used_behind_the_rest():
    arena, chunks, pager = make(4, 5)
    sweep(arena, pager, chunks)
    more = cut(arena, 3, first=5)
    pager.add(more)
    assert [misses(arena, pager, [*chunks, *more]) for _ in range(3)] == [0, 0, 0]


def test_what_is_added_in_the_middle_of_a_sweep_waits_for_its_turn():
    arena, chunks, pager = make(4, 6)
    use(pager, *chunks[:3])
    more = cut(arena, 2, first=6)
    arena.log.clear()
    pager.add(more)
    assert not arena.log, "every slot is taken by what is used sooner"
    sweep(arena, pager, [*chunks[3:], *more])
    assert pager.counters.misses == 0


# whatever the order is


@given(st.data())
def test_in_any_orders_a_chunk_is_there_when_it_is_used_and_no_slot_is_used_twice(data):
    """The recorder asserts the rest: who may be fetched, which slot it takes, how many are resident."""
    slots = data.draw(st.integers(FEWEST_SLOTS, MOST_SLOTS))
    dice = data.draw(st.one_of(st.none(), st.integers(0, 9).map(random.Random)))
    arena, chunks, pager = make(slots, data.draw(st.integers(1, 14)), dice)
    orders = data.draw(st.lists(st.lists(st.integers(0, 19), max_size=20), max_size=5))
    for number, order in enumerate(orders):
        if number == 2:
            more = cut(arena, data.draw(st.integers(0, 6)), first=len(chunks))
            pager.add(more)
            chunks += more
        sweep(arena, pager, [chunks[i % len(chunks)] for i in order])
        if data.draw(st.booleans()):
            pager.settle()
            assert arena.pending == 0
    counters = pager.counters
    assert counters.prefetches + counters.misses == sum(map(len, orders))
    assert counters.stalled == LATE * counters.stalls
    kinds = [kind for kind, *_ in arena.log]
    assert counters.fetched == SIZE * kinds.count("fetch")
    assert counters.evicted == SIZE * kinds.count("evict")
    assert 0 <= counters.fetched - counters.evicted <= SIZE * slots


def test_slots_of_chunks_that_are_used_no_more_are_given_to_others():
    arena, chunks, pager = make(4, 20)
    sweep(arena, pager, chunks)
    for _ in range(5):
        arena.log.clear()
        sweep(arena, pager, chunks[4:])  # as if the first four were frozen
    log = numbers(arena.log)
    evictions = {one[1]: i for i, one in enumerate(log) if one[0] == "evict"}
    waits = {one[1]: i for i, one in enumerate(log) if one[0] == "wait"}
    fetches = {one[1]: i for i, one in enumerate(log) if one[0] == "fetch"}
    assert sorted(evictions) == sorted(waits) == sorted(fetches) == list(range(4, 20))
    for chunk in range(8, 20):  # on its way before the one ahead of it was used
        assert fetches[chunk] < waits[chunk - 1]


def test_random_orders_keep_to_the_budget_on_a_disk(tmp_path):
    """The recording arena assumes that an eviction waits for the fetch before it; here it must."""
    mib = 1 << 20
    arena = MappedFile(40 * mib, directory=tmp_path)
    chunks = [Chunk(arena, ((2 * i * mib, 2 * (i + 1) * mib),)) for i in range(20)]
    pager, dice = Pager(4, Counters()), random.Random(1)
    pager.add(chunks)
    for _ in range(10):
        for chunk in dice.sample(chunks, 20):
            pager.acquire(chunk)
            ((first, end),) = chunk.ranges
            arena.bytes[first:end] += 1
            pager.release(chunk)
        pager.end_of_sweep()
        pager.settle()
        assert arena.resident_bytes() <= 8 * mib
    assert arena.bytes.unique().tolist() == [10]


class Failing(Recorder):
    """An arena that cannot read for a while.

    Attributes:
        failures: how many more waits for a fetch fail.
    """

    failures = 0

    def wait(self, ticket: Any) -> float:
        late = super().wait(ticket)
        if ticket.kind == "fetch" and self.failures:
            self.failures -= 1
            raise OSError("the disk does not answer")
        return late


def test_a_prefetch_that_failed_is_fetched_again_and_then_an_error_that_leaves_no_trace():
    arena = Failing(FEWEST_SLOTS)
    pager, chunks = Pager(FEWEST_SLOTS, Counters()), cut(arena, 8)
    pager.add(chunks)
    arena.failures = 1
    pager.acquire(chunks[0])  # a prefetch: once more helps
    assert [entry[:2] for entry in arena.log if entry[1] == 0][-3:] == [("evict", 0), ("fetch", 0), ("wait", 0)]
    pager.release(chunks[0])
    for call in (lambda: pager.acquire(chunks[1]), pager.settle):
        arena.failures = 2
        with pytest.raises(OSError, match="does not answer"):
            call()
    arena.failures = 0
    sweep(arena, pager, chunks[1:])
