"""A model as its linear layers: which shapes they have, and what all of them take together.

The model is built from its config.json on the meta device, so grouped heads, their size and layers that differ are as
transformers makes them. The layers are those that would be held in 4 bits; the output head is none of them.

A token is a product with one row by every layer; a step, forward and input gradient of `STEP` rows by every layer.
Both are sums of what the shapes take alone, and no model's time: attention, norms and launches are not in them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from .view import Record, grid, p50, points

STEP = 4096
ROWS = (1, STEP)
OF_TOKEN, OF_STEP = [("linear", 1)], [("linear", STEP), ("input gradient", STEP)]
FASTER = "the faster of ours"


def linear_shapes(path: Path) -> dict[tuple[int, int], int]:
    """How many linear layers of a model have each shape [N, K], in the order in which they occur.

    Args:
        path: of its config.json, or of the folder.
    """
    from qloralab.checkpoint.quantized_model import quantizable, skeleton

    model = skeleton(path)
    return dict(Counter(tuple(model.get_submodule(name).weight.shape) for name in quantizable(model)))


def name(path: Path) -> str:
    """What a model is called: its folder, or the file."""
    return path.absolute().parent.name if path.name == "config.json" else path.stem


def sums(records: Sequence[Record], of: Sequence[tuple[str, int]]) -> dict[str, float]:
    """By provider, the milliseconds of all layers: medians, times the layers of that shape. A provider that was not
    timed at each of these points of each shape is left out."""
    counts = {tuple(record["shape"]): record["count"] for record in records if record.get("count")}
    times: dict[str, dict[tuple, float]] = {}
    for point in points(records):
        timed = {one: record for one, record in point.items() if record["ms"]}
        if ours := [record for one, record in timed.items() if one.startswith("ours")]:
            timed[FASTER] = min(ours, key=p50)
        for one, record in timed.items():
            shape = tuple(record["shape"])
            times.setdefault(one, {})[shape, record["operation"], record["M"]] = counts.get(shape, 0) * p50(record)
    asked = [(shape, *point) for shape in counts for point in of]
    return {one: sum(mine[key] for key in asked) for one, mine in times.items() if all(key in mine for key in asked)}


def tables(records: Sequence[Record]) -> Iterator[Table]:
    """What all layers of a model take, a row for each provider; nothing where no model was asked for."""
    counted = [record for record in records if record.get("count")]
    token, step = sums(counted, OF_TOKEN), sums(counted, OF_STEP)
    if not (token or step):
        return

    def cells(times: Mapping[str, float], one: str) -> tuple[str, str]:
        ratio = f"{times['bf16'] / times[one]:.2f}" if one in times and "bf16" in times else ""
        return f"{times[one]:.2f}" if one in times else "", ratio

    counts = {tuple(record["shape"]): record["count"] for record in counted}
    layers = ", ".join(f"{count} of {N}x{K}" for (N, K), count in counts.items())
    yield grid(
        ("provider", "ms a token", "bf16/this", f"ms a step of {STEP:,}", "bf16/this"),
        [(one, *cells(token, one), *cells(step, one)) for one in dict.fromkeys([*token, *step])],
        left=("provider",),
        title=f"{counted[0]['model']}: all linear layers",
        caption=f"{layers}; a step: forward and input gradient",
    )
