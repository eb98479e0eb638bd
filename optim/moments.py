"""The moments of a group of parameters: two runs of memory in an arena, seen as tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qloralab.kernels.adamw import adamw_
from qloralab.kernels.adamw_8bit import adamw_8bit_

from .arena import Arena
from .chunks import BLOCK_SIZE, Layout, Segment
from .pager import Chunk

ITEMSIZE = {32: 4, 8: 1}  # bytes of an element of a moment, by the bits of the state
DTYPE = {32: torch.float32, 8: torch.uint8}


class Moments:
    """m and v of some parameters on one device, all zero at first.

    Args:
        params: contiguous, on one device.
        layout: of their state.
        state_bits: 32, or 8.
        arena: of the size of the layout, zero.

    Attributes:
        params, layout, arena: as given.
        chunks: of the arena, in the order of the layout.
    """

    def __init__(self, params: Sequence[Tensor], layout: Layout, state_bits: int, arena: Arena):
        self.params = params
        self.layout = layout
        self.arena = arena
        self.chunks = [Chunk(self.arena, ranges) for ranges in layout.ranges]
        runs = self.arena.bytes.view(2, layout.run)
        elements = layout.elements
        self._exp_avg, self._exp_avg_sq = (run.view(DTYPE[state_bits])[:elements] for run in runs)
        self._absmax: Sequence[Tensor] = ()
        if state_bits == 8:
            # 8 bytes for 256 elements, all of the time in ordinary memory.
            self._absmax = torch.zeros(2, -(-elements // BLOCK_SIZE), device=self.arena.bytes.device).unbind()

    def of_param(self, number: int) -> tuple[Tensor, ...]:
        """exp_avg and exp_avg_sq in the shape of a parameter, and with 8 bits their scales; not copies."""
        param, place = self.params[number], self.layout.places[number]
        runs = (self._exp_avg, self._exp_avg_sq)
        moments = [run[place : place + param.numel()].view(param.shape) for run in runs]
        blocks = slice(place // BLOCK_SIZE, -(-(place + param.numel()) // BLOCK_SIZE))
        return *moments, *(absmax[blocks] for absmax in self._absmax)

    def of_segment(self, segment: Segment) -> tuple[Tensor, ...]:
        """The same, flat, of a part of a parameter."""
        here = segment.here
        blocks = slice(here.start // BLOCK_SIZE, -(-here.stop // BLOCK_SIZE))
        return self._exp_avg[here], self._exp_avg_sq[here], *(absmax[blocks] for absmax in self._absmax)

    def update(
        self, segments: Sequence[Segment], grads: Sequence[Tensor], steps: Sequence[int], **rates: float
    ) -> None:
        """AdamW on parts of parameters and their moments.

        Args:
            segments: of one chunk.
            grads: flat, of the parameter of each segment.
            steps: of each segment, from 1.
            rates: lr, beta1, beta2, eps, weight_decay.
        """
        params = [self.params[one.param].detach().view(-1)[one.first : one.end] for one in segments]
        parts = [grad[one.first : one.end] for grad, one in zip(grads, segments, strict=True)]
        states = [list(tensors) for tensors in zip(*(self.of_segment(one) for one in segments), strict=True)]
        kernel: Callable[..., None] = adamw_8bit_ if self._absmax else adamw_
        kernel(params, parts, *states, steps, **rates)
