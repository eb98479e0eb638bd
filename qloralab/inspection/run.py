"""``qloralab inspect``: from the settings to the tables, the JSON and the pictures."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qloralab.lora.files import CONFIG_FILE as ADAPTER_CONFIG
from qloralab.nf4.data_type import DataType
from qloralab.nf4.dense_shares import LOGGER
from qloralab.nf4.files.atomic import replacing
from qloralab.nf4.tensor import quantize

from ..checkpoint.limits import Limits
from ..checkpoint.models import check_model, holds_4bit, load_tokenizer_and_config, model_name
from ..checkpoint.output_directory import check_writable
from ..compute import check_environment
from ..data_types import named_data_type
from ..display import Display
from ..errors import UserError
from ..evaluate.text import read_text
from ..settings import STDLIB
from ..train.run_directory import versions
from . import plots, tables
from .adapter import Adapter, inspect_adapter
from .budget import Budget, Rounding, error_budget, rounding_budget
from .layers import Layer, inspect_layers, with_output_errors
from .run_model import Pieces, Runner, linear_layers
from .settings import DATA_TYPES, InspectSettings
from .statistics import PROBABILITIES
from .weights import Weights

_DOCUMENTS = 4


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        settings: what was asked for.
        notes: what a reader of the figures has to know.
        data_types: that the figures are of, by name: their settings.
        layers: of a model; empty for an adapter.
        adapter: or None.
        text: what was run, or None.
        budget, roundings: None where they were not asked for.
    """

    settings: InspectSettings
    notes: list[str]
    data_types: dict[str, Any]
    layers: list[Layer]
    adapter: Adapter | None = None
    text: dict[str, Any] | None = None
    budget: Budget | None = None
    roundings: list[Rounding] | None = None

    def as_json(self) -> dict[str, Any]:
        """Everything, for a file. A number that is infinite is null."""
        fields: dict[str, Any] = {
            "settings": self.settings.as_json(),
            "versions": versions(),
            "notes": self.notes,
            "data_types": self.data_types,
            "text": self.text,
            "probabilities": list(PROBABILITIES),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
        }
        if self.adapter is not None:
            fields["adapter"] = {
                "config": dataclasses.asdict(self.adapter.config),
                "base": None if self.adapter.base is None else str(self.adapter.base),
                "layers": [dataclasses.asdict(update) for update in self.adapter.updates],
            }
        if self.budget is not None and self.roundings is not None:
            sums = {"sum_alone": self.budget.sum_alone, "sum_saved": self.budget.sum_saved}
            fields["budget"] = dataclasses.asdict(self.budget) | sums
            fields["roundings"] = [dataclasses.asdict(one) for one in self.roundings]
        return _finite(fields)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def inspect_path(settings: InspectSettings, display: Display | None = None) -> Inspection:
    """Inspect what lies at a path, print the tables, and write the JSON and the pictures where they are asked for.

    What can be refused without reading weights is refused first.

    Raises:
        UserError, FormatError: there is nothing to inspect at the path; a setting does not go with it; a file cannot be
            written.
    """
    display = display or Display()
    check_environment()
    path = settings.path
    if settings.json is not None:
        if settings.json.is_dir():
            raise UserError(f"{settings.json} is a directory; give --json the name of a file")
        check_writable(settings.json, settings.json.absolute().parent)
    if settings.plot is not None:
        check_writable(settings.plot, settings.plot.absolute())
    if is_adapter(path):
        why = f"{path} is an adapter"
        settings.refuse(why, "data_type", "activations", "budget")
        adapter = inspect_adapter(path, settings.base, display)
        found = Inspection(settings, adapter.notes, {}, [], adapter)
    else:
        with _without_warnings():
            found = _inspect_model(settings, display)
    tables.show(found, display)
    if settings.json is not None:
        _write(settings.json, json.dumps(found.as_json(), indent=1, allow_nan=False) + "\n")
        display.fact("saved", str(settings.json))
    if settings.plot is not None:
        with display.busy("drawing"):
            files = plots.draw(found, settings.plot)
        display.fact("pictures", ", ".join(str(file) for file in files))
    return found


@contextmanager
def _without_warnings() -> Iterator[None]:
    """That a data type has no kernel matters to whoever multiplies by it; here weights are dequantized."""
    level = LOGGER.level
    LOGGER.setLevel(logging.ERROR)
    try:
        yield
    finally:
        LOGGER.setLevel(level)


def is_adapter(path: Path) -> bool:
    """Whether path is a directory that holds an adapter and no model."""
    return os.path.isfile(path / ADAPTER_CONFIG) and not os.path.isfile(path / "config.json")


def _write(path: Path, text: str) -> None:
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as (part,):
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def _inspect_model(settings: InspectSettings, display: Display) -> Inspection:
    path = settings.path
    check_model(path)
    is_4bit = holds_4bit(path)
    if is_4bit:
        settings.refuse(f"{path} holds 4-bit weights, which are not quantized again", "data_type", "budget")
        if settings.activations and settings.base is None:
            raise UserError(f"{path} holds 4-bit weights; --activations needs the dense model, give it with --base")
    else:
        settings.refuse(f"{path} is dense", "base")
    if settings.base is not None:
        check_model(settings.base)
        if holds_4bit(settings.base):
            raise UserError(f"--base {settings.base} holds 4-bit weights; give the dense model")
    kinds = [] if is_4bit else [named_data_type(name) for name in settings.data_type or DATA_TYPES]
    if len({kind.name for kind in kinds}) < len(kinds):
        raise UserError("two of --data-type have one name; give each its own")
    pieces, text, tokenizer = _read(settings, display) if settings.reads_text else (None, None, None)

    with display.busy(f"reading {model_name(path)}"):
        weights = Weights(path)
    base = None
    if settings.base is not None:
        with display.busy(f"reading {model_name(settings.base)}"):
            base = Weights(settings.base)
    notes = [*weights.notes, *(base.notes if base else ())]
    with display.busy("inspecting", "weights") as progress:
        layers = inspect_layers(weights, kinds, base, progress)

    budget = roundings = None
    if pieces is not None:
        with display.busy("reading the dense model"):
            model = (base or weights).model()
        limits = Limits.of(model)
        limits.check(((one.source, one.input_ids) for one in pieces.pieces), tokenizer)
        runner, dense = Runner(model, pieces), linear_layers(model)
        if settings.activations:
            with display.busy("outputs of the layers", "products") as progress:
                layers = with_output_errors(layers, runner, dense, _low(kinds, weights, is_4bit), progress)
        if settings.budget:
            by = settings.by or "block"
            with display.busy(f"budget of the layers, {kinds[0].name}", "runs") as progress:
                budget = error_budget(runner, dense, kinds[0], by, progress)
            with display.busy(f"budget of the roundings, {kinds[0].name}", "runs") as progress:
                roundings = rounding_budget(runner, dense, kinds[0], progress)
    names = {kind.name: kind.settings() for kind in kinds}
    return Inspection(settings, notes, names, layers, None, text, budget, roundings)


def _low(kinds: list[DataType], weights: Weights, is_4bit: bool) -> dict[str, Callable[[str, Tensor], Tensor]]:
    """By data type, the 4-bit weight of a layer as float32; ``with_output_errors`` says more."""
    if is_4bit:
        names = {weights[layer].stored for layer in weights.layers}
        return {name: lambda path, dense: weights[path].dense() for name in names}
    return {
        kind.name: lambda path, dense, kind=kind: quantize(dense, kind, name=path).dequantize(dense.dtype)
        for kind in kinds
    }


def _read(settings: InspectSettings, display: Display) -> tuple[Pieces, dict[str, Any], Any]:
    model = settings.base or settings.path
    with display.busy("reading the text"):
        tokenizer, _ = load_tokenizer_and_config(model)
        limits = Limits.of_directory(model)
        text = read_text(settings.text or STDLIB, tokenizer, None, limits and limits.positions)
    pieces = Pieces.of(text.documents, settings.documents or _DOCUMENTS)
    if limits:
        limits.check(((one.source, one.input_ids) for one in pieces.pieces), tokenizer)
    facts = {"source": text.source, "pieces": len(pieces.pieces), "tokens": pieces.tokens, "counted": pieces.counted}
    return pieces, facts | {"counts": text.counts}, tokenizer
