"""The moments of a group of parameters: two runs of memory in an arena, seen as tensors, and their update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from qloralab.kernels.adamw import DTYPES, Rates, adamw_unchecked_
from qloralab.kernels.adamw_8bit import adamw_8bit_unchecked_

from .arena import Arena, StreamedArena
from .distributed import is_distributed, local
from .layout import BLOCK_SIZE, Layout, Segment
from .pager import Chunk

ITEMSIZE = {32: 4, 8: 1}  # bytes of an element of a moment, by the bits of the state
DTYPE = {32: torch.float32, 8: torch.uint8}
Signature = tuple[int, torch.Size, torch.dtype, bool, bool]  # of a parameter's memory: what a plan has relied on
PLANS = 4096  # of one group: a parameter each, where parameters are updated in backward


@dataclass(frozen=True)
class Batch:
    """Segments that one call updates.

    Attributes:
        chunk: that has to be there; None: they are always within reach.
        owners: whose gradient and step are a segment's: its place among the parameters that are updated.
        parts: of the gradient; None: all of it.
        params: the segments, flat.
        states: their first moments, second moments, and with 8 bits the scales of both.
        away: bytes of state that are read, and written, where they are when that is not in fast memory.
    """

    chunk: Chunk | None
    owners: Sequence[int]
    parts: Sequence[slice | None]
    params: Sequence[Tensor]
    states: Sequence[Sequence[Tensor]]
    away: int


class Moments:
    """m and v of some parameters on one device, all zero at first.

    Args:
        params: their local parts contiguous, on one device.
        layout: of their state.
        state_bits: 32, or 8.
        arena: of the size of the layout, zero.
        resident: how many of the chunks, from the first one, are always in fast memory; None: all.
        streams: whether a pager brings the others in; otherwise they are updated where they are.

    Attributes:
        params, layout, arena: as given.
        chunks: of the arena, in the order of the layout; None for those that no pager moves.
        steps: how many updates each parameter has had, float32 [params].
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        layout: Layout,
        state_bits: int,
        arena: Arena,
        resident: int | None = None,
        streams: bool = False,
    ):
        self.params = params
        self.layout = layout
        self.arena = arena
        self._resident = len(layout.ranges) if resident is None else resident
        streaming = layout.ranges[self._resident :] if streams else ()
        self.chunks: list[Chunk | None] = [None] * (len(layout.ranges) - len(streaming))
        self.chunks += [Chunk(cast(StreamedArena, arena), ranges) for ranges in streaming]
        self.steps = torch.zeros(len(params), dtype=torch.float32, device="cpu")
        runs = self.arena.bytes[: layout.run], self.arena.bytes[layout.run :]
        elements = layout.elements
        self._itemsize = ITEMSIZE[state_bits]
        self._exp_avg, self._exp_avg_sq = (run.view(DTYPE[state_bits])[:elements] for run in runs)
        self._absmax: Sequence[Tensor] = ()
        if state_bits == 8:
            # 8 bytes for 256 elements, all of the time in ordinary memory.
            self._absmax = torch.zeros(
                2, -(-elements // BLOCK_SIZE), dtype=torch.float32, device=self.arena.bytes.device
            ).unbind()
        self._shapes = [local(param).shape for param in params]
        self._distributed = any(is_distributed(param) for param in params)
        self._plans: dict[tuple[int, ...], tuple[list[Signature], list[Batch]]] = {}

    def of_param(self, number: int) -> tuple[Tensor, ...]:
        """exp_avg and exp_avg_sq in the shape of a parameter, and with 8 bits their scales; not copies."""
        shape, place = self._shapes[number], self.layout.places[number]
        runs = (self._exp_avg, self._exp_avg_sq)
        moments = [run[place : place + shape.numel()].view(shape) for run in runs]
        blocks = slice(place // BLOCK_SIZE, -(-(place + shape.numel()) // BLOCK_SIZE))
        return *moments, *(absmax[blocks] for absmax in self._absmax)

    def of_segment(self, segment: Segment) -> tuple[Tensor, ...]:
        """The same, flat, of a part of a parameter."""
        here = segment.here
        blocks = slice(here.start // BLOCK_SIZE, -(-here.stop // BLOCK_SIZE))
        return self._exp_avg[here], self._exp_avg_sq[here], *(absmax[blocks] for absmax in self._absmax)

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

    def update(self, batch: Batch, grads: Sequence[Tensor], steps: Sequence[int], rates: Rates) -> None:
        """AdamW on the segments of a batch and their moments.

        Args:
            batch: one of `batches`.
            grads: of the parameters that it was made for: flat, contiguous, the dtype of the parameter.
            steps: of each of them, from 1.
            rates: of the group.
        """
        pairs = zip(batch.owners, batch.parts, strict=True)
        parts = [grads[owner] if part is None else grads[owner][part] for owner, part in pairs]
        update: Callable[..., None] = adamw_8bit_unchecked_ if self._absmax else adamw_unchecked_
        update(batch.params, parts, *batch.states, [steps[owner] for owner in batch.owners], rates)

    def _plan(self, numbers: Sequence[int], params: Sequence[Tensor]) -> list[Batch]:
        place = {number: index for index, number in enumerate(numbers)}
        within_reach: list[Segment] = []
        away, streaming = 0, []
        for index in sorted({index for number in numbers for index in self.layout.chunks_of(number)}):
            segments = [one for one in self.layout.segments[index] if one.param in place]
            if self.chunks[index] is not None:
                streaming.append((self.chunks[index], segments))
                continue
            if index >= self._resident:
                away += sum(2 * self._itemsize * (one.end - one.first) for one in segments)
            within_reach += segments
        plan = [self._batch(None, _joined(within_reach), place, params, away)] if within_reach else []
        return plan + [self._batch(chunk, segments, place, params, 0) for chunk, segments in streaming]

    def _batch(
        self,
        chunk: Chunk | None,
        segments: Sequence[Segment],
        place: dict[int, int],
        params: Sequence[Tensor],
        away: int,
    ) -> Batch:
        owners = [place[one.param] for one in segments]
        whole = [one.end - one.first == params[owner].numel() for one, owner in zip(segments, owners, strict=True)]
        return Batch(
            chunk,
            owners,
            [None if all_ else slice(one.first, one.end) for one, all_ in zip(segments, whole, strict=True)],
            [params[owner].detach().view(-1)[one.first : one.end] for one, owner in zip(segments, owners, strict=True)],
            [list(tensors) for tensors in zip(*(self.of_segment(one) for one in segments), strict=True)],
            away,
        )


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
            found[-1] = Segment(one.param, last.first, one.end, last.place)
        else:
            found.append(one)
    return found
