"""Writing one safetensors file as a stream, one tensor at a time.

The library writes a file from tensors that are all in memory. A checkpoint that is quantized as it is read never is.
But the sizes are known beforehand, hence every offset: ``SafetensorsWriter`` reserves the header and puts each tensor
straight where it belongs, whichever comes first. The order in the file is the library's (wider dtypes first, so that
all are aligned, then by name), and so is every byte of it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .atomic import replacing
from .safetensors_reader import DTYPES, MAX_HEADER, METADATA, Description, size_of

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_CODES)}
_SLAB = 1 << 24  # bytes that are copied at once on their way to a file
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # to move what no arithmetic is defined for


class SafetensorsWriter:
    """Writes a file whose tensors are known by dtype and shape before they exist.

    Making one touches no disk: ``needed_bytes`` is there to be compared with the free space first. It is a context
    manager; the file is complete at the end of the body and replaces an existing one, and a failure leaves nothing::

        with SafetensorsWriter("model.safetensors", {"w": (torch.bfloat16, (4, 2))}) as writer:
            writer.write("w", torch.zeros(4, 2, dtype=torch.bfloat16))

    Args:
        path: of the file; its directory exists when the body begins.
        layout: dtype and shape of each tensor, by name.
        late: names of tensors, uint8 [bytes], whose size in ``layout`` is an upper bound. They are held in memory and
            lie behind all others.
        metadata: texts for the header.

    Raises:
        ValueError: safetensors has no such dtype, a late tensor is not uint8 [bytes] or not in the layout, or the
            header is longer than the format allows; at the end of the body: a tensor of the layout was not written.
        OSError: the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        layout: Mapping[str, Description],
        late: Collection[str] = (),
        metadata: Mapping[str, str] | None = None,
    ):
        self.path = Path(path)
        self._late = frozenset(late)
        self._metadata = {"format": "pt"} if metadata is None else dict(metadata)
        given = {name: (dtype, tuple(shape)) for name, (dtype, shape) in layout.items()}
        self._check(given)
        order = sorted(given, key=lambda name: (name in self._late, _RANKS[given[name][0]], name))
        self._layout = {name: given[name] for name in order}
        self._offsets = _offsets(self._layout)
        self._data_start = 8 + len(self._header(self._layout))
        self._written: set[str] = set()
        self._late_tensors: dict[str, Tensor] = {}

    @property
    def needed_bytes(self) -> int:
        """The size of the file; with late tensors, an upper bound."""
        return self._data_start + sum(size_of(*description) for description in self._layout.values())

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor where it belongs.

        Args:
            name: one of the layout, once.
            tensor: of the dtype and shape of the layout (a late one may be shorter), on any device, with any strides.

        Raises:
            ValueError: the layout has no such tensor, or it has another dtype or shape, or it was written before.
            OSError: the file cannot be written.
        """
        if name not in self._layout:
            raise ValueError(f"{name} is not in the layout of {self.path}")
        if name in self._written:
            raise ValueError(f"{name} is written twice to {self.path}")
        dtype, shape = self._layout[name]
        is_late = name in self._late
        fits = tensor.dim() == 1 and len(tensor) <= shape[0] if is_late else tuple(tensor.shape) == shape
        if tensor.dtype != dtype or not fits:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; its layout is {dtype} {list(shape)}")
        if is_late:
            self._late_tensors[name] = tensor.detach().cpu().clone()
        else:
            self._put(self._offsets[name], tensor)
        self._written.add(name)

    def __enter__(self) -> SafetensorsWriter:
        self._body = self._opened()
        self._file = self._body.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._body.__exit__(kind, error, at)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        with replacing(self.path) as (part,), part.open("wb") as file:
            yield file
            missing = [name for name in self._layout if name not in self._written]
            if missing:
                raise ValueError(f"{missing[0]} is not written to {self.path}, nor are {len(missing) - 1} others")
            self._finish()

    def _finish(self) -> None:
        layout = self._layout | {name: (t.dtype, tuple(t.shape)) for name, t in self._late_tensors.items()}
        offsets = _offsets(layout)
        for name, tensor in self._late_tensors.items():
            self._put(offsets[name], tensor)
        # Room was reserved for the longest late tensors: with shorter ones there may be a digit less in the header.
        header = self._header(layout).ljust(self._data_start - 8)
        self._file.seek(0)
        self._file.write(len(header).to_bytes(8, "little") + header)
        self._file.truncate(self._data_start + sum(size_of(*description) for description in layout.values()))

    def _check(self, layout: Mapping[str, Description]) -> None:
        for name, (dtype, shape) in layout.items():
            if name == METADATA:
                raise ValueError(f"{name} is no name for a tensor")
            if dtype not in _CODES or (dtype == torch.float4_e2m1fn_x2 and not shape):
                raise ValueError(f"{name} is {dtype} {list(shape)}, which a safetensors file cannot hold")
        for name in self._late:
            if name not in layout:
                raise ValueError(f"{name} is late, but not in the layout of {self.path}")
            dtype, shape = layout[name]
            if dtype != torch.uint8 or len(shape) != 1:
                raise ValueError(f"{name} is late, but {dtype} {list(shape)} and not uint8 [bytes]")

    def _header(self, layout: Mapping[str, Description]) -> bytes:
        """The header's text for these sizes, with spaces to a multiple of 8."""
        header: dict[str, Any] = {METADATA: self._metadata} if self._metadata else {}
        for name, start in _offsets(layout).items():
            dtype, shape = layout[name]
            span = [start, start + size_of(dtype, shape)]
            if dtype == torch.float4_e2m1fn_x2:
                shape = (*shape[:-1], 2 * shape[-1])
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": span}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > MAX_HEADER - 8:
            raise ValueError(f"the header of {self.path} is longer than the format allows: {len(text)} bytes")
        return text.ljust(-(-len(text) // 8) * 8)

    def _put(self, offset: int, tensor: Tensor) -> None:
        self._file.seek(self._data_start + offset)
        for slab in _slabs(tensor.detach().resolve_conj().resolve_neg()):
            self._file.write(slab.cpu().numpy().data)


def _slabs(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of a tensor in row-major order, uint8 [n] at a time, each valid until the next.

    A tensor that does not lie so in memory is copied, some rows at a time, through one buffer: freed and allocated
    again, the allocator of glibc would let a buffer of this size pile up.
    """
    words = tensor.reshape(tensor.shape or 1).view(_WORDS[tensor.element_size()])
    if words.is_contiguous() and words.device.type == "cpu":
        yield from words.flatten().view(torch.uint8).split(_SLAB)
        return
    some_rows = words.split(max(1, _SLAB * len(words) // max(words.nbytes, 1)))
    buffer = torch.empty(some_rows[0].shape, dtype=words.dtype, device="cpu")
    for rows in some_rows:
        yield buffer[: len(rows)].copy_(rows).flatten().view(torch.uint8)


def _offsets(layout: Mapping[str, Description]) -> dict[str, int]:
    """Where each tensor begins, in bytes from the end of the header."""
    offsets, end = {}, 0
    for name, description in layout.items():
        offsets[name] = end
        end += size_of(*description)
    return offsets
