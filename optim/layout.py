"""From parameters to chunks: where in one flat run of memory the state of each parameter is.

The parameters of a group are laid one after the other, each at a multiple of 256 elements, and their state likewise,
a run for each moment::

    first moments     | q_proj.A | q_proj.B | k_proj.A | ...
    second moments    | q_proj.A | q_proj.B | k_proj.A | ...
                      '--- chunk 0 ---'--- chunk 1 ---'

A chunk is one piece of each run, cut without regard to parameters: a small one shares a chunk with its neighbours, a
large one has many. So small parameters page like large ones. The runs lie one after the other, and not chunk by chunk,
so that a moment of a parameter is one tensor in memory, which ``state_dict`` shows without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qloralab.kernels.moment_codes import BLOCK_SIZE

from .arena import ALIGNMENT, Ranges

LARGEST_PIECE = 1 << 25  # bytes


@dataclass(frozen=True)
class Segment:
    """The part of a parameter that a chunk holds.

    Attributes:
        param: its number in the group.
        first, end: of its elements.
        offset: of its first element, in each run.
    """

    param: int
    first: int
    end: int
    offset: int

    @property
    def here(self) -> slice:
        """Its elements in each run."""
        return slice(self.offset, self.offset + self.end - self.first)


@dataclass(frozen=True)
class Layout:
    """The state of a group of parameters, cut into chunks.

    Attributes:
        offsets: of the first element of each parameter, in each run.
        segments: of each chunk.
        runs: how many there are.
        run: bytes from one run to the next.
        ranges: bytes of each chunk.
        reach: first and behind the last chunk of each parameter.
    """

    offsets: Sequence[int]
    segments: Sequence[Sequence[Segment]]
    runs: int
    run: int
    ranges: Sequence[Ranges]
    reach: Sequence[tuple[int, int]]

    @property
    def nbytes(self) -> int:
        """Bytes of all runs."""
        return self.runs * self.run

    @property
    def elements(self) -> int:
        """Elements of a run, the room between parameters included, without that behind the last."""
        return max((segment.here.stop for segments in self.segments for segment in segments), default=0)

    def chunks_of(self, param: int) -> range:
        """The chunks that hold parts of a parameter."""
        return range(*self.reach[param])


def lay_out(numels: Sequence[int], itemsize: int, piece: int, runs: int) -> Layout:
    """The layout of parameters with these numbers of elements.

    Args:
        numels: of each parameter.
        itemsize: bytes of an element of a moment: 4, or 1.
        piece: bytes of a chunk in each run, a multiple of `ALIGNMENT`.
        runs: one for each moment.
    """
    offsets, end = [], 0
    for numel in numels:
        offsets.append(end)
        end += -(-numel // BLOCK_SIZE) * BLOCK_SIZE
    count, elements = -(-end * itemsize // piece), piece // itemsize
    segments: list[list[Segment]] = [[] for _ in range(count)]
    reach = []
    for param, (offset, numel) in enumerate(zip(offsets, numels, strict=True)):
        reach.append((offset // elements, -(-(offset + numel) // elements) if numel else 0))
        for chunk in range(*reach[param]):
            first = max(chunk * elements, offset)
            last = min((chunk + 1) * elements, offset + numel)
            segments[chunk].append(Segment(param, first - offset, last - offset, first))
    run = -(-end * itemsize // ALIGNMENT) * ALIGNMENT
    pieces = [(chunk * piece, min((chunk + 1) * piece, run)) for chunk in range(count)]
    ranges = [tuple((k * run + first, k * run + last) for k in range(runs)) for first, last in pieces]
    return Layout(offsets, segments, runs, run, ranges, reach)


def piece_bytes(budget: int | None, runs: int) -> int:
    """Bytes of a chunk in each run: the largest power of two with 16 chunks in the budget, from 2 to 32 MiB."""
    piece = LARGEST_PIECE
    while piece > ALIGNMENT and budget is not None and 16 * runs * piece > budget:
        piece //= 2
    return piece
