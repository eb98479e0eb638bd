"""Are weights normal? The premise of NF4 (QLoRA, section 3 and its appendix on the normality of weights).

Each row of a weight (what one output is made of) is tested against a normal distribution of its own mean and variance:

* **Shapiro-Wilk**, as in the paper, which finds 7.5 % of the rows of LLaMA 7B not normal at a level of 5 %;
* **Kolmogorov-Smirnov**, the largest distance of the distribution functions. Because mean and variance are those of the
  sample, the tabulated levels do not hold (Lilliefors, 1967); the level used here is the 95th percentile over rows of
  N(0, 1) of the same length.

Of normal rows each rejects 5 %. *Excess kurtosis* is 0 for a normal distribution, and the more above it the heavier the
tails; it is taken over the rows, each divided by its own standard deviation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..view import picture as figure
from .models import linear_weights, load
from .table import Context, Record, Records, grid

TITLE = "Are weights normal?"
_BINS = np.linspace(-6, 6, 61)


@dataclass(frozen=True)
class Settings:
    """How many rows of each matrix are tested, at most; and rows of N(0, 1) that a level is taken from."""

    rows: int = 200
    drawn: int = 2000


SETTINGS = {"full": Settings(), "quick": Settings(rows=32), "tiny": Settings(rows=8, drawn=200)}


def standardized(weight: Tensor) -> Tensor:
    """Each row less its mean, over its standard deviation: float64 [rows, n]."""
    weight = weight.double()
    centred = weight - weight.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).sqrt()


def distance(z: Tensor) -> Tensor:
    """The Kolmogorov-Smirnov distance of each standardized row from N(0, 1), float64 [rows]."""
    n = z.shape[1]
    cumulated = torch.special.ndtr(z.sort(dim=1).values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return torch.maximum((steps[1:] - cumulated).amax(1), (cumulated - steps[:-1]).amax(1))


def level(length: int, drawn: int) -> float:
    """The distance that 5 % of normal rows of a length exceed."""
    rows = torch.randn(drawn, length, generator=torch.Generator().manual_seed(0))
    return float(distance(standardized(rows)).quantile(0.95))


def rows(context: Context) -> list[Record]:
    """A record for each model and kind of layer, one for the whole model, and one for N(0, 1) in the same shapes."""
    from scipy.stats import shapiro

    settings, records = context.of(SETTINGS), []
    sources = {"all-MiniLM-L6-v2": context.minilm} if context.minilm else {}
    for model, path in {**sources, **context.language_models}.items():
        weights = linear_weights(load(path))
        found: dict[str, list[tuple[float, ...]]] = {}
        histogram = np.zeros(len(_BINS) - 1)
        levels: dict[int, float] = {}
        with context.display.busy(f"{model}: normality", "matrices") as progress:
            for done, (name, weight) in enumerate(weights.items(), 1):
                some = weight[torch.linspace(0, len(weight) - 1, min(settings.rows, len(weight))).long()]
                z = standardized(some)
                if z.shape[1] not in levels:
                    levels[z.shape[1]] = level(z.shape[1], settings.drawn)
                ks = distance(z) > levels[z.shape[1]]
                kurtosis = z.pow(4).mean(1) - 3
                tests = [shapiro(row).pvalue < 0.05 for row in z.numpy()]
                kind = name.rpartition(".")[2] if name.count(".") < 5 else ".".join(name.split(".")[3:])
                found.setdefault(kind, []).extend(zip(ks.tolist(), tests, kurtosis.tolist(), strict=True))
                histogram += np.histogram(z.numpy(), _BINS)[0]
                progress(done, len(weights))
        found["all"] = [one for rows in found.values() for one in rows]
        for kind, tested in found.items():
            ks_share, shapiro_share, kurtosis_mean = np.mean(np.array(tested, float), axis=0)
            record = {"kind": "normality", "model": model, "layers": kind, "rows": len(tested)}
            record |= {"ks": ks_share, "shapiro": shapiro_share, "kurtosis": kurtosis_mean}
            records.append({**record, "histogram": (histogram / histogram.sum()).tolist() if kind == "all" else None})
    return records


def markdown(records: Records) -> str:
    """Whole models, then kinds of layers."""
    cells = [
        [
            one["model"],
            one["layers"],
            f"{one['rows']:,}",
            f"{one['kurtosis']:.2f}",
            f"{one['ks']:.1%}",
            f"{one['shapiro']:.1%}",
        ]
        for one in sorted(records, key=lambda one: one["layers"] != "all")
    ]
    headings = ("model", "layers", "rows", "excess kurtosis", "not normal, KS", "not normal, Shapiro-Wilk")
    return "\n\n".join(
        [
            "The share of rows that a test at a level of 5 % rejects; of normal rows it would be 5 %. The paper finds "
            "7.5 % with Shapiro-Wilk in LLaMA 7B. Every test sees smaller deviations in longer rows, and the rows of "
            "these models have other lengths, so the shares compare with the 5 % and hardly with each other. Tinylm "
            "began as N(0, 0.02) and was trained for minutes: that it is close to normal says little. The weights of "
            "SmolLM2 were rounded to 4 bits once, and steps are what Kolmogorov-Smirnov sees.",
            grid(headings, cells, left=2),
        ]
    )


def picture(records: Records, path: Path) -> None:
    """The distribution of standardized weights beside N(0, 1)."""
    middle = (_BINS[1:] + _BINS[:-1]) / 2
    with figure(path, 1, 1, figsize=(7, 4)) as (_, axes):
        axis, width = axes[0][0], _BINS[1] - _BINS[0]
        for one in records:
            if one["histogram"]:
                density = np.array(one["histogram"]).reshape(len(middle), -1).sum(1) / width
                axis.plot(middle, np.where(density > 0, density, np.nan), label=one["model"], linewidth=1.2)
        axis.plot(middle, np.exp(-(middle**2) / 2) / np.sqrt(2 * np.pi), "k--", linewidth=1, label="N(0, 1)")
        axis.set(yscale="log", ylim=(1e-6, 1), xlabel="weight over the standard deviation of its row", ylabel="density")
        axis.legend(frameon=False)
