"""The scales of BOF4-S, encoded in three ways: what the paper of BOF4-S leaves open.

A signed scale is spread around two means, one positive and one negative, so the offset of double quantization, which is
one mean, fits neither. Each answer here is an encoding of the user's own (``nf4/data_type.py``), ten lines or fewer:

=======================  ======  =========================================================================
sign + 7 bits (shipped)  8.125   the sign, and the magnitude less its mean in 127 even steps
dynamic map, no offset   8.125   the signed 8-bit map of double quantization on the scale itself
8 bits + sign            9.125   double quantization of the magnitude, and a bit for the sign beside it
=======================  ======  =========================================================================

Each has one float32 for 256 scales besides. *Cost* is the squared error of the weights over that with float32 scales.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from torch import Tensor

from qloralab.nf4.blockwise import divide, in_blocks, nearest
from qloralab.nf4.codebook import dynamic_map
from qloralab.nf4.data_type import DATA_TYPES, Encoding
from qloralab.nf4.data_type import ENCODINGS as SHIPPED
from qloralab.nf4.double_quant import dequantize_scales, quantize_scales
from qloralab.nf4.packed import SCALES_PER_BLOCK

from ..view import picture as figure
from .cases import bits, with_float32
from .interval import bootstrap, shown
from .table import Context, Record, Records, grid
from .weight_error import SETTINGS, errors, samples

TITLE = "BOF4-S with double quantization: three encodings of a signed scale"


def dynamic_without_offset(scales: Tensor, values: Tensor) -> Tensor:
    """Signed scales [1, blocks] through the signed 8-bit map, each 256 divided by the largest of them."""
    blocks = in_blocks(scales[0], SCALES_PER_BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    decoded = dynamic_map()[nearest(divide(blocks, largest), dynamic_map()).int()] * largest
    return decoded.flatten()[None, : scales.shape[1]]


def magnitude_and_sign(scales: Tensor, values: Tensor) -> Tensor:
    """Double quantization of the magnitudes of [1, blocks]; the sign is kept."""
    return dequantize_scales(*quantize_scales(scales[0].abs())).copysign(scales[0])[None]


_NESTED = 8 + 32 / SCALES_PER_BLOCK
ENCODINGS = {
    "sign + 7 bits (shipped)": SHIPPED["double_signed"],
    "dynamic map, no offset": Encoding(_NESTED, dynamic_without_offset, alone=False),
    "8 bits + sign": Encoding(_NESTED + 1, magnitude_and_sign, alone=False),
}


def rows(context: Context) -> list[Record]:
    """A record for each source and encoding."""
    records: list[Record] = []
    bof4_s = DATA_TYPES["bof4-s"]
    for source, some in samples(context, context.of(SETTINGS)).items():
        exact, nf4 = errors(some, with_float32(bof4_s)), errors(some, DATA_TYPES["nf4"])
        for name, encoding in ENCODINGS.items():
            one = dataclasses.replace(bof4_s, encoding=encoding)
            both = np.column_stack([errors(some, one)[:, 0], exact[:, 0], nf4[:, 0]])
            records.append(
                {
                    "kind": "encoding",
                    "source": source,
                    "encoding": name,
                    "bits": bits(one),
                    "samples": len(some),
                    "cost": bootstrap(both, lambda sums: sums[:, 0] / sums[:, 1]),
                    "to_nf4": bootstrap(both, lambda sums: sums[:, 0] / sums[:, 2]),
                }
            )
    return records


def markdown(records: Records) -> str:
    """The encodings side by side."""
    sources = list(dict.fromkeys(record["source"] for record in records))
    cells = []
    for name in ENCODINGS:
        found = {record["source"]: record for record in records if record["encoding"] == name}
        first = found[sources[0]]
        row = [name, f"{first['bits']:.4f}"]
        for source in sources:
            row += [shown(found[source]["cost"], 5), shown(found[source]["to_nf4"])]
        cells.append(row)
    headings = ["encoding of a scale", "bits a weight"]
    headings += [part for source in sources for part in (f"{source}: cost", "to NF4, doubly quantized")]
    return "\n\n".join(
        [
            "BOF4-S in blocks of 64. *Cost* is the squared error over that with float32 scales; the last column of "
            "each "
            "source is the error over that of NF4 with double quantization, at 4.127 bits. The paper of BOF4-S gives "
            "no "
            "encoding, so there is nothing to compare these with.",
            grid(headings, cells),
        ]
    )


def picture(records: Records, path: Path) -> None:
    """The cost of each encoding beyond float32 scales, in per cent."""
    sources = list(dict.fromkeys(record["source"] for record in records))
    with figure(path, 1, 1, figsize=(7, 3.5)) as (_, axes):
        axis = axes[0][0]
        for number, source in enumerate(sources):
            some = [record for record in records if record["source"] == source]
            axis.barh(
                [index + 0.35 * number for index in range(len(some))],
                [100 * (record["cost"]["value"] - 1) for record in some],
                height=0.3,
                label=source,
            )
        axis.set_yticks([index + 0.17 for index in range(len(ENCODINGS))], labels=list(ENCODINGS))
        axis.invert_yaxis()
        axis.set(xlabel="squared error added by the encoding, %")
        axis.legend(frameon=False)
