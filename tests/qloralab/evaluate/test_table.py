"""The tables, on wide and narrow terminals: every figure is there whole."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from qloralab.evaluate.evaluation import Evaluation, compare
from qloralab.evaluate.table import show, show_differences

TOKENS = np.array([30, 50, 20])
DENSE = TOKENS * [2.7, 2.8, 2.9]
ONE = Evaluation(16, 8, "f", "document", TOKENS, TOKENS * [3.0, 3.1, 3.2], TOKENS * 0.02, np.array([27, 44, 19]), DENSE)
OTHER = Evaluation(
    16, 8, "f", "document", TOKENS, TOKENS * [2.9, 3.0, 3.1], TOKENS * 0.01, np.array([28, 45, 19]), DENSE
)


def printed(width: int, function, *arguments) -> str:
    file = io.StringIO()
    function(*arguments[:-1], Console(file=file, width=width), *arguments[-1])
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return file.getvalue()


@pytest.mark.parametrize("width", [200, 80, 60])
def test_the_figures_of_a_run(width):
    text = printed(width, show, ONE, ["dense"])
    for part in ("perplexity", "21.977", "3.0900", "3.0000 to 3.2000", "0.02000", "90.00 %", "0.3000", "dense"):
        assert part in text


@pytest.mark.parametrize("width", [200, 80])
def test_the_differences(width):
    text = printed(width, show_differences, ONE, OTHER, compare(ONE, OTHER), ["other", "dense"])
    for part in ("+0.1000", "+0.1000 to +0.1000", "+0.01000", "-2.00 %", "3.0900", "2.9900", "other"):
        assert part in text
    assert "not compared" not in text
    other = dataclasses.replace(OTHER, reference_nll_sums=2 * DENSE)
    text = printed(width, show_differences, ONE, other, compare(ONE, other), ["other", "dense"])
    assert "KL divergence and agreement are not compared" in text
    assert "0.01000" not in text


def test_a_very_narrow_terminal_loses_nothing():
    text = "".join(printed(34, show, ONE, ["dense"]).split())
    assert "perplexity" in text
    assert "21.977" in text


def test_one_window_has_no_interval():
    alone = Evaluation(16, 8, "f", "window", np.array([3]), np.array([6.0]))
    text = printed(80, show, alone, ["dense"])
    assert text.count("none") == 2
    assert "KL" not in text
