"""``benchmarks/cpu.py`` on small weights: who is right is timed, who is wrong is not; tables say what records say."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from qloralab.benchmarks import cpu
from qloralab.benchmarks.case import OPERATIONS
from qloralab.benchmarks.cpu import MEMORY, OPERATORS, POINTS, SHAPES, Roofline, main, measure, roofline
from qloralab.benchmarks.cpu_providers import EMULATED, PROVIDERS
from qloralab.benchmarks.cpu_views import GOALS, plot, tables
from qloralab.benchmarks.provider import PRODUCTS, Provider, from_user
from qloralab.benchmarks.record import RECORDS, record_file, write
from qloralab.benchmarks.view import Goal

README = Path(cpu.__file__).with_name("README.md")
LIMITS = Roofline(copy_gb_per_s=10.0, float32_gflop_per_s=100.0, bfloat16_gflop_per_s=400.0)
FIELDS = {
    "benchmark", "memory", "operation", "shape", "M", "provider", "dtype", "ms", "reps", "device", "class",
    "capability", "mkl", "lowered", "threads", "versions", "commit", "error", "wrong", "skipped", "roofline",
    "bound_ms",
}  # fmt: skip
NAMED = {one.name: one for one in PROVIDERS}


def measured(points, providers=PROVIDERS) -> list[dict]:
    return list(measure([(64, 64)], points, LIMITS, providers, 0.0, memory="recycled"))


def test_a_tiny_run_from_the_measurement_to_the_views(tmp_path, capsys):
    points = [("dequantize", None), ("quantize", None), *((operation, 4) for operation in PRODUCTS)]
    records = measured(points)
    assert [r["wrong"] for r in records] == [None] * len(records)
    assert {(r["operation"], r["provider"]) for r in records} == {
        (operation, one.name) for one in PROVIDERS for operation in one.operations
    }
    for record in records:
        assert set(record) >= FIELDS
        assert record["reps"] == NAMED[record["provider"]].fewest
        assert 0 < record["ms"]["p20"] <= record["ms"]["p50"] <= record["ms"]["p80"]
    assert {r["dtype"] for r in records if r["provider"] in ("ours, f32", "f32")} == {"float32"}
    assert {r["dtype"] for r in records if r["provider"] in ("ours", "bf16")} == {"bfloat16"}
    file = record_file(tmp_path, "cpu")
    write(records, file)
    assert json.loads(file.read_text()) == records
    main(["--view", records[0]["class"], "--out", str(tmp_path)])
    assert "dequantize" in capsys.readouterr().out
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_provider_is_not_timed_and_the_rest_goes_on():
    calls = []

    def off(case):
        return [lambda: calls.append(case) or (case.expected[0] * 1.0125).bfloat16()]

    def raises(case):
        raise ValueError("odd")

    wrong, broken = (Provider(name, runs, ("linear",)) for name, runs in (("ours", off), ("mine", raises)))
    refused, failed, timed = measured([("linear", 4)], [wrong, broken, NAMED["bf16"]])
    assert len(calls) == 1  # for the check
    assert (refused["ms"], refused["reps"], refused["error"]) == (None, 0, None)
    assert refused["wrong"] == "error 0.013, 0.002 allowed"
    assert (failed["wrong"], failed["ms"]) == ("ValueError: odd", None)
    assert timed["reps"] == 15


def test_the_providers_of_the_readme(tmp_path, monkeypatch):
    """The example is timed; one that is off is refused with its error; what it does not take is no record."""
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    name = re.search(r"^def (\w+)", example, re.MULTILINE)
    assert name
    (tmp_path / "readme_example.py").write_text(example)
    (tmp_path / "readme_wrong.py").write_text(
        f"from readme_example import {name[1]}\n\ndef off(case):\n    runs = {name[1]}(case)\n"
        "    return runs and [lambda run=run: 1.25 * run() for run in runs]\n"
    )
    monkeypatch.chdir(tmp_path)
    mine = from_user(f"readme_example:{name[1]}"), from_user("readme_wrong:off")
    right, wrong = measured([("linear", 4), ("dequantize", None)], mine)
    assert right["ms"]["p50"] > 0
    assert (wrong["ms"], wrong["wrong"]) == (None, "error 0.25, 0.002 allowed")
    for unknown in ("no_such_module:f", "readme_example:no_such_name", "readme_example"):
        with pytest.raises(SystemExit, match="module:NAME"):
            from_user(unknown)


def test_more_rows_than_a_provider_has_time_for_are_recorded_as_skipped():
    slow = Provider("bf16", lambda case: pytest.fail("it was asked"), ("linear",), dense=True, most_rows=16)
    (record,) = measured([("linear", 17)], [slow])
    assert (record["ms"], record["wrong"], record["reps"]) == (None, None, 0)
    assert record["skipped"].endswith("up to M = 16")
    assert (NAMED["bf16"].most_rows == 16) == EMULATED


def test_the_bound_is_the_longer_of_traffic_and_arithmetic():
    assert LIMITS.bound_ms(nbytes=10**7, flops=0, dtype=torch.float32) == pytest.approx(1.0)
    assert LIMITS.bound_ms(nbytes=10**7, flops=3 * 10**8, dtype=torch.float32) == pytest.approx(3.0)
    assert LIMITS.bound_ms(nbytes=0, flops=8 * 10**8, dtype=torch.bfloat16) == pytest.approx(2.0)
    emulated = dataclasses.replace(LIMITS, bfloat16_gflop_per_s=None)
    assert emulated.bound_ms(nbytes=0, flops=8 * 10**8, dtype=torch.bfloat16) == pytest.approx(8.0)


def test_rates_are_measured():
    limits = roofline(nbytes=2**16, shape=(8, 64, 64), seconds=0.0)
    assert 0.01 < limits.copy_gb_per_s < 10**4
    assert 0.001 < limits.float32_gflop_per_s < 10**5
    assert (limits.bfloat16_gflop_per_s is None) == EMULATED  # its product is not timed where it is emulated


def test_every_operation_is_measured_and_is_one_of_ours():
    assert {operation for operation, _ in POINTS} == set(OPERATIONS[:5]) == set(OPERATORS)
    assert all(hasattr(torch.ops.qloralab, name) for name in OPERATORS.values())
    for goals in GOALS.values():
        assert {(goal.operation, goal.M) for goal in goals} <= set(POINTS)


def record(operation: str, M: int | None, provider: str, ms: float | None, **fields) -> dict:
    return {
        "memory": "recycled", "operation": operation, "shape": [4096, 4096], "M": M, "provider": provider,
        "ms": ms and {"p20": ms - 0.1, "p50": ms, "p80": ms + 0.2}, "bound_ms": 0.25,
        "device": "a processor, 2 threads", "class": "avx512-bf16", "commit": "abc",
        "roofline": {"copy_gb_per_s": 40.0, "float32_gflop_per_s": None, "bfloat16_gflop_per_s": 400.0}, **fields,
    }  # fmt: skip


RECORDED = [
    record("dequantize", None, "ours", 0.5),
    record("dequantize", None, "bitsandbytes", 4.0),
    record("dequantize", None, "bf16", 0.5),
    record("linear", 1, "ours", 0.5),
    record("linear", 1, "bitsandbytes", 12.0),
    record("linear", 1, "bitsandbytes, eval", 1.5),
    record("linear", 1, "bf16", 1.5),
    record("linear", 128, "ours", 11.0),
    record("linear", 128, "reference", None, wrong="error 0.1"),
    record("linear", 128, "bitsandbytes, eval", None, wrong="error 0.1"),
    record("linear", 128, "bitsandbytes", 20.0),
    record("linear", 128, "bf16", 10.5),
]
AVX2 = {"class": "avx2"}


def test_a_row_shows_the_times_and_each_goal(lines):
    assert lines(*tables(RECORDED)) == [
        ["dequantize", "4096x4096", "", "0.5", "", "4", "0.5 copy", "50%", "bitsandbytes / ours ≥ 6", "8.00 yes"],
        ["", "", "", "", "", "", "", "", "ours / bf16 copy ≤ 0.80", "1.00 no"],
        # the faster of the two ways of bitsandbytes, and which it is
        ["linear", "4096x4096", "1", "0.5", "", "1.5 eval", "1.5", "50%", "bf16 / ours ≥ 3", "3.00 yes"],
        ["", "", "", "", "", "", "", "", "bitsandbytes / ours ≥ 20", "3.00 no"],
        # a way that gave a wrong result is no peer, however fast
        ["linear", "4096x4096", "128", "11", "wrong", "20", "10.5", "2%", "ours / bf16 ≤ 1.10", "1.05 yes"],
    ]


def test_on_avx2_ours_in_float32_is_held_against_the_faster_dense_product(lines):
    times = {"ours": 9.0, "ours, f32": 2.0, "bf16": 4.0, "f32": 5.0}
    records = [record("linear", 1, name, ms, **AVX2) for name, ms in times.items()]
    records += [record("linear", 128, name, 6.0, **AVX2) for name in ("ours, f32", "f32")]
    records += [record("linear", 128, "bf16", None, skipped="emulated", **AVX2)]
    assert lines(*tables(records)) == [
        ["linear", "4096x4096", "1", "9", "2", "4", "5", "12%", "ours / dense ≤ 0.60", "0.50 yes"],
        ["linear", "4096x4096", "128", "", "6", "emulated", "6", "4%", "ours / f32 ≤ 1.10", "1.00 yes"],
    ]


def test_the_title_says_the_class_and_what_lowered_it():
    (table,) = tables([record("linear", 1, "ours", 1.0, **AVX2, lowered={"QLORALAB_ISA": "avx2"})])
    assert str(table.title).startswith("avx2: a processor, 2 threads, commit abc, QLORALAB_ISA=avx2, memory recycled")


def test_nothing_is_reached_by_a_wrong_result(lines):
    found = lines(*tables([record("linear", 16, "ours", None, wrong="error 0.1"), record("linear", 16, "bf16", 3.0)]))
    assert found[0][3:6] == ["wrong", "3", ""]
    assert [line[-1] for line in found] == ["not timed", "not timed"]


def test_each_kind_of_memory_has_its_table(lines):
    fresh = [record("dequantize", None, "ours", 9.0, memory="fresh")]
    assert [lines(table)[0][3] for table in tables([*RECORDED, *fresh])] == ["0.5", "9"]


@pytest.mark.parametrize(
    ("goal", "ours", "peer", "reached"),
    [
        (Goal("linear", 1, "bf16", 3), 1.0, 3.0, (3.0, True)),
        (Goal("linear", 1, "bf16", 3), 1.0, 2.0, (2.0, False)),
        (Goal("linear", 512, "bf16", 1.25, faster=False), 5.0, 4.0, (1.25, True)),
        (Goal("linear", 512, "bf16", 1.25, faster=False), 6.0, 4.0, (1.5, False)),
    ],
)
def test_a_goal_is_a_ratio_of_times(goal, ours, peer, reached):
    assert goal.reached(ours, peer) == reached


def test_a_provider_that_was_added_is_shown_and_drawn(tmp_path):
    added = [*RECORDED, record("linear", 1, "mine", 0.7), record("dequantize", None, "mine", 0.9)]
    (table,) = tables(added)
    shown = [str(column.header) for column in table.columns][3:8]
    assert shown == ["ours", "reference", "bitsandbytes", "bf16", "mine"]
    assert list(table.columns[7].cells) == ["0.9", "0.7", ""]
    for name, some in {"added": added, "all": RECORDED, "products": RECORDED[3:], "none": []}.items():
        plot(some, tmp_path / f"{name}.png")  # what is wrong or missing is left out
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("file", sorted(RECORDS.glob("cpu-*.json")), ids=lambda file: file.stem)
def test_the_committed_records_are_of_one_run_and_shown(file):
    records = json.loads(file.read_text())
    for field in ("device", "commit", "threads", "class"):
        assert len({r[field] for r in records}) == 1, field
    assert file.stem == f"cpu-{records[0]['class']}"
    ours = [r for r in records if r["provider"].startswith("ours")]
    found = {(r["memory"], *r["shape"], r["operation"], r["M"]) for r in ours}
    first = [point for point in POINTS if point[0] != "adapted layer"]  # there since the record of avx2
    assert found >= {(memory, *shape, *point) for memory in MEMORY for shape in SHAPES for point in first}
    assert {r["implementation"] for r in ours} == {"native"}
    assert not any(r["wrong"] for r in ours)
    assert len(list(tables(records))) == len(MEMORY)
