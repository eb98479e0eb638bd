"""From a dense model to a directory with 4-bit weights: what ``qloralab quantize`` does.

A Hugging Face directory streams. Its tensors are read one after the other, each from a mapping that is let go before
the next; a linear layer's weight is quantized, everything else copied as it is, and each goes straight into a file
whose layout is known before. So memory follows the largest tensor, not the model; names and shapes come from a
skeleton of the model without memory. A GGUF file has no such tensors: it is loaded in bfloat16 first.

The new directory grows under a hidden name beside its path and is renamed when it is complete. Nothing is left of one
that was not.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from qloralab.nf4.files import bitsandbytes_layout
from qloralab.nf4.files.bitsandbytes_layout import dtype_name
from qloralab.nf4.files.checkpoint import Checkpoint, write_index
from qloralab.nf4.files.pretrained import COMPUTE_DTYPE, skip_modules
from qloralab.nf4.files.quantization_config import FIELD, STORAGES, QuantizationConfig
from qloralab.nf4.files.safetensors_reader import size_of
from qloralab.nf4.files.safetensors_writer import SafetensorsWriter
from qloralab.nf4.linear import QuantizedLinear
from qloralab.nf4.model import quantize_
from qloralab.nf4.packed import BLOCK_SIZES
from qloralab.nf4.tensor import quantize

from ..display import Display
from ..errors import UserError
from ..interrupt import StopRequest
from ..resident import peak_mb
from .models import DENSE_DTYPE, check_model, load_model, load_tokenizer, model_name, quiet, reading
from .output_directory import check_writable, count_text, size_text, written_beside
from .quantized_model import (
    CONFIG_FILE,
    check_shape,
    floating_dtype,
    quantizable,
    read_config,
    save_quantized,
    saved_tensors,
    skeleton,
    write_config,
)

# Weights in any format: what is not part of the safetensors checkpoint does not belong to the quantized model.
_WEIGHTS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".pkl", ".pickle",
    ".h5", ".msgpack", ".onnx", ".gguf", ".npz", ".npy", ".tflite", ".ot",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """How weights are quantized.

    Attributes:
        codebook: "nf4" or "fp4".
        block_size: weights that share a scale.
        double_quant: quantize the scales too.
        storage: the dtype that the packed codes are labelled with; the bytes are the same.
    """

    codebook: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    storage: torch.dtype = torch.uint8

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise UserError(f"--block-size is {self.block_size}; it must be one of {', '.join(map(str, BLOCK_SIZES))}")


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of it.

    Attributes:
        path: the directory.
        layers: how many linear layers are in 4 bits.
        weights: how many weights they have.
        bits: per weight, the scales included.
        bytes_before, bytes_after: of all tensors, as they lie in the files.
        seconds: of reading, quantizing and writing.
        peak_mb: the largest resident memory of the process, in 10**6 bytes.
    """

    path: Path
    layers: int
    weights: int
    bits: float
    bytes_before: int
    bytes_after: int
    seconds: float
    peak_mb: float


def quantize_model(model: Path, out: Path, options: Options | None = None, display: Display | None = None) -> Result:
    """Write the model at a path with 4-bit weights, as transformers and bitsandbytes do; see ``quantized_model``.

    Args:
        model: a Hugging Face directory with safetensors, or a GGUF file.
        out: the directory to make; it does not exist or is empty.
        options: by default NF4 in blocks of 64 with double quantization.
        display: shows the facts and the progress.

    Raises:
        UserError: the model cannot be quantized or read, or out cannot be written, or the disk is too small.
        FormatError: a file of the model is not what it claims to be.
    """
    options, display = options or Options(), display or Display()
    _check_out(out)
    check_model(model)
    write = _stream if model.is_dir() else _load_and_save
    try:
        result = write(model, out, options, display)
    except OSError as error:
        if error.filename and model in Path(os.fsdecode(error.filename)).parents:
            raise UserError(f"{os.fsdecode(error.filename)} cannot be read: {error.strerror}") from error
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error
    _summarize(result, display)
    return result


class _Stream:
    """What becomes of each tensor of a checkpoint, known before one is read."""

    def __init__(self, directory: Path, options: Options):
        self.directory = directory
        self.options = options
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
            model = skeleton(directory)
            layers = quantizable(model)
            self.skip_modules = skip_modules(model, layers)
        self._check_names(model, layers)
        self.weights = {f"{layer}.weight" for layer in layers}
        self.small_files = [file for file in sorted(directory.iterdir()) if _is_small_file(file)]
        for file in self.small_files:
            _check_link(file)
        self.sizes = {name: self.checkpoint.describe(name) for name in self.checkpoint.names()}

    def count(self, names: Iterable[str]) -> int:
        """How many numbers some tensors hold."""
        return sum(math.prod(self.sizes[name][1]) for name in names)

    def shards(self, directory: Path) -> list[tuple[SafetensorsWriter, list[str]]]:
        """A writer for each file of the checkpoint, and the tensors that it gets."""
        files, o = self.checkpoint.files, self.options
        shards = []
        for number, file in enumerate(files, 1):
            names = [name for name in self.sizes if self.checkpoint.file_of(name) == file]
            layout, late = {}, []
            for name in names:
                dtype, shape = self.sizes[name]
                parts = {name: (dtype, shape)}
                if name in self.weights:
                    parts = bitsandbytes_layout.describe(
                        name, shape, dtype, o.codebook, o.block_size, o.double_quant, o.storage
                    )
                    late.append([*parts][-1])
                layout |= parts
            called = f"model-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
            shards.append((SafetensorsWriter(directory / called, layout, late), names))
        return shards

    def convert(self, name: str) -> tuple[int, dict[str, torch.Tensor]]:
        """The new tensors that come of one, and the bytes of the packed weight (0 for a copy).

        Raises:
            UserError: the weight cannot be quantized.
        """
        tensor, o = self.checkpoint.tensor(name), self.options
        if name not in self.weights:
            return 0, {name: tensor}
        try:
            weight = quantize(tensor, o.codebook, o.block_size, o.double_quant, name=name)
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.checkpoint.file_of(name)}: {error}") from error
        return weight.nbytes, weight.stored(name, o.storage)

    def write_rest(self, part: Path) -> None:
        """Write config.json, and copy the small files."""
        for file in self.small_files:
            shutil.copyfile(file, part / file.name)
        o = self.options
        config = QuantizationConfig(o.codebook, o.double_quant, COMPUTE_DTYPE, o.storage, self.skip_modules)
        # Without a dtype, transformers takes that of the first tensor it finds, which now may be a scale.
        stated = any(self.config.get(field) for field in ("dtype", "torch_dtype"))
        dtype = {} if stated else {"dtype": dtype_name(floating_dtype(self.checkpoint))}
        write_config(part, self.config | dtype, config)

    def _check_names(self, model: Any, layers: list[str]) -> None:
        """Refuse a checkpoint whose names are not those that the model has in memory."""
        if not layers:
            raise UserError(f"{self.directory} has no linear layer to quantize")
        names = set(self.checkpoint.names())
        there = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in names}
        for name, parameter in model.named_parameters():
            if id(parameter) not in there:
                raise UserError(
                    f"{self.directory} has no tensor {name}; its tensors do not have the names that the model has in "
                    "memory, so it cannot be streamed: load it with transformers, then quantize_ and save_quantized"
                )
        for name in (f"{layer}.weight" for layer in layers):
            _, shape = self.checkpoint.describe(name)
            check_shape(name, shape, tuple(model.get_parameter(name).shape), self.checkpoint)


def _stream(directory: Path, out: Path, options: Options, display: Display) -> Result:
    with display.busy(f"reading the headers of {model_name(directory)}"):
        stream = _Stream(directory, options)
        try:
            needed = sum(writer.needed_bytes for writer, _ in stream.shards(out))
        except ValueError as error:  # the storage does not fit
            raise UserError(f"{directory}: {error}") from error
    needed += sum(file.stat().st_size for file in stream.small_files)
    files = len(stream.checkpoint.files)
    parameters = f"{count_text(stream.count(stream.sizes))} parameters in {files} file{'s' if files > 1 else ''}"
    display.fact("model", f"{model_name(directory)}, {parameters}")

    start = time.perf_counter()
    held = total = done = 0
    weight_map: dict[str, str] = {}
    stop = StopRequest(lambda: None)
    with written_beside(out, needed) as part, stop, display.busy("quantizing", "tensors") as progress:
        for writer, names in stream.shards(part):
            with writer:
                for name in names:
                    if stop.requested:
                        raise KeyboardInterrupt
                    nbytes, tensors = stream.convert(name)
                    held += nbytes
                    while tensors:  # the mapping goes with its tensor
                        key, tensor = tensors.popitem()
                        writer.write(key, tensor)
                        weight_map[key] = writer.path.name
                        total += tensor.nbytes
                        del tensor
                    done += 1
                    progress(done, len(stream.sizes))
        if files > 1:
            write_index(part, weight_map, total)
        stream.write_rest(part)
    count, before = stream.count(stream.weights), sum(size_of(*description) for description in stream.sizes.values())
    seconds = time.perf_counter() - start
    return Result(out, len(stream.weights), count, 8 * held / count, before, total, seconds, peak_mb())


def _load_and_save(path: Path, out: Path, options: Options, display: Display) -> Result:
    if options.storage != torch.uint8:
        name = dtype_name(options.storage)
        raise UserError(f"--storage {name} goes with a directory; a GGUF file is written with uint8")
    start = time.perf_counter()
    with display.busy(f"reading {model_name(path)}"):
        model = load_model(path, DENSE_DTYPE)
        tokenizer = load_tokenizer(path)
    parameters = sum(p.numel() for p in model.parameters())
    before = sum(t.nbytes for t in saved_tensors(model).values())
    display.fact("model", f"{model_name(path)}, {count_text(parameters)} parameters in bfloat16")
    o = options
    try:
        with display.busy("quantizing", "tensors") as progress:
            quantize_(model, o.codebook, o.block_size, o.double_quant, COMPUTE_DTYPE, progress=progress)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error
    after = sum(t.nbytes for t in saved_tensors(model).values())
    with display.busy("writing"), written_beside(out, after) as part, quiet():
        tokenizer.save_pretrained(part)
        save_quantized(model, part)
    weights = [module.weight for module in model.modules() if isinstance(module, QuantizedLinear)]
    count, held = sum(weight.numel() for weight in weights), sum(weight.nbytes for weight in weights)
    seconds = time.perf_counter() - start
    return Result(out, len(weights), count, 8 * held / count, before, after, seconds, peak_mb())


def _check_out(out: Path) -> None:
    """Refuse at once what would be refused at the end."""
    if os.path.isdir(out) and any(out.iterdir()):
        raise UserError(f"{out} exists and is not empty; give --out the name of a new directory")
    if os.path.lexists(out) and not os.path.isdir(out):
        raise UserError(f"{out} is not a directory; give --out the name of a new one")
    check_writable(out, out.absolute())


def _summarize(result: Result, display: Display) -> None:
    weights = f"{count_text(result.weights)} weights at {result.bits:.3f} bits"
    display.fact("4 bits", f"{result.layers} linear layers, {weights}: {size_text(result.weights * result.bits / 8)}")
    display.fact("size", f"{size_text(result.bytes_before)} -> {size_text(result.bytes_after)}")
    speed = result.bytes_before / 1e6 / result.seconds
    memory = f"{result.peak_mb / 1000:.2f} GB of memory"
    display.fact("speed", f"{result.seconds:.1f} s, {speed:,.0f} MB/s, {memory}")
    display.fact("saved", str(result.path))
    display.fact("try it", f'qloralab generate --model {result.path} --prompt "…"')


def storage_dtype(name: str) -> torch.dtype:
    """The dtype of a name of ``--storage``.

    Raises:
        UserError: bitsandbytes has no such storage.
    """
    if name not in STORAGES:
        raise UserError(f"--storage is {name!r}; it must be one of {', '.join(STORAGES)}")
    return STORAGES[name]


def _is_small_file(file: Path) -> bool:
    """Whether a file of a model's directory goes with the quantized model as it is."""
    left = file.name.startswith(".") or file.name.endswith(_WEIGHTS) or file.name in (CONFIG_FILE, "training_args.bin")
    return file.is_file() and not left


def _check_link(file: Path) -> None:
    """Refuse a symbolic link that leads elsewhere than to its directory or to the blobs of the hub's cache."""
    target, folder = file.resolve(), file.parent.resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if not (target.is_relative_to(folder) or target.is_relative_to(blobs)):
        raise UserError(f"{file} leads out of the directory, to {target}; put a copy in its place, or remove it")
