"""Figures and intervals from sums: known answers, and data whose true difference is known."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from qloralab.evaluate.evaluation import Estimate, Evaluation, compare


def made_up(seed: int = 0, shift: float = 0.0, documents: int = 60) -> Evaluation:
    """Documents of very different difficulty; the same ones for each shift, which is added to every token's loss."""
    shared, own = np.random.default_rng(seed), np.random.default_rng((seed, 1, round(shift * 1e6)))
    tokens = shared.integers(20, 200, documents)
    hardness = shared.normal(3.0, 0.8, documents)
    nll = tokens * (hardness + shift + own.normal(0, 0.02, documents))
    kl: Any = tokens * abs(shift)
    return Evaluation(16, 8, "f", "document", tokens, nll, kl, tokens // 2, tokens * hardness)


def test_the_figures_are_ratios_of_sums():
    one = Evaluation(
        8, 4, "f", "document", np.array([1, 3]), np.array([1.0, 5.0]), np.array([0.5, 0.1]), np.array([0, 3]),
        np.array([1.0, 3.0]),
    )  # fmt: skip
    assert (one.nll, one.perplexity, one.kl, one.agreement) == pytest.approx((1.5, np.exp(1.5), 0.15, 0.75), abs=1e-12)
    assert one.reference_nll == 1.0
    assert one.estimates()["nll_above"].value == pytest.approx(0.5)
    bare = dataclasses.replace(one, kl_sums=None, agreed=None, reference_nll_sums=None)
    assert (bare.kl, bare.agreement) == (None, None)
    assert list(bare.estimates()) == ["nll", "perplexity"]
    assert compare(bare, one).kl is None


def test_kl_divergences_from_different_models_are_not_compared():
    one = made_up()
    assert one.reference_nll_sums is not None
    for factor, compared in ((1.005, True), (1.02, False)):
        found = compare(one, dataclasses.replace(one, reference_nll_sums=factor * one.reference_nll_sums))
        assert [found.kl is not None, found.agreement is not None] == [compared] * 2
        assert found.nll.value == 0


def test_intervals_are_those_of_scipy():
    """Over other draws, so they agree to the noise of 10,000 of them: an end moves by 1 % of the width."""
    from scipy.stats import bootstrap

    one = made_up()
    theirs = bootstrap(
        (one.nll_sums, one.tokens), lambda nll, tokens, axis: nll.sum(axis) / tokens.sum(axis), paired=True,
        n_resamples=10_000, method="percentile", rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    found = one.estimates()["nll"]
    assert found.value == pytest.approx(one.nll, rel=1e-12)
    assert found.interval == pytest.approx((theirs.low, theirs.high), abs=0.04 * (theirs.high - theirs.low))
    assert one.estimates() == made_up().estimates()  # a fixed seed


def test_identical_runs_differ_by_exactly_nothing():
    one = made_up(3)
    found = compare(one, made_up(3))
    assert [found.nll, found.perplexity, found.kl, found.agreement] == [Estimate(0.0, (0.0, 0.0))] * 4


def test_paired_intervals_hold_the_true_difference_as_often_as_they_say():
    """Of 200 made-up pairs, 95 % of the intervals hold it: 190, give or take three times the 3 of chance."""
    hits = 0
    for seed in range(200):
        low, high = _interval(compare(made_up(seed, 0.05), made_up(seed)).nll)
        hits += low <= 0.05 <= high
    assert 178 <= hits <= 199


def test_pairing_narrows_the_interval():
    a, b = made_up(0, 0.05), made_up(0)
    paired, alone = _width(compare(a, b).nll), _width(a.estimates()["nll"])
    assert paired < alone / 10
    found = compare(a, b)
    assert found.perplexity.value == pytest.approx(a.perplexity - b.perplexity, rel=1e-12)
    assert found.kl is not None
    assert found.kl.value == pytest.approx(0.05, rel=1e-9)


def _interval(estimate: Estimate) -> tuple[float, float]:
    assert estimate.interval is not None
    return estimate.interval


def _width(estimate: Estimate) -> float:
    low, high = _interval(estimate)
    return high - low


def test_one_unit_has_no_interval_and_empty_ones_do_no_harm():
    alone = Evaluation(8, 4, "f", "window", np.array([5]), np.array([10.0]))
    assert alone.estimates()["nll"] == Estimate(2.0, None)
    with_empty = Evaluation(8, 4, "f", "document", np.array([5, 0]), np.array([10.0, 0.0]))
    assert with_empty.estimates()["nll"] == Estimate(2.0, (2.0, 2.0))


def test_a_comparison_over_other_tokens_is_refused(refusal):
    one = made_up()
    message = refusal(compare, one, dataclasses.replace(one, stride=4))
    assert message == "the two runs have different windows: 16 with stride 8, and 16 with stride 4"
    message = refusal(compare, one, dataclasses.replace(one, fingerprint="g"))
    assert message == "the two runs have read different tokens: the texts differ, or the tokenizers do"
