"""Two records of a GPU beside each other: what became slower.

    python -m benchmarks.gpu --compare before.json after.json --fail-over 3%

A point of a provider is in both where operation, weight, rows and adapter are the same. Over the limit is one whose
median became longer by more than that, and one that was timed and now is wrong or fails. What was skipped was not
measured, and says nothing. Times of two cards are shown, and marked: they differ for other reasons than the code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from .view import Record, grid, p50
from .work import RANK

Key = tuple[Any, ...]


def percentage(text: str) -> float:
    """3% or 3 as 0.03, for argparse."""
    return float(text.removesuffix("%")) / 100


def by_key(records: Sequence[Record]) -> Mapping[Key, Record]:
    """The points by what has to be the same: operation, [N, K], M, provider, rank and dropout."""
    return {
        (r["operation"], tuple(r["shape"]), r["M"], r["provider"], r.get("rank", RANK), r.get("dropout", 0.0)): r
        for r in records
        if r["kind"] in ("point", "chain")
    }


def compare(before: Sequence[Record], after: Sequence[Record], limit: float) -> tuple[Table, int]:
    """A row for each point that both have and one has timed, and how many are over the limit.

    Args:
        before, after: records.
        limit: 0.03 lets a median become 3 % longer.
    """
    first, second = by_key(before), by_key(after)
    both = [(first[key], second[key]) for key in first if key in second and (first[key]["ms"] or second[key]["ms"])]
    rows = [(a, b, *_judged(a, b, limit)) for a, b in both]
    over = sum(is_over for *_, is_over in rows)
    table = grid(
        ("operation", "weight", "M", "provider", "before, µs", "after, µs", "after/before", ""),
        [
            (
                *(a["operation"], "x".join(map(str, a["shape"])), str(a["M"] or ""), a["provider"]),
                *(f"{1000 * p50(one):,.1f}" if one["ms"] else one["status"] for one in (a, b)),
                *(f"{p50(b) / p50(a):.3f}" if a["ms"] and b["ms"] else "", mark),
            )
            for a, b, mark, _ in rows
        ],
        left=("operation", "weight", "provider", ""),
        title=" beside ".join(f"{some[0]['device']}, commit {some[0]['commit']}" for some in (before, after)),
        caption=f"{over} of {len(rows)} points are over the limit of {limit:.1%}; "
        f"{len(first.keys() ^ second.keys())} are in one record only",
    )
    return table, over


def _judged(a: Record, b: Record, limit: float) -> tuple[str, bool]:
    """The words beside a point, and whether it is over the limit."""
    if a["ms"] and b["ms"]:
        over, word = p50(b) > (1 + limit) * p50(a), "slower"
    else:
        over, word = bool(a["ms"]) and b["status"] in ("wrong", "failed"), b["status"]
    words = [word] if over else []
    return ", ".join([*words, *(["another card"] if a["device"] != b["device"] else [])]), over
