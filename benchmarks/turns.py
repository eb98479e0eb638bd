"""Processes that work in turns: one at a time, while the others sleep.

What the machine does besides reaches all of them alike, and none of them takes a processor from the one that is timed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

WAITING = "waiting"  # what a process says that waits for its turn


def in_turns(commands: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """The records of processes that wait for a line on stdin at each ``turn``, and end with a record on stdout.

    Raises:
        SystemExit: one of them failed.
    """
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children: dict[str, Any] = {name: subprocess.Popen(command, **pipes) for name, command in commands.items()}
    said = dict.fromkeys(children, WAITING)
    try:
        for name, child in children.items():
            _hear(name, child)  # it is loaded, and waits
        while WAITING in said.values():
            for name, child in children.items():
                if said[name] == WAITING:
                    print(f"{name} …", file=sys.stderr, flush=True)
                    child.stdin.write("\n")
                    child.stdin.flush()
                    said[name] = _hear(name, child)
        return [json.loads(record) for record in said.values()]
    finally:
        for child in children.values():
            child.kill()
            child.communicate()


def _hear(name: str, child: subprocess.Popen[str]) -> str:
    """What a process says next: that it waits, or its record."""
    for line in child.stdout or ():
        if line.startswith((WAITING, "{")):
            return line.strip()
    raise SystemExit(f"{name} ended with code {child.wait()}, without a record")


def turn() -> None:
    """Let the other process work, asleep; without the one that hands out turns there is nothing left to do."""
    print(WAITING, flush=True)
    if not sys.stdin.readline():
        raise SystemExit("nobody waits for this record")
