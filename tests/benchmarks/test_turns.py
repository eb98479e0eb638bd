"""Processes work in turns, never at once, and end together."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest

from qloralab.benchmarks.turns import in_turns

CHILD = """
import json, sys, time
from qloralab.benchmarks.turns import turn
log = []
for _ in range(TURNS):
    turn()
    log.append(time.monotonic())
    time.sleep(0.02)
    log.append(time.monotonic())
if TURNS == 1:
    sys.exit(7)
print("something that a library says")
print(json.dumps({"log": log}))
"""


def child(turns: int) -> list[str]:
    return [sys.executable, "-c", CHILD.replace("TURNS", str(turns))]


def test_processes_work_in_turns_and_never_at_once():
    first, second = (record["log"] for record in in_turns({"a": child(3), "b": child(4)}))
    assert [len(first), len(second)] == [6, 8]
    spans = sorted(
        (*log[i : i + 2], name) for name, log in (("a", first), ("b", second)) for i in range(0, len(log), 2)
    )
    assert [name for *_, name in spans] == list("abababb")
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_a_process_that_fails_ends_the_other():
    with pytest.raises(SystemExit, match="a ended with code 7, without a record"):
        in_turns({"a": child(1), "b": child(4)})
