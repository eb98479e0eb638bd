"""Which data types the tables compare: every one that is shipped, with scales in float32 and in its own encoding."""

from __future__ import annotations

import dataclasses

from qloralab.nf4.data_type import DATA_TYPES, DataType

FLOAT32 = "float32"
BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
COMPARED = (
    "nf4",
    "fp4",
    "int4",
    "af4",
    "bof4",
    "bof4-s",
    "nf4-ls",
    "int4-ls",
    "kmeans4",
    "any4",
    "mxfp4",
    "nvfp4",
    "nvfp4-4over6",
)
TABLE_2 = ("int4", "fp4", "fp4_e3m0", "nf4")  # the paper's


def four_bits() -> list[str]:
    """The shipped data types of 16 values, the paper's first."""
    others = [name for name in DATA_TYPES if name not in TABLE_2 and not is_of_other_bits(name)]
    return [*TABLE_2, *others]


def is_of_other_bits(name: str) -> bool:
    """NF2 to NF8 without NF4."""
    values = DATA_TYPES[name].values
    return values is not None and len(values) != 16


def with_float32(one: DataType) -> DataType:
    """The same data type with scales that are not encoded."""
    return dataclasses.replace(one, encoding=FLOAT32)


def bits(one: DataType) -> float:
    """Bits a weight, codebooks of rows left out: those of the code, and the scale's over the block."""
    from qloralab.nf4.data_type import ENCODINGS

    encoding = ENCODINGS[one.encoding] if isinstance(one.encoding, str) else one.encoding
    count = 16 if one.values is None else len(one.values)
    return (count - 1).bit_length() + encoding.bits / one.block_size
