"""The products of ``gpu.py`` under their roofline, as a picture.

To the right goes what there is to compute for each byte that has to be moved, which grows with the rows M; upwards what
was reached of it. Left of the bend memory is the limit, right of it the tensor cores. A packed weight has fewer bytes,
so the same product stands further to the right, under a higher part of the roof.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .view import Record, p50, picture
from .work import least

COLOURS = {
    "ours": "#9bb7d4",
    "ours, fused": "#1f5fa8",
    "bf16": "#555555",
    "bitsandbytes": "#c0392b",
    "ours, canonical": "#2a9d8f",
}
OPERATIONS = ("linear", "input gradient")
SHOWN = (1, 4, 16, 64, 256, 1024)  # of M: more rows stand too close


def plot(records: Sequence[Record], path: Path) -> None:
    """Draw the products that were timed: a row of panels for each direction, a panel for each weight."""
    drawn = [record for record in records if record.get("operation") in OPERATIONS and record["ms"]]
    shapes = list(dict.fromkeys(tuple(record["shape"]) for record in drawn))
    size = (1 + 4.6 * max(len(shapes), 1), 8)
    with picture(path, len(OPERATIONS), max(len(shapes), 1), figsize=size, sharey=True) as (figure, axes):
        for operation, row in zip(OPERATIONS, axes, strict=True):
            for shape, panel in zip(shapes, row, strict=False):
                some = [r for r in drawn if r["operation"] == operation and tuple(r["shape"]) == shape]
                if some:
                    panel.set_title(f"{operation}, {shape[0]}x{shape[1]}")
                    _panel(panel, some)
        if drawn:
            figure.suptitle(f"{drawn[0]['device']}, commit {drawn[0]['commit']}: medians")


def _panel(axes: Any, records: Sequence[Record]) -> None:
    axes.set(xscale="log", yscale="log")
    at: dict[int, float] = {}
    for name in dict.fromkeys([*COLOURS, *(record["provider"] for record in records)]):
        mine = sorted((r for r in records if r["provider"] == name), key=lambda record: record["M"])
        if not mine:
            continue
        works = [least(r["operation"], r["shape"], r["M"], dense=name == "bf16") for r in mine]
        x = [work.flops / work.nbytes for work in works]
        y = [1e-9 * work.flops / p50(record) for work, record in zip(works, mine, strict=True)]
        axes.plot(x, y, "o-", color=COLOURS.get(name), label=name, markersize=4, linewidth=1)
        if name.startswith("ours"):
            at |= {record["M"]: share for record, share in zip(mine, x, strict=True)}
    if limits := next((record["roofline"] for record in records if record["roofline"]), None):
        _roof(axes, limits)
    top = axes.secondary_xaxis("top")
    top.set_xticks([*at.values()], labels=[str(M) if M in SHOWN else "" for M in at], fontsize=8)
    top.minorticks_off()
    top.set_xlabel("M, beside a packed weight", fontsize=8)
    axes.set(xlabel="operations a byte", ylabel="TFLOP/s")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _roof(axes: Any, limits: Record) -> None:
    first, last = axes.get_xlim()
    x, peak = np.geomspace(first, last, 200), limits["gemm_tflop_per_s"]
    for name, style in (("read", "-"), ("copy", ":")):
        if rate := limits.get(f"{name}_gb_per_s"):
            y = np.minimum(1e-3 * rate * x, peak)
            axes.plot(x, y, style, color="black", linewidth=1, label=f"{name} {rate:,.0f} GB/s, {peak:.0f} TFLOP/s")
