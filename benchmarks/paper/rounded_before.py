"""How far one rounding to 4 bits beforehand moves the ranking of data types.

The weights of SmolLM2 come from a GGUF file in Q4_1: blocks of 32 weights, each ``d * q + m`` with q from 0 to 15 and
float16 d and m. What a data type does to such weights is not what it does to those of a model. Here the same is done on
purpose to models whose float32 weights are known, and the data types are ranked twice:

* *as measured*: error of the quantized weights against the rounded ones, all that a user of the GGUF file sees;
* *in truth*: error of quantizing the float32 weights themselves.

Kendall's tau is 1 for the same order and -1 for the opposite one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qloralab.checkpoint.models import load_tokenizer
from qloralab.evaluate.measure import evaluate
from qloralab.nf4.data_type import DATA_TYPES

from ..view import picture as figure
from .cases import four_bits
from .models import linear_weights, load, quantized
from .perplexity import beginnings
from .table import Context, Record, Records, grid
from .weight_error import errors

TITLE = "Weights that were in 4 bits before (SmolLM2): does the ranking move?"


@dataclass(frozen=True)
class Settings:
    """Held-out files and tokens of each, for the KL divergence; data types, None: all of 16 values."""

    documents: int = 24
    tokens: int = 256
    data_types: tuple[str, ...] | None = None


SETTINGS = {"full": Settings(), "quick": Settings(8, 128), "tiny": Settings(2, 32, ("nf4", "fp4", "int4"))}


def q4_1(weight: Tensor) -> Tensor:
    """A weight as a GGUF file in Q4_1 gives it back: 32 weights, ``d * q + m``, q from 0 to 15, d and m in float16."""
    blocks = weight.reshape(-1, 32)
    low, high = blocks.aminmax(dim=1, keepdim=True)
    d = (high - low) / 15
    q = ((blocks - low) / d.clamp_min(1e-12)).add(0.5).floor().clamp(0, 15)
    return (d.half().float() * q + low.half().float()).view_as(weight)


def rows(context: Context) -> list[Record]:
    """A record for each model with known weights and data type."""
    settings, records = context.of(SETTINGS), []
    paths = {context.tinylm.name: context.tinylm}
    if context.minilm:
        paths["all-MiniLM-L6-v2"] = context.minilm
    for model_name, path in paths.items():
        model = load(path)
        text = beginnings(load_tokenizer(path), settings.documents, settings.tokens) if path == context.tinylm else []
        before = [weight.clone() for weight in linear_weights(model).values()]
        after = [q4_1(weight) for weight in before]
        measured: dict[str, dict[str, float]] = {name: {} for name in settings.data_types or four_bits()}
        for stage, weights in (("truth", before), ("measured", after)):
            with torch.no_grad():
                for weight, value in zip(linear_weights(model).values(), weights, strict=True):
                    weight.copy_(value)
            with context.display.busy(f"{model_name}, {stage}", "data types") as progress:
                for done, name in enumerate(measured, 1):
                    one = DATA_TYPES[name]
                    squared, total = errors(weights, one).sum(axis=0)
                    measured[name][f"error_{stage}"] = float(squared / total)
                    if text:
                        window = settings.tokens
                        found = evaluate(quantized(model, one), text, window, window // 2, reference=model)
                        measured[name][f"kl_{stage}"] = found.kl or 0.0
                    progress(done, len(measured))
        records += [
            {"kind": "ranking", "model": model_name, "data_type": name, **one} for name, one in measured.items()
        ]
    return records


def markdown(records: Records) -> str:
    """Errors relative to NF4's, in truth and as measured, and how the two orders agree."""
    from scipy.stats import kendalltau

    parts = [
        "All data types with their own encoding. *Truth* is measured on the float32 weights, *seen* on the same "
        "weights "
        "after a rounding to Q4_1, both over NF4's."
    ]
    for model in dict.fromkeys(record["model"] for record in records):
        some = [record for record in records if record["model"] == model]
        (nf4,) = (record for record in some if record["data_type"] == "nf4")
        pairs = [pair for pair in ("error", "kl") if f"{pair}_truth" in nf4]
        cells = [
            [one["data_type"]]
            + [
                f"{one[f'{pair}_{stage}'] / nf4[f'{pair}_{stage}']:.3f}"
                for pair in pairs
                for stage in ("truth", "measured")
            ]
            for one in some
        ]
        headings = ["data type"]
        headings += [part for pair in pairs for part in (f"{_WORDS[pair]}, truth", f"{_WORDS[pair]}, seen")]
        taus = [
            f"{_WORDS[pair]} {kendalltau(*([one[f'{pair}_{stage}'] for one in some] for stage in _STAGES))[0]:.2f}"
            for pair in pairs
        ]
        parts += [f"**{model}**, Kendall's tau: {', '.join(taus)}.", grid(headings, cells)]
    return "\n\n".join(parts)


_WORDS = {"error": "squared error", "kl": "KL"}
_STAGES = ("truth", "measured")


def picture(records: Records, path: Path) -> None:
    """The ratio to NF4 in truth and as seen, a line between them for each data type."""
    models = list(dict.fromkeys(record["model"] for record in records))
    with figure(path, 1, len(models), figsize=(6 * len(models), 4.5)) as (_, axes):
        for axis, model in zip(axes[0], models, strict=True):
            some = [record for record in records if record["model"] == model]
            (nf4,) = (record for record in some if record["data_type"] == "nf4")
            some = sorted(some, key=lambda one: one["error_truth"])
            truth, seen = ([one[f"error_{stage}"] / nf4[f"error_{stage}"] for one in some] for stage in _STAGES)
            rows = range(len(some))
            axis.hlines(rows, truth, seen, color="grey", linewidth=1)
            axis.plot(truth, rows, "o", color="C0", label="on float32 weights")
            axis.plot(seen, rows, "x", color="C3", label="after a rounding to Q4_1")
            axis.set_yticks(rows, labels=[one["data_type"] for one in some])
            axis.invert_yaxis()
            axis.set(xscale="log", title=model, xlabel="squared error over NF4's")
            axis.legend(frameon=False)
