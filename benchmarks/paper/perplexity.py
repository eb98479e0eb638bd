"""Table 2: the language models with their linear layers in each data type, in perplexity and KL divergence.

Text is the held-out files of the standard library, the beginning of each; figures are per token, by ``qloralab eval``'s
own functions (``qloralab/evaluate``): perplexity, KL divergence from the dense model, and how often the most probable
token stays. The difference to NF4 is paired over documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qloralab.checkpoint.models import load_tokenizer
from qloralab.data.encoding import Encoded
from qloralab.evaluate.evaluation import Comparison, Evaluation, compare
from qloralab.evaluate.measure import evaluate
from qloralab.nf4.data_type import DATA_TYPES

from ..view import picture as figure
from .cases import COMPARED, FLOAT32, bits, four_bits, with_float32
from .corpus import documents
from .interval import shown
from .models import load, quantized
from .table import Context, Record, Records, grid
from .tinylm import spread

TITLE = "Data types: perplexity and KL divergence (Table 2)"
SMALL = 20e6  # parameters, of a model that every data type is tried on


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        documents: held-out files, evenly spread.
        tokens: of each, from its start.
        large_documents: the same of models of more than 20 million parameters.
        small: data types that other models are tried with; None: all of 16 values.
        large: data types that such models are tried with, in their own encoding.
    """

    documents: int = 48
    tokens: int = 256
    large_documents: int = 24
    small: tuple[str, ...] | None = None
    large: tuple[str, ...] = COMPARED


SETTINGS = {
    "full": Settings(),
    "quick": Settings(
        documents=24, large_documents=10, tokens=128, large=("nf4", "fp4", "int4", "bof4-s", "nvfp4", "kmeans4")
    ),
    "tiny": Settings(documents=3, tokens=64, small=("nf4", "nvfp4")),
}


def beginnings(tokenizer: Any, number: int, tokens: int) -> list[Encoded]:
    """The first tokens of so many held-out files; all but the first of each are predicted."""
    texts = spread(documents(held_out=True), number)
    ids = [tokenizer(text[: 8 * tokens], verbose=False)["input_ids"][:tokens] for text in texts]
    return [Encoded(one, list(one), f"document {index}") for index, one in enumerate(ids) if len(one) > 1]


def rows(context: Context) -> list[Record]:
    """A record for each model, data type and kind of scales."""
    settings, records = context.of(SETTINGS), []
    for model_name, path in context.language_models.items():
        model, tokenizer = load(path), load_tokenizer(path)
        is_small = model.num_parameters() < SMALL
        number = settings.documents if is_small else settings.large_documents
        text = beginnings(tokenizer, number, settings.tokens)
        cases = [
            (name, DATA_TYPES[name], "own")
            for name in ((settings.small or four_bits()) if is_small else settings.large)
        ]
        if is_small and context.size != "tiny":
            cases += [(name, with_float32(one), FLOAT32) for name, one, _ in cases]
        found: dict[tuple[str, str], Evaluation] = {}
        with context.display.busy(f"{model_name}: perplexity", "data types") as progress:
            window = settings.tokens
            dense = evaluate(model, text, window, window // 2, reference=model)
            for done, (name, one, kind) in enumerate(cases, 1):
                found[name, kind] = evaluate(quantized(model, one), text, window, window // 2, reference=model)
                progress(done, len(cases))
        common = {"kind": "language", "model": model_name, "parameters": model.num_parameters()}
        common |= {"documents": len(text), "tokens": int(dense.tokens.sum())}
        records.append({**common, "data_type": "float32", "scales": "", "bits": 32.0, **_figures(dense)})
        for name, one, kind in cases:
            ours, nf4 = found[name, kind], found["nf4", kind]
            record = {**common, "data_type": name, "scales": kind, "bits": bits(one), **_figures(ours)}
            records.append(
                {**record, "encoding": one.settings()["encoding"], "to_nf4": _differences(compare(ours, nf4))}
            )
            records[-1]["to_dense"] = _differences(compare(ours, dense))
    return records


def _figures(one: Evaluation) -> dict[str, Any]:
    return {name: asdict(estimate) for name, estimate in one.estimates().items()}


def _differences(two: Comparison) -> dict[str, Any]:
    return {name: value for name, value in asdict(two).items() if value is not None}


def markdown(records: Records) -> str:
    """A table for each model."""
    parts = []
    for model in dict.fromkeys(record["model"] for record in records):
        some = [record for record in records if record["model"] == model]
        cells = []
        for one in some:
            scales = one.get("encoding", "")
            if one["scales"] == "own" and scales == FLOAT32:
                continue
            row = [one["data_type"], scales, f"{one['bits']:.3f}", f"{one['perplexity']['value']:.3f}"]
            if "to_nf4" in one:
                row += [shown(one["to_dense"]["perplexity"], sign=True), shown(_milli(one["kl"]), 2)]
                row += ["0" if one["data_type"] == "nf4" else shown(_milli(one["to_nf4"]["kl"]), 2, sign=True)]
                row += [f"{100 * one['agreement']['value']:.1f}"]
            cells.append(row + [""] * (8 - len(row)))
        first = some[0]
        parts += [
            f"**{model}**, {first['parameters'] / 1e6:.1f} M parameters, blocks of 64 or the data type's own, "
            f"{first['tokens']:,} tokens of {first['documents']} held-out files. Intervals of 95 % over documents, "
            "paired.",
            grid(
                (
                    "data type", "scales", "bits", "perplexity", "less dense", "KL, 10⁻³ nats", "KL less NF4's",
                    "same token, %",
                ),
                cells,
                left=2,
            ),
        ]  # fmt: skip
    return "\n\n".join(parts)


def _milli(estimate: dict[str, Any]) -> dict[str, Any]:
    interval = estimate["interval"]
    return {
        "value": 1e3 * estimate["value"],
        "interval": None if interval is None else [1e3 * end for end in interval],
    }


def picture(records: Records, path: Path) -> None:
    """KL divergence of each data type, with its interval; a panel for each model."""
    models = list(dict.fromkeys(record["model"] for record in records))
    with figure(path, 1, len(models), figsize=(7 * len(models), 5)) as (_, axes):
        for axis, model in zip(axes[0], models, strict=True):
            some = [one for one in records if one["model"] == model and one["scales"] == "own"]
            some = sorted(some, key=lambda one: one["kl"]["value"])
            draw_bars(axis, [one["data_type"] for one in some], [one["kl"] for one in some])
            axis.set(xlabel="KL divergence from the dense model, nats a token", title=model)


def draw_bars(axis: Any, labels: Sequence[str], estimates: Sequence[dict[str, Any]]) -> None:
    """A bar across for each estimate, its interval as a line."""
    axis.barh(range(len(labels)), [one["value"] for one in estimates], color="#8fb0d6")
    for row, one in enumerate(estimates):
        if one["interval"] is not None:
            axis.plot(one["interval"], [row, row], color="black", linewidth=1.2)
    axis.set_yticks(range(len(labels)), labels=labels)
    axis.invert_yaxis()
