"""Where the state of an optimizer's parameters is: memory for it, and the chunks that come and go on each device.

A group's parameters on one device are a `Part`, with an arena of their own; the parts of a device share its budget and
its pager. What there is no room for is an error before anything is registered.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qloralab.kernels.rule import Rule

from .arena import Arena, Memory
from .distributed import is_distributed, local
from .layout import Layout, lay_out, piece_bytes
from .mapped_file import MappedFile
from .moments import DTYPE, Moments, check_param
from .pager import FEWEST_SLOTS, Chunk, Counters, Pager, divide
from .paging import Paging
from .state_dict import Entry, copy_


@dataclass
class Device:
    """What the parts on one device share."""

    slots: int | None  # for chunks; None: no budget
    streams: bool  # whether a pager moves what does not stay
    pager: Pager | None = None
    current: Chunk | None = None  # acquired, and not released yet
    counters: Counters = field(default_factory=Counters)

    def divide(self, count: int) -> tuple[int, int]:
        """How many of some more chunks stay, and in how many new slots the others stream."""
        if self.slots is None:
            return count, 0
        if not self.streams:
            return min(count, self.slots), 0
        return (0, 0) if self.pager is not None else divide(count, self.slots)

    def admit(self, stay: int, width: int) -> None:
        """Take in chunks as `divide` said."""
        if self.slots is not None:
            self.slots -= stay
        if width:
            self.pager = Pager(width, self.counters)

    def use(self, chunk: Chunk | None) -> None:
        """Have a chunk there, in place of the one before. None: what is always there."""
        if chunk is not None and self.pager is not None and self.current is not chunk:
            self.release(self.pager)
            self.pager.acquire(chunk)
            self.current = chunk

    def release(self, pager: Pager) -> None:
        """Let go of the last chunk."""
        if self.current is not None:
            pager.release(self.current)
            self.current = None


@dataclass(frozen=True)
class Part:
    """Parameters that are on one device, and their moments."""

    moments: Moments
    shared: Device


class Storage:
    """The state of all parameters of an optimizer.

    Args:
        rule: whose moments the state is.
        state_bits, budget, state_dir, oversubscribe: as for ``PagedAdamW``.

    Attributes:
        parts: in the order in which they were allocated.
        homes: the number of a part, and the number in it, of each parameter that has room for its state.
        devices: by their names.

    Raises:
        ValueError: the bits or the budget are out of range.
    """

    def __init__(
        self,
        rule: Rule,
        state_bits: int,
        budget: int | None,
        state_dir: str | os.PathLike[str] | None,
        oversubscribe: bool,
    ):
        if state_bits not in DTYPE:
            raise ValueError(f"state_bits is 32 or 8, not {state_bits}")
        runs = len(rule.moments)
        self._piece = piece_bytes(budget, runs)
        least = FEWEST_SLOTS * runs * self._piece
        if budget is not None and budget < least:
            raise ValueError(f"budget is {least:,} bytes at least ({least >> 20} MiB), not {budget:,}")
        self._rule, self._state_bits, self._budget = rule, state_bits, budget
        self._state_dir, self._oversubscribe = state_dir, oversubscribe
        self.parts: list[Part] = []
        self.homes: dict[Tensor, tuple[int, int]] = {}
        self.devices: dict[torch.device, Device] = {}

    def allocate(self, groups: Iterable[Sequence[Tensor]], params: Iterable[Tensor]) -> list[Tensor]:
        """Make room for the state of parameters that have none, by the groups that they are in, and return them.

        Raises:
            ValueError, TypeError: a parameter cannot be updated here; or the budget has no room left to page in.
            OSError, MemoryError, ImportError: as for ``PagedAdamW``. Nothing has been registered, after each of them.
        """
        chosen = set(params)
        if not chosen:
            return []
        wanted: dict[torch.device, list[tuple[list[Tensor], Layout]]] = {}
        for group in groups:
            on_device: dict[torch.device, list[Tensor]] = {}
            for param in group:
                if param in chosen:
                    self._check(param)
                    on_device.setdefault(param.device, []).append(param)
            for device, members in on_device.items():
                numels = [local(param).numel() for param in members]
                layout = lay_out(numels, self._state_bits // 8, self._piece, len(self._rule.moments))
                wanted.setdefault(device, []).append((members, layout))
        made: list[tuple[torch.device, Device, tuple[int, int], list[Part]]] = []
        for device, layouts in wanted.items():
            slots = None if self._budget is None else self._budget // (len(self._rule.moments) * self._piece)
            shared = self.devices.get(device, Device(slots, streams=device.type == "cpu"))
            stay, width = shared.divide(sum(len(layout.ranges) for _, layout in layouts))
            left, parts = stay, []
            for members, layout in layouts:
                keep = min(left, len(layout.ranges))
                left -= keep
                arena = self._arena(layout, keep, device)
                moments = Moments(members, layout, self._rule, self._state_bits, arena, keep, shared.streams)
                parts.append(Part(moments, shared))
            made.append((device, shared, (stay, width), parts))
        for device, shared, divided, parts in made:
            self.devices[device] = shared
            shared.admit(*divided)
            for part in parts:
                self._register(part)
        return [param for _, _, _, parts in made for part in parts for param in part.moments.params]

    def _check(self, param: Tensor) -> None:
        what = f"a parameter {list(param.shape)}"
        if param.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{what} is on {param.device}; the state pages on CPUs and NVIDIA GPUs")
        if self._state_bits == 8 and is_distributed(param):
            raise ValueError(f"{what} is a DTensor, which needs state_bits=32")
        check_param(param, param.device)

    def _arena(self, layout: Layout, keep: int, device: torch.device) -> Arena:
        stays = [pair for ranges in layout.ranges[:keep] for pair in ranges]
        if device.type == "cuda" and layout.nbytes:
            from .unified_memory import UnifiedMemory

            try:
                return UnifiedMemory(layout.nbytes, device, stays, self._oversubscribe)
            except ImportError as error:
                if self._budget is not None:
                    raise
                warnings.warn(f"the state is in ordinary memory of {device}: {error}", RuntimeWarning, stacklevel=6)
                return Memory(layout.nbytes, device)
        if keep == len(layout.ranges):
            return Memory(layout.nbytes, device)
        return MappedFile(layout.nbytes, stays, self._state_dir)

    def _register(self, part: Part) -> None:
        self.parts.append(part)
        if part.shared.pager is not None:
            part.shared.pager.add([chunk for chunk in part.moments.chunks if chunk is not None])
        for number, param in enumerate(part.moments.params):
            self.homes[param] = len(self.parts) - 1, number

    def copy_(self, entries: Mapping[Tensor, Entry | None]) -> None:
        """Copy the state of parameters, None if they are to have none, chunk by chunk to where it pages."""
        by_part: dict[int, dict[int, Entry | None]] = {}
        for param, entry in entries.items():
            index, number = self.homes[param]
            by_part.setdefault(index, {})[number] = entry
        for index, of_part in sorted(by_part.items()):
            moments = self.parts[index].moments
            for chunk, segments in zip(moments.chunks, moments.layout.segments, strict=True):
                chosen = [segment for segment in segments if segment.param in of_part]
                if chosen:
                    self.parts[index].shared.use(chunk)
                for segment in chosen:
                    copy_(moments.of_segment(segment), of_part[segment.param], segment, self._rule)
            for number, entry in of_part.items():
                moments.steps[number] = 0 if entry is None else entry.step

    def end(self) -> Exception | None:
        """Let go of the last chunks, and return the first error of writing one, or None."""
        for shared in self.devices.values():
            if shared.pager is not None:
                shared.release(shared.pager)
                shared.pager.end_of_sweep()
        return next((part.moments.arena.failure for part in self.parts if part.moments.arena.failure), None)

    @property
    def pages_to_a_file(self) -> bool:
        """Whether some of the state is in a file, which a forked process does not share."""
        return any(device.pager is not None for device in self.devices.values())

    def paging(self) -> Paging:
        """What the state takes now, and what was done so far."""
        arenas = [part.moments.arena for part in self.parts]
        files = [arena for arena in arenas if isinstance(arena, MappedFile)]
        counters = [device.counters for device in self.devices.values()]
        return Paging(
            where=", ".join(dict.fromkeys(arena.where for arena in arenas)),
            state_bytes=sum(len(arena.bytes) for arena in arenas),
            budget=self._budget,
            resident_bytes=sum(arena.resident_bytes() for arena in arenas),
            rss_bytes=sum(file.rss_bytes() for file in files) if files else None,
            **{name: sum(getattr(one, name) for one in counters) for name in Counters.__dataclass_fields__},
        )
