"""What is replayed is what would have been launched: every kernel, grid and parameter, for every kind of call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CASES = Path(__file__).with_name("replays.py")
pytestmark = pytest.mark.compiler


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Of a process of its own, where kernels are compiled; nothing is launched."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(CASES)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_replay_launches_what_the_ordinary_way_does(found):
    assert {name: case["wrong"] for name, case in found["replayed"].items() if case["wrong"]} == {}
    assert {name for name, case in found["replayed"].items() if case["replays"] != 2} == set()
    assert sum(case["launches"] > 2 for case in found["replayed"].values()) > 10


def test_what_is_more_than_launches_goes_the_ordinary_way(found):
    assert {name: case["wrong"] for name, case in found["ordinary"].items() if case["wrong"]} == {}
    assert {name for name, case in found["ordinary"].items() if case["replays"]} == set()
    assert len(found["ordinary"]) > 10


def test_a_weight_that_was_written_to_or_moved_is_seen(found):
    assert found["in place"] == dict.fromkeys(found["in place"], True)
    assert len(found["in place"]) == 4


def test_steps_of_training_launch_the_same(found):
    assert found["a step"]["wrong"] == []
    assert found["a step"]["launches"] == 16
    assert found["a step"]["replays"] == 5 * 6


def test_it_waits_for_others_to_look_away(found):
    assert found["conditions"] == {
        "nothing": 5,
        "autocast": 5,
        "inference": 5,
        "launch_enter_hook": 0,
        "launch_exit_hook": 0,
        "devices": [7, 7, None],
        "nothing again": 5,
        "two-pass": 0,
    }


def test_a_kernel_that_is_not_tritons_is_replayed_beside_one_that_is(found):
    native, sums = found["native"]["launches"]
    assert found["native"]["same"] == [True] * 4
    assert found["native"]["replays"] == 5
    assert native[:1] + native[2:7] == ["native", [3, 1, 1], 512, 65536, 7, True]
    assert native[7] == ["x", "temporary 0", 0, 2**32 - 3, 3, 2**64 - 2**40, 2**63, 0x3F000000]
    assert sums[0] == "_add_parts"
    assert sums[7][0] == "temporary 0"
