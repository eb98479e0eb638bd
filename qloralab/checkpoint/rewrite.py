"""A dense checkpoint, written again tensor by tensor: what ``qloralab quantize`` and ``qloralab merge`` share.

A Hugging Face directory streams. Its tensors are read one after the other, each from a mapping that is let go before
the next; what becomes of one goes straight into a file whose layout is known before. So memory follows the largest
tensor, not the model; names and shapes come from a skeleton of the model without memory.

The new directory grows under a hidden name beside its path and is renamed when it is complete. Nothing is left of one
that was not.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from qloralab.nf4.files.checkpoint import Checkpoint, write_index
from qloralab.nf4.files.quantization_config import FIELD
from qloralab.nf4.files.safetensors_reader import Description
from qloralab.nf4.files.safetensors_writer import SafetensorsWriter

from ..display import Display
from ..errors import UserError
from ..interrupt import StopRequest
from .models import model_name, reading
from .output_directory import count_text, written_beside
from .quantized_model import CONFIG_FILE, check_shape, read_config, skeleton

# Weights in any format: what is not part of the safetensors checkpoint does not belong to the new model.
_WEIGHTS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".pkl", ".pickle",
    ".h5", ".msgpack", ".onnx", ".gguf", ".npz", ".npy", ".tflite", ".ot",
)  # fmt: skip


class Rewriting:
    """A dense directory, opened to be written again. A subclass says what becomes of each tensor.

    Args:
        directory: of Hugging Face, with safetensors.
        chosen: the linear layers, of a skeleton, whose weights change.
        otherwise: what to do, in words, where the files have other names than the model in memory.

    Attributes:
        model: a skeleton.
        layers: the chosen ones.
        config: the fields of config.json.
        sizes: dtype and shape of each tensor, in the order of the files.
        small_files: what is copied beside the tensors.

    Raises:
        UserError: the directory is not dense, has no such layer, or its tensors have other names.
        FormatError: a file of it is not what it claims to be.
    """

    def __init__(self, directory: Path, chosen: Callable[[Any], list[str]], otherwise: str):
        self.directory = directory
        self.config = read_config(directory)
        if FIELD in self.config:
            fields = self.config[FIELD]
            method = fields.get("quant_method", "bitsandbytes") if isinstance(fields, dict) else "unknown"
            raise UserError(f"{directory} is quantized already, by {method}; give --model the dense model")
        try:
            self.checkpoint = Checkpoint(directory)
        except FileNotFoundError as error:
            raise UserError(str(error)) from error
        if self.checkpoint.quantized_names():
            raise UserError(f"{directory} holds 4-bit weights already; give --model the dense model")
        with reading(directory):
            self.model = skeleton(directory)
            self.layers = chosen(self.model)
        self._check_names(otherwise)
        self.small_files = small_files(directory)
        self.sizes = {name: self.checkpoint.describe(name) for name in self.checkpoint.names()}

    def parts(self, name: str) -> tuple[dict[str, Description], list[str]]:
        """The tensors that one becomes, by dtype and shape; and the late ones, see ``SafetensorsWriter``.

        Raises:
            ValueError: it cannot become them.
        """
        return {name: self.sizes[name]}, []

    def convert(self, name: str) -> dict[str, Tensor]:
        """The same tensors. Called once for each name, in the order of the files.

        Raises:
            UserError: it cannot become them.
        """
        return {name: self.checkpoint.tensor(name)}

    def write_rest(self, part: Path) -> None:
        """Write config.json, and copy the small files."""
        copy_small_files(self.small_files, part)

    def count(self, names: Iterable[str]) -> int:
        """How many numbers some tensors hold."""
        return sum(math.prod(self.sizes[name][1]) for name in names)

    def write(self, out: Path, doing: str, display: Display) -> int:
        """Write all of it.

        Args:
            out: the directory to make.
            doing: what is done to the tensors, for the display.
            display: shows the facts and the progress.

        Returns:
            the bytes of all tensors.

        Raises:
            UserError: a tensor cannot be converted, or the disk is too small.
        """
        try:
            needed = sum(writer.needed_bytes for writer, _ in self._shards(out))
        except ValueError as error:
            raise UserError(f"{self.directory}: {error}") from error
        needed += sum(file.stat().st_size for file in self.small_files)
        files = len(self.checkpoint.files)
        parameters = f"{count_text(self.count(self.sizes))} parameters in {files} file{'s' if files > 1 else ''}"
        display.fact("model", f"{model_name(self.directory)}, {parameters}")
        total = done = 0
        weight_map: dict[str, str] = {}
        stop = StopRequest(lambda: None)
        with written_beside(out, needed) as part, stop, display.busy(doing, "tensors") as progress:
            for writer, names in self._shards(part):
                with writer:
                    for name in names:
                        if stop.requested:
                            raise KeyboardInterrupt
                        tensors = self.convert(name)
                        while tensors:  # the mapping goes with its tensor
                            key, tensor = tensors.popitem()
                            writer.write(key, tensor)
                            weight_map[key] = writer.path.name
                            total += tensor.nbytes
                            del tensor
                        done += 1
                        progress(done, len(self.sizes))
            if files > 1:
                write_index(part, weight_map, total)
            self.write_rest(part)
        return total

    def _shards(self, directory: Path) -> list[tuple[SafetensorsWriter, list[str]]]:
        """A writer for each file of the checkpoint, and the tensors that it gets."""
        files = self.checkpoint.files
        shards = []
        for number, file in enumerate(files, 1):
            names = [name for name in self.sizes if self.checkpoint.file_of(name) == file]
            layout, late = {}, []
            for name in names:
                parts, held = self.parts(name)
                layout |= parts
                late += held
            called = f"model-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
            shards.append((SafetensorsWriter(directory / called, layout, late), names))
        return shards

    def _check_names(self, otherwise: str) -> None:
        """Refuse a checkpoint whose names are not those that the model has in memory."""
        if not self.layers:
            raise UserError(f"{self.directory} has no linear layer to quantize")
        names = set(self.checkpoint.names())
        there = {id(p) for name, p in self.model.named_parameters(remove_duplicate=False) if name in names}
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in there:
                raise UserError(
                    f"{self.directory} has no tensor {name}; its tensors do not have the names that the model has in "
                    f"memory, so it cannot be streamed: {otherwise}"
                )
        for name in (f"{layer}.weight" for layer in self.layers):
            _, shape = self.checkpoint.describe(name)
            check_shape(name, shape, tuple(self.model.get_parameter(name).shape), self.checkpoint)


def small_files(directory: Path) -> list[Path]:
    """What goes with a model as it is: all of its directory but weights, config.json and hidden files.

    Raises:
        UserError: one is a link that leads out of the directory.
    """
    found = [file for file in sorted(directory.iterdir()) if _is_small_file(file)]
    for file in found:
        _check_link(file)
    return found


def copy_small_files(files: Iterable[Path], part: Path) -> None:
    """Copy them into a directory."""
    for file in files:
        shutil.copyfile(file, part / file.name)


def late_part(parts: Mapping[str, Description]) -> str:
    """Of the tensors of a 4-bit weight, the one whose size is known last."""
    return [*parts][-1]


@contextmanager
def making(model: Path, out: Path) -> Iterator[None]:
    """Errors of the disk, as one line about the file of the model that cannot be read, or about out."""
    try:
        yield
    except OSError as error:
        if error.filename and model in Path(os.fsdecode(error.filename)).parents:
            raise UserError(f"{os.fsdecode(error.filename)} cannot be read: {error.strerror}") from error
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error


def _is_small_file(file: Path) -> bool:
    left = file.name.startswith(".") or file.name.endswith(_WEIGHTS) or file.name in (CONFIG_FILE, "training_args.bin")
    return file.is_file() and not left


def _check_link(file: Path) -> None:
    """Refuse a symbolic link that leads elsewhere than to its directory or to the blobs of the hub's cache."""
    target, folder = file.resolve(), file.parent.resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if not (target.is_relative_to(folder) or target.is_relative_to(blobs)):
        raise UserError(f"{file} leads out of the directory, to {target}; put a copy in its place, or remove it")
