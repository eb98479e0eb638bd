"""The moments of some parameters: a run of memory for each in an arena, seen as tensors, and the plan of an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from qloralab.kernels.moment_codes import BLOCK_SIZE
from qloralab.kernels.rule import DTYPES, Rule, Segments
from qloralab.kernels.update import check

from .arena import Arena, StreamedArena
from .distributed import is_distributed, local
from .layout import Layout, Segment
from .pager import Chunk

DTYPE = {32: torch.float32, 8: torch.uint8}  # of a moment, by the bits of the state
Signature = tuple[int, torch.Size, torch.dtype, bool, bool]  # of a parameter's memory: a plan has relied on it
PLANS = 4096  # of one group: a parameter each, where parameters are updated in backward


@dataclass(frozen=True)
class Batch:
    """Segments that one call updates.

    Attributes:
        chunk: that has to be there; None: they are always within reach.
        owners: the index, among the parameters that are updated, of the one that a segment is of.
        parts: of the gradient; None: all of it.
        params: the segments, flat.
        moments, scales: as `Segments` has them.
        away: bytes of state that are read, and written, where they are when that is not in fast memory.
    """

    chunk: Chunk | None
    owners: Sequence[int]
    parts: Sequence[slice | None]
    params: Sequence[Tensor]
    moments: Sequence[Sequence[Tensor]]
    scales: Sequence[Sequence[Tensor]] | None
    away: int

    def segments(self, grads: Sequence[Tensor], steps: Sequence[int]) -> Segments:
        """The segments, with gradients (flat) and steps (from 1) of the parameters that the batch is for."""
        owned = zip(self.owners, self.parts, strict=True)
        parts = [grads[owner] if part is None else grads[owner][part] for owner, part in owned]
        return Segments(self.params, parts, self.moments, self.scales, [steps[owner] for owner in self.owners])


class Moments:
    """The moments of some parameters on one device, all zero at first.

    Args:
        params: their local parts contiguous, on one device.
        layout: of their state.
        rule: whose moments these are.
        state_bits: 32, or 8.
        arena: of the size of the layout, zero.
        resident: how many of the chunks, from the first one, are always in fast memory; None: all.
        streams: whether a pager brings the others in; otherwise they are updated where they are.

    Attributes:
        params, layout, rule, arena: as given.
        chunks: of the arena, in the order of the layout; None for those that no pager moves.
        steps: how many updates each parameter has had, float32 [params].
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        layout: Layout,
        rule: Rule,
        state_bits: int,
        arena: Arena,
        resident: int | None = None,
        streams: bool = False,
    ):
        self.params, self.layout, self.rule, self.arena = params, layout, rule, arena
        self._resident = len(layout.ranges) if resident is None else resident
        streaming = layout.ranges[self._resident :] if streams else ()
        self.chunks: list[Chunk | None] = [None] * (len(layout.ranges) - len(streaming))
        self.chunks += [Chunk(cast(StreamedArena, arena), ranges) for ranges in streaming]
        self.steps = torch.zeros(len(params), dtype=torch.float32, device="cpu")
        elements, dtype = layout.elements, DTYPE[state_bits]
        starts = [k * layout.run for k in range(layout.runs)]
        self._runs = [arena.bytes[at : at + layout.run].view(dtype)[:elements] for at in starts]
        blocks, coded = -(-elements // BLOCK_SIZE), self._runs if state_bits == 8 else []
        # 4 bytes for 256 elements of a moment, all of the time in ordinary memory.
        self._scales = [torch.zeros(blocks, dtype=torch.float32, device=arena.bytes.device) for _ in coded]
        self._shapes = [local(param).shape for param in params]
        self._distributed = any(is_distributed(param) for param in params)
        self._plans: dict[tuple[int, ...], tuple[list[Signature], list[Batch]]] = {}

    def of_param(self, number: int) -> tuple[Tensor, ...]:
        """The moments in the shape of a parameter, and with 8 bits their scales; not copies."""
        shape, offset = self._shapes[number], self.layout.offsets[number]
        moments, scales = self._at(slice(offset, offset + shape.numel()))
        return *(moment.view(shape) for moment in moments), *scales

    def of_segment(self, segment: Segment) -> tuple[list[Tensor], list[Tensor]]:
        """The moments of a part of a parameter, flat, and with 8 bits their scales; not copies."""
        return self._at(segment.here)

    def _at(self, here: slice) -> tuple[list[Tensor], list[Tensor]]:
        blocks = slice(here.start // BLOCK_SIZE, -(-here.stop // BLOCK_SIZE))
        return [run[here] for run in self._runs], [scale[blocks] for scale in self._scales]

    def advance(self, numbers: Sequence[int]) -> list[int]:
        """Count an update of these parameters, and say which one it is for each of them, from 1."""
        if len(numbers) == len(self.params):
            self.steps += 1
        else:
            self.steps[numbers] += 1
        return [int(self.steps[numbers[0]])] if len(numbers) == 1 else self.steps[numbers].int().tolist()

    def batches(self, numbers: Sequence[int]) -> list[Batch]:
        """The calls that update some parameters: one for all that is within reach, and one for each chunk that streams.

        They are kept: to make the views of 1,000 small tensors takes longer than to update them.

        Args:
            numbers: of the parameters.

        Raises:
            TypeError, ValueError: a parameter has been given another shape, or memory that no kernel can take.
        """
        key, params = tuple(numbers), [self.params[number] for number in numbers]
        if self._distributed:
            params = [local(param) for param in params]
        signatures = [(p.data_ptr(), p.shape, p.dtype, p.is_contiguous(), p.is_neg()) for p in params]
        known = self._plans.get(key)
        if known is None or known[0] != signatures:
            for number, param in zip(numbers, params, strict=True):
                check_param(param, self.arena.bytes.device)
                if param.shape != (had := self._shapes[number]):
                    found = f"a parameter {list(param.shape)} was {list(had)} when its state was made"
                    raise ValueError(f"{found}: when a shape changes, make a new optimizer")
            if len(self._plans) >= PLANS:
                self._plans.clear()
            known = self._plans[key] = signatures, self._plan(numbers, params)
        return known[1]

    def _plan(self, numbers: Sequence[int], params: Sequence[Tensor]) -> list[Batch]:
        index_of = {number: index for index, number in enumerate(numbers)}
        within_reach: list[Segment] = []
        away, streaming = 0, []
        for chunk in sorted({chunk for number in numbers for chunk in self.layout.chunks_of(number)}):
            segments = [one for one in self.layout.segments[chunk] if one.param in index_of]
            if self.chunks[chunk] is not None:
                streaming.append((self.chunks[chunk], segments))
                continue
            if chunk >= self._resident:
                away += sum(one.end - one.first for one in segments) * sum(run.itemsize for run in self._runs)
            within_reach += segments
        plan = [self._batch(None, _joined(within_reach), index_of, params, away)] if within_reach else []
        return plan + [self._batch(chunk, segments, index_of, params, 0) for chunk, segments in streaming]

    def _batch(
        self,
        chunk: Chunk | None,
        segments: Sequence[Segment],
        index_of: dict[int, int],
        params: Sequence[Tensor],
        away: int,
    ) -> Batch:
        owners, parts, flat, moments, scales = [index_of[one.param] for one in segments], [], [], [], []
        for one, owner in zip(segments, owners, strict=True):
            part = slice(one.first, one.end)
            parts.append(None if one.end - one.first == params[owner].numel() else part)
            flat.append(params[owner].detach().view(-1)[part])
            of_one = self.of_segment(one)
            moments.append(of_one[0])
            scales.append(of_one[1])
        by_moment = [list(some) for some in zip(*moments, strict=True)]
        by_scale = [list(some) for some in zip(*scales, strict=True)] if self._scales else None
        check(Segments(flat, flat, by_moment, by_scale, [1] * len(flat)))  # gradients are looked at in each step
        return Batch(chunk, owners, parts, flat, by_moment, by_scale, away)


def check_param(param: Tensor, device: torch.device) -> None:
    """Raise TypeError or ValueError unless the kernels can update a parameter, which is to be on a device."""
    what = f"a parameter {list(param.shape)}"
    try:
        param = local(param)
    except TypeError as error:
        raise TypeError(f"{what} {error}") from None
    if param.dtype not in DTYPES:
        raise TypeError(f"{what} is {param.dtype}; what can be updated is float32, bfloat16 and float16")
    if not param.is_contiguous():
        raise ValueError(f"{what} is not contiguous: its strides are {param.stride()}")
    if param.device != device:
        raise ValueError(f"{what} is on {param.device}, and its state on {device}: load both from a checkpoint")


def _joined(segments: Sequence[Segment]) -> list[Segment]:
    """Segments with those of the same parameter that follow each other made one."""
    found: list[Segment] = []
    for one in segments:
        last = found[-1] if found else None
        if last is not None and last.param == one.param and last.end == one.first:
            found[-1] = Segment(one.param, last.first, one.end, last.offset)
        else:
            found.append(one)
    return found
