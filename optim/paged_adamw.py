"""AdamW whose state may be larger than the memory it is given (QLoRA, arXiv 2305.14314, section 3: paged optimizers).

AdamW keeps two numbers beside each parameter. `PagedAdamW` keeps them in chunks, a budget of which is in fast memory;
the rest is on the disk (CPU) or in the host's memory (GPU). A step goes over the chunks once. On a CPU, while one is
updated (``kernels/adamw.py``), the next ones come in and the last ones go out (``pager.py``). On a GPU the kernel reads
and writes what is away where it is (``unified_memory.py``).

What a step costs: an update with float32 parameters moves 28 bytes an element through memory, and where nothing is
kept, 8 in and 8 out of the arena. The slower of the two decides.
"""

from __future__ import annotations

import operator
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from qloralab.kernels.adamw import Rates

from .arena import Arena, Memory
from .distributed import any_of, is_distributed, local, local_beside, shown_like
from .interrupts import held_interrupts
from .layout import Layout, lay_out, piece_bytes
from .mapped_file import MappedFile
from .moments import ITEMSIZE, PLANS, Batch, Moments, check_param
from .pager import FEWEST_PLACES, Chunk, Counters, Pager, divide
from .paging import Paging
from .state_dict import NAMES, Entry, check_options, copy_, entry_of, nested, read

NONFINITE = ("update", "skip", "raise")

_NONE: dict[str, Tensor] = {}  # what a parameter has in `state` before its first update
_NOTHING: tuple[dict[str, Tensor], list[Tensor]] = _NONE, []
_MIDWAY = "an update failed midway: load the parameters and the state from a checkpoint"


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
    """Parameters that are on one device, and their moments."""

    moments: Moments
    shared: _Device


@dataclass
class _Work:
    """Parameters to update that are of one part and, by now, of one group."""

    part: _Part
    group: int
    numbers: list[int] = field(default_factory=list)  # in the part
    params: list[Tensor] = field(default_factory=list)


class PagedAdamW(Optimizer):
    """``torch.optim.AdamW`` with a state that pages.

    The update, its order and its rounding are those of ``kernels/adamw.py``. Parameters are float32, bfloat16 or
    float16, contiguous, on CPUs or NVIDIA GPUs; a group may lie on several devices. Of a ``DTensor`` (``fully_shard``)
    each process updates its part.

    ``state`` and ``param_groups`` are the truth, as in PyTorch: the next step goes on from what is assigned there, from
    nothing where an entry was removed, and with the rates of the group that a parameter is in by then.

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
        ValueError: an argument is out of range, a parameter not contiguous, twice in a group or, with 8 bits, a DTensor
            (the scales of its codes would have no place in a checkpoint for other numbers of processes); a group asks
            for amsgrad, maximize or coupled weight decay.
        TypeError: a parameter has another dtype, or values that are not in its own memory.
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
        self._shown: dict[Tensor, tuple[dict[str, Tensor], list[Tensor]]] = {}  # entries of `state`, and their values
        self._works: dict[tuple[tuple[int, ...], ...], list[_Work]] = {}
        self._places: dict[Tensor, tuple[int, int]] = {}  # where in param_groups a parameter was found last
        self._process = os.getpid()
        self._broken: str | None = None
        self._lock = threading.RLock()  # backward has a thread for each device
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        if state_bits == 8:
            self.register_state_dict_post_hook(_nested)
        self._allocate(param for group in self.param_groups for param in group["params"] if param.requires_grad)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in PyTorch.

        Raises:
            ValueError: also where the budget has no room left for another group to page in.
            OSError, MemoryError: there is no room for its state. The optimizer is as it was, after each of them.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_options(group, f"group {len(self.param_groups) - 1}")
            self._check_distinct(group["params"])
            if self._parts:
                self._allocate(param for param in group["params"] if param.requires_grad)
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
            ValueError, TypeError: a parameter, its gradient, its state or a rate is not what it has to be, or a
                gradient is not finite (``nonfinite="raise"``); nothing was updated.
            RuntimeError: an update failed before; or the state pages to a file, and this is a forked process.
            OSError: the state could not be written; all parameters are updated, and the message says what to do.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._lock, held_interrupts():
            groups = enumerate(self.param_groups)
            if self._update([(n, [p for p in group["params"] if p.grad is not None]) for n, group in groups]):
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
        with self._lock, held_interrupts():
            replaced = self._replaced(list(self._homes))
            if replaced:
                self._put(replaced)
                self._end()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this optimizer, of ``torch.optim.AdamW``, or of AdamW of bitsandbytes, paged or not.

        It is copied chunk by chunk to where the state pages; a state of other bits is converted on the way.

        Raises:
            ValueError: the groups or the shapes are others, or the state is another optimizer's; nothing was changed.
        """
        with self._lock, held_interrupts():
            # Between the hooks of others: behind those that change what is loaded, before those that look at it.
            entries: dict[Tensor, Entry] = {}
            handles = [
                self.register_load_state_dict_pre_hook(lambda _, found: self._take(found, entries)),
                self.register_load_state_dict_post_hook(lambda _: self._put_all(entries), prepend=True),
            ]
            try:
                super().load_state_dict(state_dict)
            finally:
                for handle in handles:
                    handle.remove()

    def _take(self, state_dict: dict[str, Any], entries: dict[Tensor, Entry]) -> dict[str, Any]:
        """Read the entries of a state dictionary, and leave the rest of it."""
        self._check_process()
        entries |= read(state_dict, self.param_groups)
        self._allocate(param for param in entries if param not in self._homes)
        return {**state_dict, "state": {}}

    def _put_all(self, entries: Mapping[Tensor, Entry]) -> None:
        """Let these be the state of all parameters."""
        self._broken = _MIDWAY
        for part in self._parts:
            part.moments.arena.failure = None
        self._put({param: entries.get(param) for param in self._homes})
        self._end()

    def _put(self, entries: Mapping[Tensor, Entry | None]) -> None:
        """Copy the state of parameters, None if they are to have none, chunk by chunk to where it pages."""
        by_part: dict[int, dict[int, Entry | None]] = {}
        for param, entry in entries.items():
            index, number = self._homes[param]
            by_part.setdefault(index, {})[number] = entry
        for index, of_part in sorted(by_part.items()):
            part, moments = self._parts[index], self._parts[index].moments
            for chunk, segments in zip(moments.chunks, moments.layout.segments, strict=True):
                chosen = [segment for segment in segments if segment.param in of_part]
                if chosen:
                    self._use(part, chunk)
                for segment in chosen:
                    copy_(moments.of_segment(segment), of_part[segment.param], segment)
            for number, entry in of_part.items():
                moments.steps[number] = 0 if entry is None else entry.step
        for param, entry in entries.items():
            if entry is not None:
                self._show(param)
            elif self._shown.pop(param, None):
                self.state.pop(param, None)

    def __reduce_ex__(self, protocol: object):
        raise TypeError("a PagedAdamW cannot be pickled or copied: save its state_dict(), which any AdamW can load")

    def _allocate(self, params: Iterable[Tensor]) -> None:
        """Make room for the state of parameters that have none, and register them."""
        chosen = set(params)
        if not chosen:
            return
        wanted: dict[torch.device, list[tuple[list[Tensor], Layout]]] = {}
        for group in self.param_groups:
            on_device: dict[torch.device, list[Tensor]] = {}
            for param in group["params"]:
                if param in chosen:
                    if param.device.type not in ("cpu", "cuda"):
                        what = f"a parameter {list(param.shape)} is on {param.device}"
                        raise ValueError(f"{what}; the state pages on CPUs and NVIDIA GPUs")
                    if self._state_bits == 8 and is_distributed(param):
                        raise ValueError(f"a parameter {list(param.shape)} is a DTensor, which needs state_bits=32")
                    check_param(param, param.device)
                    on_device.setdefault(param.device, []).append(param)
            for device, members in on_device.items():
                numels = [local(param).numel() for param in members]
                layout = lay_out(numels, ITEMSIZE[self._state_bits], self._piece)
                wanted.setdefault(device, []).append((members, layout))
        # All memory first: where there is too little, nothing has been registered.
        made: list[tuple[torch.device, _Device, tuple[int, int], list[_Part]]] = []
        for device, layouts in wanted.items():
            places = None if self._budget is None else self._budget // (2 * self._piece)
            shared = self._devices.get(device, _Device(places, streams=device.type == "cpu"))
            stay, width = shared.divide(sum(len(layout.ranges) for _, layout in layouts))
            left, parts = stay, []
            for members, layout in layouts:
                keep = min(left, len(layout.ranges))
                left -= keep
                arena = self._arena(layout, keep, device)
                moments = Moments(members, layout, self._state_bits, arena, keep, shared.streams)
                parts.append(_Part(moments, shared))
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

    def _update(self, groups: Sequence[tuple[int, Sequence[Tensor]]]) -> bool:
        """Update parameters, by the number of their group; they have a gradient. Whether it was done, or skipped."""
        if self._broken:
            raise RuntimeError(self._broken)
        self._check_process()
        works = self._works_of(groups)
        rates = [self._rates(work.group) for work in works]
        grads = [self._gradients(work.params) for work in works]
        if self._nonfinite != "update" and (bad := _not_finite(works, grads)) is not None:
            if self._nonfinite == "raise":
                raise ValueError(f"{self._name(bad)} has a gradient that is not finite; no parameter was updated")
            self.skipped += 1
            return False
        batches = [work.part.moments.batches(work.numbers) for work in works]
        replaced = self._replaced(param for work in works for param in work.params)
        self._broken = _MIDWAY
        self._put(replaced)
        for one in zip(works, grads, batches, rates, strict=True):
            self._update_part(*one)
        self._broken = None
        return True

    def _works_of(self, groups: Sequence[tuple[int, Sequence[Tensor]]]) -> list[_Work]:
        """The parameters of some groups by the part that they are in. Kept, as most steps have the same."""
        key = tuple((group, *map(id, members)) for group, members in groups)
        if key not in self._works:
            params = [param for _, members in groups for param in members]
            self._check_distinct(params)
            self._allocate(param for param in params if param not in self._homes)
            found: dict[tuple[int, int], _Work] = {}
            for group, members in groups:
                for param in members:
                    index, number = self._homes[param]
                    work = found.setdefault((index, group), _Work(self._parts[index], group))
                    work.numbers.append(number)
                    work.params.append(param)
            if len(self._works) >= PLANS:
                self._works.clear()
            self._works[key] = [found[place] for place in sorted(found)]
        return self._works[key]

    def _gradients(self, params: Sequence[Tensor]) -> list[Tensor]:
        grads = []
        for param in params:
            try:
                grads.append(_gradient(param))
            except (TypeError, ValueError, RuntimeError) as error:
                raise type(error)(f"{self._name(param)} has a gradient that {error}") from None
        return grads

    def _update_part(self, work: _Work, grads: Sequence[Tensor], batches: Sequence[Batch], rates: Rates) -> None:
        """Go over the chunks of a part, those without a parameter to update excepted."""
        moments, counters = work.part.moments, work.part.shared.counters
        steps = moments.advance(work.numbers)
        for number, step in zip(work.numbers, steps, strict=True):
            if step == 1:
                self._show(moments.params[number])
        moments.arena.recall()
        for batch in batches:
            self._use(work.part, batch.chunk)
            moments.update(batch, grads, steps, rates)
            counters.fetched += batch.away
            counters.evicted += batch.away

    def _update_in_backward(self, param: Tensor) -> None:
        """The hook: the gradient of a parameter is complete."""
        with self._lock, held_interrupts(), torch.no_grad():
            group = self._group_of(param)
            if group is not None:
                self._update([(group, [param])])
                param.grad = None

    def _group_of(self, param: Tensor) -> int | None:
        """The number of the group that a parameter is in now; None: it was taken out."""
        group, index = self._places.get(param, (0, 0))
        if group < len(self.param_groups):
            members = self.param_groups[group]["params"]
            if index < len(members) and members[index] is param:
                return group
        for group, its in enumerate(self.param_groups):
            for index, other in enumerate(its["params"]):
                self._places[other] = group, index
                if other is param:
                    return group
        return None

    def _rates(self, number: int) -> Rates:
        """Of a group, as they are now."""
        group = self.param_groups[number]
        check_options(group, f"group {number}")
        try:
            return Rates(*map(float, (group["lr"], *group["betas"], group["eps"], group["weight_decay"])))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"lr, betas, eps and weight_decay of group {number} are no numbers: {error}") from error

    def _replaced(self, params: Iterable[Tensor]) -> dict[Tensor, Entry | None]:
        """What others have put in the place of the state of these parameters; None: nothing."""
        found = {}
        for param in params:
            entry, (shown, values) = self.state.get(param, _NONE), self._shown.get(param, _NOTHING)
            if entry is shown and len(entry) == len(values) and all(map(operator.is_, entry.values(), values)):
                continue
            if entry or shown:
                # Copied: it may be a view of what another parameter is about to be given.
                what = f"the state of {self._name(param)}"
                found[param] = entry_of(entry, param, what).copy() if entry else None
        return found

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
        views = [shown_like(view, param) for view in moments.of_param(number)]
        names, values = ("step", *NAMES[self._state_bits]), [moments.steps[number], *views]
        self.state[param] = entry = dict(zip(names, values, strict=True))
        self._shown[param] = entry, values

    def _check_distinct(self, params: Sequence[Tensor]) -> None:
        if len(set(params)) < len(params):
            twice = next(param for index, param in enumerate(params) if any(param is other for other in params[:index]))
            raise ValueError(f"{self._name(twice)} is there twice; an optimizer updates each once")

    def _check_process(self) -> None:
        if self._process != os.getpid() and any(device.pager is not None for device in self._devices.values()):
            raise RuntimeError(
                "the state pages to a file of another process, from which this one was forked: make the optimizer here"
            )

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


def _not_finite(works: Sequence[_Work], grads: Sequence[Sequence[Tensor]]) -> Tensor | None:
    """A parameter whose gradient has NaN or infinity, in any process. Waits for the device once for each part."""
    for work, some in zip(works, grads, strict=True):
        largest = torch.stack([grad.abs().amax().float() if len(grad) else grad.new_zeros(()).float() for grad in some])
        bad = any_of(largest.isfinite().logical_not(), work.params).nonzero()
        if len(bad):
            return work.params[int(bad[0])]
    return None


def _check_rates(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not float(value) >= 0:
            raise ValueError(f"{name} is at least 0, not {value}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas are two numbers from 0 to 1, 1 excluded, not {betas}")


def _nested(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dictionary of 8 bits in the layout of bitsandbytes."""
    return {**state_dict, "state": {key: nested(entry) for key, entry in state_dict["state"].items()}}


def _gradient(param: Tensor) -> Tensor:
    """The gradient of a parameter, or of its local part, flat."""
    grad = param.grad
    assert grad is not None
    if grad.layout is not torch.strided:
        raise RuntimeError(f"is {grad.layout}, for which PagedAdamW has no update")
    if grad.dtype is not param.dtype or grad.device != param.device or grad.shape != param.shape:
        found = f"{grad.dtype} {list(grad.shape)} on {grad.device}"
        raise ValueError(f"is {found}; the parameter is {param.dtype} {list(param.shape)} on {param.device}")
    if grad.is_neg() or grad._is_zerotensor():
        grad = grad.clone()  # which writes the values that it stands for
    if grad.requires_grad:
        grad = grad.detach()
    if type(grad) is not Tensor or type(param) is not Parameter:
        grad = local_beside(grad, param)
    return grad.contiguous().view(-1)
