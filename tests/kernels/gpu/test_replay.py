"""What is replayed is what would have been launched: every kernel, grid and parameter, for every kind of call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qloralab.kernels.cpu.build import BuildError
from qloralab.kernels.gpu import replay

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
    assert found["native"]["replays of more"] == 0  # what PyTorch computes too
    assert native[:1] + native[2:7] == ["native", [3, 1, 1], 512, 65536, 7, True]
    assert native[7] == ["x", "temporary 0", 0, 2**32 - 3, 3, 2**64 - 2**40, 2**63, 0x3F000000]
    assert sums[0] == "_add_parts"
    assert sums[7][0] == "temporary 0"


def test_a_launch_waits_for_what_may_have_written_its_weight(found):
    assert found["native"]["depends"] == [True, False, True, False, True]


# What happens around a recording, with operators and programs that are made up.


class Made:
    """Stands for a program that was recorded: gives a tensor, or nothing."""

    def __init__(self, result: Tensor | None, device: str = "cuda", functions: tuple[int, ...] = (1, 2)):
        self.program = SimpleNamespace(launches=[SimpleNamespace(name=f"_{one}", function=one) for one in functions])
        self.device, self.result, self.calls = torch.device(device), result, 0
        self.is_dependent = False

    def __call__(self, addresses: Sequence[int], stream: int, depend: bool = False) -> Tensor | None:
        self.calls += 1
        return self.result


class Recorder:
    """Makes operators that are recorded."""

    made: Made | None = None

    def __call__(self, run: Callable[..., Any]) -> Callable[..., Any]:
        return replay.replayed("an operator", run)


@pytest.fixture
def recorder(monkeypatch) -> Iterator[Any]:
    """``recorder(run)`` is an operator of a tensor; what its recording gives is ``recorder.made``."""
    noted: Any = lambda: nullcontext([])  # noqa: E731
    made = Recorder()
    monkeypatch.setattr(replay, "_tools", replay._Tools(lambda device: 7, lambda values: None, noted, bool))
    monkeypatch.setattr(replay, "_replay", lambda *_: made.made)
    replay.clear()
    yield made
    replay.clear()


def ones(x: Tensor) -> Tensor:
    return torch.ones_like(x)


def test_the_first_replay_of_kernels_is_compared_and_the_others_are_not(recorder):
    call, x = recorder(ones), torch.zeros(3)
    recorder.made = Made(torch.ones(3))
    for calls in (0, 1, 2, 3):  # seen; recorded, and compared; replayed
        assert torch.equal(call(x), torch.ones(3))
        assert recorder.made.calls == calls
    recorder.made = Made(torch.zeros(5))  # the same kernels with another shape
    for calls in (0, 0, 1):
        call(torch.zeros(5))
        assert recorder.made.calls == calls


@pytest.mark.parametrize(
    "wrong", [torch.tensor([1.0, 1, -1]), torch.ones(4), torch.ones(3).int()], ids=["a value", "a shape", "a dtype"]
)
def test_kernels_that_give_other_bits_end_all_replays(recorder, wrong):
    call, x = recorder(ones), torch.zeros(3)
    recorder.made = Made(wrong)
    call(x)
    with pytest.warns(RuntimeWarning, match="the launches of _1, _2, issued together, gave other bits") as caught:
        assert torch.equal(call(x), torch.ones(3))
    assert len(caught) == 1
    for size in (3, 4, 4, 4):
        assert torch.equal(call(torch.zeros(size)), torch.ones(size))
    assert recorder.made.calls == 1


def test_zeros_are_compared_with_their_signs(recorder):
    call = recorder(torch.zeros_like)
    recorder.made = Made(-torch.zeros(3))
    call(torch.ones(3))
    with pytest.warns(RuntimeWarning, match="other bits"):
        call(torch.ones(3))


def test_a_thread_without_a_context_goes_the_ordinary_way(recorder):
    call, x = recorder(ones), torch.zeros(3)
    recorder.made = Made(None)
    for _ in range(4):
        assert torch.equal(call(x), torch.ones(3))
    recorder.made = Made(torch.ones(3))
    call(x)  # compared, once there is one
    recorder.made.result = torch.full((3,), 2.0)
    assert torch.equal(call(x), torch.full((3,), 2.0))


@pytest.mark.parametrize("error", [BuildError("there is no compiler"), OSError("there is no libcuda")], ids=str)
def test_without_a_compiler_or_a_driver_nothing_is_replayed(recorder, monkeypatch, error):
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(replay, "_replay", fails)
    call = recorder(ones)
    call(torch.zeros(3))
    with pytest.warns(RuntimeWarning, match=f"{error}\nEach kernel is launched by itself") as caught:
        assert torch.equal(call(torch.zeros(3)), torch.ones(3))
    for size in (3, 4, 4):
        assert torch.equal(call(torch.zeros(size)), torch.ones(size))
    assert len(caught) == 1


def test_nothing_is_recorded_within_a_capture(recorder, monkeypatch):
    call, x = recorder(ones), torch.zeros(3)
    recorder.made = Made(torch.ones(3))
    monkeypatch.setattr(replay, "_is_capturing", lambda device: True)
    for _ in range(4):
        call(x)
    assert recorder.made.calls == 0
    monkeypatch.setattr(replay, "_is_capturing", lambda device: False)
    call(x)
    monkeypatch.setattr(replay, "_is_capturing", lambda device: True)
    call(x)  # what was recorded before is replayed into it
    assert recorder.made.calls == 2


def test_operators_are_not_mixed_up(recorder):
    recorder.made = Made(torch.ones(3), "cpu")
    one, other, x = recorder(ones), replay.replayed("another", torch.zeros_like), torch.zeros(3)
    for _ in range(3):
        one(x)
    assert torch.equal(other(x), torch.zeros(3))


def test_operands_at_one_address_are_not_recorded(recorder):
    call, x = recorder(lambda x, y: torch.ones_like(x)), torch.zeros(3)
    recorder.made = Made(torch.ones(3), "cpu")
    for _ in range(3):
        call(x, x)
    assert recorder.made.calls == 0
    call(x, torch.zeros(3))
    call(x, torch.zeros(3))
    assert recorder.made.calls == 1


def test_a_call_that_fails_is_no_recording(recorder):
    def fails(x: Tensor) -> Tensor:
        raise ValueError("no")

    call = recorder(fails)
    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            call(torch.zeros(3))


def test_only_so_many_kinds_are_remembered(recorder, monkeypatch):
    monkeypatch.setattr(replay, "MOST", 3)
    call = recorder(ones)
    recorder.made = Made(torch.ones(1), "cpu")
    for size in range(1, 9):
        for _ in range(3):
            call(torch.zeros(size))
    assert len(replay._replays) == len(replay._seen) == 3
    before = recorder.made.calls
    call(torch.zeros(8))
    assert recorder.made.calls == before + 1
    call(torch.zeros(1))  # forgotten
    assert recorder.made.calls == before + 1


def test_triton_is_not_imported_to_look_for_a_replay():
    code = (
        "import sys, torch; from qloralab.kernels.gpu import replay\n"
        "call = replay.replayed('an operator', torch.ones_like)\n"
        "assert torch.equal(call(torch.zeros(3)), torch.ones(3)) and 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
