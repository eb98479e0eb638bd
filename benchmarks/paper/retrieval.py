"""Sentences that an encoder finds: how much of it is kept when its linear layers are in 4 bits.

The first sentences of docstrings are embedded by all-MiniLM-L6-v2, before and after. *Kept* is how often a sentence's
nearest neighbour, by cosine, is the same one; *change* is the root mean square of what quantization does to the cosines
of all pairs; *angle* the mean of 1 - cos(before, after) of a sentence. This is an encoder in float32 whose weights were
never quantized before, which no language model in a package is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qloralab.nf4.data_type import DATA_TYPES

from ..view import picture as figure
from .cases import FLOAT32, bits, four_bits, with_float32
from .corpus import docstrings
from .interval import bootstrap, shown
from .models import embed, load_encoder, quantized
from .perplexity import draw_bars
from .table import Context, Record, Records, grid

TITLE = "Data types: what an encoder finds (all-MiniLM-L6-v2)"


@dataclass(frozen=True)
class Settings:
    """How much is measured: sentences, and whether scales in float32 are tried too."""

    sentences: int = 600
    float32_too: bool = True


SETTINGS = {"full": Settings(), "quick": Settings(160, False), "tiny": Settings(16, False)}


def sentences(number: int) -> list[str]:
    """So many different first sentences of docstrings, evenly spread."""
    answers = [one.messages[-1].content for half in (False, True) for one in docstrings(half)]
    found = list(dict.fromkeys(answer.partition(". ")[0].rstrip(".") + "." for answer in answers))
    return found[:: max(1, len(found) // number)][:number]


def neighbours(embedded: Tensor) -> tuple[Tensor, Tensor]:
    """The cosines of all pairs, [n, n] with -1 for a sentence and itself, and the nearest neighbour of each [n]."""
    cosines = (embedded @ embedded.T).fill_diagonal_(-1)
    return cosines, cosines.argmax(1)


def rows(context: Context) -> list[Record]:
    """A record for each data type and kind of scales; none without the encoder."""
    if context.minilm is None:
        return []
    settings = context.of(SETTINGS)
    model, tokenizer = load_encoder(context.minilm)
    text = sentences(settings.sentences)
    before = embed(model, tokenizer, text)
    cosines, nearest = neighbours(before)
    cases = [(name, DATA_TYPES[name], "own") for name in four_bits()]
    if settings.float32_too:
        cases += [(name, with_float32(one), FLOAT32) for name, one, _ in cases]
    samples, records = {}, []
    with context.display.busy("MiniLM: retrieval", "data types") as progress:
        for done, (name, one, kind) in enumerate(cases, 1):
            after = embed(quantized(model, one), tokenizer, text)
            moved, found = neighbours(after)
            change = (moved - cosines).square().sum(1) / (len(text) - 1)  # of a sentence with the others
            angle = 1 - (before * after).sum(1)
            columns = [torch.ones(len(text)), found == nearest, change, angle]
            samples[name, kind] = torch.stack([column.double() for column in columns], 1).numpy()
            records.append({"kind": "retrieval", "data_type": name, "scales": kind, "bits": bits(one)})
            records[-1] |= {"encoding": one.settings()["encoding"], "sentences": len(text)}
            progress(done, len(cases))
    for record in records:
        ours, nf4 = samples[record["data_type"], record["scales"]], samples["nf4", record["scales"]]
        record["kept"] = bootstrap(ours, lambda sums: sums[:, 1] / sums[:, 0])
        record["change"] = bootstrap(ours, lambda sums: np.sqrt(sums[:, 2] / sums[:, 0]))
        record["angle"] = bootstrap(ours, lambda sums: sums[:, 3] / sums[:, 0])
        both = np.column_stack([ours, nf4])
        record["kept_less_nf4"] = bootstrap(both, lambda sums: (sums[:, 1] - sums[:, 5]) / sums[:, 0])
        record["angle_to_nf4"] = bootstrap(both, lambda sums: sums[:, 3] / sums[:, 7])
    return records


def markdown(records: Records) -> str:
    """The data types one below the other."""
    if not records:
        return "Not measured: the package of the encoder was not installed."
    cells = [
        [
            one["data_type"],
            one["encoding"],
            f"{one['bits']:.3f}",
            shown(one["kept"], 3),
            "0" if one["data_type"] == "nf4" else shown(one["kept_less_nf4"], 3, sign=True),
            f"{one['change']['value']:.4f}",
            "1" if one["data_type"] == "nf4" else shown(one["angle_to_nf4"], 2),
        ]
        for one in records
        if not (one["scales"] == "own" and one["encoding"] == FLOAT32)
    ]
    headings = ("data type", "scales", "bits", "neighbour kept", "less NF4's", "change of cosine", "angle to NF4's")
    return "\n\n".join(
        [
            f"{records[0]['sentences']} first sentences of docstrings; all 36 linear layers of the encoder in blocks "
            "of 64 "
            "or the data type's own. Intervals of 95 % over sentences. The paper has no encoder; its Table 2 is on "
            "language models.",
            grid(headings, cells, left=2),
        ]
    )


def picture(records: Records, path: Path) -> None:
    """How far each data type turns a sentence's embedding, with its interval."""
    some = sorted((one for one in records if one["scales"] == "own"), key=lambda one: one["angle"]["value"])
    with figure(path, 1, 1, figsize=(7, 4.5)) as (_, axes):
        draw_bars(axes[0][0], [one["data_type"] for one in some], [one["angle"] for one in some])
        axes[0][0].set(xlabel="1 - cosine of an embedding before and after, mean over sentences")
