"""What a run trains and what it trains on: the model and the examples that the settings name, checked and ready."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch

from qloralab.lora.config import LoraConfig
from qloralab.lora.inject import adapters, inject_, train_merge_aware_, trainable
from qloralab.lora.residual import residual_, start_
from qloralab.nf4.data_type import DataType
from qloralab.nf4.dense_shares import described
from qloralab.nf4.files.quantization_config import KNOWN
from qloralab.nf4.linear import QuantizedLinear

from ..checkpoint.limits import Limits
from ..checkpoint.models import (
    DENSE_DTYPE,
    check_adapter,
    check_adapter_fits,
    check_model,
    holds_4bit,
    load_adapter,
    load_model,
    load_tokenizer_and_config,
    model_name,
    quantize_loaded_,
)
from ..checkpoint.output_directory import count_text, size_text
from ..checkpoint.quantized_model import parameter_count
from ..compute import Precision, precision, prepare_kernels, prepare_memory, run_device
from ..data.batches import split
from ..data.encoding import Encoded, encode_all
from ..data.examples import Example, read_jsonl
from ..data.stdlib_corpus import stdlib_examples
from ..data_types import named_data_type
from ..display import Display
from ..errors import UserError
from ..settings import DATA_TYPE, QUANTIZATION, SPLITTING, STDLIB, Settings
from . import tensorboard, tracking
from .graphs import has_graphs


@dataclass(frozen=True)
class Material:
    """What is known of a run before a weight is read.

    Attributes:
        tokenizer, model_config: of the model.
        train, held_out: the examples to train on, and those to validate with.
        precision: what is computed in, and why.
        lora: of new adapters.
        data_type: of the weights that this run quantizes; None where it quantizes none.
    """

    tokenizer: Any
    model_config: Any
    train: list[Encoded]
    held_out: list[Encoded]
    precision: Precision
    lora: LoraConfig
    data_type: DataType | None


@dataclass(frozen=True)
class Prepared:
    """All that a run needs besides its settings.

    Attributes:
        model: on the device of the run; with adapters, or, for "full", in float32.
        tokenizer: of the model.
        train, held_out: the examples to train on, and those to validate with.
        precision: what is computed in, and why.
        data_type: of the weights that this run quantizes; None where it quantizes none.
        init_errors: with "loftq" or "pissa": norm(W - Q - s B A) / norm(W), the mean of all layers, of the quantizer
            alone and after each iteration.
    """

    model: Any
    tokenizer: Any
    train: list[Encoded]
    held_out: list[Encoded]
    precision: Precision
    data_type: DataType | None
    init_errors: list[float] | None = None


def prepare(settings: Settings, display: Display) -> Prepared:
    """Read the data, then the model; what can be refused without reading them is refused first.

    Raises:
        UserError: the data, the model, the adapter or a setting is not usable.
    """
    read = read_data(settings, display)
    torch.manual_seed(settings.seed)
    model, errors = _prepare_model(settings, read.lora, read.data_type, read.precision, display)
    _check_limits(Limits.of(model), [*read.train, *read.held_out], read.tokenizer, display)
    return Prepared(model, read.tokenizer, read.train, read.held_out, read.precision, read.data_type, errors)


def read_data(settings: Settings, display: Display) -> Material:
    """Read the data, and of the model what is not weights. Nothing is written.

    Raises:
        UserError: the data, the model's tokenizer, the adapter or a setting is not usable.
    """
    if settings.graph and not has_graphs(run_device()):
        raise UserError("--graph needs an NVIDIA GPU, and there is none here; leave it out")
    if settings.tensorboard:
        tensorboard.check()
    if settings.track:
        tracking.check(settings.track)
    config = _lora_config(settings)
    chosen = precision(settings.dtype, run_device())
    _check_paths(settings)
    data_type = _data_type(settings)
    with display.busy("reading the examples"):
        examples = stdlib_examples() if settings.data == STDLIB else read_jsonl(settings.data, settings.format)
    with display.busy("reading the tokenizer"):
        tokenizer, model_config = load_tokenizer_and_config(settings.model)
        limits = Limits.of_directory(settings.model)
    if settings.adapter and (other_model := check_adapter_fits(settings.adapter, model_config)):
        display.fact("note", other_model)
    train, held_out = _encode(examples, tokenizer, limits, settings, display)
    return Material(tokenizer, model_config, train, held_out, chosen, config, data_type)


def _lora_config(settings: Settings) -> LoraConfig:
    try:
        return LoraConfig(**settings.new_adapters)
    except ValueError as error:
        raise UserError(str(error)) from None


def _data_type(settings: Settings) -> DataType | None:
    """What the weights are quantized to, or None where they are not."""
    if settings.method != "qlora":
        return None
    if not holds_4bit(settings.model):
        found = named_data_type(settings.data_type or DATA_TYPE, settings.block_size, settings.double_quant)
        if settings.init in SPLITTING and not (found.is_plain and found.codebook in KNOWN):
            raise UserError(
                f"--init {settings.init} saves its base as bitsandbytes opens it, which has {' and '.join(KNOWN)} "
                f"only, not {found.name}"
            )
        return found
    splits = ("init",) if settings.init in SPLITTING else ()
    for name in (*QUANTIZATION, *splits):
        if getattr(settings, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} would be ignored: {settings.model} holds 4-bit weights; leave it out")
    return None


def _check_paths(settings: Settings) -> None:
    """Refuse at once what would be refused after the data, or the model, has been read."""
    check_model(settings.model)
    if settings.method != "qlora" and holds_4bit(settings.model):
        needs = "trains all weights" if settings.method == "full" else "trains adapters beside dense ones"
        raise UserError(
            f"{settings.model} holds 4-bit weights and --method {settings.method} {needs}; "
            "give --model the dense model, or use --method qlora"
        )
    if settings.adapter:
        check_adapter(settings.adapter)


def _encode(
    examples: list[Example], tokenizer: Any, limits: Limits | None, settings: Settings, display: Display
) -> tuple[list[Encoded], list[Encoded]]:
    """The tokens of the examples to train on, and of those held out; a line tells what became of all."""
    positions = limits and limits.positions
    with display.busy("tokenizing", "examples") as progress:
        encoded = encode_all(examples, tokenizer, settings.max_length, settings.treats_too_long, progress, positions)
    if limits:
        limits.check(((one.source, one.input_ids) for one in encoded), tokenizer)
    groups = [list(group) for _, group in groupby(encoded, key=lambda one: one.source)]
    halves = split(groups, settings.held_out, settings.seed)  # the answers of a conversation stay together
    train, held_out = (list(chain.from_iterable(half)) for half in halves)
    counts = {
        "left out as too long": len(examples) - len(groups),
        f"cut to {min(settings.max_length, positions or settings.max_length)} tokens": sum(
            group[0].cut for group in groups
        ),
        "conversations as one example for each answer": sum(len(group) > 1 for group in groups),
        "duplicates": len(encoded) - len({tuple(one.input_ids) for one in encoded}),
    }
    source = "docstrings of the Python standard library" if settings.data == STDLIB else settings.data
    said = [f"{source}: {len(train):,} examples + {len(held_out)} held out"]
    said += [f"{count:,} {what}" for what, count in counts.items() if count]
    if unused := dict.fromkeys(name for example in examples for name in example.unused):
        said.append(f"fields that are not used: {', '.join(unused)}")
    display.fact("data", "; ".join(said))
    return train, held_out


def _check_limits(limits: Limits, encoded: Sequence[Encoded], tokenizer: Any, display: Display) -> None:
    limits.check(((one.source, one.input_ids) for one in encoded), tokenizer)
    longer = sum(len(one.input_ids) > (limits.context or len(one.input_ids)) for one in encoded)
    if longer:
        display.fact(
            "note", f"{longer:,} examples are longer than the {limits.context:,} tokens the model was made for"
        )


def _prepare_model(
    settings: Settings, config: LoraConfig, data_type: DataType | None, chosen: Precision, display: Display
) -> tuple[Any, list[float] | None]:
    """The model that trains: read, in 4 bits and with adapters where the method has them, on the device; and
    ``Prepared.init_errors``."""
    name = model_name(settings.model)
    with display.busy(f"reading {name}"):
        dtype = torch.float32 if settings.method == "full" else chosen.dtype
        model = load_model(settings.model, dtype if data_type is None else DENSE_DTYPE)
    display.fact("model", f"{name}, {count_text(parameter_count(model))} parameters")
    display.fact("dtype", chosen.described(settings.method))
    prepare_kernels(display)
    prepare_memory(display)
    starts = {}
    if settings.init in SPLITTING and data_type is not None:
        with display.busy(f"{settings.init}: splitting weights", "layers") as progress:
            try:
                starts = residual_(model, config, settings.init, data_type, skip=settings.skipped, progress=progress)
            except ValueError as error:
                raise UserError(str(error)) from error
    if data_type is not None:  # in a model with 4-bit weights, what is dense is to stay dense
        with display.busy("quantizing", "weights") as progress:
            quantize_loaded_(model, chosen.dtype, progress, data_type, settings.skipped)
    if settings.method == "qlora":
        _tell_weights(model, display)
    if settings.method != "full":
        _adapt(model, settings.adapter, config, settings.merge_aware, display)
    errors = None
    if starts:
        start_(model, starts)
        errors = [sum(some) / len(some) for some in zip(*(start.errors for start in starts.values()), strict=True)]
        after = ", ".join(f"{error:.4f}" for error in errors[1:])
        display.fact(settings.init or "", f"error of the weights {errors[0]:.4f} quantized, {after} with the adapters")
    if settings.checkpointing:
        # transformers renames it; the old name goes in version 6
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model.to(run_device()), errors


def _tell_weights(model: Any, display: Display) -> None:
    weights = [module.weight for module in model.modules() if isinstance(module, QuantizedLinear)]
    count, size = sum(w.numel() for w in weights), sum(w.nbytes for w in weights)
    ideal = sum(w.ideal_bits_per_parameter * w.numel() for w in weights) / count
    bits = f"{count_text(count)} weights at {8 * size / count:.3f} bits: {size_text(size)}"
    if round(ideal, 3) != round(8 * size / count, 3):
        bits += f" ({ideal:.3f} bits were they packed)"
    kinds = ", ".join(sorted({w.codebook for w in weights}))
    display.fact("quantized", f"{kinds}, {len(weights)} linear layers, {bits}")
    display.fact("dense", described(model))


def _adapt(model: Any, adapter: Path | None, config: LoraConfig, merge_aware: bool, display: Display) -> None:
    """Put adapters beside the layers: those of a directory, or new ones."""
    if adapter:
        load_adapter(model, adapter)
    else:
        try:
            inject_(model, config)
        except ValueError as error:
            raise UserError(str(error)) from error
    if merge_aware:
        try:
            train_merge_aware_(model)
        except ValueError as error:
            raise UserError(str(error)) from error
    layers = adapters(model)
    used = next(iter(layers.values())).config
    count = count_text(sum(p.numel() for p in trainable(model)))
    start = f", from {adapter}" if adapter else ""
    start += ", through the quantizer" if merge_aware else ""
    scaling = f"r = {used.r}, alpha = {used.lora_alpha:g}{' over sqrt(r)' if used.use_rslora else ''}"
    display.fact("adapters", f"{scaling}, {len(layers)} layers: {count} trainable parameters{start}")
