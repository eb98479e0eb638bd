"""Double quantization: what it saves, exactly and on disk, and where its one offset fails.

A float32 scale for 64 weights costs 32 / 64 = 0.5 bits a weight; a byte, and a float32 for 256 of these, cost
8 / 64 + 32 / (64 * 256) = 0.127 (QLoRA, section 3). The offset is the mean of all scales of the tensor. Where the
blocks of one tensor differ by a large factor, it lies between them, and the map's 256 values are spent around it: the
scales of the small blocks are decoded from the difference of two large numbers, and lose their digits, or their sign.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qloralab.nf4.data_type import ENCODINGS
from qloralab.nf4.tensor import quantize

from ..view import picture as figure
from .table import Context, Record, Records, grid, of_kind

TITLE = "Double quantization: bits, and where one offset fails"


@dataclass(frozen=True)
class Settings:
    """The side of the weight, and the factors between its blocks."""

    side: int = 4096
    factors: tuple[float, ...] = (1, 10, 30, 100, 300, 1000, 3000, 10000)


SETTINGS = {"full": Settings(), "quick": Settings(side=2048), "tiny": Settings(side=256, factors=(1, 1000))}


def mixed(side: int, factor: float) -> Tensor:
    """N(0, 1), of which every second block of 64 weights is divided by a factor: float32 [side, side]."""
    weight = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    weight.view(-1, 2, 64)[:, 1] /= factor
    return weight


def rows(context: Context) -> list[Record]:
    """A record for each kind of scales, and one for each factor and encoding."""
    from safetensors.torch import save_file

    settings, records = context.of(SETTINGS), []
    weight = mixed(settings.side, 1)
    for name, double in (("float32", False), ("double", True)):
        packed = quantize(weight, "nf4", 64, double)
        with tempfile.TemporaryDirectory() as folder:
            save_file(packed.to_bitsandbytes(), file := Path(folder, "weight.safetensors"))
            disk = 8 * file.stat().st_size / weight.numel()
        formula = 4 + (8 / 64 + 32 / (64 * 256) if double else 32 / 64)
        records.append(
            {"kind": "bits", "scales": name, "weights": weight.numel(), "formula": formula}
            | {"held": packed.bits_per_parameter, "disk": disk}
        )
    for factor in settings.factors:
        weight = mixed(settings.side, factor)
        scales = weight.view(-1, 64).abs().amax(1)
        for name in ("float32", "double", "e4m3"):
            decoded = ENCODINGS[name].decoded(scales[None], torch.ones(1))[0]
            small = slice(1, None, 2)
            off = ((decoded - scales).abs() / scales)[small]
            records.append(
                {"kind": "factor", "scales": name, "factor": factor}
                | {"median": float(off.median()), "largest": float(off.max())}
                | {"not_positive": float((decoded[small] <= 0).float().mean())}
            )
    return records


def markdown(records: Records) -> str:
    """The bits, and the scales of the small blocks."""
    held = {record["scales"]: record for record in of_kind(records, "bits")}
    cells = [[name, *(f"{one[key]:.4f}" for key in ("formula", "held", "disk"))] for name, one in held.items()]
    saved = [f"{held['float32'][key] - held['double'][key]:.4f}" for key in ("formula", "held", "disk")]
    failing = [
        [
            f"{one['factor']:,.0f}",
            one["scales"],
            *(f"{one[name]:.{digits}%}" for name, digits in (("median", 2), ("largest", 1), ("not_positive", 1))),
        ]
        for one in of_kind(records, "factor")
        if one["factor"] in (1, 100, 1000, 10000) and one["scales"] != "float32"
    ]
    return "\n\n".join(
        [
            f"NF4 in blocks of 64, {held['double']['weights']:,} weights; bits a weight by the formula, as held in "
            "memory, "
            "and of a safetensors file in the format of bitsandbytes, header included. The last line is "
            "what the paper calls 0.373 bits.",
            grid(("scales", "formula", "held", "on disk"), [*cells, ["saved", *saved]]),
            "Where it fails: every second block is smaller by a factor. The error of the decoded scales of these "
            "blocks, "
            "and the share of them that come out zero or negative (which turns every weight of the block around, or to "
            "nothing). E4M3, the encoding of NVFP4, has no offset and keeps a relative error until it underflows.",
            grid(("factor", "scales", "median error", "largest error", "not positive"), failing, left=2),
        ]
    )


def picture(records: Records, path: Path) -> None:
    """The error of the small blocks' scales over the factor."""
    with figure(path, 1, 1, figsize=(7, 4)) as (_, axes):
        axis = axes[0][0]
        for name in ("double", "e4m3"):
            some = [one for one in of_kind(records, "factor") if one["scales"] == name]
            axis.plot(
                [one["factor"] for one in some], [one["median"] for one in some], marker="o", label=f"{name}, median"
            )
            axis.plot(
                [one["factor"] for one in some],
                [one["largest"] for one in some],
                marker="^",
                linestyle=":",
                color=axis.lines[-1].get_color(),
                label=f"{name}, largest",
            )
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="by how much every second block is smaller")
        axis.set(ylabel="relative error of its decoded scale")
        axis.legend(frameon=False)
