"""Figure 3 and Table 2, the side of the weights: the squared error of each data type, by block size.

    error = sum((W - W')**2) / sum(W**2)

of two things: N(0, 1), a matrix a seed, and the linear weights of an encoder that was never quantized. The ratio to NF4
is taken with the same blocks and the same kind of scales (float32 beside float32; each one's own encoding beside NF4
with double quantization): by seeds with Student's interval, by matrices with the bootstrap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qloralab.nf4.data_type import DATA_TYPES, DataType
from qloralab.nf4.tensor import quantize

from ..view import picture as figure
from .cases import BLOCK_SIZES, FLOAT32, bits, four_bits, is_of_other_bits, with_float32
from .interval import Floats, bootstrap, shown, student
from .models import linear_weights, load_encoder
from .table import Context, Record, Records, grid

TITLE = "Data types: the error of the weights (Table 2, Figure 3)"


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        seeds, side: matrices of N(0, 1), and the side of one.
        matrices: of the encoder, evenly spread; None: all of them.
        block_sizes: that are compared; the table shows 64.
        data_types: names; None: all that are shipped.
    """

    seeds: int = 5
    side: int = 1024
    matrices: int | None = None
    block_sizes: tuple[int, ...] = BLOCK_SIZES
    data_types: tuple[str, ...] | None = None


SETTINGS = {
    "full": Settings(),
    "quick": Settings(seeds=3, side=512, matrices=6, block_sizes=(16, 32, 64, 256, 1024, 4096)),
    "tiny": Settings(seeds=2, side=64, matrices=2, block_sizes=(64,), data_types=("nf4", "bof4-s", "nvfp4")),
}


def samples(context: Context, settings: Settings) -> dict[str, list[Tensor]]:
    """The matrices to quantize, by where they come from."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(settings.seeds)]
    sources = {"N(0, 1)": [torch.randn(settings.side, settings.side, generator=one) for one in generators]}
    if context.minilm:
        found = [*linear_weights(load_encoder(context.minilm)[0]).values()]
        some = np.linspace(0, len(found) - 1, settings.matrices or len(found)).round().astype(int)
        sources["MiniLM"] = [found[index] for index in some]
    return sources


def errors(samples: list[Tensor], one: DataType) -> Floats:
    """The squared error of each sample and the sum of its squares, float64 [samples, 2]."""
    sums = [(float((w - quantize(w, one).dequantize()).square().sum(dtype=torch.float64)), w) for w in samples]
    return np.array([[error, float(w.square().sum(dtype=torch.float64))] for error, w in sums])


def rows(context: Context) -> list[Record]:
    """A record for each source, data type, block size, and encoding of the scales."""
    settings = context.of(SETTINGS)
    sources = samples(context, settings)
    names = settings.data_types or (*four_bits(), *filter(is_of_other_bits, DATA_TYPES))
    cases = [
        (source, name, size, kind)
        for source in sources
        for size in settings.block_sizes
        for kind in (FLOAT32, "own")
        for name in names
        if size == 64 or not is_of_other_bits(name)
    ]
    records, measured = [], {}
    with context.display.busy("weight error", "data types") as progress:
        for done, (source, name, size, kind) in enumerate(cases, 1):
            one = dataclasses.replace(DATA_TYPES[name], block_size=size)
            one = with_float32(one) if kind == FLOAT32 else one
            measured[source, name, size, kind] = errors(sources[source], one)
            progress(done, len(cases))
            records.append({"kind": "error", "source": source, "data_type": name, "block_size": size, "scales": kind})
            records[-1] |= {"encoding": one.settings()["encoding"], "bits": bits(one)}
    for record in records:
        source, kind = record["source"], record["scales"]
        ours = measured[source, record["data_type"], record["block_size"], kind]
        nf4 = measured[source, "nf4", record["block_size"], kind]
        record["samples"] = len(ours)
        record["weights"] = sum(w.numel() for w in sources[source])
        if source == "MiniLM":
            record["error"] = bootstrap(ours, lambda sums: sums[:, 0] / sums[:, 1])
            both = np.column_stack([ours[:, 0], nf4[:, 0]])
            record["to_nf4"] = bootstrap(both, lambda sums: sums[:, 0] / sums[:, 1])
        else:
            record["error"] = student(ours[:, 0] / ours[:, 1])
            record["to_nf4"] = student(ours[:, 0] / nf4[:, 0])
    return records


def _at(records: Records, **fields: Any) -> list[Mapping[str, Any]]:
    return [record for record in records if all(record[name] == value for name, value in fields.items())]


def markdown(records: Records) -> str:
    """The table at blocks of 64, or of its own size where a data type has another."""
    sources = list(dict.fromkeys(record["source"] for record in records))
    cells = []
    for name in dict.fromkeys(record["data_type"] for record in records):
        for kind in (FLOAT32, "own"):
            found = [_at(records, source=s, data_type=name, block_size=64, scales=kind) for s in sources]
            if not all(found) or (kind == "own" and found[0][0]["encoding"] == FLOAT32):
                continue
            first = found[0][0]
            row = [name, first["encoding"], f"{first['bits']:.3f}"]
            for (one,) in found:
                row += [f"{1e3 * one['error']['value']:.2f}", "1" if name == "nf4" else shown(one["to_nf4"])]
            cells.append(row)
    headings = ["data type", "scales", "bits"]
    headings += [part for source in sources for part in (f"{source}: error, 10⁻³", "to NF4 (95 %)")]
    own = [
        [one["data_type"], str(one["block_size"]), f"{one['bits']:.3f}", f"{1e3 * one['error']['value']:.2f}"]
        for name in ("mxfp4", "nvfp4", "nvfp4-4over6", "any4")
        for one in _at(records, data_type=name, scales="own", source=sources[-1])
        if one["block_size"] == DATA_TYPES[name].block_size
    ]
    text = [
        "Relative squared error in blocks of 64, of N(0, 1) and of the encoder's float32 weights. "
        "*To NF4* divides by NF4's error with scales of the same kind. The paper's Table 2 gives perplexity only; its "
        "order there, NF4 before FP4 and FP4 before Int4 by perplexity, need not be that of the weights' errors.",
        grid(headings, cells, left=2),
    ]
    if own and sources[-1] == "MiniLM":
        text += ["At the block size that each was made for:"]
        text += [grid(["data type", "block", "bits", "MiniLM: error, 10⁻³"], own)]
    return "\n\n".join(text)


def picture(records: Records, path: Path) -> None:
    """The error over the block size, a line for each data type with its own encoding of scales."""
    sources = list(dict.fromkeys(record["source"] for record in records))
    with figure(path, 1, len(sources), figsize=(7 * len(sources), 5)) as (_, axes):
        for axis, source in zip(axes[0], sources, strict=True):
            some = [one for one in _at(records, source=source, scales="own") if not is_of_other_bits(one["data_type"])]
            for number, name in enumerate(dict.fromkeys(one["data_type"] for one in some)):
                line = sorted((one for one in some if one["data_type"] == name), key=lambda one: one["block_size"])
                axis.plot(
                    [one["block_size"] for one in line],
                    [one["error"]["value"] for one in line],
                    marker="os^v"[number // 10],
                    markersize=4,
                    linewidth=1.2,
                    color=f"C{number % 10}",
                    label=name,
                )
            axis.set_xscale("log", base=2)
            axis.set(xlabel="weights in a block", ylabel="relative squared error", title=source, yscale="log")
            axis.legend(frameon=False, fontsize=8, ncols=2)
