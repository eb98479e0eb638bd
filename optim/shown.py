"""What an optimizer's ``state`` shows of the storage, and what users put in its place.

``state`` is the truth, as in PyTorch: the next step goes on from what is assigned there, and from nothing where an
entry was removed. An entry is a dictionary of views; whether it is still the one that was shown, value by value, tells
what was changed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

from torch import Tensor

from qloralab.kernels.rule import Rule

from .distributed import shown_like
from .state_dict import Entry, entry_of, names
from .storage import Storage

_NONE: dict[str, Any] = {}  # the entry of a parameter before its first update
_NOTHING: tuple[dict[str, Any], list[Tensor]] = _NONE, []
State = MutableMapping[Tensor, Any]


class Shown:
    """The entries that were shown last.

    Args:
        storage: whose state is shown.
        rule: has the names of the moments.
        state_bits: 32 or 8.
    """

    def __init__(self, storage: Storage, rule: Rule, state_bits: int):
        self._storage, self._rule, self._names = storage, rule, ("step", *names(rule, state_bits))
        self._entries: dict[Tensor, tuple[dict[str, Any], list[Tensor]]] = {}

    def show(self, state: State, param: Tensor) -> None:
        """Let ``state`` have the state of a parameter, as views of it."""
        index, number = self._storage.homes[param]
        moments = self._storage.parts[index].moments
        values = [moments.steps[number], *(shown_like(view, param) for view in moments.of_param(number))]
        state[param] = entry = dict(zip(self._names, values, strict=True))
        self._entries[param] = entry, values

    def replaced(
        self, state: State, params: Iterable[Tensor], name_of: Callable[[Tensor], str]
    ) -> dict[Tensor, Entry | None]:
        """What others have put in the place of the state of these parameters; None: nothing.

        Raises:
            ValueError: it is no state of the rule, or does not fit the parameter.
        """
        found = {}
        for param in params:
            entry, (shown, values) = state.get(param, _NONE), self._entries.get(param, _NOTHING)
            if entry is shown and len(entry) == len(values) and all(map(operator.is_, entry.values(), values)):
                continue
            if entry or shown:
                # Copied: it may be a view of what another parameter is about to be given.
                what = f"the state of {name_of(param)}"
                found[param] = entry_of(entry, param, self._rule, what).copy() if entry else None
        return found

    def put(self, state: State, entries: Mapping[Tensor, Entry | None]) -> None:
        """Copy the state of parameters to where it pages, and show it; None: they are to have none."""
        self._storage.copy_(entries)
        for param, entry in entries.items():
            if entry is not None:
                self.show(state, param)
            elif self._entries.pop(param, None):
                state.pop(param, None)
