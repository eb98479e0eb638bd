"""The table can be read wherever it is printed, the JSON holds all of it, the exit status says how it ended."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from qloralab.parity import report as view
from qloralab.parity.compare import Report
from qloralab.parity.report import from_json, in_short, show, summary, table, to_json
from qloralab.parity.rows import EDGES, QUANTITIES, Rows

VERSIONS = {"bitsandbytes": "0.50.2"}
FACTS = {"weights": 1, "model": None, "versions": VERSIONS, "instruction_set": "AVX512", "seconds": 3.2}


def made(beyond: int = 0) -> Report:
    """A report with every quantity, in which some differ."""
    rows = Rows()
    for quantity in QUANTITIES:
        for codebook in ("nf4", "fp4") if quantity != EDGES else ():
            rows.row(quantity, f"{codebook} f32").add("normal f32/64", 135_997_571)
    rows.row("codes", "fp4 f32").add("normal f32/64", 100, 9, {"second zero": 9}, "[83]: 0 for 8")
    rows.row("weights, split rows", "nf4 f32").add(
        "64x16 f32/64", 50, 40, {"split rows": 40}, "[64]: -0.483 for -0.63", 0.4825
    )
    rows.row(EDGES, "NaN").add(
        "NaN", 1, 1, {"edge": 1}, "a; b", found=("ValueError: weight[1, 3] is nan", "64 of 64 weights are NaN")
    )
    rows.row(EDGES, "zeros").add("zeros", 1, found=("reads +0.0", "reads +0.0"))
    if beyond:
        rows.row("scales", "f32").add("normal f32/64", 10, beyond, {}, "[0]: 1 for [2]", 7.0)
    return Report(rows.all(), dict(FACTS))


def printed(report: Report, width: int, terminal: bool) -> str:
    out = io.StringIO()
    show(report, Console(file=out, width=width, force_terminal=terminal, color_system=None))
    return out.getvalue()


@pytest.mark.parametrize(
    ("width", "terminal", "most"), [(80, True, 80), (100, True, 100), (200, True, 120), (40, False, 120)]
)
def test_the_table_fits_and_cuts_no_word(width, terminal, most):
    text = printed(made(), width, terminal)
    lines = text.splitlines()
    assert len(lines) < 80, "a column so narrow that words are cut into letters"
    legend = next(i for i, line in enumerate(lines) if line.startswith("equal "))
    assert max(map(len, lines[:legend])) <= most
    assert "…" not in text
    assert "135,997,671" in text
    for quantity in QUANTITIES:
        assert all(word in text for word in quantity.split())
    assert "ValueError" in text
    assert all(part in text for part in ("64x16", "f32/64", "[64]:", "-0.483", "-0.63"))


def test_wide_enough_each_row_tells_its_difference_on_one_line():
    lines = [line.split() for line in printed(made(), 120, False).splitlines()]
    assert ["codes,", "fp4", "135,997,671", "135,997,662"] in [line[:4] for line in lines]
    (split,) = (line for line in lines if line[:3] == ["weights,", "split", "rows"])
    assert split[3:5] == ["271,995,192", "271,995,152"]  # of both codebooks
    assert split[-5:] == ["%", "of", "max", "bitsandbytes", "wrong"]


def test_only_the_verdicts_that_occur_are_explained():
    text = printed(made(), 120, False)
    assert "same value          +0.0 and -0.0" in text
    assert "now equal" not in text
    assert "DIFFERS" not in text
    assert "DIFFERS             beyond" in printed(made(beyond=2), 120, False)


def test_the_summary_counts_what_is_beyond():
    assert summary(made()) == (
        "543,990,384 weights, bitsandbytes 0.50.2, AVX512, 3 s: nothing differs beyond what is documented"
    )
    assert summary(made(beyond=2)).endswith("2 differences in 1 rows are not documented")


def test_the_short_form_is_a_markdown_table_of_a_dozen_rows():
    out = io.StringIO()
    Console(file=out, width=200).print(table(in_short(made())))
    lines = [line.strip() for line in out.getvalue().splitlines() if line.strip()]
    assert all(line.startswith("|") and line.endswith("|") for line in lines)
    assert 10 <= len(lines) - 2 <= 14
    assert sum(row.compared for row in in_short(made())) == sum(row.compared for row in made().rows)


def test_json_has_all_and_reads_back():
    report = made(beyond=2)
    text = to_json(report)
    document = json.loads(text)
    assert document["fails"] is True
    assert document["allowances"]["split rows"]["verdict"] == "bitsandbytes wrong"
    (row,) = (row for row in document["rows"] if (row["quantity"], row["detail"]) == ("weights, split rows", "nf4 f32"))
    assert (row["compared"], row["equal"], row["allowed"]) == (135_997_621, 135_997_581, {"split rows": 40})
    assert row["first_difference"] == "64x16 f32/64 [64]: -0.483 for -0.63"
    assert [case["case"] for case in row["cases"]] == ["normal f32/64", "64x16 f32/64"]
    again = from_json(text)
    assert to_json(again) == text
    assert printed(again, 120, False) == printed(report, 120, False)


def test_json_in_short_lists_what_differs_and_counts_the_rest():
    document = json.loads(to_json(made(), most=3))
    (row,) = (row for row in document["rows"] if (row["quantity"], row["detail"]) == ("weights, split rows", "nf4 f32"))
    assert row["tensors"] == 2
    assert [case["case"] for case in row["cases"]] == ["64x16 f32/64"]
    assert all(row["cases"] == [] for row in json.loads(to_json(made(), most=0))["rows"] if row["quantity"] != EDGES)
    assert [row["cases"][0]["found"][0] for row in document["rows"] if row["quantity"] == EDGES] == [
        "ValueError: weight[1, 3] is nan", "reads +0.0"
    ]  # fmt: skip


@pytest.mark.parametrize(("beyond", "status"), [(0, 0), (2, 1)])
def test_the_command_ends_with_what_was_found(program, monkeypatch, tmp_path, beyond, status):
    asked = []

    def compare(weights, model, seed, progress):
        progress("codes [nf4]")
        asked.append((weights, model, seed))
        return made(beyond)

    monkeypatch.setattr(view, "compare", compare)
    ended, out, err = program("parity", "--weights", 12, "--seed", 3, "--model", "m", "--json", "p.json")
    assert (ended, err) == (status, "")
    assert asked[0][0::2] == (12, 3)
    assert str(asked[0][1]) == "m"
    assert out.rstrip().splitlines()[-1] == summary(made(beyond))
    assert (tmp_path / "p.json").read_text() == to_json(made(beyond))


def test_a_file_that_cannot_be_written_is_told_before_the_work(program, monkeypatch):
    monkeypatch.setattr(view, "compare", lambda *arguments, **options: pytest.fail("compared"))
    message = "qloralab: error: no/such/p.json cannot be written: No such file or directory\n"
    assert program("parity", "--json", "no/such/p.json") == (2, "", message)
