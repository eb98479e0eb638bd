"""AdamW whose state may be larger than the memory it is given (QLoRA, arXiv 2305.14314, section 3: paged optimizers).

AdamW keeps two numbers beside each parameter. `PagedAdamW` keeps them in chunks, a budget of which is in fast memory;
the rest is on the disk (CPU) or in the host's memory (GPU). A step goes over the chunks once. On a CPU, while one is
updated (``kernels/adamw.py``), the next ones come in and the last ones go out (``pager.py``). On a GPU the kernel reads
and writes what is away where it is (``unified_memory.py``).

What a step costs: an update with float32 parameters moves 28 bytes an element through memory, and where nothing is
kept, 8 in and 8 out of the arena. The slower of the two decides.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from qloralab.kernels.adamw import Rates

from . import states
from .arena import Arena, Memory
from .chunks import Layout, lay_out, piece_bytes
from .interrupts import held_interrupts
from .mapped_file import MappedFile
from .moments import ITEMSIZE, Batch, Moments, check_param
from .pager import FEWEST_PLACES, Chunk, Counters, Pager, divide

NONFINITE = ("update", "skip", "raise")

_MIDWAY = "an update failed midway: load the parameters and the state from a checkpoint"


@dataclass(frozen=True)
class Paging:
    """What an optimizer's state takes, and what its pager has done since the start.

    Attributes:
        where: the places of the state.
        state_bytes: all of it that may page.
        budget: the most that may be resident, bytes; None: no limit.
        resident_bytes: what is in fast memory now, as the system says (``mincore``).
        rss_bytes: what of a mapped file counts in this process's resident set; None where there is none.
        prefetches: chunks that were on their way before they were asked for.
        misses: chunks that were not.
        stalls: chunks that had not arrived when they were needed.
        stalled: seconds spent waiting for them.
        fetched, evicted: bytes that came and went; on a GPU, that its kernels read and wrote in the host's memory.
    """

    where: str
    state_bytes: int
    budget: int | None
    resident_bytes: int
    rss_bytes: int | None
    prefetches: int
    misses: int
    stalls: int
    stalled: float
    fetched: int
    evicted: int

    @property
    def evicted_bytes(self) -> int:
        """What is not resident now."""
        return self.state_bytes - self.resident_bytes

    def __str__(self) -> str:
        line = f"optimizer state {self.state_bytes / 1e6:.0f} MB, {self.resident_bytes / 1e6:.0f} resident"
        if not self.fetched:
            return line
        if not self.prefetches + self.misses:
            return f"{line}; {self.fetched / 1e9:.1f} GB in and {self.evicted / 1e9:.1f} GB out, over the link"
        return f"{line}; {self.prefetches} prefetches, {self.stalls} stalls, {self.stalled:.1f} s"


@dataclass
class _Device:
    """What the groups have in common on one device."""

    places: int | None  # for chunks; None: no budget
    streams: bool  # what does not stay
    pager: Pager | None = None
    current: Chunk | None = None  # acquired, and not released yet
    counters: Counters = field(default_factory=Counters)

    def divide(self, count: int) -> tuple[int, int]:
        """How many of some more chunks stay, and in how many new places the others stream."""
        if self.places is None:
            return count, 0
        if not self.streams:
            return min(count, self.places), 0
        return (0, 0) if self.pager is not None else divide(count, self.places)

    def admit(self, stay: int, width: int) -> None:
        """Take in chunks as `divide` said."""
        if self.places is not None:
            self.places -= stay
        if width:
            self.pager = Pager(width, self.counters)


@dataclass(frozen=True)
class _Part:
    """The parameters of a group that are on one device, and their moments."""

    group: int
    moments: Moments
    shared: _Device


class PagedAdamW(Optimizer):
    """``torch.optim.AdamW`` with a state that pages.

    The update, its order and its rounding are those of ``kernels/adamw.py``. Parameters are float32, bfloat16 or
    float16, contiguous, on CPUs or NVIDIA GPUs; a group may lie on several devices.

    Args:
        params: parameters, (name, parameter) pairs or groups, as for any PyTorch optimizer.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        state_bits: 32: float32 moments, 8 bytes an element. 8: codes with a scale for 256 (``adamw_8bit.py``), 2.03.
        budget: bytes of state that may be resident on each device, 16 MiB at least. None: on a CPU all of it is, in
            ordinary memory; on a GPU it is managed memory, of which the driver evicts what others need (ordinary
            memory, with a warning, where ``cuda.bindings`` is not installed).
        nonfinite: what a step does with a gradient that has NaN or infinity. "update": what AdamW does, without
            looking. "skip": nothing (``skipped`` counts these steps). "raise": ValueError, and nothing.
        update_in_backward: update each parameter as soon as its gradient is accumulated, and free the gradient. Then
            a backward is a step: gradients cannot be clipped, unscaled, or accumulated over several. ``step`` behind
            it ends the step, and says what could not be written.
        state_dir: for the file, on a CPU; None: the first of the directory for temporary files, /var/tmp and the
            current one that is on a disk.
        oversubscribe: allocate managed memory even if the GPU has less free. A GPU that others use may hang.

    Attributes:
        skipped: steps that were skipped.

    Raises:
        ValueError: an argument is out of range, or a parameter not contiguous.
        TypeError: a parameter has another dtype.
        OSError: the disk has no room for the state.
        MemoryError: the GPU has none.
        ImportError: a budget on a GPU, and no ``cuda.bindings``; the message says what to install.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        state_bits: Literal[32, 8] = 32,
        budget: int | None = None,
        *,
        nonfinite: Literal["update", "skip", "raise"] = "update",
        update_in_backward: bool = False,
        state_dir: str | os.PathLike[str] | None = None,
        oversubscribe: bool = False,
    ):
        _check_rates(lr, betas, eps, weight_decay)
        if state_bits not in ITEMSIZE:
            raise ValueError(f"state_bits is 32 or 8, not {state_bits}")
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite is one of {', '.join(NONFINITE)}, not {nonfinite!r}")
        self._piece = piece_bytes(budget)
        if budget is not None and budget < FEWEST_PLACES * 2 * self._piece:
            raise ValueError(f"budget is {FEWEST_PLACES * 2 * self._piece:,} bytes at least (16 MiB), not {budget:,}")
        self.skipped = 0
        self._state_bits, self._budget, self._nonfinite = state_bits, budget, nonfinite
        self._in_backward, self._state_dir, self._oversubscribe = update_in_backward, state_dir, oversubscribe
        self._devices: dict[torch.device, _Device] = {}
        self._parts: list[_Part] = []
        self._homes: dict[Tensor, tuple[int, int]] = {}  # the number of a part, and in it
        self._broken: str | None = None
        self._lock = threading.RLock()  # backward has a thread for each device
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._allocate(param for group in self.param_groups for param in group["params"] if param.requires_grad)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in PyTorch.

        Raises:
            ValueError: also where the budget has no room left for another group to page in.
            OSError, MemoryError: there is no room for its state. The optimizer is as it was, after each of them.
        """
        super().add_param_group(param_group)
        if self._parts:
            try:
                self._allocate(param for param in self.param_groups[-1]["params"] if param.requires_grad)
            except BaseException:
                self.param_groups.pop()
                raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update each parameter that has a gradient.

        Ctrl-C waits until all are updated. What can fail is looked at before the first one is touched.

        Args:
            closure: computes the loss again, with gradients, and returns it.

        Raises:
            ValueError: a gradient is not finite (``nonfinite="raise"``), or another device's; nothing was updated.
            OSError: the state could not be written; all parameters are updated, and the message says what to do.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        with self._lock, held_interrupts():
            if self._update(params):
                self._end()
        return loss

    def paging(self) -> Paging:
        """What the state takes now, and what was done so far. Asks the system, which takes some milliseconds."""
        arenas = [part.moments.arena for part in self._parts]
        files = [arena for arena in arenas if isinstance(arena, MappedFile)]
        counters = [device.counters for device in self._devices.values()]
        return Paging(
            where=", ".join(dict.fromkeys(arena.where for arena in arenas)),
            state_bytes=sum(len(arena.bytes) for arena in arenas),
            budget=self._budget,
            resident_bytes=sum(arena.resident_bytes() for arena in arenas),
            rss_bytes=sum(file.rss_bytes() for file in files) if files else None,
            **{name: sum(getattr(one, name) for one in counters) for name in Counters.__dataclass_fields__},
        )

    def state_dict(self) -> dict[str, Any]:
        """The state in the layout of ``torch.optim.AdamW``, which loads it; 8-bit states in that of bitsandbytes.

        As in PyTorch the tensors are the live ones: the next step changes them. Saving them reads what is away from the
        disk, and doubles nothing.

        Raises:
            RuntimeError: an update failed midway, or a part of the state is lost.
        """
        if self._broken:
            raise RuntimeError(self._broken)
        found = super().state_dict()
        if self._state_bits == 8:
            found["state"] = {key: states.nested(entry) for key, entry in found["state"].items()}
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this optimizer, of ``torch.optim.AdamW``, or of AdamW of bitsandbytes, paged or not.

        It is copied chunk by chunk to where the state pages; a state of other bits is converted on the way.

        Raises:
            ValueError: the groups or the shapes are others, or the state is another optimizer's; nothing was changed.
        """
        entries = states.read(state_dict, self.param_groups)
        with self._lock, held_interrupts():
            self._allocate(param for param in entries if param not in self._homes)
            super().load_state_dict({**state_dict, "state": {}})
            self._broken = _MIDWAY
            for part in self._parts:
                moments = part.moments
                moments.arena.failure = None
                moments.steps.zero_()
                for chunk, segments in zip(moments.chunks, moments.layout.segments, strict=True):
                    self._use(part, chunk)
                    for segment in segments:
                        entry = entries.get(moments.params[segment.param])
                        states.copy_(moments.of_segment(segment), entry, segment)
            for param, entry in entries.items():
                index, number = self._homes[param]
                self._parts[index].moments.steps[number] = entry.step
                self._show(param)
            self._end()

    def __reduce_ex__(self, protocol: object):
        raise TypeError("a PagedAdamW cannot be pickled or copied: save its state_dict(), which any AdamW can load")

    def _allocate(self, params: Iterable[Tensor]) -> None:
        """Make room for the state of parameters that have none, and register them."""
        chosen = set(params)
        if not chosen:
            return
        wanted: dict[torch.device, list[tuple[int, list[Tensor], Layout]]] = {}
        for number, group in enumerate(self.param_groups):
            on_device: dict[torch.device, list[Tensor]] = {}
            for param in group["params"]:
                if param in chosen:
                    if param.device.type not in ("cpu", "cuda"):
                        what = f"a parameter {list(param.shape)} is on {param.device}"
                        raise ValueError(f"{what}; the state pages on CPUs and NVIDIA GPUs")
                    check_param(param, param.device)
                    on_device.setdefault(param.device, []).append(param)
            for device, members in on_device.items():
                layout = lay_out([param.numel() for param in members], ITEMSIZE[self._state_bits], self._piece)
                wanted.setdefault(device, []).append((number, members, layout))
        # All memory first: where there is too little, nothing has been registered.
        made: list[tuple[torch.device, _Device, tuple[int, int], list[_Part]]] = []
        for device, layouts in wanted.items():
            places = None if self._budget is None else self._budget // (2 * self._piece)
            shared = self._devices.get(device, _Device(places, streams=device.type == "cpu"))
            stay, width = shared.divide(sum(len(layout.ranges) for _, _, layout in layouts))
            left, parts = stay, []
            for number, members, layout in layouts:
                keep = min(left, len(layout.ranges))
                left -= keep
                arena = self._arena(layout, keep, device)
                moments = Moments(members, layout, self._state_bits, arena, keep, shared.streams)
                parts.append(_Part(number, moments, shared))
            made.append((device, shared, (stay, width), parts))
        for device, shared, divided, parts in made:
            self._devices[device] = shared
            shared.admit(*divided)
            for part in parts:
                self._register(part)

    def _arena(self, layout: Layout, keep: int, device: torch.device) -> Arena:
        stays = [pair for ranges in layout.ranges[:keep] for pair in ranges]
        if device.type == "cuda" and layout.nbytes:
            from .unified_memory import UnifiedMemory

            try:
                return UnifiedMemory(layout.nbytes, device, stays, self._oversubscribe)
            except ImportError as error:
                if self._budget is not None:
                    raise
                warnings.warn(f"the state is in ordinary memory of {device}: {error}", RuntimeWarning, stacklevel=4)
                return Memory(layout.nbytes, device)
        if keep == len(layout.ranges):
            return Memory(layout.nbytes, device)
        return MappedFile(layout.nbytes, stays, self._state_dir)

    def _register(self, part: _Part) -> None:
        self._parts.append(part)
        if part.shared.pager is not None:
            part.shared.pager.add([chunk for chunk in part.moments.chunks if chunk is not None])
        for number, param in enumerate(part.moments.params):
            self._homes[param] = len(self._parts) - 1, number
            if self._in_backward:
                param.register_post_accumulate_grad_hook(_hook(weakref.ref(self)))

    def _update(self, params: Sequence[Tensor]) -> bool:
        """Update these parameters, which have a gradient; whether it was done, or skipped."""
        if self._broken:
            raise RuntimeError(self._broken)
        self._allocate(param for param in params if param not in self._homes)
        work: dict[int, tuple[list[int], list[Tensor]]] = {}  # by part
        for param in params:
            index, number = self._homes[param]
            numbers, grads = work.setdefault(index, ([], []))
            numbers.append(number)
            grads.append(_gradient(param))
        if self._nonfinite != "update" and (bad := self._not_finite(work)) is not None:
            if self._nonfinite == "raise":
                raise ValueError(f"{self._name(bad)} has a gradient that is not finite; no parameter was updated")
            self.skipped += 1
            return False
        planned = [(self._parts[index], *of_part) for index, of_part in sorted(work.items())]
        batches = [part.moments.batches(numbers) for part, numbers, _ in planned]
        self._broken = _MIDWAY
        for (part, numbers, grads), of_part in zip(planned, batches, strict=True):
            self._update_part(part, numbers, grads, of_part)
        self._broken = None
        return True

    def _update_part(
        self, part: _Part, numbers: Sequence[int], grads: Sequence[Tensor], batches: Sequence[Batch]
    ) -> None:
        """Go over the chunks of a part, those without a parameter to update excepted."""
        moments, group, counters = part.moments, self.param_groups[part.group], part.shared.counters
        rates = Rates(*map(float, (group["lr"], *group["betas"], group["eps"], group["weight_decay"])))
        steps = moments.advance(numbers)
        for number, step in zip(numbers, steps, strict=True):
            if step == 1:
                self._show(moments.params[number])
        moments.arena.recall()
        for batch in batches:
            self._use(part, batch.chunk)
            moments.update(batch, grads, steps, rates)
            counters.fetched += batch.away
            counters.evicted += batch.away

    def _update_in_backward(self, param: Tensor) -> None:
        """The hook: the gradient of a parameter is complete."""
        with self._lock, held_interrupts(), torch.no_grad():
            self._update([param])
            param.grad = None

    def _use(self, part: _Part, chunk: Chunk | None) -> None:
        """Have a chunk there, in place of the one before. None: what is always there."""
        shared = part.shared
        if chunk is None or shared.pager is None or shared.current is chunk:
            return
        if shared.current is not None:
            shared.pager.release(shared.current)
            shared.current = None
        shared.pager.acquire(chunk)
        shared.current = chunk

    def _end(self) -> None:
        """Let go of the last chunks; say what could not be written."""
        for shared in self._devices.values():
            if shared.pager is not None:
                if shared.current is not None:
                    shared.pager.release(shared.current)
                    shared.current = None
                shared.pager.end_of_sweep()
        self._broken = None
        failures = [part.moments.arena.failure for part in self._parts if part.moments.arena.failure]
        if failures:
            lost = "All parameters were updated, but a part of the state is lost: load both from a checkpoint"
            self._broken = f"{getattr(failures[0], 'strerror', None) or failures[0]}. {lost}"
            raise OSError(getattr(failures[0], "errno", None), self._broken) from failures[0]

    def _show(self, param: Tensor) -> None:
        """Let ``state`` have the state of a parameter, as views of it."""
        index, number = self._homes[param]
        moments = self._parts[index].moments
        views = dict(zip(states.NAMES[self._state_bits], moments.of_param(number), strict=True))
        self.state[param] = {"step": moments.steps[number], **views}

    def _not_finite(self, work: Mapping[int, tuple[list[int], list[Tensor]]]) -> Tensor | None:
        """A parameter whose gradient has NaN or infinity. Waits for the device once for each part."""
        for index, (numbers, grads) in work.items():
            some = [(number, grad) for number, grad in zip(numbers, grads, strict=True) if len(grad)]
            if some:
                largest = torch.stack([grad.abs().amax().float() for _, grad in some])
                bad = largest.isfinite().logical_not().nonzero()
                if len(bad):
                    return self._parts[index].moments.params[some[int(bad[0])][0]]
        return None

    def _name(self, param: Tensor) -> str:
        for number, group in enumerate(self.param_groups):
            for index, other in enumerate(group["params"]):
                if other is param:
                    name = group["param_names"][index] if "param_names" in group else f"{index} of group {number}"
                    return f"parameter {name} {list(param.shape)}"
        return f"a parameter {list(param.shape)}"


def _hook(optimizer: weakref.ref[PagedAdamW]) -> Callable[[Tensor], None]:
    """What a parameter calls when its gradient is complete. It does not keep an optimizer that nobody else has."""

    def update(param: Tensor) -> None:
        if (alive := optimizer()) is not None:
            alive._update_in_backward(param)

    return update


def _check_rates(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not float(value) >= 0:
            raise ValueError(f"{name} is at least 0, not {value}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas are two numbers from 0 to 1, 1 excluded, not {betas}")


def _gradient(param: Tensor) -> Tensor:
    """The gradient of a parameter, flat."""
    grad = param.grad
    assert grad is not None
    if grad.is_sparse:
        raise RuntimeError("PagedAdamW has no update for sparse gradients")
    if grad.dtype is not param.dtype or grad.device != param.device or grad.numel() != param.numel():
        found = f"{grad.dtype} {list(grad.shape)} on {grad.device}"
        raise ValueError(f"a parameter {param.dtype} {list(param.shape)} on {param.device} has a gradient {found}")
    return (grad.detach() if grad.requires_grad else grad).contiguous().view(-1)
