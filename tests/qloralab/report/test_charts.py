"""Charts as parts of a page."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from qloralab.report import charts
from qloralab.report.runs import read_runs


def curves(svg: str) -> list[str]:
    return re.findall(r'id="curve-([^"]+)"', svg)


def test_every_run_has_its_curves(trained):
    both = read_runs([trained / "first", trained / "second"])
    kinds = ("batch", "smoothed", "validation")
    assert curves(charts.losses(both)) == [f"loss-{run}-{kind}" for run in (0, 1) for kind in kinds]
    assert curves(charts.column(both, "lr", "learning rate")) == ["lr-0-all", "lr-1-all"]
    assert curves(charts.adapters(both[:1])) == [f"adapter{panel}-0-norm" for panel in range(7)]


def test_what_was_not_measured_has_no_curve(trained):
    (run,) = read_runs([trained / "first"])
    del run.metrics[1:]
    assert curves(charts.losses([run])) == ["loss-0-validation"]
    assert curves(charts.column([run], "lr", "learning rate")) == []


def test_charts_of_one_page_share_no_identifier(trained):
    both = read_runs([trained / "first", trained / "second"])
    fields = [charts.column(both, name, name) for name in ("lr", "grad_norm", "rss_mb")]
    found = [re.findall(r' id="([^"]+)"', svg) for svg in (charts.losses(both), charts.adapters(both), *fields)]
    every = [name for names in found for name in names]
    assert len(every) == len(set(every)) > 40


def test_a_chart_refers_to_itself_alone(trained):
    both = read_runs([trained / "first", trained / "second"])
    for svg in (charts.losses(both), charts.adapters(both)):
        ElementTree.fromstring(svg)
        assert "http" not in svg
        there = set(re.findall(r' id="([^"]+)"', svg))
        asked = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)
        assert asked
        assert {one or other for one, other in asked} <= there


@pytest.mark.parametrize("count", [1, 1200, 1201, 50_000])
def test_a_long_curve_keeps_its_ends_and_its_spikes(count):
    values = [float(i % 7) for i in range(count)]
    values[count // 3] = 1e6
    kept = charts._thinned(values)
    assert kept == sorted(set(kept))
    assert {0, count // 3, count - 1} <= set(kept)
    assert len(kept) == count if count <= 1200 else len(kept) <= 802


def test_more_runs_than_colours_differ_by_dashes():
    pairs = [(charts.colour(i), charts.dash(i)) for i in range(3 * len(charts.COLOURS))]
    assert len(set(pairs)) == len(pairs)
