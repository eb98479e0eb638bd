"""The records of ``benchmarks/gpu.py`` as tables, and the goals they are held against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

Record = Mapping[str, Any]

COLUMNS = ("ours", "ours, fused", "bf16", "bitsandbytes", "unsloth")  # then every other provider


@dataclass(frozen=True)
class Goal:
    """A peer's time over ours that is to be reached on an H100.

    Attributes:
        operation: of the point.
        M: rows, or None.
        peer: a column of the table.
        ratio: at least this.
    """

    operation: str
    M: int | None
    peer: str
    ratio: float


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


def points(records: Sequence[Record]) -> Iterator[dict[str, Record]]:
    """The records of each point, by provider, in the order of their first record."""
    found: dict[tuple, dict[str, Record]] = {}
    for record in records:
        if record["kind"] == "point":
            key = (record["operation"], tuple(record["shape"]), record["M"])
            found.setdefault(key, {})[record["provider"]] = record
    yield from found.values()


def with_ratios(point: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of one point, each with the time of every other provider over its own, where both were timed."""
    times = {record["provider"]: record["ms"]["p50"] for record in point if record["ms"]}
    return [
        {
            **record,
            "ratios": {name: ms / times[record["provider"]] for name, ms in times.items() if name != record["provider"]}
            if record["ms"]
            else {},
        }
        for record in point
    ]


def tables(records: Sequence[Record]) -> Iterator[Table]:
    """The canaries that do not hold, if any; then a row for each point."""
    canaries = [record for record in records if record["kind"] == "canary"]
    if wrong := [record for record in canaries if record["wrong"]]:
        view = Table(title=f"{len(wrong)} of {len(canaries)} canaries do not hold")
        view.add_column("canary")
        view.add_column("what was found")
        for record in wrong:
            view.add_row(record["name"], record["wrong"])
        yield view
    if measured := list(points(records)):
        yield _table(measured, len(canaries) - len(wrong), len(canaries))


def _table(measured: Sequence[Mapping[str, Record]], held: int, canaries: int) -> Table:
    first = next(iter(measured[0].values()))
    limits = first["roofline"]
    rates = (
        f"copy {limits['copy_gb_per_s']:,.0f} GB/s, bfloat16 product {limits['gemm_tflop_per_s']:.0f} TFLOP/s"
        if limits
        else "no ceilings were measured"
    )
    view = Table(
        title=f"{first['device']}, commit {first['commit']}, {held} of {canaries} canaries hold: median µs",
        caption=f"{rates}; bound: the least time at these rates over ours; e: with launches, not from a CUDA graph; "
        "/ours: that provider's time over ours; of our times, the least",
    )
    shown = dict.fromkeys([*COLUMNS, *(name for point in measured for name in point)])
    for heading in ("operation", "weight", "M", *shown, "bound", "bf16/ours", "goal", "bnb/ours", "goal"):
        view.add_column(heading, justify="left" if heading in ("operation", "weight") else "right", no_wrap=True)
    for point in measured:
        some = next(iter(point.values()))
        ours = [record for name, record in point.items() if name.startswith("ours") and record["ms"]]
        timed = min(ours, key=lambda record: record["ms"]["p50"], default=None)
        view.add_row(
            some["operation"],
            "x".join(map(str, some["shape"])),
            str(some["M"] or ""),
            *(_cell(point.get(name)) for name in shown),
            f"{timed['roofline_share']:.0%}" if timed and timed["roofline_share"] else "",
            *_against(some, timed, "bf16"),
            *_against(some, timed, "bitsandbytes"),
        )
    return view


def _cell(record: Record | None) -> str:
    if record is None:
        return ""
    if not record["ms"]:
        return record["status"]
    return f"{1000 * record['ms']['p50']:,.1f}{' e' if record['timing'] == 'events' else ''}"


def _against(point: Record, ours: Record | None, peer: str) -> tuple[str, str]:
    """The ratio to a peer, and the goal with whether it is reached."""
    ratio = ours["ratios"].get(peer) if ours else None
    goal = next((g for g in GOALS if (g.operation, g.M, g.peer) == (point["operation"], point["M"], peer)), None)
    if ratio is None:
        return "", f"≥ {goal.ratio:.3g}" if goal else ""
    return f"{ratio:.2f}", f"≥ {goal.ratio:.3g} {'yes' if ratio >= goal.ratio else 'no'}" if goal else ""
