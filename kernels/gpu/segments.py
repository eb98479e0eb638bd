"""The segments of a chunk as a kernel finds them: one launch for many tensors, which no argument could name.

A kernel reads where its tensors are from a table in the memory of the device, a row of 8-byte words for each segment::

    0 .. 3   addresses of p, g and moments   6   what depends on the step: bits of two float32
    4        n                               7
    5        its first program               8   addresses of the scales, where moments have 8 bits
                                             9

Another table says for each program which segment it works on; which part of it follows from word 5. A program handles
1,024 elements or more, so the 4 bytes of its entry are nothing beside the data.

Both are written into one buffer of pinned memory, which is copied to the device on the current stream. Nothing waits:
PyTorch's allocator of pinned memory notes the copy, and gives the buffer out again only after it has run. A CUDA graph
would keep the address of the buffer, so an update must not be captured.

The compiler has to know dtypes and alignment, so segments of one kind are one launch: those of one dtype, and among
them apart from the others those that begin at multiples of 16 bytes and have a multiple of 16 elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..rule import Segments

WIDTH = 10  # words of a row
ALIGNMENT = 16  # bytes, and elements


@dataclass(frozen=True)
class Launch:
    """The segments of one kind.

    Attributes:
        dtype: of their parameters.
        aligned: whether 16 bytes may be loaded at once.
        table: int64 [segments, WIDTH], on the device.
        segment_of: int32 [programs], on the device: the number of the segment that a program works on.
    """

    dtype: torch.dtype
    aligned: bool
    table: Tensor
    segment_of: Tensor

    def on_its_device(self) -> AbstractContextManager[Any]:
        """Makes the device of the tensors current: Triton launches a kernel on whichever is."""
        return torch.cuda.device(self.table.device) if self.table.is_cuda else nullcontext()


def launches(segments: Segments, rates: Any, tile: int) -> Iterator[Launch]:
    """Sort segments by kind, and bring their tables to the device.

    Args:
        segments: of a rule with two moments.
        rates: has the two ``factors`` of a step.
        tile: elements of a segment that one program handles.
    """
    params = segments.params
    numels = torch.tensor([param.numel() for param in params], device="cpu")
    addresses = torch.tensor([[tensor.data_ptr() for tensor in some] for some in segments.tensors], device="cpu")
    aligned = (torch.cat([numels[None], addresses[:4]]) % ALIGNMENT == 0).all(dim=0)
    known = {step: rates.factors(step) for step in set(segments.steps)}
    factors = torch.tensor([known[step] for step in segments.steps], dtype=torch.float32, device="cpu")
    factors = factors.view(len(params), 2).view(torch.int32).long().T
    dtypes = [param.dtype for param in params]
    for dtype in dict.fromkeys(dtypes):
        of_dtype = torch.tensor([one is dtype for one in dtypes], device="cpu") & (numels > 0)
        for is_aligned in (True, False):
            chosen = (of_dtype & (aligned == is_aligned)).nonzero()[:, 0]
            if len(chosen):
                columns = numels[chosen], addresses[:, chosen], factors[:, chosen]
                yield Launch(dtype, is_aligned, *_tables(*columns, tile, params[0].device))


def _tables(
    numels: Tensor, addresses: Tensor, factors: Tensor, tile: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`Launch.table` and `Launch.segment_of`."""
    programs = (numels + (tile - 1)) // tile
    count, total = len(numels), int(programs.sum())
    words = count * WIDTH + (total + 1) // 2
    host = torch.empty(words, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    table, segment_of = _split(host, count, total)
    first = programs.cumsum(0) - programs
    columns = torch.cat([addresses[:4], numels[None], first[None], factors, addresses[4:]])
    table[:, : len(columns)] = columns.T
    segment_of.copy_(
        torch.arange(count, dtype=torch.int32, device="cpu").repeat_interleave(programs, output_size=total)
    )
    return _split(host.to(device, non_blocking=True), count, total)


def _split(words: Tensor, count: int, total: int) -> tuple[Tensor, Tensor]:
    """The two tables in one buffer."""
    table, segment_of = words[: count * WIDTH], words[count * WIDTH :]
    return table.view(count, WIDTH), segment_of.view(torch.int32)[:total]
