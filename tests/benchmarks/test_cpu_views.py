"""Tables and picture say what the records say, and hold it against the goals."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from benchmarks.cpu import MEMORY, POINTS, SHAPES
from benchmarks.cpu_views import GOALS, Goal, plot, tables
from benchmarks.provenance import RECORDS


def record(operation: str, M: int | None, provider: str, ms: float | None, **fields) -> dict:
    return {
        "memory": "recycled",
        "operation": operation,
        "shape": [4096, 4096],
        "M": M,
        "provider": provider,
        "ms": ms and {"p20": ms - 0.1, "p50": ms, "p80": ms + 0.2},
        "bound_ms": 0.25,
        "device": "a processor, 2 threads",
        "class": "avx512-bf16",
        "commit": "abc",
        "roofline": {"copy_gb_per_s": 40.0, "float32_gflop_per_s": None, "bfloat16_gflop_per_s": 400.0},
        **fields,
    }


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


def rows(records: list[dict]) -> list[list[list[str]]]:
    """The lines of each table, as stripped cells."""
    found = []
    for table in tables(records):
        out = io.StringIO()
        Console(file=out, width=160).print(table)
        lines = [line for line in out.getvalue().splitlines() if line.startswith("│")]
        found.append([[cell.strip() for cell in line.split("│")[1:-1]] for line in lines])
    return found


def test_a_row_shows_the_times_and_each_goal():
    (table,) = rows(RECORDED)
    assert table == [
        ["dequantize", "4096x4096", "", "0.5", "", "4", "0.5 copy", "50%", "bitsandbytes / ours ≥ 6", "8.00 yes"],
        ["", "", "", "", "", "", "", "", "ours / bf16 copy ≤ 0.80", "1.00 no"],
        # the faster of the two ways of bitsandbytes, and which it is
        ["linear", "4096x4096", "1", "0.5", "", "1.5 eval", "1.5", "50%", "bf16 / ours ≥ 3", "3.00 yes"],
        ["", "", "", "", "", "", "", "", "bitsandbytes / ours ≥ 20", "3.00 no"],
        # a way that gave a wrong result is no peer, however fast
        ["linear", "4096x4096", "128", "11", "wrong", "20", "10.5", "2%", "ours / bf16 ≤ 1.10", "1.05 yes"],
    ]


def test_on_avx2_ours_in_float32_is_held_against_the_faster_dense_product():
    times = {"ours": 9.0, "ours, f32": 2.0, "bf16": 4.0, "f32": 5.0}
    records = [record("linear", 1, name, ms, **{"class": "avx2"}) for name, ms in times.items()]
    skipped = record("linear", 128, "bf16", None, skipped="emulated", **{"class": "avx2"})
    records += [record("linear", 128, name, 6.0, **{"class": "avx2"}) for name in ("ours, f32", "f32")] + [skipped]
    (table,) = rows(records)
    assert table == [
        ["linear", "4096x4096", "1", "9", "2", "4", "5", "12%", "ours / dense ≤ 0.60", "0.50 yes"],
        ["linear", "4096x4096", "128", "", "6", "emulated", "6", "4%", "ours / f32 ≤ 1.10", "1.00 yes"],
    ]


def test_the_title_says_the_class_and_what_lowered_it():
    lowered = [record("linear", 1, "ours", 1.0, **{"class": "avx2"}, lowered={"QLORALAB_ISA": "avx2"})]
    (table,) = tables(lowered)
    assert str(table.title).startswith("avx2: a processor, 2 threads, commit abc, QLORALAB_ISA=avx2, memory recycled")


def test_nothing_is_reached_by_a_wrong_result():
    (table,) = rows([record("linear", 16, "ours", None, wrong="error 0.1"), record("linear", 16, "bf16", 3.0)])
    assert table[0][3:6] == ["wrong", "3", ""]
    assert [line[-1] for line in table] == ["not timed", "not timed"]


def test_each_kind_of_memory_has_its_table():
    fresh = [record("dequantize", None, "ours", 9.0, memory="fresh")]
    assert [table[0][3] for table in rows([*RECORDED, *fresh])] == ["0.5", "9"]


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


def test_every_goal_belongs_to_a_point_that_is_measured():
    for goals in GOALS.values():
        assert {(goal.operation, goal.M) for goal in goals} <= set(POINTS)


def test_a_provider_that_was_added_is_shown(tmp_path):
    added = [record("linear", 1, "mine", 0.7), record("dequantize", None, "mine", 0.9)]
    (table,) = tables([*RECORDED, *added])
    assert [str(column.header) for column in table.columns][3:8] == [
        "ours",
        "reference",
        "bitsandbytes",
        "bf16",
        "mine",
    ]
    assert list(table.columns[7].cells) == ["0.9", "0.7", ""]
    plot([*RECORDED, *added], tmp_path / "drawn.png")


def test_the_picture_is_drawn_without_what_is_wrong_or_missing(tmp_path):
    plot(RECORDED, tmp_path / "all.png")
    plot([r for r in RECORDED if r["operation"] == "linear"], tmp_path / "some.png")
    plot([], tmp_path / "none.png")
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in tmp_path.iterdir())


FILES = sorted(RECORDS.glob("cpu-*.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_committed_records_are_of_one_run(file):
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
