"""The GPU's benchmark without a GPU: the same run by the host's clock, its providers right, wrong or broken."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from qloralab.benchmarks import gpu, gpu_optimizer
from qloralab.benchmarks.case import OPERATIONS, Case, Weight
from qloralab.benchmarks.clock import Timer, host
from qloralab.benchmarks.gpu import POINTS, chosen, fused_up_to, main, measure, run
from qloralab.benchmarks.gpu_canaries import Canary, CanaryError
from qloralab.benchmarks.gpu_device import Device, Limits, ceilings, state
from qloralab.benchmarks.gpu_providers import PROVIDERS
from qloralab.benchmarks.gpu_views import GOALS, fits, tables, with_ratios
from qloralab.benchmarks.provider import Provider
from qloralab.benchmarks.record import RECORDS, TRIALS, gpu_record_file
from qloralab.benchmarks.sass.compile import compile_cases
from qloralab.benchmarks.work import Work, least
from qloralab.kernels.gpu import choice
from qloralab.kernels.gpu.choice import KERNELS

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which has wheels for Linux")
LIMITS = Limits(copy_gb_per_s=10.0, gemm_tflop_per_s=0.1)
LATER = float("inf")
CEILINGS = {"nbytes": 2**16, "shape": (8, 64, 64), "seconds": 0.0}
COMMON = {"benchmark": "gpu", "device": "a GPU", "versions": {}, "commit": "abc"}
FIELDS = {
    "benchmark", "kind", "operation", "shape", "M", "provider", "status", "why", "ms", "reps", "error", "timing",
    "note", "copies", "ratios", "roofline", "bound_ms", "roofline_share", "device", "versions", "commit",
}  # fmt: skip


def device(free: int = 2**34) -> Device:
    return Device(CPU, "A GPU (80 GB)", 2**15, host, lambda: free)


def provider(name: str) -> Provider:
    return next(one for one in PROVIDERS if one.name == name)


def raises(case: Case):
    raise RuntimeError("no kernel image is available\nfor execution")


def raises_when_called(case: Case):
    def call() -> torch.Tensor:
        raise ValueError("odd")

    return [call]


def off(case: Case):
    runs: Any = provider("bf16").runs(case)
    return [lambda: runs[0]() * 1.25]


CONTENDERS = [
    provider("ours"),
    provider("bf16"),
    Provider("raises", raises),
    Provider("raises when called", raises_when_called),
    Provider("off", off, operations=("linear",)),
    Provider("absent", raises, package="a_package_that_nobody_has"),
]


def measured(
    points, free: int = 2**34, deadline: float = LATER, limits: Limits | None = LIMITS, **options
) -> list[dict[str, Any]]:
    options = {"shapes": [(64, 128)], "providers": CONTENDERS, "seconds": 0.0, **options}
    return [
        record
        for point in measure(device(free), COMMON, limits, deadline, points=points, **options)
        for record in point
    ]


def by_provider(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {record["provider"]: record for record in records}


NO_GPU = "no GPU was measured: torch.cuda.is_available() is False\n"


def test_without_a_gpu_one_line_and_no_error():
    command, environment = [sys.executable, "-m", "benchmarks.gpu"], {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, NO_GPU, "")


@pytest.mark.parametrize(("command", "options"), [(main, ["--save"]), (gpu_optimizer.main, [])])
def test_without_a_gpu_nothing_is_written(command, options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command(["--out", str(tmp_path), *options])
    assert capsys.readouterr().out == NO_GPU
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
        "off": ("wrong", "error 0.25, 0.002 allowed"),
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
    assert ours["reps"] == 5
    assert ours["timing"] == "host"


def test_an_adapter_of_another_rank_with_dropout_is_right_too():
    points = [("adapted layer", 8), ("linear", 8)]
    records = measured(points, providers=[*map(provider, ("ours", "bf16", "bitsandbytes"))], rank=4, dropout=0.3)
    layer, linear = records[:2], records[2:]
    assert [(r["provider"], r["status"], r["rank"], r["dropout"]) for r in layer] == [
        ("ours", "ok", 4, 0.3), ("bf16", "ok", 4, 0.3)
    ]  # fmt: skip
    assert layer[0]["bound_ms"] < measured(points[:1], providers=[provider("ours")])[0]["bound_ms"]
    assert [(r["provider"], r["status"]) for r in linear] == [("ours", "ok"), ("bf16", "ok"), ("bitsandbytes", "ok")]
    assert {frozenset(r) for r in linear} == {frozenset(FIELDS)}


def test_points_are_of_the_operations_and_rows_that_are_asked_for():
    assert chosen(None, None) == POINTS
    assert chosen(["dequantize", "adapted layer"], None) == [
        ("dequantize", None), ("adapted layer", 1024), ("adapted layer", 4096)
    ]  # fmt: skip
    assert chosen(["quantize", "linear"], [3, 5]) == [("quantize", None), ("linear", 3), ("linear", 5)]
    assert chosen(["canaries"], [3]) == []


def test_operations_and_providers_are_listed(capsys):
    main(["--list"])
    out = capsys.readouterr().out
    for part in (
        "linear: 1, 4, 16,",
        "quantize: no rows",
        "chain: 1, 16",
        '"ours, fused": linear, input gradient',
        "it needs a GPU",
    ):
        assert part in out


def test_without_ceilings_there_is_no_bound():
    ours = by_provider(measured([("linear", 4)], limits=None))["ours"]
    assert ours["status"] == "ok"
    assert (ours["roofline"], ours["bound_ms"], ours["roofline_share"]) == (None, None, None)


NEED = Case("linear", Weight((64, 128), CPU, 2**15, gpu.COPIES), 4096).memory(5)
SKIPPED: dict[str, tuple[dict[str, Any], str]] = {
    "deadline": ({"deadline": 0.0}, "the time was up"),
    "rows": ({"free": NEED}, f"it needs {NEED / 1e9:.1f} GB, {NEED / 1e9:.1f} are free"),
    "weight": ({"free": 1000}, "MemoryError: a weight needs "),
}


@pytest.mark.parametrize(("limits", "why"), SKIPPED.values(), ids=SKIPPED)
def test_what_has_no_time_or_memory_is_skipped(limits, why):
    records = measured([("linear", 4096), ("linear", 4)], providers=CONTENDERS[:5], **limits)
    large, small = records[:5], by_provider(records[5:])
    assert {record["status"] for record in large} == {"skipped"}
    assert all(record["why"].startswith(why) for record in large)
    assert small["ours"]["status"] == ("ok" if limits == {"free": NEED} else "skipped")  # the rest goes on


def test_a_lost_device_ends_the_measurement_not_the_report(monkeypatch):
    why = "the device was lost: RuntimeError: an illegal memory access was encountered"

    def synchronize() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert dataclasses.replace(device(), device=torch.device("cuda")).lost() == why
    assert device().lost() is None
    monkeypatch.setattr(Device, "lost", lambda self: why)
    first, second = (by_provider(part) for part in (lambda r: (r[:6], r[6:]))(measured([("linear", 4), ("linear", 1)])))
    assert first["ours"]["status"] == "ok"
    assert {record["status"] for record in second.values()} == {"skipped"}
    assert second["ours"]["why"] == why


def test_a_sample_that_fails_is_a_record():
    there = dataclasses.replace(device(), prepare=lambda runs, graph: Timer(lambda: [][0], "graph"))
    (point,) = measure(there, COMMON, LIMITS, LATER, [(64, 64)], [("linear", 4)], CONTENDERS[:2], 0.0)
    assert {(r["status"], r["why"]) for r in point} == {("failed", "IndexError: list index out of range")}


def test_a_provider_is_called_inside_its_context_which_no_clock_sees():
    events: list[str] = []

    @contextmanager
    def inside():
        events.append("enter")
        yield
        events.append("leave")

    def sample() -> float:
        events.append("clock")
        return 1.0

    runs: Any = provider("bf16").runs
    one = Provider("mine", lambda case: events.append("runs") or runs(case), ("linear",), inside=inside, fewest=2)
    there = dataclasses.replace(device(), prepare=lambda runs, graph: events.append("prepare") or Timer(sample))
    list(measure(there, COMMON, LIMITS, LATER, [(64, 64)], [("linear", 4)], [one], 0.0))
    assert events == ["enter", "runs", "prepare", "leave", *["enter", "clock", "leave"] * 2]


def test_ours_are_held_to_a_kernel_each():
    for name, kernel in gpu.PROVIDER_KERNELS.items():
        with provider(name).inside():
            assert choice.decide(4096, 4096, 1, choice.Device("sm_90", 132, "a card")).kernel == kernel


def holds(guard) -> None:
    guard.copy(torch.ones(3))


def holds_not(guard) -> None:
    raise CanaryError("1 of 2 elements differ")


def test_a_run_from_the_canaries_to_the_table(tmp_path, capsys):
    path = gpu_record_file(tmp_path, "A GPU (80 GB)")
    assert path.name == "gpu-a-gpu-80-gb.json"
    records = run(
        device(), path, LATER,
        [Canary("right", holds), Canary("wrong", holds_not)], ceilings=CEILINGS,
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
    main(["--view", str(path)])
    out = capsys.readouterr().out
    assert "1 of 2 canaries do not hold" in out
    assert "1 of 2 elements differ" in out
    assert "linear" in out


@pytest.mark.parametrize(
    ("arguments", "folder", "seconds"),
    [
        ([], RECORDS, gpu.BUDGET),
        (["--rows", "1"], TRIALS, gpu.BUDGET),
        (["--only", "linear"], TRIALS, gpu.BUDGET),
        (["--budget", "0"], TRIALS, 0.0),
    ],
)
def test_only_a_run_of_all_points_is_a_record(arguments, folder, seconds, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "cuda_device", device)
    monkeypatch.setattr(gpu, "run", lambda *given, **options: asked.append(given) or [])
    main(arguments)
    ((_, path, deadline, _),) = asked
    assert path == gpu_record_file(folder, "A GPU (80 GB)")
    assert deadline - time.monotonic() == pytest.approx(seconds, abs=10)


def test_a_run_goes_on_without_ceilings(tmp_path, capsys):
    records = run(
        device(), tmp_path / "records.json", LATER, [], ceilings={"shape": (1, 2, -1)},
        measure={"shapes": [(64, 64)], "points": [("linear", 1)], "providers": CONTENDERS[:1], "seconds": 0.0},
    )  # fmt: skip
    assert [(r["status"], r["bound_ms"]) for r in records if r["kind"] == "point"] == [("ok", None)]
    assert "no ceilings: RuntimeError" in capsys.readouterr().err


def test_canaries_after_the_deadline_do_not_run(tmp_path):
    records = run(
        device(), tmp_path / "records.json", time.monotonic(), [Canary("right", holds)], ceilings=CEILINGS,
        measure={"shapes": [(64, 64)], "points": [("linear", 1)], "providers": CONTENDERS[:1]},
    )  # fmt: skip
    assert records[0]["wrong"] == "the time was up"


@pytest.mark.parametrize(("free", "nbytes"), [(2**34, 2**20), (2**16, 2**50)], ids=["ordinary", "more than is free"])
def test_ceilings_are_rates(free, nbytes):
    limits = ceilings(device(free), nbytes=nbytes, shape=(64, 64, 64), seconds=0.0)
    assert 0.01 < limits.copy_gb_per_s < 10**4
    assert 1e-6 < limits.gemm_tflop_per_s < 100
    assert limits.read_gb_per_s is not None
    assert 0.01 < limits.read_gb_per_s < 10**4


def test_what_is_read_alone_takes_the_rate_of_reading():
    limits = Limits(copy_gb_per_s=2.0, gemm_tflop_per_s=1.0, read_gb_per_s=4.0)
    assert limits.bound_ms(Work(read=10**6, written=0, flops=0)) == pytest.approx(0.25)
    assert limits.bound_ms(Work(read=10**6, written=10**6, flops=0)) == pytest.approx(1.0)
    assert limits.bound_ms(Work(read=3 * 10**6, written=10**6, flops=0)) == pytest.approx(1.0 + 0.5)
    assert limits.bound_ms(Work(read=10**6, written=3 * 10**6, flops=0)) == pytest.approx(2.0)
    assert limits.bound_ms(Work(read=10**6, written=0, flops=10**9)) == pytest.approx(1.0)
    assert dataclasses.replace(limits, read_gb_per_s=None).bound_ms(Work(10**6, 0, 0)) == pytest.approx(0.5)


@needs_triton
def test_the_kernel_that_reads_reads_all():
    from qloralab.benchmarks.gpu_read import BLOCK, read

    source = torch.randint(-2, 3, (2 * BLOCK + 5,), dtype=torch.int32)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    assert read(source.to(where)).tolist() == [int(part.sum()) for part in source.split(BLOCK)]


@needs_triton
def test_the_kernel_that_reads_loads_16_bytes_a_thread():
    (code,) = compile_cases(["sm_90"], ["qloralab.benchmarks.gpu_read"])
    loads = re.findall(r"\bLDG\S*", code.sass)
    assert set(loads) == {"LDG.E.128"}
    assert len(loads) == 64 * 1024 / 16 / 256
    assert code.spilled == 0


SMI = """#!/bin/sh
[ "$1" = --id=GPU-1 ] && echo "1755, 2619, 690.25, [N/A], 61"
"""
NOTHING = dict.fromkeys(("sm_mhz", "memory_mhz", "power_w", "power_limit_w", "celsius"))


def test_clocks_and_power_are_what_nvidia_smi_says(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(SMI)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert state(device()) == NOTHING  # it may not be executed
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert state(device()) == NOTHING  # it knows no such device
    known = dataclasses.replace(device(), id="GPU-1")
    assert state(known) == {**NOTHING, "sm_mhz": 1755.0, "memory_mhz": 2619.0, "power_w": 690.25, "celsius": 61.0}
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert state(known) == NOTHING


def test_clocks_and_power_stand_around_the_points(tmp_path, monkeypatch):
    said = iter([{**NOTHING, "sm_mhz": 1980.0, "power_w": 80.0, "celsius": 30.0}, {**NOTHING, "sm_mhz": 1410.0}])
    monkeypatch.setattr(gpu, "state", lambda device: next(said))
    records = run(
        device(), tmp_path / "records.json", LATER, [Canary("right", holds)], ceilings=CEILINGS,
        measure={"shapes": [(64, 64)], "points": [("linear", 1)], "providers": CONTENDERS[:1], "seconds": 0.0},
    )  # fmt: skip
    assert [record["kind"] for record in records] == ["canary", "state", "point", "state"]
    (table,) = tables(records)
    assert "before 1980 MHz, 80 W, 30 °C, after 1410 MHz; " in str(table.caption)


def test_a_provider_that_is_not_installed_says_so():
    assert provider("ours").missing() is None
    if (why := provider("unsloth").missing()) is not None:
        assert why == "unsloth is not installed"


def record(provider: str, ms: float | None, M: int | None = 16, operation: str = "linear", **fields) -> dict[str, Any]:
    return {
        "kind": "point", "operation": operation, "shape": [4096, 4096], "M": M, "provider": provider,
        "ms": ms and {"p20": ms, "p50": ms, "p80": ms}, "status": "ok" if ms else "failed",
        "timing": "graph" if ms else None, "roofline_share": 0.5 if ms else None,
        "roofline": {"copy_gb_per_s": 3000.0, "gemm_tflop_per_s": 700.0}, "device": "a GPU", "commit": "abc", **fields,
    }  # fmt: skip


def test_a_row_shows_the_times_the_ratios_and_the_goals(lines):
    point = [record("ours", 0.010), record("bf16", 0.025), record("bitsandbytes", 0.020, timing="events")]
    assert lines(*tables(with_ratios(point))) == [
        [
            *("linear", "4096x4096", "16", "10.0", "", "25.0", "20.0 e", "", "50%"),
            *("2.50", "≥ 2.8 no", "2.00", "≥ 1.6 yes"),
        ]
    ]


def test_a_provider_that_was_added_is_shown_and_the_goals_are_for_the_fastest_of_ours(lines):
    times = {"ours": 0.020, "ours, fused": 0.010, "mine": 0.004, "ours, another": 0.005, "bf16": 0.02}
    (row,) = lines(*tables(with_ratios([record(name, ms) for name, ms in times.items()])))
    assert row[3:12] == ["20.0", "10.0", "20.0", "", "", "4.0", "5.0", "50%", "4.00"]
    assert row[12] == "≥ 2.8 yes"


def test_what_was_not_timed_reaches_nothing(lines):
    point = [record("ours", None), record("bf16", 0.025), record("unsloth", None, status="missing")]
    assert lines(*tables(with_ratios(point))) == [
        ["linear", "4096x4096", "16", "failed", "", "25.0", "", "missing", "", "", "≥ 2.8", "", "≥ 1.6"]
    ]


def timed(provider: str, M: int, t0: float, rate: float) -> list[dict[str, Any]]:
    dense = provider == "bf16"
    return [
        record(provider, t0 + 1e-6 * least("linear", shape, M, dense).nbytes / rate, M=M, shape=shape)
        for shape in ([4096, 4096], [14336, 4096], [1024, 4096])
    ]


def test_a_line_through_the_times_of_few_rows_has_their_rate_and_what_they_take_besides():
    records = [*timed("bf16", 4, 0.002, 3000.0), *timed("ours", 1, 0.0075, 2000.0), *timed("ours", 64, 0.1, 1000.0)]
    assert list(fits(records)) == [
        ("ours", "1", "3", "7.5", "2,000", "0.0%"), ("bf16", "4", "3", "2.0", "3,000", "0.0%")
    ]  # fmt: skip
    assert list(fits(records[:1])) == []
    upwards = [record("ours", 0.03, M=1), record("ours", 0.01, M=1, shape=[14336, 4096])]
    assert [row[4] for row in fits(upwards)] == ["none"]


def test_the_committed_record_has_these_lines():
    found = {row[:2]: row[3:5] for row in fits(json.loads((RECORDS / "gpu-nvidia-h100-80gb-hbm3.json").read_text()))}
    assert found["ours, fused", "1"] == ("6.8", "1,721")
    assert found["bitsandbytes", "1"] == ("4.1", "1,219")


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


def test_the_rows_are_printed_from_a_record(tmp_path, capsys):
    points = [
        record(one, ms, M=1, operation=operation)
        for one, ms in (("ours", 0.02), ("ours, fused", 0.01))
        for operation in ("linear", "input gradient")
    ]
    (tmp_path / "gpu.json").write_text(json.dumps(points))
    main(["--view", str(tmp_path / "gpu.json"), "--save"])
    assert capsys.readouterr().out.splitlines()[-1] == '    "a GPU": {(4096, 4096): 1},'


def test_the_rows_of_the_committed_record():
    path = RECORDS / "gpu-nvidia-h100-80gb-hbm3.json"
    assert fused_up_to(json.loads(path.read_text())) == {(4096, 4096): 256, (14336, 4096): 512, (4096, 14336): 256}


@pytest.mark.parametrize("file", sorted(RECORDS.glob("gpu-nvidia*.json")), ids=lambda file: file.stem)
def test_the_committed_records_are_shown(file):
    records = json.loads(file.read_text())
    assert file == gpu_record_file(RECORDS, records[0]["device"])
    assert {(r["operation"], r["M"]) for r in records if r["kind"] == "point"} == set(POINTS)
    table, fit = tables(records)
    assert fit.caption
    assert "155 of 155 canaries hold" in str(table.title)
