"""A checkpoint: the tensors of a model by name, in one safetensors file or in several with an index.

``model.safetensors`` holds everything, or ``model.safetensors.index.json`` says which file holds what::

    {"metadata": {"total_size": 4096}, "weight_map": {"h.0.w": "model-00001-of-00002.safetensors", ...}}

and other tools write one ``*.safetensors`` file of another name. The index is believed in nothing: its files lie in
the directory itself, hold the tensors that it names, and no others. A symbolic link in the directory may lead elsewhere
(the cache of Hugging Face's hub is made of them); a name in the index may not.

A 4-bit weight is a handful of tensors (see ``bitsandbytes_layout.py``), which may lie in several files. The names of a
checkpoint so fall into those of its 4-bit weights and the plain ones.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..tensor import QuantizedTensor
from . import bitsandbytes_layout
from .errors import FormatError
from .json_file import read_object, write_object
from .safetensors_reader import Description, SafetensorsFile

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SUFFIX = ".safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PICKLE = "a pickle, which can run code; where it is trusted, convert it to safetensors"


class Checkpoint:
    """The tensors of a directory, or of one safetensors file. Opening it reads headers; no tensor.

    Args:
        path: of the file; or of the directory, in which ``model.safetensors`` comes before the index, and the index
            before a single file of another name.

    Raises:
        FileNotFoundError: there is nothing at path, or nothing that holds weights.
        FormatError: the index or a file is broken, a 4-bit weight has no payload, or there are only pickles.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        index = self.path / INDEX_FILE
        if self.path.is_dir() and os.path.lexists(index) and not os.path.lexists(self.path / WEIGHTS_FILE):
            self._opened = _open_shards(index)
        else:
            self._opened = [SafetensorsFile(_single_file(self.path))]
        self._files = {name: file for file in self._opened for name in file.names()}
        self._parts = _parts(list(self._files))
        for name in self.plain_names():
            if name.endswith(".quant_map"):
                message = "is part of a 4-bit weight, whose quant_state is missing"
                raise FormatError(message, file=self.file_of(name), tensor=name)

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors: one, or the shards in the order of their names."""
        return [file.path for file in self._opened]

    def names(self) -> list[str]:
        """The names of all tensors, file by file, as they lie there."""
        return list(self._files)

    def quantized_names(self) -> list[str]:
        """The full names of the 4-bit weights."""
        return list(self._parts)

    def plain_names(self) -> list[str]:
        """The names of the tensors that are part of no 4-bit weight."""
        taken = {name for parts in self._parts.values() for name in parts}
        return [name for name in self._files if name not in taken]

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor.

        Raises:
            FormatError: the checkpoint has no such tensor; so do the methods below.
        """
        return self._file(name).path

    def describe(self, name: str) -> Description:
        """The dtype and the shape of a tensor, which is not read."""
        return self._file(name).describe(name)

    def tensor(self, name: str) -> Tensor:
        """A tensor, backed by a mapping of its file that goes with it; see ``SafetensorsFile``."""
        return self._file(name).tensor(name)

    def quantized(self, name: str) -> QuantizedTensor:
        """A 4-bit weight, in memory of its own.

        Args:
            name: one of ``quantized_names``.

        Raises:
            FormatError: its tensors do not fit each other, or there are none.
        """
        names = self._parts.get(name, [])
        try:
            tensors: dict[str, Tensor] = {}
            for file in dict.fromkeys(self._files[part] for part in names):
                tensors |= file.tensors(part for part in names if self._files[part] is file)
            weight = QuantizedTensor.from_bitsandbytes(tensors, name)
        except FormatError as error:
            if error.file is not None:
                raise
            where = [part for part in (error.tensor, *names) if part in self._files]
            file = self._files[where[0]].path if where else self.path
            raise FormatError(error.message, file=file, tensor=error.tensor, field=error.field) from None
        return weight.clone()

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._files:
            raise FormatError("is not in the checkpoint", file=self.path, tensor=name)
        return self._files[name]


def write_index(directory: str | os.PathLike[str], weight_map: Mapping[str, str], total_size: int) -> None:
    """Write the index of a checkpoint of several files, as transformers writes it.

    Args:
        directory: of the files.
        weight_map: the name of the file of each tensor, by the name of the tensor.
        total_size: bytes of all tensors together.
    """
    write_object(Path(directory, INDEX_FILE), {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)})


def _single_file(path: Path) -> Path:
    if not path.is_dir():
        if path.suffix in _PICKLES and path.exists():
            raise FormatError(f"is {_PICKLE}", file=path)
        return path
    if os.path.lexists(path / WEIGHTS_FILE):
        return path / WEIGHTS_FILE
    inside = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    found = [file for file in inside if file.suffix == _SUFFIX]
    if len(found) > 1:
        raise FormatError(f"holds {len(found)} safetensors files and no {INDEX_FILE}", file=path)
    for pickle in (file for file in inside if file.suffix in _PICKLES and not found):
        raise FormatError(f"is {_PICKLE}", file=pickle)
    if not found:
        raise FileNotFoundError(f"{path} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    return found[0]


def _open_shards(index: Path) -> list[SafetensorsFile]:
    """The files that an index names, in the order of their names; each tensor lies where the index has it."""
    weight_map = _read_index(index)
    opened, found = [], set()
    for shard in sorted(set(weight_map.values())):
        path = index.with_name(shard)
        if not os.path.exists(path):
            raise FormatError(f"names {shard!r}, which does not exist", file=index, field="weight_map")
        opened.append(SafetensorsFile(path))
        for name in opened[-1].names():
            if weight_map.get(name) != shard:
                raise FormatError(f"is not what {INDEX_FILE} has in this file", file=path, tensor=name)
            found.add(name)
    for name, shard in weight_map.items():
        if name not in found:
            message = f"is not in the file, where {INDEX_FILE} has it"
            raise FormatError(message, file=index.with_name(shard), tensor=name)
    return opened


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor."""
    content = {"metadata": {}, **read_object(path)}
    if not isinstance(content["metadata"], dict):
        raise FormatError(f"is {content['metadata']!r:.60}; expected an object", file=path, field="metadata")
    if "weight_map" not in content:
        raise FormatError("is missing", file=path, field="weight_map")
    weight_map = content["weight_map"]
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"is {weight_map!r:.60}; expected files by tensor", file=path, field="weight_map")
    for name, shard in weight_map.items():
        wrong = _wrong_with(shard)
        if wrong:
            raise FormatError(f"is {shard!r:.100}, which {wrong}", file=path, tensor=name, field="weight_map")
    return weight_map


def _wrong_with(shard: Any) -> str | None:
    """Why this cannot be the name of a shard; None when it can."""
    if not isinstance(shard, str):
        return "is no name of a file"
    if "/" in shard or "\\" in shard:
        return "leaves the directory"
    if shard.endswith(_PICKLES):
        return f"is {_PICKLE}"
    if not shard.endswith(_SUFFIX) or not shard.isprintable() or len(shard.encode()) > 255:
        return f"is no name of a *{_SUFFIX} file"
    return None


def _parts(names: list[str]) -> dict[str, list[str]]:
    """The names of the tensors of each 4-bit weight, by the full name of the weight."""
    parts: dict[str, list[str]] = {prefix: [] for prefix in bitsandbytes_layout.weights(names)}
    for name in names:
        end = len(name)
        while end > 0:
            if name[:end] in parts:
                parts[name[:end]].append(name)
            end = name.rfind(".", 0, end)
    return parts
