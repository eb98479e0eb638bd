"""The GPU's benchmark without a GPU: the same run by the host's clock, its providers right, wrong or broken."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import gpu
from benchmarks.gpu import (
    POINTS,
    Deadline,
    Device,
    Limits,
    ceilings,
    fused_up_to,
    library_versions,
    main,
    measure,
    record_file,
    run,
    view,
)
from benchmarks.gpu_canaries import Canary, CanaryError
from benchmarks.gpu_problem import OPERATIONS, Problem, Weight, WrongResultError, copies
from benchmarks.gpu_providers import ADAPTED, ONCE, PROVIDERS, Provider
from benchmarks.gpu_timing import FEWEST, MOST, CudaClock, HostClock, Timer, interleave
from benchmarks.gpu_views import GOALS, tables, with_ratios
from qloralab.kernels.gpu.choice import FUSED_UP_TO, KERNELS

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
LIMITS = Limits(copy_gb_per_s=10.0, gemm_tflop_per_s=0.1)
LATER = Deadline(float("inf"))
FIELDS = {
    "benchmark", "kind", "operation", "shape", "M", "provider", "status", "why", "ms", "reps", "error", "timing",
    "note", "copies", "ratios", "roofline", "bound_ms", "roofline_share", "device", "versions", "commit",
}  # fmt: skip


def device(free: int = 2**34) -> Device:
    return Device(CPU, "A GPU (80 GB)", 2**15, HostClock(), lambda: free)


def provider(name: str) -> Provider:
    return next(one for one in PROVIDERS if one.name == name)


def raises(problem: Problem):
    raise RuntimeError("no kernel image is available\nfor execution")


def raises_when_called(problem: Problem):
    def call() -> torch.Tensor:
        raise ValueError("odd")

    return [call]


def off(problem: Problem):
    return [lambda: provider("bf16").runs(problem)[0]() * 1.25]  # pyright: ignore[reportOperatorIssue]


CONTENDERS = [
    provider("ours"),
    provider("bf16"),
    Provider("raises", raises),
    Provider("raises when called", raises_when_called),
    Provider("off", off, operations=("linear",)),
    Provider("absent", raises, package="a_package_that_nobody_has"),
]


def measured(
    points, free: int = 2**34, deadline: Deadline = LATER, limits: Limits | None = LIMITS, **options
) -> list[dict[str, Any]]:
    common = {"benchmark": "gpu", "device": "a GPU", "versions": {}, "commit": "abc"}
    options = {"shapes": [(64, 128)], "providers": CONTENDERS, "seconds": 0.0, **options}
    return [
        record
        for point in measure(device(free), common, limits, deadline, points=points, **options)
        for record in point
    ]


def by_provider(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {record["provider"]: record for record in records}


def test_without_a_gpu_one_line_and_no_error():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"],
        cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (
        0, "no GPU was measured: torch.cuda.is_available() is False\n", ""
    )  # fmt: skip


def test_without_a_gpu_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main(["--out", str(tmp_path), "--save"])
    assert list(tmp_path.iterdir()) == []


def test_one_failing_provider_is_a_record_and_the_rest_goes_on():
    records = measured([("linear", 4), ("dequantize", None)])
    linear, dequantize = by_provider(records[:6]), by_provider(records[6:])
    assert set(linear) == {one.name for one in CONTENDERS}
    assert set(dequantize) == set(linear) - {"off"}
    for record in records:
        assert set(record) == FIELDS
        assert (record["ms"] is None) == (record["status"] != "ok")
        assert (record["why"] is None) == (record["status"] == "ok")
    found = {name: (record["status"], record["why"]) for name, record in linear.items()}
    assert found == {
        "ours": ("ok", None),
        "bf16": ("ok", None),
        "raises": ("failed", "RuntimeError: no kernel image is available for execution"),
        "raises when called": ("failed", "ValueError: odd"),
        "off": ("wrong", "error 0.25, 0.003 allowed"),
        "absent": ("missing", "a_package_that_nobody_has is not installed"),
    }
    assert dequantize["ours"]["error"] == 0.0


def test_a_record_holds_ratios_and_its_share_of_the_roofline():
    records = by_provider(measured([("linear", 4)]))
    ours, dense = records["ours"], records["bf16"]
    assert set(ours["ratios"]) == {"bf16"}
    assert ours["ratios"]["bf16"] == pytest.approx(dense["ms"]["p50"] / ours["ms"]["p50"])
    assert dense["ratios"]["ours"] == pytest.approx(1 / ours["ratios"]["bf16"])
    nbytes = 64 * 64 + 128 + 4 + 4 + 4 * 2 * (64 + 128)  # codes, scales, one second-level scale, the offset; x and y
    assert ours["bound_ms"] == pytest.approx(max(1e-6 * nbytes / 10.0, 1e-9 * 2 * 4 * 64 * 128 / 0.1))
    assert ours["roofline_share"] == pytest.approx(ours["bound_ms"] / ours["ms"]["p50"])
    assert ours["reps"] == FEWEST
    assert ours["timing"] == "host"


def test_without_ceilings_there_is_no_bound():
    ours = by_provider(measured([("linear", 4)], limits=None))["ours"]
    assert ours["status"] == "ok"
    assert (ours["roofline"], ours["bound_ms"], ours["roofline_share"]) == (None, None, None)


def test_after_the_deadline_points_are_skipped_and_nothing_runs():
    points = [("linear", 4), ("dequantize", None)]
    records = measured(points, deadline=Deadline(time.monotonic()))
    assert {(record["status"], record["why"]) for record in records} == {("skipped", "the time was up")}
    assert len(records) == 11


def test_what_does_not_fit_is_skipped_and_the_rest_goes_on():
    need = Problem("linear", Weight((64, 128), CPU, 2**15), 4096).memory(5)
    records = measured([("linear", 4096), ("linear", 4)], free=need, providers=CONTENDERS[:5])
    large, small = records[:5], records[5:]
    assert {record["status"] for record in large} == {"skipped"}
    assert large[0]["why"] == f"it needs {need / 1e9:.1f} GB, {need / 1e9:.1f} are free"
    assert by_provider(small)["ours"]["status"] == "ok"


def test_a_weight_that_cannot_be_made_is_skipped():
    records = measured([("linear", 4)], free=1000)
    assert {record["status"] for record in records} == {"skipped"}
    assert records[0]["why"].startswith("MemoryError: a weight needs ")


def test_a_lost_device_ends_the_measurement_not_the_report(monkeypatch):
    def lost(self) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(Device, "synchronize", lost)
    first, second = (by_provider(part) for part in (lambda r: (r[:6], r[6:]))(measured([("linear", 4), ("linear", 1)])))
    assert first["ours"]["status"] == "ok"
    assert {record["status"] for record in second.values()} == {"skipped"}
    assert second["ours"]["why"] == "the device was lost: RuntimeError: an illegal memory access was encountered"


def test_a_sample_that_fails_is_a_record():
    class Fails:
        def prepare(self, runs, graph: bool) -> Timer:
            return Timer(lambda: [][0], "graph")

    there = dataclasses.replace(device(), clock=Fails())
    common = {"benchmark": "gpu", "device": "a GPU", "versions": {}, "commit": "abc"}
    (point,) = measure(there, common, LIMITS, LATER, [(64, 64)], [("linear", 4)], CONTENDERS[:2], 0.0)
    assert {(r["status"], r["why"]) for r in point} == {("failed", "IndexError: list index out of range")}


def holds(guard) -> None:
    guard.copy(torch.ones(3))


def holds_not(guard) -> None:
    raise CanaryError("1 of 2 elements differ")


def test_a_run_from_the_canaries_to_the_table(tmp_path, capsys):
    path = record_file(tmp_path, "A GPU (80 GB)")
    assert path.name == "gpu-a-gpu-80-gb.json"
    records = run(
        device(), path, LATER,
        canaries=[Canary("right", holds), Canary("wrong", holds_not)],
        ceilings={"nbytes": 2**16, "shape": (8, 64, 64), "seconds": 0.0},
        measure={
            "shapes": [(64, 64)], "points": [("dequantize", None), ("linear", 4)], "providers": CONTENDERS,
            "seconds": 0.0,
        },
    )  # fmt: skip
    assert json.loads(path.read_text()) == records
    assert [(r["name"], r["wrong"]) for r in records if r["kind"] == "canary"] == [
        ("right", None), ("wrong", "CanaryError: 1 of 2 elements differ")
    ]  # fmt: skip
    assert {r["device"] for r in records} == {"A GPU (80 GB)"}
    assert all(r["roofline"]["copy_gb_per_s"] > 0 for r in records if r["kind"] == "point")
    view(path)
    out = capsys.readouterr().out
    assert "1 of 2 canaries do not hold" in out
    assert "1 of 2 elements differ" in out
    assert "linear" in out


def test_a_run_goes_on_without_ceilings(tmp_path, capsys):
    broken = dataclasses.replace(device(), clock=HostClock(), free=lambda: 2**34)
    records = run(
        broken, tmp_path / "records.json", LATER, canaries=[], ceilings={"shape": (1, 2, -1)},
        measure={"shapes": [(64, 64)], "points": [("linear", 1)], "providers": CONTENDERS[:1], "seconds": 0.0},
    )  # fmt: skip
    assert [(r["status"], r["bound_ms"]) for r in records] == [("ok", None)]
    assert "no ceilings: RuntimeError" in capsys.readouterr().err


def test_canaries_after_the_deadline_do_not_run(tmp_path):
    late = Deadline(time.monotonic())
    records = run(
        device(), tmp_path / "records.json", late, canaries=[Canary("right", holds)],
        ceilings={"nbytes": 2**16, "shape": (8, 64, 64), "seconds": 0.0},
        measure={"shapes": [(64, 64)], "points": [("linear", 1)], "providers": CONTENDERS[:1]},
    )  # fmt: skip
    assert records[0]["wrong"] == "the time was up"


def test_ceilings_are_rates():
    limits = ceilings(device(), nbytes=2**20, shape=(64, 64, 64), seconds=0.0)
    assert 0.01 < limits.copy_gb_per_s < 10**4
    assert 1e-6 < limits.gemm_tflop_per_s < 100


def test_the_ceiling_of_a_copy_takes_no_more_than_is_free():
    limits = ceilings(device(free=2**16), nbytes=2**50, shape=(8, 8, 8), seconds=0.0)
    assert limits.copy_gb_per_s > 0


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", ["ours", "bf16", "bitsandbytes"])
def test_providers_are_right(name, operation):
    one = provider(name)
    if operation not in one.operations:
        pytest.skip(f"{name} has no {operation}")
    M = None if operation in ("dequantize", "quantize") else 16
    problem = Problem(operation, Weight((64, 128), CPU, 2**15), M)
    runs = one.runs(problem)
    assert len(runs) == problem.copies > 2
    with torch.no_grad():
        errors = {one.check(problem, call()) for call in runs}
    assert len(errors) == 1
    if M is not None:
        assert errors.pop() > ONCE / 4


def test_a_provider_that_is_not_installed_says_so():
    assert provider("ours").missing() is None
    if (why := provider("unsloth").missing()) is not None:
        assert why == "unsloth is not installed"


@pytest.mark.parametrize(
    ("operation", "M", "spoil"),
    [
        ("linear", 4, lambda y: y.float()),
        ("linear", 4, lambda y: y[:, :-1]),
        ("linear", 1000, lambda y: torch.cat([y[:-1], y[-1:] + 1])),
        ("linear", 4, lambda y: y.masked_fill(y == y.max(), float("nan"))),
        ("dequantize", None, lambda y: y[:-1]),
        ("dequantize", None, lambda y: y + (y == y.max()) * 2.0**-7),
        ("quantize", None, lambda y: y * 1.02),
    ],
    ids=["dtype", "shape", "last of many rows", "NaN", "rows", "one weight", "codes"],
)
def test_a_wrong_result_is_refused(operation, M, spoil):
    problem = Problem(operation, Weight((64, 128), CPU, 1), M)
    right = problem.weight.dequantized if M is None else provider("bf16").runs(problem)[0]()
    tolerance = 0.0 if M is None else ONCE
    problem.check(right, tolerance)
    with pytest.raises(WrongResultError):
        problem.check(spoil(right), tolerance)


@pytest.mark.parametrize("part", range(4), ids=["y", "dx", "dA", "dB"])
def test_a_wrong_part_of_an_adapted_layer_is_refused(part):
    problem = Problem("adapted layer", Weight((64, 128), CPU, 1), 8)
    right: Any = provider("ours").runs(problem)[0]()
    problem.check(right, ADAPTED)
    with pytest.raises(WrongResultError):
        problem.check([result * (1.02 if i == part else 1) for i, result in enumerate(right)], ADAPTED)
    with pytest.raises(WrongResultError):
        problem.check(right[:2], ADAPTED)  # the result without an adapter


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (root)\n", "580.159.04"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n", "550.54.15"),
        ("something else\n", None),
    ],
)
def test_the_drivers_version(text, expected, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert gpu._driver() == expected


@pytest.mark.parametrize(("nbytes", "count"), [(1, 32), (10, 20), (99, 3), (100, 2), (10**6, 2)])
def test_copies_fill_the_cache_twice_within_limits(nbytes, count):
    assert copies(nbytes, 100) == count


def test_copies_are_of_their_own():
    weight = Weight((64, 64), CPU, 1)
    first = weight.copies("dense", weight.dequantized.clone, 2)
    again = weight.copies("dense", weight.dequantized.clone, 3)
    assert [a is b for a, b in zip(first, again, strict=False)] == [True, True]
    assert len({part.data_ptr() for part in again}) == 3


def test_memory_counts_what_is_there():
    problem = Problem("linear", Weight((64, 128), CPU, 1), 8)
    one, five = problem.memory(1), problem.memory(5)
    assert five - one == 4 * (problem.copies * 2 * 8 * 128 + 2 * 64 * 128)
    assert one > 8 * 64 * 128 + problem.copies * (2 * 64 * 128 + 64 * 64)


def test_contenders_take_turns_in_changing_order():
    calls: list[str] = []
    timers = {name: Timer(lambda name=name: calls.append(name) or len(calls), "host") for name in "abc"}
    samples = interleave(timers, 0.0)
    assert {len(of_one) for of_one in samples.values()} == {FEWEST}
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert {"".join(sorted(turn)) for turn in rounds} == {"abc"}
    assert len(set(rounds)) > 1
    assert samples["a"] == [place + 1 for place, name in enumerate(calls) if name == "a"]
    calls.clear()
    assert len(interleave(timers, 60.0)["a"]) == MOST


def test_the_hosts_clock_counts_a_call_of_each_copy():
    calls: list[int] = []
    timer = HostClock().prepare([lambda: calls.append(0), lambda: time.sleep(0.02)], graph=True)
    assert len(calls) == 1
    assert timer.sample() >= 10  # the mean of both
    assert len(calls) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [True, False])
def test_the_devices_clock(graph):
    source = torch.ones(2**28, dtype=torch.uint8, device="cuda")
    timer = CudaClock().prepare([source.clone, source.clone], graph)
    assert timer.kind == ("graph" if graph else "events")
    assert 2**29 / 20e9 < timer.sample() * 1e3 < 2**29 / 20e3  # between 20 GB/s and 20 TB/s


@pytest.mark.gpu
def test_what_cannot_be_captured_is_timed_by_events():
    x = torch.ones(8, device="cuda")
    timer = CudaClock().prepare([lambda: x.sum().item()], graph=True)
    assert timer.kind == "events"
    assert timer.note
    assert timer.sample() > 0


def record(provider: str, ms: float | None, M: int | None = 16, operation: str = "linear", **fields) -> dict[str, Any]:
    return {
        "kind": "point",
        "operation": operation,
        "shape": [4096, 4096],
        "M": M,
        "provider": provider,
        "ms": ms and {"p20": ms, "p50": ms, "p80": ms},
        "status": "ok" if ms else "failed",
        "timing": "graph" if ms else None,
        "roofline_share": 0.5 if ms else None,
        "roofline": {"copy_gb_per_s": 3000.0, "gemm_tflop_per_s": 700.0},
        "device": "a GPU",
        "commit": "abc",
        **fields,
    }


def rows(records: list[dict]) -> list[list[str]]:
    (table,) = tables(records)
    out = io.StringIO()
    Console(file=out, width=200).print(table)
    lines = [line for line in out.getvalue().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]


def test_a_row_shows_the_times_the_ratios_and_the_goals():
    point = [record("ours", 0.010), record("bf16", 0.025), record("bitsandbytes", 0.020, timing="events")]
    assert rows(with_ratios(point)) == [
        [
            *("linear", "4096x4096", "16", "10.0", "", "25.0", "20.0 e", "", "50%"),
            *("2.50", "≥ 2.8 no", "2.00", "≥ 1.6 yes"),
        ]
    ]


def test_the_goals_are_for_the_fastest_of_ours():
    times = {"ours": 0.020, "ours, fused": 0.005, "ours, another": 0.010, "bf16": 0.02}
    point = [record(name, ms) for name, ms in times.items()]
    (row,) = rows(with_ratios(point))
    assert row[3:6] == ["20.0", "5.0", "20.0"]
    assert row[8] == "10.0"
    assert row[10:12] == ["4.00", "≥ 2.8 yes"]


def test_a_provider_that_was_added_is_shown():
    point = [record("ours", 0.010), record("mine", 0.007), record("ours, another", 0.005), record("bf16", 0.02)]
    (row,) = rows(with_ratios(point))
    assert row[3:12] == ["10.0", "", "20.0", "", "", "7.0", "5.0", "50%", "4.00"]  # the fastest of ours counts


def test_what_was_not_timed_reaches_nothing():
    point = [record("ours", None), record("bf16", 0.025), record("unsloth", None, status="missing")]
    assert rows(with_ratios(point)) == [
        ["linear", "4096x4096", "16", "failed", "", "25.0", "", "missing", "", "", "≥ 2.8", "", "≥ 1.6"]
    ]


def test_no_table_without_points():
    assert list(tables([])) == []


def test_every_goal_belongs_to_a_point_and_every_point_to_an_operation():
    assert {(goal.operation, goal.M) for goal in GOALS} <= set(POINTS)
    assert len({(goal.operation, goal.M, goal.peer) for goal in GOALS}) == len(GOALS)
    assert {operation for operation, _ in POINTS} == set(OPERATIONS)
    assert set(gpu.PROVIDER_KERNELS.values()) == set(KERNELS)


def test_the_rows_of_the_table_are_where_both_ways_were_timed_in_both_directions():
    def both(M, fused, two_pass, back=1.0, operation="input gradient"):
        for name, ms in (("ours, fused", fused), ("ours", two_pass)):
            yield from (record(name, ms, M=M), record(name, ms and ms * back, M=M, operation=operation))

    records = [
        *both(1, 0.01, 0.02), *both(16, 0.01, 0.02), *both(64, 0.03, 0.02), *both(128, 0.01, 0.02),
        *both(4, None, 0.02), *both(8, 0.03, 0.02, operation="dequantize"), record("bf16", 0.03),
        {"kind": "canary", "name": "right", "wrong": None},
    ]  # fmt: skip
    assert fused_up_to(records) == {(4096, 4096): 16}
    assert fused_up_to(list(both(1, 0.02, 0.01))) == {(4096, 4096): 0}
    assert fused_up_to([record("ours", 0.02)]) == {}


def test_the_table_is_that_of_the_committed_record():
    path = Path(gpu.__file__).with_name("records") / "gpu-nvidia-h100-80gb-hbm3.json"
    assert fused_up_to(json.loads(path.read_text())) == FUSED_UP_TO["sm_90"]


def test_versions_of_what_is_installed_only(monkeypatch):
    monkeypatch.setattr(gpu, "PACKAGES", ("torch", "a-package-that-nobody-has"))
    found = library_versions()
    assert found["torch"].startswith(torch.__version__.partition("+")[0])
    assert "a-package-that-nobody-has" not in found
