"""A model, or an adapter, as a GGUF file: what ``qloralab export`` does.

GGUF is the format of llama.cpp and of what is made of it, and transformers reads it too. One file holds all: keys and
values (architecture, sizes, tokenizer), a table of the tensors, and their values, each at a multiple of 32 bytes. It
is written by the ``gguf`` package; here is what goes into it (``architecture.py``, ``tokenizer.py``).

A model comes from a Hugging Face directory, dense or with 4-bit weights, which are dequantized. Its tensors stream,
one after the other. Matrices are rounded to ``--dtype``, and what has one dimension stays float32, as llama.cpp has it.

An adapter is a file of its own, to be given beside the file of the model that it is for::

    general.type = "adapter", adapter.type = "lora", adapter.lora.alpha = scaling * r
    blk.0.attn_q.weight.lora_a [r, in], blk.0.attn_q.weight.lora_b [out, r]

A reader adds alpha / r * B A to the product with the weight. An adapter that was trained merge-aware is none of that:
it computes with a sum that is quantized, so it is merged and exported as a model.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qloralab.lora.files import read_adapter
from qloralab.nf4.files.atomic import replacing
from qloralab.nf4.files.checkpoint import Checkpoint
from qloralab.nf4.files.errors import FormatError

from ..checkpoint.models import (
    check_adapter,
    check_adapter_fits,
    check_model,
    load_tokenizer,
    load_tokenizer_and_config,
    model_name,
    quiet,
    reading,
    reading_adapter,
)
from ..checkpoint.opened import run_of
from ..checkpoint.output_directory import check_writable, size_text
from ..checkpoint.quantized_model import check_shape, skeleton
from ..checkpoint.rewrite import making
from ..display import Display
from ..errors import UserError
from . import tokenizer as tokenizer_fields
from .architecture import Architecture
from .settings import ExportSettings, FloatType

_DTYPES: dict[FloatType, torch.dtype] = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_FILE_TYPES: dict[FloatType, str] = {"bf16": "MOSTLY_BF16", "f16": "MOSTLY_F16", "f32": "ALL_F32"}


@dataclasses.dataclass(frozen=True)
class _Part:
    """A tensor of the file.

    Attributes:
        name: in the file.
        shape: of it.
        dtype: that it is rounded to.
        read: its values.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def export(settings: ExportSettings, display: Display | None = None) -> int:
    """Write the GGUF file of the settings.

    Returns:
        how many bytes it has.

    Raises:
        UserError: the model or the adapter cannot be used or is not written as GGUF, or the file cannot be written.
        FormatError: a file is not what it claims to be.
    """
    display = display or Display()
    out = settings.gguf
    check_model(settings.model)
    if os.path.lexists(out):
        raise UserError(f"{out} exists; give --gguf the name of a new file")
    check_writable(out, out.absolute().parent)
    with making(settings.model, out):
        (_export_model if settings.adapter is None else _export_adapter)(settings, display)
        size = out.stat().st_size
    display.fact("saved", f"{out}, {size_text(size)}")
    return size


def _export_model(settings: ExportSettings, display: Display) -> None:
    if not settings.model.is_dir():
        raise UserError(f"{settings.model} is a GGUF file already; give --adapter, or --model a directory")
    with display.busy(f"reading the headers of {model_name(settings.model)}"):
        with reading(settings.model):
            model = skeleton(settings.model)
        architecture = Architecture(model)
        try:
            parts = _parts(model, Checkpoint(settings.model), architecture, _DTYPES[settings.float_type])
        except FileNotFoundError as error:
            raise UserError(str(error)) from error
        tokenizer = load_tokenizer(settings.model)
    display.fact("model", f"{model_name(settings.model)}, {architecture.name}, {len(parts)} tensors")
    with _writer(settings, architecture, parts, display) as writer:
        writer.add_type("model")
        writer.add_name(model_name(settings.model))
        architecture.describe(writer)
        tokenizer_fields.describe(tokenizer, model.config.vocab_size, writer, settings.pre_tokenizer)


def _parts(model: Any, checkpoint: Checkpoint, architecture: Architecture, dtype: torch.dtype) -> list[_Part]:
    """The tensors of a directory, in the order of the model."""
    packed, parts = {*checkpoint.quantized_names()}, []
    there = packed.union(checkpoint.plain_names())
    tied = model.all_tied_weights_keys
    for name, parameter in model.named_parameters():
        if name not in there:
            raise FormatError("is not in the checkpoint", file=checkpoint.path, tensor=name)
        shape = tuple(parameter.shape)
        if name not in packed:
            check_shape(name, checkpoint.describe(name)[1], shape, checkpoint)

        def read(name: str = name, shape: tuple[int, ...] = shape) -> Tensor:
            if name not in packed:
                return architecture.rows(name, checkpoint.tensor(name).float())
            weight = checkpoint.quantized(name).dequantize(torch.float32)
            check_shape(name, tuple(weight.shape), shape, checkpoint)
            return architecture.rows(name, weight)

        parts.append(_Part(architecture.tensor(name), shape, dtype if len(shape) > 1 else torch.float32, read))
    known = {name for name, _ in model.named_parameters()}.union(tied, dict(model.named_buffers()))
    for name in sorted(there - known):
        if not name.endswith(".rotary_emb.inv_freq"):  # which older versions of transformers saved
            raise FormatError("is no tensor of the model", file=checkpoint.file_of(name), tensor=name)
    return parts


def _export_adapter(settings: ExportSettings, display: Display) -> None:
    from transformers import AutoModelForCausalLM

    adapter = settings.adapter
    assert adapter is not None
    check_adapter(adapter)
    if run_of(adapter).get("merge_aware"):
        merge = "qloralab merge --into 4bit, and export that"
        raise UserError(f"{adapter} was trained merge-aware: beside its base it is another model; {merge}")
    with display.busy(f"reading the configuration of {model_name(settings.model)}"):
        _, config = load_tokenizer_and_config(settings.model)
        if other_model := check_adapter_fits(adapter, config):
            display.fact("note", other_model)
        with quiet(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        architecture = Architecture(model)
        with reading_adapter(adapter):
            lora, layers = read_adapter(None, adapter)
    dtype, parts = _DTYPES[settings.float_type], []
    for layer, (A, B) in layers.items():
        name = f"{layer}.weight"
        if name in model.all_tied_weights_keys:
            raise UserError(f"{adapter} adapts {layer}, whose weight is that of the embedding: GGUF has no such tensor")
        base = architecture.tensor(name)
        parts.append(_Part(f"{base}.lora_a", tuple(A.shape), dtype, lambda A=A: A))
        parts.append(_Part(f"{base}.lora_b", tuple(B.shape), dtype, lambda B=B, n=name: architecture.rows(n, B)))
    alpha = lora.scaling * lora.r  # what a reader divides by r
    display.fact("adapter", f"{len(layers)} layers of a {architecture.name}, r = {lora.r}, alpha = {alpha:g}")
    with _writer(settings, architecture, parts, display) as writer:
        writer.add_type("adapter")
        writer.add_name(model_name(adapter))
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)


@contextmanager
def _writer(
    settings: ExportSettings, architecture: Architecture, parts: list[_Part], display: Display
) -> Iterator[Any]:
    """A ``gguf.GGUFWriter`` to describe what the file holds; then the tensors are written, one after the other."""
    import gguf

    settings.gguf.absolute().parent.mkdir(parents=True, exist_ok=True)
    with replacing(settings.gguf) as (path,):
        writer = gguf.GGUFWriter(path, architecture.name)
        try:
            yield writer
            writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[settings.float_type]])
            for part in parts:
                kind = gguf.GGMLQuantizationType[_ggml_name(part.dtype)]
                size = part.dtype.itemsize * int(np.prod(part.shape))
                writer.add_tensor_info(part.name, part.shape, np.dtype(np.float32), size, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            with display.busy("writing", "tensors") as progress:
                for done, part in enumerate(parts, 1):
                    writer.write_tensor_data(_rounded(part))
                    progress(done, len(parts))
        finally:
            writer.close()


def _ggml_name(dtype: torch.dtype) -> str:
    return next(name for name, one in _DTYPES.items() if one == dtype).upper()


def _rounded(part: _Part) -> np.ndarray:
    """The values of a tensor in its dtype; NumPy has no bfloat16, whose bits are those of an int16.

    Raises:
        UserError: a value has no place in float16.
    """
    tensor = part.read()
    made = tensor.to(part.dtype).contiguous()
    if part.dtype == torch.float16 and not made.isfinite().all() and tensor.isfinite().all():
        raise UserError(f"{part.name} has values that float16 cannot hold; export --dtype bf16 or f32")
    return (made.view(torch.int16) if part.dtype == torch.bfloat16 else made).numpy()
