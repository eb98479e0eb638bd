"""From a dense model to a directory with 4-bit weights: what ``qloralab quantize`` does.

A Hugging Face directory streams (``rewrite.py``): a linear layer's weight is quantized, everything else copied as it
is. A GGUF file has no such tensors: it is loaded in bfloat16 first.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch

from qloralab.nf4.files import bitsandbytes_layout
from qloralab.nf4.files.bitsandbytes_layout import dtype_name
from qloralab.nf4.files.pretrained import COMPUTE_DTYPE, skip_modules
from qloralab.nf4.files.quantization_config import STORAGES, QuantizationConfig
from qloralab.nf4.files.safetensors_reader import Description, size_of
from qloralab.nf4.linear import QuantizedLinear
from qloralab.nf4.model import quantize_
from qloralab.nf4.packed import BLOCK_SIZES
from qloralab.nf4.tensor import quantize

from ..display import Display
from ..errors import UserError
from ..resident import peak_mb
from .models import DENSE_DTYPE, check_model, load_model, load_tokenizer, model_name, quiet
from .output_directory import check_new, count_text, size_text, written_beside
from .quantized_model import floating_dtype, quantizable, save_quantized, saved_tensors, write_config
from .rewrite import Rewriting, late_part, making


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
    check_new(out)
    check_model(model)
    write = _stream if model.is_dir() else _load_and_save
    with making(model, out):
        result = write(model, out, options, display)
    _summarize(result, display)
    return result


class _Stream(Rewriting):
    """A directory whose linear layers go into 4 bits."""

    def __init__(self, directory: Path, options: Options):
        super().__init__(directory, quantizable, "load it with transformers, then quantize_ and save_quantized")
        self.options = options
        self.weights = {f"{layer}.weight" for layer in self.layers}
        self.held = 0  # bytes of the packed weights

    def parts(self, name: str) -> tuple[dict[str, Description], list[str]]:
        if name not in self.weights:
            return super().parts(name)
        (dtype, shape), o = self.sizes[name], self.options
        parts = bitsandbytes_layout.describe(name, shape, dtype, o.codebook, o.block_size, o.double_quant, o.storage)
        return parts, [late_part(parts)]

    def convert(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self.weights:
            return super().convert(name)
        tensor, o = self.checkpoint.tensor(name), self.options
        try:
            weight = quantize(tensor, o.codebook, o.block_size, o.double_quant, name=name)
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.checkpoint.file_of(name)}: {error}") from error
        self.held += weight.nbytes
        return weight.stored(name, o.storage)

    def write_rest(self, part: Path) -> None:
        super().write_rest(part)
        o, skipped = self.options, skip_modules(self.model, self.layers)
        config = QuantizationConfig(o.codebook, o.double_quant, COMPUTE_DTYPE, o.storage, skipped)
        # Without a dtype, transformers takes that of the first tensor it finds, which now may be a scale.
        stated = any(self.config.get(field) for field in ("dtype", "torch_dtype"))
        dtype = {} if stated else {"dtype": dtype_name(floating_dtype(self.checkpoint))}
        write_config(part, self.config | dtype, config)


def _stream(directory: Path, out: Path, options: Options, display: Display) -> Result:
    with display.busy(f"reading the headers of {model_name(directory)}"):
        stream = _Stream(directory, options)
    start = time.perf_counter()
    total = stream.write(out, "quantizing", display)
    count, before = stream.count(stream.weights), sum(size_of(*description) for description in stream.sizes.values())
    seconds = time.perf_counter() - start
    return Result(out, len(stream.weights), count, 8 * stream.held / count, before, total, seconds, peak_mb())


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
