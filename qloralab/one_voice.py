"""Of the processes that ``torchrun`` starts for one run, one says why the run ends.

A mistake in an option is found by all of them, and when one is killed all others lose it. Each would say so. Until the
processes know each other, the first of them speaks; from then on, whichever asks first.
"""

from __future__ import annotations

import os
from collections.abc import Callable


def started() -> int:
    """How many processes ``torchrun``, or another launcher with its environment variables, has started; 1: none."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdigit() and "RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this is the first of them, or the only one."""
    return started() == 1 or os.environ["RANK"] == "0"


_asked: list[Callable[[], bool]] = [lambda: True]


def expect_others() -> None:
    """This command may be one of several processes: the first of them speaks."""
    ask(is_first)


def speaks() -> bool:
    """Whether this process says why it ends."""
    return _asked[-1]()


def ask(who: Callable[[], bool]) -> None:
    """From now on, ``speaks`` asks this."""
    _asked.append(who)
