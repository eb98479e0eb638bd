"""Every edge is on this machine what is written, and another behaviour on either side is told."""

from __future__ import annotations

import dataclasses

import pytest

from qloralab.parity import edges
from qloralab.parity.edges import ALL, Edge, compare_edges
from qloralab.parity.rows import Row, Rows

DOCUMENTED = Edge("edge", "ours", "theirs", "because", lambda: ("ours", "theirs"))


def found(monkeypatch, **changes) -> Row:
    monkeypatch.setattr(edges, "ALL", (dataclasses.replace(DOCUMENTED, **changes),))
    compare_edges(rows := Rows())
    (row,) = rows.all()
    return row


@pytest.mark.parametrize("edge", ALL, ids=lambda edge: edge.name)
def test_what_we_do_is_what_is_written(edge):
    ours, theirs = edge.observe()
    assert ours == edge.ours
    assert theirs in (edge.ours, edge.theirs)


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ("ours", "theirs", "as documented"),
        ("ours", "ours", "now equal"),
        ("ours", "something else", "DIFFERS"),
        ("something else", "theirs", "DIFFERS"),
        ("theirs", "theirs", "DIFFERS"),
    ],
)
def test_what_is_found_decides(monkeypatch, ours, theirs, verdict):
    row = found(monkeypatch, observe=lambda: (ours, theirs))
    assert row.verdict == verdict
    assert row.fails == (verdict == "DIFFERS")
    assert row.cases[0]["found"] == (ours, theirs)
    assert found(monkeypatch, theirs="ours", observe=lambda: ("ours", "ours")).verdict == "equal", "both agree"


def test_names_are_unique():
    assert len({edge.name for edge in ALL}) == len(ALL)
