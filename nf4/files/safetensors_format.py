"""The safetensors format, as far as reading and writing share it (github.com/huggingface/safetensors).

A header, then the bytes of all tensors, row-major, little-endian::

    8 bytes     n, the length of the header, little-endian
    n bytes     JSON in UTF-8, spaces may follow:
                {"__metadata__": {"format": "pt"},
                 "w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...}
    the rest    the tensors; the offsets count from here, leave no byte out and share none
"""

from __future__ import annotations

import math

import torch

Description = tuple[torch.dtype, tuple[int, ...]]  # what a file says of a tensor

# In the order in which the library lays tensors out.
DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F4": torch.float4_e2m1fn_x2,  # two numbers an element: the last size is twice that in the file
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the library's own limit
METADATA = "__metadata__"


def size_of(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """How many bytes a tensor takes in a file."""
    return math.prod(shape) * dtype.itemsize
