"""The records of ``gpu.py`` as tables, and the goals they are held against on an H100."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from . import gpu_chain, gpu_model
from .view import Goal, Record, grid, p50, point_cells, points, yes
from .work import least

COLUMNS = ("ours", "ours, fused", "bf16", "bitsandbytes", "unsloth")  # then every other provider
GOALS = [
    Goal("dequantize", None, "bitsandbytes", 1.5),
    Goal("quantize", None, "bitsandbytes", 3.5),
    *(Goal("linear", M, "bf16", ratio) for M, ratio in ((1, 3.1), (4, 2.8), (16, 2.8), (64, 2.2), (128, 1.5))),
    *(
        Goal(operation, M, "bf16", ratio)
        for operation in ("linear", "input gradient")
        for M, ratio in ((256, 0.95), (512, 0.85), (1024, 0.87), (2048, 0.90), (4096, 0.95), (8192, 0.97))
    ),
    Goal("linear", 1, "bitsandbytes", 1.3),
    Goal("linear", 4, "bitsandbytes", 2.5),
    Goal("linear", 16, "bitsandbytes", 1.6),
    Goal("adapted layer", 1024, "bitsandbytes", 1.8),
    Goal("adapted layer", 4096, "bitsandbytes", 1.4),
    Goal("adapted layer", 4096, "bf16", 1 / 1.12),
]


def with_ratios(point: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of one point, each with the time of every other provider over its own, where both were timed."""
    times = {record["provider"]: p50(record) for record in point if record["ms"]}
    for record in point:
        own = times.get(record["provider"])
        record["ratios"] = {name: ms / own for name, ms in times.items() if name != record["provider"]} if own else {}
    return list(point)


def tables(records: Sequence[Record]) -> Iterator[Table]:
    """The canaries that do not hold, if any; a row for each point; what the layers of a model take, if there is one;
    what products with few rows take besides their bytes; the chain."""
    canaries = [record for record in records if record["kind"] == "canary"]
    if wrong := [(record["name"], record["wrong"]) for record in canaries if record["wrong"]]:
        headings = ("canary", "what was found")
        title = f"{len(wrong)} of {len(canaries)} canaries do not hold"
        yield grid(headings, wrong, left=headings, wrap=True, title=title)
    if measured := list(points([record for record in records if record["kind"] == "point"])):
        yield _table(measured, len(canaries) - len(wrong), len(canaries), states(records))
        yield from gpu_model.tables(records)
        if lines := list(fits(records)):
            headings = ("provider", "M", "shapes", "t0, µs", "GB/s", "farthest off")
            caption = "products: the time is t0 + bytes / rate, by least squares over the shapes"
            yield grid(headings, lines, left=("provider",), caption=caption)
    yield from gpu_chain.tables([record for record in records if record["kind"] == "chain"])


def fits(records: Sequence[Record], most: int = 16) -> Iterator[tuple[str, ...]]:
    """A row for each provider and few rows M: the line through the times of ``linear`` over the shapes.

    What a product moves takes its bytes over a rate; t0 is what it takes besides: launch, filling, the tail. It needs
    two shapes that differ in bytes.
    """
    times: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for record in records:
        if record.get("operation") == "linear" and record["M"] <= most and record["ms"]:
            name, M = record["provider"], record["M"]
            work = least("linear", record["shape"], M, dense=name == "bf16")
            times.setdefault((name, M), []).append((work.nbytes, p50(record)))
    for (name, M), found in sorted(times.items(), key=lambda item: item[0][1]):
        if len({nbytes for nbytes, _ in found}) > 1:
            slope, t0 = statistics.linear_regression(*zip(*found, strict=True))
            off = max(abs(t0 + slope * nbytes - ms) / ms for nbytes, ms in found)
            rate = f"{1e-6 / slope:,.0f}" if slope > 0 else "none"
            yield name, str(M), str(len(found)), f"{1000 * t0:.1f}", rate, f"{off:.1%}"


def states(records: Sequence[Record]) -> str:
    """Clock, power and temperature before the first and after the last point, where nvidia-smi said them."""
    said = [record for record in records if record["kind"] == "state" and record["sm_mhz"]]
    units = {"sm_mhz": "MHz", "power_w": "W", "celsius": "°C"}
    each = [", ".join(f"{one[name]:.0f} {unit}" for name, unit in units.items() if one[name]) for one in said]
    return f"before {each[0]}, after {each[-1]}; " if each else ""


def _table(measured: Sequence[Mapping[str, Record]], held: int, canaries: int, stated: str) -> Table:
    first = next(iter(measured[0].values()))
    limits = first["roofline"]
    reading = f"reading {limits['read_gb_per_s']:,.0f} GB/s, " if limits and limits.get("read_gb_per_s") else ""
    rates = (
        f"{reading}copy {limits['copy_gb_per_s']:,.0f} GB/s, bfloat16 product {limits['gemm_tflop_per_s']:.0f} TFLOP/s"
        if limits
        else "no ceilings were measured"
    )
    checked = f", {held} of {canaries} canaries hold" if canaries else ""
    shown = dict.fromkeys([*COLUMNS, *(name for point in measured for name in point)])

    def row(point: Mapping[str, Record]) -> list[str]:
        ours = [record for name, record in point.items() if name.startswith("ours") and record["ms"]]
        best = min(ours, key=p50, default=None)
        return [
            *point_cells(point),
            *(_cell(point.get(name)) for name in shown),
            f"{best['roofline_share']:.0%}" if best and best["roofline_share"] else "",
            *_against(point, best, "bf16"),
            *_against(point, best, "bitsandbytes"),
        ]

    return grid(
        ("operation", "weight", "M", *shown, "bound", "bf16/ours", "goal", "bnb/ours", "goal"),
        map(row, measured),
        left=("operation", "weight"),
        title=f"{first['device']}, commit {first['commit']}{checked}: median µs",
        caption=f"{rates}; {stated}bound: the least time at these rates over ours; e: with launches, not from a CUDA "
        "graph; /ours: that provider's time over ours; of our times, the least",
    )


def _cell(record: Record | None) -> str:
    if record is None:
        return ""
    if not record["ms"]:
        return record["status"]
    return f"{1000 * p50(record):,.1f}{' e' if record['timing'] == 'events' else ''}"


def _against(point: Mapping[str, Record], ours: Record | None, peer: str) -> tuple[str, str]:
    """The ratio to a peer, and the goal with whether it is reached."""
    some, there = next(iter(point.values())), point.get(peer)
    goal = next((g for g in GOALS if (g.operation, g.M, g.peer) == (some["operation"], some["M"], peer)), None)
    asked = f"≥ {goal.ratio:.3g}" if goal else ""
    if not (ours and there and there["ms"]):
        return "", asked
    ratio, enough = (goal or Goal("", None, peer, 0)).reached(p50(ours), p50(there))
    return f"{ratio:.2f}", f"{asked} {yes(enough)}" if goal else ""
