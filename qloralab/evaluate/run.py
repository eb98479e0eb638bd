"""``qloralab eval``: from the settings to the table and the JSON."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from qloralab.lora.inject import trainable
from qloralab.nf4.data_type import DataType
from qloralab.nf4.linear import QuantizedLinear

from ..checkpoint.limits import Limits
from ..checkpoint.models import check_model, holds_4bit, model_name
from ..checkpoint.opened import Source
from ..checkpoint.output_directory import count_text
from ..checkpoint.quantized_model import parameter_count
from ..compute import Precision, precision, run_device
from ..data.encoding import fingerprint
from ..data_types import named_data_type
from ..display import Display
from ..errors import UserError
from ..train.run_directory import versions
from .evaluation import Evaluation, check_comparable, compare
from .measure import evaluate
from .record import check_out, read_record, write_record
from .settings import DENSE, NONE, EvalSettings
from .table import show, show_differences
from .text import Text, read_text
from .windows import check_window, counted

_DEFAULT = "nf4"


def evaluate_model(settings: EvalSettings, display: Display | None = None) -> Evaluation:
    """Evaluate a model on a text, print the figures, and write the JSON where one is asked for.

    What can be refused without reading weights is refused first.

    Raises:
        UserError, FormatError: the model, the adapter, the text or a setting is not usable; the other run has read
            other tokens; the JSON cannot be written.
    """
    display = display or Display()
    chosen = precision(settings.dtype, run_device())
    if settings.out is not None:
        check_out(settings.out)
    other = None if settings.against is None else read_record(settings.against)
    source = Source.of(settings.model, _data_type(settings), settings.adapter, display, settings.skip or ())
    reference = _reference(settings, source, display)
    text = _documents(settings, source, display)
    if other is not None:
        check_comparable(other, settings.window, settings.stride, fingerprint(text.documents))

    model = source.open(chosen, display)
    limits = Limits.of(model)
    check_window(settings.window, settings.stride, limits.positions)
    _check_words(limits, text, source)
    beside = model if reference is source else None if reference is None else reference.open(chosen, display)
    facts = _facts(settings, source, reference, text, model, chosen)
    _tell(facts, chosen, display)
    with display.busy("evaluating", "tokens") as progress:
        found = evaluate(model, text.documents, settings.window, settings.stride, beside, progress)

    name = _name(settings, reference)
    show(found, display.console, name)
    comparison = None
    if other is not None and settings.against is not None:
        comparison = compare(found, other)
        show_differences(found, other, comparison, display.console, settings.against.stem, name)
    if settings.out is not None:
        write_record(settings.out, found, [one.source for one in text.documents], facts, comparison)
        display.fact("saved", str(settings.out))
    return found


def _data_type(settings: EvalSettings) -> DataType | None:
    """Of the linear layers; None: dense, or as the directory holds them."""
    check_model(settings.model)
    if holds_4bit(settings.model):
        if settings.data_type is not None:
            raise UserError(f"{settings.model} holds 4-bit weights; --data-type needs the dense model, leave it out")
        settings.refuse_quantizing(f"{settings.model} holds 4-bit weights")
        return None
    if settings.data_type == DENSE:
        return None
    return named_data_type(settings.data_type or _DEFAULT, settings.block_size, settings.double_quant)


def _reference(settings: EvalSettings, source: Source, display: Display) -> Source | None:
    """What KL divergence and agreement are taken from: a model that is opened; the source itself; or None."""
    if settings.reference == Path(NONE):
        return None
    if settings.reference is None and holds_4bit(source.model):
        display.fact(
            "note", f"no KL divergence: {source.model} holds no dense weights; give --reference the dense model"
        )
        return None
    if settings.reference is None and source.data_type is None and source.adapter is None:
        return source
    if settings.reference is None:
        return dataclasses.replace(source, data_type=None, adapter=None, skip=())
    found = Source.of(settings.reference, None, None, display)
    if found.tokenizer.get_vocab() != source.tokenizer.get_vocab():
        raise UserError(f"--reference {settings.reference} has another vocabulary than {settings.model}")
    return found


def _documents(settings: EvalSettings, source: Source, display: Display) -> Text:
    positions = source.limits and source.limits.positions
    check_window(settings.window, settings.stride, positions)
    with display.busy("reading the text"):
        text = read_text(settings.text, source.tokenizer, settings.documents, positions)
    if source.limits:
        _check_words(source.limits, text, source)
    return text


def _check_words(limits: Limits, text: Text, source: Source) -> None:
    """Documents may be longer than the model's positions: windows are not."""
    endless = dataclasses.replace(limits, positions=None)
    endless.check(((one.source, one.input_ids) for one in text.documents), source.tokenizer)


def _name(settings: EvalSettings, reference: Source | None) -> str:
    return "" if reference is None else model_name(reference.model) if settings.reference else DENSE


def _facts(
    settings: EvalSettings, source: Source, reference: Source | None, text: Text, model: Any, chosen: Precision
) -> dict[str, Any]:
    """All that the figures depend on."""
    return {
        "settings": settings.as_json(),
        "model": {"name": model_name(settings.model), **_weights(source, model)},
        "reference": None if reference is None else str(reference.model),
        "text": {
            "source": text.source,
            "documents": len(text.documents),
            "tokens": sum(len(one.input_ids) for one in text.documents),
            "counted": sum(map(counted, text.documents)),
            "counts": text.counts,
        },
        "dtype": chosen.name,
        "dtype_reason": chosen.why,
        "versions": versions(),
    }


def _weights(source: Source, model: Any) -> dict[str, Any]:
    """How the weights are held."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    weights = {id(layer.weight): layer.weight for layer in layers}.values()
    count = sum(weight.numel() for weight in weights)
    adapters = sum(p.numel() for p in trainable(model)) if source.adapter else 0
    facts: dict[str, Any] = {
        "parameters": parameter_count(model) - adapters,
        "adapter_parameters": adapters,
        "data_type": source.data_type.settings() if source.data_type else "as it lies" if layers else DENSE,
        "quantized_layers": len(layers),
        "quantized_parameters": count,
    }
    if count:
        facts["bits_per_parameter"] = sum(8 * weight.nbytes for weight in weights) / count
        ideal = sum(weight.ideal_bits_per_parameter * weight.numel() for weight in weights)
        facts["ideal_bits_per_parameter"] = ideal / count
    return facts


def _tell(facts: dict[str, Any], chosen: Precision, display: Display) -> None:
    model, text, settings = facts["model"], facts["text"], facts["settings"]
    display.fact("model", f"{model['name']}, {count_text(model['parameters'])} parameters")
    display.fact("weights", _described(model))
    if settings["adapter"]:
        display.fact("adapter", f"{settings['adapter']}, {count_text(model['adapter_parameters'])} parameters")
    display.fact("dtype", chosen.described())
    documents = f"{text['documents']:,} document{'' if text['documents'] == 1 else 's'}"
    display.fact("text", f"{text['source']}: {documents}, {text['tokens']:,} tokens")
    display.fact("counted", f"{text['counted']:,}: {text['counts']}")
    display.fact("windows", f"{settings['window']} tokens, stride {settings['stride']}")


def _described(model: dict[str, Any]) -> str:
    if not model["quantized_layers"]:
        return DENSE
    name, held, ideal = "4 bits", model["bits_per_parameter"], model["ideal_bits_per_parameter"]
    if isinstance(model["data_type"], dict):
        kind = model["data_type"]
        name = f"{kind['name']}, blocks of {kind['block_size']}, scales {kind['scale']}, {kind['encoding']}"
    less = "" if abs(held - ideal) < 0.0005 else f" ({ideal:.3f} ideal)"
    count = count_text(model["quantized_parameters"])
    return f"{name}: {model['quantized_layers']} linear layers, {count} weights at {held:.3f} bits{less}"
