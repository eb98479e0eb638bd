"""An optimizer whose state may be larger than the memory it is given (QLoRA, arXiv 2305.14314, section 3).

The state is in chunks, a budget of which is in fast memory; the rest is on the disk (CPU) or in the host's memory
(GPU). A step goes over the chunks once. On a CPU, while one is updated (``kernels/update.py``), the next ones come in
and the last ones go out (``pager.py``). On a GPU the kernel reads and writes what is away where it is
(``unified_memory.py``). ``storage.py`` has the memory, ``shown.py`` and ``groups.py`` look at what users change.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from qloralab.kernels.rule import Rule
from qloralab.kernels.update import update_

from .groups import check_distinct, check_rates, find, gradients, name_of, not_finite, rates_of
from .interrupts import held_interrupts
from .moments import PLANS, Batch
from .paging import Paging
from .shown import Shown
from .state_dict import Entry, check_options, nested, read
from .storage import Part, Storage

NONFINITE = ("update", "skip", "raise")

_MIDWAY = "an update failed midway: load the parameters and the state from a checkpoint"


@dataclass
class _Work:
    """Parameters to update that are of one part and, by now, of one group."""

    part: Part
    group: int
    numbers: list[int] = field(default_factory=list)  # in the part
    params: list[Tensor] = field(default_factory=list)


class PagedOptimizer(Optimizer):
    """The optimizer of a rule, whose state pages. A class of one names its rule, and its options in ``__init__``.

    Args:
        params: parameters, (name, parameter) pairs or groups, as for any PyTorch optimizer.
        defaults: the options of the rule's rates, in their order.
        state_bits, budget, nonfinite, update_in_backward, state_dir, oversubscribe: as for ``PagedAdamW``.
    """

    rule: ClassVar[Rule]

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        state_bits: int = 32,
        budget: int | None = None,
        nonfinite: str = "update",
        update_in_backward: bool = False,
        state_dir: str | os.PathLike[str] | None = None,
        oversubscribe: bool = False,
    ):
        check_rates(defaults)
        self._storage = Storage(self.rule, state_bits, budget, state_dir, oversubscribe)
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite is one of {', '.join(NONFINITE)}, not {nonfinite!r}")
        self._shown = Shown(self._storage, self.rule, state_bits)
        self.skipped = 0
        self._nonfinite, self._in_backward, self._rate_defaults = nonfinite, update_in_backward, dict(defaults)
        self._works: dict[tuple[tuple[int, ...], ...], list[_Work]] = {}
        self._found: dict[Tensor, tuple[int, int]] = {}  # the group that a parameter was in last, and its index there
        self._process = os.getpid()
        self._broken: str | None = None
        self._lock = threading.RLock()  # backward has a thread for each device
        super().__init__(params, defaults)
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
            check_options(group, f"group {len(self.param_groups) - 1}", self.rule)
            check_distinct(self.param_groups, group["params"])
            if self._storage.parts:
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
        return self._storage.paging()

    def state_dict(self) -> dict[str, Any]:
        """The state in the layout of PyTorch, or with 8 bits in that of bitsandbytes; both load it where they can.

        As in PyTorch the tensors are the live ones: the next step changes them. Saving them reads what is away from the
        disk, and doubles nothing.

        Raises:
            RuntimeError: an update failed midway, or a part of the state is lost.
        """
        if self._broken:
            raise RuntimeError(self._broken)
        with self._lock, held_interrupts():
            replaced = self._replaced(self._storage.homes)
            if replaced:
                self._shown.put(self.state, replaced)
                self._end()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this optimizer, or that of PyTorch's or bitsandbytes' for the same rule, paged or not.

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
        entries |= read(state_dict, self.param_groups, self.rule)
        self._allocate(param for param in entries if param not in self._storage.homes)
        return {**state_dict, "state": {}}

    def _put_all(self, entries: Mapping[Tensor, Entry]) -> None:
        """Let these be the state of all parameters."""
        self._broken = _MIDWAY
        for part in self._storage.parts:
            part.moments.arena.failure = None
        self._shown.put(self.state, {param: entries.get(param) for param in self._storage.homes})
        self._end()

    def __reduce_ex__(self, protocol: object):
        name, any_ = type(self).__name__, self.rule.name
        raise TypeError(f"a {name} cannot be pickled or copied: save its state_dict(), which any {any_} can load")

    def _allocate(self, params: Iterable[Tensor]) -> None:
        """Make room for the state of parameters that have none."""
        for param in self._storage.allocate((group["params"] for group in self.param_groups), params):
            if self._in_backward:
                param.register_post_accumulate_grad_hook(_hook(weakref.ref(self)))

    def _update(self, groups: Sequence[tuple[int, Sequence[Tensor]]]) -> bool:
        """Update parameters, by the number of their group; they have a gradient. Whether it was done, or skipped."""
        if self._broken:
            raise RuntimeError(self._broken)
        self._check_process()
        works = self._works_of(groups)
        rates = [rates_of(self.param_groups, work.group, self._rate_defaults, self.rule) for work in works]
        grads = [gradients(self.param_groups, work.params, self.rule) for work in works]
        if self._nonfinite != "update":
            found = (not_finite(work.params, some) for work, some in zip(works, grads, strict=True))
            if (bad := next((param for param in found if param is not None), None)) is not None:
                if self._nonfinite == "raise":
                    name = name_of(self.param_groups, bad)
                    raise ValueError(f"{name} has a gradient that is not finite; no parameter was updated")
                self.skipped += 1
                return False
        batches = [work.part.moments.batches(work.numbers) for work in works]
        replaced = self._replaced(param for work in works for param in work.params)
        self._broken = _MIDWAY
        self._shown.put(self.state, replaced)
        for one in zip(works, grads, batches, rates, strict=True):
            self._update_part(*one)
        self._broken = None
        return True

    def _works_of(self, groups: Sequence[tuple[int, Sequence[Tensor]]]) -> list[_Work]:
        """The parameters of some groups by the part that they are in. Kept, as most steps have the same."""
        key = tuple((group, *map(id, members)) for group, members in groups)
        if key not in self._works:
            params = [param for _, members in groups for param in members]
            check_distinct(self.param_groups, params)
            self._allocate(param for param in params if param not in self._storage.homes)
            found: dict[tuple[int, int], _Work] = {}
            for group, members in groups:
                for param in members:
                    index, number = self._storage.homes[param]
                    work = found.setdefault((index, group), _Work(self._storage.parts[index], group))
                    work.numbers.append(number)
                    work.params.append(param)
            if len(self._works) >= PLANS:
                self._works.clear()
            self._works[key] = [found[one] for one in sorted(found)]
        return self._works[key]

    def _update_part(self, work: _Work, grads: Sequence[Tensor], batches: Sequence[Batch], rates: Any) -> None:
        """Go over the chunks of a part, those without a parameter to update excepted."""
        moments, shared = work.part.moments, work.part.shared
        steps = moments.advance(work.numbers)
        for number, step in zip(work.numbers, steps, strict=True):
            if step == 1:
                self._shown.show(self.state, moments.params[number])
        moments.arena.recall()
        for batch in batches:
            shared.use(batch.chunk)
            update_(self.rule, batch.segments(grads, steps), rates)
            shared.counters.fetched += batch.away
            shared.counters.evicted += batch.away

    def _update_in_backward(self, param: Tensor) -> None:
        """The hook: the gradient of a parameter is complete."""
        with self._lock, held_interrupts(), torch.no_grad():
            group = self._group_of(param)
            if group is not None:
                self._update([(group, [param])])
                param.grad = None

    def _group_of(self, param: Tensor) -> int | None:
        """The number of the group that a parameter is in now; None: it was taken out."""
        group, index = self._found.get(param, (0, 0))
        if group < len(self.param_groups):
            members = self.param_groups[group]["params"]
            if index < len(members) and members[index] is param:
                return group
        if (found := find(self.param_groups, param)) is None:
            return None
        self._found[param] = found
        return found[0]

    def _replaced(self, params: Iterable[Tensor]) -> dict[Tensor, Entry | None]:
        return self._shown.replaced(self.state, params, lambda param: name_of(self.param_groups, param))

    def _end(self) -> None:
        """Let go of the last chunks; say what could not be written."""
        self._broken, failure = None, self._storage.end()
        if failure:
            lost = "All parameters were updated, but a part of the state is lost: load both from a checkpoint"
            self._broken = f"{getattr(failure, 'strerror', None) or failure}. {lost}"
            raise OSError(getattr(failure, "errno", None), self._broken) from failure

    def _check_process(self) -> None:
        if self._process != os.getpid() and self._storage.pages_to_a_file:
            raise RuntimeError(
                "the state pages to a file of another process, from which this one was forked: make the optimizer here"
            )


def _hook(optimizer: weakref.ref[PagedOptimizer]) -> Callable[[Tensor], None]:
    """What a parameter calls when its gradient is complete. It does not keep an optimizer that nobody else has."""

    def update(param: Tensor) -> None:
        if (alive := optimizer()) is not None:
            alive._update_in_backward(param)

    return update


def _nested(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dictionary of 8 bits in the layout of bitsandbytes."""
    entries = {key: nested(entry, optimizer.rule) for key, entry in state_dict["state"].items()}
    return {**state_dict, "state": entries}
