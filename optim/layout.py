"""From parameters to chunks: where in one flat run of memory the state of each parameter is.

The parameters of a group are laid one after the other, each at a multiple of 256 elements, and their state likewise::

    first moments     | q_proj.A | q_proj.B | k_proj.A | ...
    second moments    | q_proj.A | q_proj.B | k_proj.A | ...
                      '--- chunk 0 ---'--- chunk 1 ---'

A chunk is one piece of each run, cut without regard to parameters: a small one shares a chunk with its neighbours, a
large one has many. So small parameters page like large ones. The two runs lie one after the other, and not chunk by
chunk, so that the moments of a parameter are two tensors in memory, which ``state_dict`` shows without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .arena import ALIGNMENT, Ranges

BLOCK_SIZE = 256  # elements that share a scale, where the state has 8 bits
LARGEST_PIECE = 1 << 25  # bytes


@dataclass(frozen=True)
class Segment:
    """The part of a parameter that a chunk holds.

    Attributes:
        param: its number in the group.
        first, end: of its elements.
        place: of its first element, in each run.
    """

    param: int
    first: int
    end: int
    place: int

    @property
    def here(self) -> slice:
        """Where in each run."""
        return slice(self.place, self.place + self.end - self.first)


@dataclass(frozen=True)
class Layout:
    """The state of a group of parameters, cut into chunks.

    Attributes:
        places: of the first element of each parameter, in each run.
        segments: of each chunk.
        run: bytes from one run to the next.
        ranges: bytes of each chunk.
        reach: first and behind the last chunk of each parameter.
    """

    places: Sequence[int]
    segments: Sequence[Sequence[Segment]]
    run: int
    ranges: Sequence[Ranges]
    reach: Sequence[tuple[int, int]]

    @property
    def nbytes(self) -> int:
        """Of both runs."""
        return 2 * self.run

    @property
    def elements(self) -> int:
        """Of a run, the room between parameters included, without that behind the last."""
        return max((segment.here.stop for segments in self.segments for segment in segments), default=0)

    def chunks_of(self, param: int) -> range:
        """The chunks that hold parts of a parameter."""
        return range(*self.reach[param])


def lay_out(numels: Sequence[int], itemsize: int, piece: int) -> Layout:
    """The layout of parameters with these numbers of elements.

    Args:
        numels: of each parameter.
        itemsize: bytes of an element of each moment: 4, or 1.
        piece: bytes of a chunk in each run, a multiple of `ALIGNMENT`.
    """
    places, end = [], 0
    for numel in numels:
        places.append(end)
        end += -(-numel // BLOCK_SIZE) * BLOCK_SIZE
    count, elements = -(-end * itemsize // piece), piece // itemsize
    spans = zip(places, numels, strict=True)
    reach = [(place // elements, -(-(place + numel) // elements) if numel else 0) for place, numel in spans]
    segments: list[list[Segment]] = [[] for _ in range(count)]
    for param, (place, numel) in enumerate(zip(places, numels, strict=True)):
        for chunk in range(*reach[param]):
            first = max(chunk * elements, place)
            last = min((chunk + 1) * elements, place + numel)
            segments[chunk].append(Segment(param, first - place, last - place, first))
    run = -(-end * itemsize // ALIGNMENT) * ALIGNMENT
    ranges = []
    for chunk in range(count):
        first, last = chunk * piece, min((chunk + 1) * piece, run)
        ranges.append(((first, last), (run + first, run + last)))
    return Layout(places, segments, run, ranges, reach)


def piece_bytes(budget: int | None) -> int:
    """Bytes of a chunk in each run: the largest power of two with 16 chunks in the budget, from 2 to 32 MiB."""
    piece = LARGEST_PIECE
    while piece > ALIGNMENT and budget is not None and 32 * piece > budget:
        piece //= 2
    return piece
