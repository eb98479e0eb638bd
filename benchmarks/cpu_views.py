"""The records of ``benchmarks/cpu.py`` as tables and as a picture, and the goals they are held against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

Record = Mapping[str, Any]

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


@dataclass(frozen=True)
class Goal:
    """A ratio to reach on a class of processors, by what of ours multiplies in the dtype of its hardware.

    Attributes:
        operation: of the point.
        M: rows, or None.
        peer: a column of the table, or dense, the faster of bf16 and f32.
        ratio: of the times.
        faster: the peer's time over ours is at least the ratio; else ours over the peer's is at most the ratio.
    """

    operation: str
    M: int | None
    peer: str
    ratio: float
    faster: bool = True

    def __str__(self) -> str:
        peer = self.peer + _mode(self.operation, self.peer)
        return f"{peer} / ours ≥ {self.ratio:g}" if self.faster else f"ours / {peer} ≤ {self.ratio:.2f}"

    def reached(self, ours: float, peer: float) -> tuple[float, bool]:
        """The ratio of two times, and whether it is good enough."""
        ratio = peer / ours if self.faster else ours / peer
        return ratio, ratio >= self.ratio if self.faster else ratio <= self.ratio


_PRODUCTS = ("linear", "input gradient")
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


def points(records: Sequence[Record]) -> Iterator[dict[str, Record]]:
    """The records of each point, by provider, in the order of their first record."""
    found: dict[tuple, dict[str, Record]] = {}
    for record in records:
        key = (record["memory"], record["operation"], tuple(record["shape"]), record["M"])
        found.setdefault(key, {})[record["provider"]] = record
    yield from found.values()


def columns(point: Mapping[str, Record]) -> dict[str, Record]:
    """A point's records by column, and the faster dense one: bitsandbytes is the faster of its modes that is right."""
    chosen = {name: record for name, record in point.items() if name != "bitsandbytes, eval"}
    modes = [record for name, record in point.items() if name.startswith("bitsandbytes")]
    if right := [record for record in modes if record["ms"]]:
        chosen["bitsandbytes"] = min(right, key=_median)
    if dense := [point[name] for name in ("bf16", "f32") if name in point and point[name]["ms"]]:
        chosen["dense"] = min(dense, key=_median)
    return chosen


def _median(record: Record) -> float:
    return record["ms"]["p50"]


def _best(kind: str, M: int | None) -> str:
    """The column of ours that a class is judged by: products in the dtype that its hardware multiplies."""
    return "ours" if M is None or kind.endswith("bf16") else "ours, f32"


def tables(records: Sequence[Record]) -> Iterator[Table]:
    """A table for each kind of memory: a row for each point, a column for each provider, goals and what is reached."""
    for memory in dict.fromkeys(record["memory"] for record in records):
        mine = [record for record in records if record["memory"] == memory]
        yield _table(memory, mine)


def _table(memory: str, records: Sequence[Record]) -> Table:
    first, kind = records[0], records[0]["class"]
    limits = first["roofline"]
    rates = {dtype: limits[f"{dtype}_gflop_per_s"] for dtype in ("float32", "bfloat16")}
    lowered = "".join(f", {name}={value}" for name, value in first.get("lowered", {}).items())
    view = Table(
        title=f"{kind}: {first['device']}, commit {first['commit']}{lowered}, memory {memory}: median ms",
        caption=f"copy {limits['copy_gb_per_s']:.1f} GB/s, "
        + "".join(f"{dtype} product {rate:.0f} GFLOP/s, " for dtype, rate in rates.items() if rate)
        + "bound: the least time at these rates over ours",
    )
    there = dict.fromkeys(record["provider"].partition(", eval")[0] for record in records)
    shown = [name for name in dict.fromkeys([*COLUMNS, *there]) if name in there]
    for heading in ("operation", "weight", "M", *shown, "bound", "goal", "reached"):
        left = heading in ("operation", "weight", "goal")
        view.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for point in points(records):
        some, by_column = next(iter(point.values())), columns(point)
        goals = [g for g in GOALS.get(kind, ()) if (g.operation, g.M) == (some["operation"], some["M"])]
        ours = by_column.get(_best(kind, some["M"]))
        view.add_row(
            some["operation"],
            "x".join(map(str, some["shape"])),
            str(some["M"] or ""),
            *(_cell(by_column.get(name)) for name in shown),
            f"{ours['bound_ms'] / ours['ms']['p50']:.0%}" if ours and ours["ms"] else "",
            "\n".join(map(str, goals)),
            "\n".join(_reached(goal, ours, by_column.get(goal.peer)) for goal in goals),
        )
    return view


def _cell(record: Record | None) -> str:
    if record is None:
        return ""
    if not record["ms"]:
        return "emulated" if record.get("skipped") else "wrong"
    return f"{record['ms']['p50']:.3g}{_mode(record['operation'], record['provider'])}"


def _mode(operation: str, provider: str) -> str:
    """What the provider does there, where its column does not say it."""
    if provider == "bf16" and operation == "dequantize":
        return " copy"
    return " eval" if provider.endswith(", eval") else ""


def _reached(goal: Goal, ours: Record | None, peer: Record | None) -> str:
    if not (ours and peer and ours["ms"] and peer["ms"]):
        return "not timed"
    ratio, enough = goal.reached(ours["ms"]["p50"], peer["ms"]["p50"])
    return f"{ratio:.2f} {'yes' if enough else 'no'}"


def plot(records: Sequence[Record], path: Path) -> None:
    """Draw the recycled points: a row of panels for each weight, a panel for each operation.

    Args:
        records: of one run.
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn = [record for record in records if record["memory"] == "recycled" and record["ms"]]
    shapes = list(dict.fromkeys(tuple(record["shape"]) for record in drawn))
    figure, grid = plt.subplots(
        max(len(shapes), 1), len(OPERATIONS), figsize=(18, 1 + 3.4 * max(len(shapes), 1)), squeeze=False,
        layout="constrained", width_ratios=[1, 1, 1.6, 1, 1],
    )  # fmt: skip
    for shape, row in zip(shapes, grid, strict=False):
        for operation, axes in zip(OPERATIONS, row, strict=True):
            panel = [r for r in drawn if tuple(r["shape"]) == shape and r["operation"] == operation]
            axes.set_title(f"{operation}, {shape[0]}x{shape[1]}")
            if any(record["M"] for record in panel):
                _lines(axes, panel)
            else:
                _bars(axes, panel)
    if drawn:
        figure.suptitle(
            f"{drawn[0]['class']}: {drawn[0]['device']}: median, 20th and 80th percentile; dotted: the bound of ours"
        )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _lines(axes: Any, panel: Sequence[Record]) -> None:
    for name in dict.fromkeys([*COLOURS, *(record["provider"] for record in panel)]):
        mine = sorted((r for r in panel if r["provider"] == name), key=lambda record: record["M"])
        rows = [record["M"] for record in mine]
        p20, p50, p80 = ([record["ms"][q] for record in mine] for q in ("p20", "p50", "p80"))
        if not rows:
            continue
        (line,) = axes.plot(rows, p50, "o-", color=COLOURS.get(name), label=name, markersize=4)
        colour = line.get_color()
        axes.fill_between(rows, p20, p80, color=colour, alpha=0.2, linewidth=0)
        if name.startswith("ours"):
            axes.plot(rows, [record["bound_ms"] for record in mine], ":", color=colour)
    axes.set(xscale="log", yscale="log", xlabel="M, rows of the input", ylabel="ms")
    ticks = sorted({record["M"] for record in panel})
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def _bars(axes: Any, panel: Sequence[Record]) -> None:
    for place, record in enumerate(panel):
        p20, p50, p80 = (record["ms"][q] for q in ("p20", "p50", "p80"))
        axes.bar(place, p50, color=COLOURS.get(record["provider"]), yerr=[[p50 - p20], [p80 - p50]])
        axes.annotate(f"{p50:.3g}", (place, p80), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8)
        if record["provider"] == "ours":
            axes.hlines(record["bound_ms"], place - 0.4, place + 0.4, color="black", linestyle=":")
    labels = [record["provider"] + _mode(record["operation"], record["provider"]) for record in panel]
    axes.set_xticks(range(len(panel)), labels=labels, rotation=30, ha="right")
    axes.set(yscale="log", ylabel="ms")
    axes.margins(y=0.15)
