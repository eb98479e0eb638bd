"""The records of ``cpu.py`` as tables and as a picture, and the goals they are held against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from .view import Goal, Record, annotate, grid, p50, picture, point_cells, points, yes

COLOURS = {
    "ours": "#1f5fa8",
    "ours, f32": "#2a9d8f",
    "reference": "#9bb7d4",
    "bitsandbytes": "#c0392b",
    "bitsandbytes, eval": "#e59866",
    "bf16": "#555555",
    "f32": "#b0883a",
}
# Of a table, before those of other providers; bitsandbytes is the faster of its two. What no record has is left out.
COLUMNS = ("ours", "ours, f32", "reference", "bitsandbytes", "bf16", "f32")
OPERATIONS = ("dequantize", "quantize", "linear", "input gradient", "adapted layer")

_PRODUCTS = ("linear", "input gradient")
# By class: ratios to reach by what of ours multiplies in the dtype of its hardware. A peer is a column of the table, or
# dense, the faster of bf16 and f32.
GOALS = {
    "avx512-bf16": [
        Goal("dequantize", None, "bitsandbytes", 6),
        Goal("dequantize", None, "bf16", 0.8, faster=False),
        Goal("quantize", None, "bitsandbytes", 25),
        Goal("linear", 1, "bf16", 3),
        Goal("linear", 1, "bitsandbytes", 20),
        Goal("linear", 4, "bf16", 2),
        Goal("linear", 16, "bf16", 1),
        Goal("linear", 16, "bitsandbytes", 4),
        *(Goal(operation, 128, "bf16", 1.10, faster=False) for operation in _PRODUCTS),
        *(Goal(operation, 512, "bf16", 1.04, faster=False) for operation in _PRODUCTS),
    ],
    "avx2": [
        Goal("dequantize", None, "bf16", 0.9, faster=False),
        Goal("quantize", None, "bitsandbytes", 15),
        *(Goal("linear", M, "dense", ratio, faster=False) for M, ratio in ((1, 0.6), (4, 0.7), (16, 1.0))),
        *(Goal(operation, 128, "f32", 1.10, faster=False) for operation in _PRODUCTS),
        *(Goal(operation, 512, "f32", 1.05, faster=False) for operation in _PRODUCTS),
        Goal("adapted layer", 512, "f32", 1.15, faster=False),
    ],
}


def columns(point: Mapping[str, Record]) -> dict[str, Record]:
    """A point's records by column, and the faster dense one: bitsandbytes is the faster of its modes that is right."""
    chosen = {name: record for name, record in point.items() if name != "bitsandbytes, eval"}
    timed = {name: record for name, record in point.items() if record["ms"]}
    if right := [record for name, record in timed.items() if name.startswith("bitsandbytes")]:
        chosen["bitsandbytes"] = min(right, key=p50)
    if dense := [timed[name] for name in ("bf16", "f32") if name in timed]:
        chosen["dense"] = min(dense, key=p50)
    return chosen


def tables(records: Sequence[Record]) -> Iterator[Table]:
    """A table for each kind of memory: a row for each point, a column for each provider, goals and what is reached."""
    for memory in dict.fromkeys(record["memory"] for record in records):
        yield _table(memory, [record for record in records if record["memory"] == memory])


def _table(memory: str, records: Sequence[Record]) -> Table:
    first, kind = records[0], records[0]["class"]
    limits = first["roofline"]
    rates = {dtype: limits[f"{dtype}_gflop_per_s"] for dtype in ("float32", "bfloat16")}
    lowered = "".join(f", {name}={value}" for name, value in first.get("lowered", {}).items())
    there = dict.fromkeys(record["provider"].partition(", eval")[0] for record in records)
    shown = [name for name in dict.fromkeys([*COLUMNS, *there]) if name in there]

    def row(point: Mapping[str, Record]) -> list[str]:
        operation, _, M = head = point_cells(point)
        by_column = columns(point)
        goals = [g for g in GOALS.get(kind, ()) if (g.operation, str(g.M or "")) == (operation, M)]
        ours = by_column.get("ours" if not M or kind.endswith("bf16") else "ours, f32")
        return [
            *head,
            *(_cell(by_column.get(name)) for name in shown),
            f"{ours['bound_ms'] / p50(ours):.0%}" if ours and ours["ms"] else "",
            "\n".join(map(_asked, goals)),
            "\n".join(_reached(goal, ours, by_column.get(goal.peer)) for goal in goals),
        ]

    return grid(
        ("operation", "weight", "M", *shown, "bound", "goal", "reached"),
        map(row, points(records)),
        left=("operation", "weight", "goal"),
        title=f"{kind}: {first['device']}, commit {first['commit']}{lowered}, memory {memory}: median ms",
        caption=f"copy {limits['copy_gb_per_s']:.1f} GB/s, "
        + "".join(f"{dtype} product {rate:.0f} GFLOP/s, " for dtype, rate in rates.items() if rate)
        + "bound: the least time at these rates over ours",
    )


def _cell(record: Record | None) -> str:
    if record is None:
        return ""
    if not record["ms"]:
        return "emulated" if record.get("skipped") else "wrong"
    return f"{p50(record):.3g}{_mode(record['operation'], record['provider'])}"


def _mode(operation: str, provider: str) -> str:
    """What the provider does there, where its column does not say it."""
    if provider == "bf16" and operation == "dequantize":
        return " copy"
    return " eval" if provider.endswith(", eval") else ""


def _asked(goal: Goal) -> str:
    peer = goal.peer + _mode(goal.operation, goal.peer)
    return f"{peer} / ours ≥ {goal.ratio:g}" if goal.faster else f"ours / {peer} ≤ {goal.ratio:.2f}"


def _reached(goal: Goal, ours: Record | None, peer: Record | None) -> str:
    if not (ours and peer and ours["ms"] and peer["ms"]):
        return "not timed"
    ratio, enough = goal.reached(p50(ours), p50(peer))
    return f"{ratio:.2f} {yes(enough)}"


def plot(records: Sequence[Record], path: Path) -> None:
    """Draw the recycled points: a row of panels for each weight, a panel for each operation."""
    drawn = [record for record in records if record["memory"] == "recycled" and record["ms"]]
    shapes = list(dict.fromkeys(tuple(record["shape"]) for record in drawn))
    size, widths = (18, 1 + 3.4 * max(len(shapes), 1)), [1, 1, 1.6, 1, 1]
    with picture(path, max(len(shapes), 1), len(OPERATIONS), figsize=size, width_ratios=widths) as (figure, axes):
        for shape, row in zip(shapes, axes, strict=False):
            for operation, panel in zip(OPERATIONS, row, strict=True):
                some = [r for r in drawn if tuple(r["shape"]) == shape and r["operation"] == operation]
                panel.set_title(f"{operation}, {shape[0]}x{shape[1]}")
                (_lines if any(record["M"] for record in some) else _bars)(panel, some)
        if drawn:
            what = "median, 20th and 80th percentile; dotted: the bound of ours"
            figure.suptitle(f"{drawn[0]['class']}: {drawn[0]['device']}: {what}")


def _lines(axes: Any, panel: Sequence[Record]) -> None:
    for name in dict.fromkeys([*COLOURS, *(record["provider"] for record in panel)]):
        mine = sorted((r for r in panel if r["provider"] == name), key=lambda record: record["M"])
        if not mine:
            continue
        rows = [record["M"] for record in mine]
        low, middle, high = ([record["ms"][q] for record in mine] for q in ("p20", "p50", "p80"))
        (line,) = axes.plot(rows, middle, "o-", color=COLOURS.get(name), label=name, markersize=4)
        axes.fill_between(rows, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        if name.startswith("ours"):
            axes.plot(rows, [record["bound_ms"] for record in mine], ":", color=line.get_color())
    axes.set(xscale="log", yscale="log", xlabel="M, rows of the input", ylabel="ms")
    ticks = sorted({record["M"] for record in panel})
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def _bars(axes: Any, panel: Sequence[Record]) -> None:
    for x, record in enumerate(panel):
        low, middle, high = (record["ms"][q] for q in ("p20", "p50", "p80"))
        axes.bar(x, middle, color=COLOURS.get(record["provider"]), yerr=[[middle - low], [high - middle]])
        annotate(axes, x, high, f"{middle:.3g}", fontsize=8)
        if record["provider"] == "ours":
            axes.hlines(record["bound_ms"], x - 0.4, x + 0.4, color="black", linestyle=":")
    labels = [record["provider"] + _mode(record["operation"], record["provider"]) for record in panel]
    axes.set_xticks(range(len(panel)), labels=labels, rotation=30, ha="right")
    axes.set(yscale="log", ylabel="ms")
    axes.margins(y=0.15)
