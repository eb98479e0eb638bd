"""The safetensors format (github.com/huggingface/safetensors), and one file of it, read strictly.

A header, then the bytes of all tensors, row-major, little-endian::

    8 bytes     n, the length of the header, little-endian
    n bytes     JSON in UTF-8, spaces may follow:
                {"__metadata__": {"format": "pt"},
                 "w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...}
    the rest    the tensors; the offsets count from here, leave no byte out and share none

The header is read here, because an error then names the tensor and the field; the bytes of the tensors are read by the
safetensors library, which maps the file and checks it again. A mapping of the library lives as long as a tensor of it
does, and the pages that were read stay in memory as long as the mapping. So each call maps the file anew: who lets one
tensor go before asking for the next holds one tensor, not the file.
"""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import FormatError
from .json_file import parse_object

Description = tuple[torch.dtype, tuple[int, ...]]  # what a file says of a tensor

# The order is the one in which the library lays tensors out.
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
MAX_HEADER = 100_000_000  # bytes; the library's own limit
METADATA = "__metadata__"
MAX_DIMS = 64  # torch's


def size_of(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """How many bytes a tensor takes in a file."""
    return math.prod(shape) * dtype.itemsize


def are_sizes(found: Any) -> bool:
    """Whether this is a list of numbers that the sizes of a tensor, or offsets in a file, can be."""
    return isinstance(found, list) and all(type(size) is int and 0 <= size < 2**63 for size in found)


class SafetensorsFile:
    """A file to read from. Opening it reads the header; no tensor.

    Attributes:
        path: of the file.
        metadata: the texts of the header.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: it is not a regular file, or its header is not one of this format.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        header, data_bytes = _read_header(self.path)
        self.metadata = _read_metadata(header.pop(METADATA, None), self.path)
        entries = [(name, *_read_entry(name, entry, self.path)) for name, entry in header.items()]
        entries.sort(key=lambda entry: entry[2])
        _check_offsets([(name, span) for name, _, span in entries], data_bytes, self.path)
        self._descriptions = {name: description for name, description, _ in entries}
        self.tensors([])  # what the library refuses and the above does not is refused now

    def names(self) -> list[str]:
        """The names of the tensors, in the order in which they lie in the file."""
        return list(self._descriptions)

    def describe(self, name: str) -> Description:
        """The dtype and the shape of a tensor, which is not read.

        Raises:
            FormatError: the file has no such tensor.
        """
        if name not in self._descriptions:
            raise FormatError("is not in the file", file=self.path, tensor=name)
        return self._descriptions[name]

    def tensor(self, name: str) -> Tensor:
        """A tensor, on the CPU, backed by a mapping of the file that goes with it.

        Raises:
            FileNotFoundError: the file is gone.
            FormatError: the file has no such tensor, or is no longer what it was when it was opened.
        """
        return self.tensors([name])[name]

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Several tensors by their names, which share one mapping; see ``tensor``."""
        wanted = {name: self.describe(name) for name in names}
        found: dict[str, Tensor] = {}
        name = None
        try:
            with safe_open(self.path, framework="pt") as file:
                for name in wanted:
                    found[name] = file.get_tensor(name)
        except SafetensorError as error:
            raise FormatError(f"is not a safetensors file: {error}", file=self.path, tensor=name) from None
        for name, tensor in found.items():
            if (tensor.dtype, tuple(tensor.shape)) != wanted[name]:
                raise FormatError("changed while the file was read", file=self.path, tensor=name)
            if tensor.data_ptr() % tensor.element_size():  # a file whose header does not end on a multiple of 8
                found[name] = tensor.clone()
        return found


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header as JSON has it, and the number of bytes that follow it. Reads no more than the file has."""
    try:
        is_regular = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        is_regular = False
    if not is_regular:
        raise FormatError("is not a regular file", file=path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise FormatError(f"has {size} bytes; the length of its header alone takes 8", file=path, field="header")
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_HEADER):
            message = f"claims {length} bytes; the file has {size}: it is cut short, or no safetensors file"
            raise FormatError(message, file=path, field="header")
        text = file.read(length)
    if not text.startswith(b"{"):
        raise FormatError("does not begin with {: this is not a safetensors file", file=path, field="header")
    return parse_object(text, file=path, field="header"), size - 8 - length


def _read_metadata(found: Any, path: Path) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise FormatError(f"is {found!r:.60}; expected texts by name", file=path, field=METADATA)
    return found


def _read_entry(name: str, entry: Any, path: Path) -> tuple[Description, tuple[int, int]]:
    """What the header says of a tensor: its description, and its first byte and the one after its last."""

    def refuse(message: str, field: str | None = None) -> NoReturn:
        raise FormatError(message, file=path, tensor=name, field=field)

    if not isinstance(entry, dict):
        refuse(f"is {entry!r:.60} in the header; expected an object")
    for field in ("dtype", "shape", "data_offsets"):
        if field not in entry:
            refuse("is missing", field)
    code, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        refuse(f"is {code!r:.60}; known: {', '.join(DTYPES)}", "dtype")
    if not are_sizes(shape) or len(shape) > MAX_DIMS or math.prod(max(size, 1) for size in shape) >= 2**60:
        refuse(f"is {shape!r:.60}; expected at most {MAX_DIMS} sizes, of a tensor that can exist", "shape")
    if not are_sizes(span) or len(span) != 2:
        refuse(f"is {span!r:.60}; expected two offsets", "data_offsets")
    dtype = DTYPES[code]
    if dtype == torch.float4_e2m1fn_x2:
        if not shape or shape[-1] % 2:
            refuse(f"is {shape!r:.60}; the last size of {code} is even", "shape")
        shape = [*shape[:-1], shape[-1] // 2]
    expected = size_of(dtype, tuple(shape))
    if span[1] - span[0] != expected:
        refuse(f"is {span}; {code} {entry['shape']!r:.60} takes {expected} bytes", "data_offsets")
    return (dtype, tuple(shape)), (span[0], span[1])


def _check_offsets(spans: list[tuple[str, tuple[int, int]]], data_bytes: int, path: Path) -> None:
    """The tensors lie one behind the other, from the first byte to the last."""
    position = 0
    for name, (start, end) in spans:
        message = None
        if start != position:
            message = f"begins at byte {start}; the tensors before it end at byte {position}"
        elif end > data_bytes:
            message = f"ends at byte {end}; the file has {data_bytes} behind its header"
        if message:
            raise FormatError(message, file=path, tensor=name, field="data_offsets")
        position = end
    if position != data_bytes:
        raise FormatError(f"has {data_bytes - position} bytes that belong to no tensor", file=path)
