"""What a model makes of a text: sums by document, the figures made of them, and how sure they are.

Per token, over all tokens that count:

    NLL          -log p(token)                                   in nats
    perplexity   exp(mean NLL)
    KL           sum over the vocabulary of q log(q / p)          in nats; q: the reference, p: the model
    agreement    whether the most probable token is the same
    NLL above    its NLL less that of the reference

**Intervals.** Tokens of one document are not independent, documents are. So the bootstrap (Efron, 1979) draws as many
documents as there are, with replacement, 10,000 times, and the 95 % interval runs from the 2.5th to the 97.5th
percentile of the figure over these draws. A figure is a ratio of two sums, and both are drawn together. The interval
says what other documents of the same kind would give, and nothing of another kind of text. Of fewer than some twenty
documents it is too narrow: they have not shown how different documents can be.

**Paired.** Two models that read the same documents find the same ones hard, and most of what separates documents
cancels in the difference. So ``compare`` draws documents once, and takes both models' sums of what was drawn: intervals
of the difference are often ten times narrower than those of the two figures, and whether those overlap tells nothing.

A text that is one document has nothing to draw from. Its windows take the place of documents there: consecutive tokens,
each predicted once (the block bootstrap: Carlstein, 1986).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Unit = Literal["document", "window"]

RESAMPLES = 10_000
_LEVEL = (2.5, 97.5)  # percentiles
_SAME = 0.01  # relative: one reference in two dtypes differs by less, two models by more
_SLAB = 4_000_000  # numbers of draws held at a time


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval.

    Attributes:
        value: over the documents that there are.
        interval: from, to; None where there is one document of one window, or none is possible.
    """

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model makes of a text, by document.

    Attributes:
        window, stride: tokens; see ``windows.py``.
        fingerprint: SHA-256 of the tokens, and of which of them count.
        unit: what an element of the arrays is: a document, or, of a text that is one document, a window.
        tokens: that count, int64 [units].
        nll_sums: of -log p, in nats, float64 [units].
        kl_sums: of the KL divergence from the reference, in nats, float64 [units]; None without a reference.
        agreed: tokens at which the most probable token is that of the reference, int64 [units]; None without one.
        reference_nll_sums: of the reference's -log q, in nats, float64 [units]; None without one.
    """

    window: int
    stride: int
    fingerprint: str
    unit: Unit
    tokens: Integers
    nll_sums: Floats
    kl_sums: Floats | None = None
    agreed: Integers | None = None
    reference_nll_sums: Floats | None = None

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of a token, in nats."""
        return self._mean(self.nll_sums)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return float(np.exp(self.nll))

    @property
    def kl(self) -> float | None:
        """Mean KL divergence of a token, KL(reference || model), in nats; None without a reference."""
        return None if self.kl_sums is None else self._mean(self.kl_sums)

    @property
    def agreement(self) -> float | None:
        """Share of tokens at which the most probable token is that of the reference; None without one."""
        return None if self.agreed is None else self._mean(self.agreed)

    @property
    def reference_nll(self) -> float | None:
        """Mean negative log-likelihood of a token by the reference, in nats; None without one."""
        return None if self.reference_nll_sums is None else self._mean(self.reference_nll_sums)

    def _mean(self, sums: Floats | Integers) -> float:
        return float(sums.sum() / self.tokens.sum())

    def estimates(self) -> dict[str, Estimate]:
        """The figures by name, each with its interval: nll, perplexity; where there is a reference kl, agreement, and
        nll_above, the NLL less that of the reference, paired over documents."""
        return _estimates([self], lambda one: one)

    def _sums(self) -> dict[str, Floats]:
        named = {"nll": self.nll_sums, "kl": self.kl_sums, "agreement": self.agreed}
        if self.reference_nll_sums is not None:
            named["nll_above"] = self.nll_sums - self.reference_nll_sums
        return {name: sums.astype(np.float64) for name, sums in named.items() if sums is not None}


@dataclass(frozen=True)
class Comparison:
    """Differences of two evaluations over the same documents: a less b.

    Attributes:
        nll: of the mean negative log-likelihoods, in nats per token.
        perplexity: of the perplexities.
        kl: of the mean KL divergences; None where one of the two has none, or theirs are from different references.
        agreement: of the shares of tokens that agree with the reference; None as for kl.
    """

    nll: Estimate
    perplexity: Estimate
    kl: Estimate | None = None
    agreement: Estimate | None = None


def compare(a: Evaluation, b: Evaluation) -> Comparison:
    """How much a differs from b, paired over documents.

    Raises:
        UserError: they have read other tokens, or in other windows.
    """
    check_comparable(a, b.window, b.stride, b.fingerprint)
    found = _estimates([a, b], lambda one, other: one - other)
    names = ("nll", "perplexity", "kl", "agreement") if same_reference(a, b) else ("nll", "perplexity")
    return Comparison(**{name: found[name] for name in names})


def same_reference(a: Evaluation, b: Evaluation) -> bool:
    """Whether both have a reference, and the same one: it gave the same tokens about the same probability."""
    one, other = a.reference_nll, b.reference_nll
    return one is not None and other is not None and abs(one - other) <= _SAME * max(one, other)


def check_comparable(a: Evaluation, window: int, stride: int, fingerprint: str) -> None:
    """Refuse a comparison over different tokens.

    Raises:
        UserError: a was made with other windows, or has read other tokens.
    """
    if (a.window, a.stride) != (window, stride):
        raise UserError(
            f"the two runs have different windows: {a.window} with stride {a.stride}, and {window} with stride {stride}"
        )
    if a.fingerprint != fingerprint:
        raise UserError("the two runs have read different tokens: the texts differ, or the tokenizers do")


def _estimates(runs: Sequence[Evaluation], combine: Callable[..., Floats]) -> dict[str, Estimate]:
    """Each figure that all runs have, combined over the runs, with the interval of the same draws of documents."""
    sums = [run._sums() for run in runs]
    names = [name for name in sums[0] if all(name in one for one in sums)]
    tokens = runs[0].tokens.astype(np.float64)
    columns = np.stack([tokens, *(one[name] for name in names for one in sums)], axis=1)  # [units, 1 + names * runs]
    drawn = _draws(columns)  # [1 + RESAMPLES, columns]; the first row is what there is
    means = drawn[:, 1:] / drawn[:, :1]
    found: dict[str, Estimate] = {}
    for index, name in enumerate(names):
        of_runs = means[:, index * len(runs) : (index + 1) * len(runs)].T
        found[name] = _estimate(combine(*of_runs))
        if name == "nll":
            found["perplexity"] = _estimate(combine(*np.exp(of_runs)))
    return found


def _draws(columns: Floats) -> Floats:
    """Sums of the columns over all units, and over units drawn with replacement, RESAMPLES times; a fixed seed.

    A draw is how often each unit occurs in it. Draws without a token that counts are left out.
    """
    units, generator = len(columns), np.random.default_rng(0)
    rows = [columns.sum(axis=0, keepdims=True)]
    slab = max(1, _SLAB // units)
    for start in range(0, RESAMPLES if units > 1 else 0, slab):
        size = min(slab, RESAMPLES - start)
        rows.append(generator.multinomial(units, np.full(units, 1 / units), size).astype(np.float64) @ columns)
    drawn = np.concatenate(rows)
    return drawn[drawn[:, 0] > 0]


def _estimate(drawn: Floats) -> Estimate:
    value, others = float(drawn[0]), drawn[1:]
    if not len(others):
        return Estimate(value, None)
    low, high = np.percentile(others, _LEVEL)
    return Estimate(value, (float(low), float(high)))
