"""Where the state of each parameter is: every element once, in bounds, at a multiple of 256, in one chunk."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qloralab.optim.arena import ALIGNMENT
from qloralab.optim.layout import BLOCK_SIZE, LARGEST_PIECE, Segment, lay_out, piece_bytes

MIB = 1 << 20
NUMELS = st.lists(st.one_of(st.integers(0, 600), st.integers(0, 3_000_000)), max_size=12)
ITEMSIZES = st.sampled_from([4, 1])
PIECES = st.sampled_from([ALIGNMENT, 2 * ALIGNMENT])


@given(NUMELS, ITEMSIZES, PIECES)
def test_segments_hold_each_element_once_in_their_chunk_one_behind_the_other(numels, itemsize, piece):
    layout = lay_out(numels, itemsize, piece, 2)
    ends, behind = [0] * len(numels), 0
    for segments, ((first, last), _) in zip(layout.segments, layout.ranges, strict=True):
        assert segments, "a chunk without a segment"
        for one in segments:
            assert one.first == ends[one.param] < one.end
            assert one.offset == layout.offsets[one.param] + one.first
            assert one.offset % BLOCK_SIZE == one.first % BLOCK_SIZE == 0, "a block of 256 is cut"
            assert behind <= one.here.start < one.here.stop
            assert first <= one.here.start * itemsize
            assert one.here.stop * itemsize <= last
            ends[one.param], behind = one.end, one.here.stop
    assert ends == numels
    assert layout.elements == behind
    assert layout.elements * itemsize <= layout.run
    for param in range(len(numels)):
        found = [i for i, segments in enumerate(layout.segments) if any(one.param == param for one in segments)]
        assert list(layout.chunks_of(param)) == found


@given(NUMELS, ITEMSIZES, PIECES, st.sampled_from([1, 2]))
def test_ranges_cover_all_runs(numels, itemsize, piece, runs):
    layout = lay_out(numels, itemsize, piece, runs)
    for run, pairs in enumerate(zip(*layout.ranges, strict=True)):
        borders = [pairs[0][0], *(end for _, end in pairs)]
        assert [first for first, _ in pairs] == borders[:-1]
        assert (borders[0], borders[-1]) == (run * layout.run, (run + 1) * layout.run)
        assert all(border % ALIGNMENT == 0 for border in borders)
        assert all(end - first == piece for first, end in pairs[:-1])
        assert 0 < pairs[-1][1] - pairs[-1][0] <= piece
    assert all(len(ranges) == runs for ranges in layout.ranges)
    assert layout.nbytes == runs * layout.run


@given(NUMELS)
def test_no_more_room_than_blocks_and_the_last_range_need(numels):
    layout = lay_out(numels, 4, ALIGNMENT, 2)
    assert 4 * sum(numels) <= layout.run < 4 * sum(numels) + 4 * BLOCK_SIZE * len(numels) + ALIGNMENT


def test_a_small_parameter_shares_a_chunk_and_a_large_one_has_several():
    per_chunk = ALIGNMENT // 4
    layout = lay_out([100, per_chunk, 0, 300], 4, ALIGNMENT, 2)
    assert layout.offsets == [0, 256, 256 + per_chunk, 256 + per_chunk]
    assert layout.segments == [
        [Segment(0, 0, 100, 0), Segment(1, 0, per_chunk - 256, 256)],
        [Segment(1, per_chunk - 256, per_chunk, per_chunk), Segment(3, 0, 300, per_chunk + 256)],
    ]
    assert layout.ranges == [((0, 2 * MIB), (4 * MIB, 6 * MIB)), ((2 * MIB, 4 * MIB), (6 * MIB, 8 * MIB))]


def test_a_chunk_that_is_full_to_the_last_element():
    layout = lay_out([ALIGNMENT // 4, 1], 4, ALIGNMENT, 2)
    assert [list(layout.chunks_of(param)) for param in (0, 1)] == [[0], [1]]


@pytest.mark.parametrize("numels", [[], [0], [0, 0]])
def test_nothing_has_no_chunks(numels):
    layout = lay_out(numels, 4, ALIGNMENT, 2)
    assert (layout.nbytes, layout.elements, list(layout.ranges), list(layout.segments)) == (0, 0, [], [])
    assert [len(layout.chunks_of(param)) for param in range(len(numels))] == [0] * len(numels)


@pytest.mark.parametrize(
    ("budget", "mib"),
    [(None, 32), (2**40, 32), (1024 * MIB, 32), (1024 * MIB - 1, 16), (128 * MIB, 4), (128 * MIB - 1, 2), (0, 2)],
)
def test_a_budget_has_16_chunks_of_the_largest_size(budget, mib):
    assert piece_bytes(budget, 2) == mib * MIB <= LARGEST_PIECE
    assert piece_bytes(None if budget is None else budget // 2, 1) == mib * MIB
