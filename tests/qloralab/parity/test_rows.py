"""A row counts, tells the difference that says most, and fails exactly when one is not covered."""

from __future__ import annotations

import pytest

from qloralab.parity.rows import ALLOWANCES, DIFFERS, QUANTITIES, Row, Rows, merged


def test_differences_fail_where_they_are_not_covered():
    row = Row("codes", "nf4 f32", "steps")
    assert row.verdict == "not compared"
    row.add("b", 15)
    assert (row.compared, row.equal, row.beyond, row.first, row.verdict, row.fails) == (15, 15, 0, None, "equal", False)
    assert row.cases == [{"case": "b", "compared": 15, "equal": 15}]
    row.add("a", 10, 3, {"second zero": 2, "quotient": 1, "extreme scale": 0}, "[1]: 0 for 8", 1.0)
    assert (row.compared, row.equal, row.beyond, row.fails) == (25, 22, 0, False)
    assert row.allowed == {"second zero": 2, "quotient": 1}
    assert row.verdict == "as documented"  # weighs more than the same value
    assert row.cases[1]["allowed"] == {"second zero": 2, "quotient": 1}
    row.add("c", 10, 3, {"second zero": 2}, "[1]: 0 for 3")
    assert (row.beyond, row.fails, row.verdict) == (1, True, DIFFERS)


def test_the_first_difference_is_the_first_of_those_that_say_most():
    row = Row("codes", "fp4 f32")
    row.add("zeros", 10, 1, {"second zero": 1}, "0 for 8")
    assert row.first == "zeros 0 for 8"
    row.add("tail", 10, 1, {"quotient": 1}, "2 for 3")
    row.add("tail again", 10, 1, {"quotient": 1}, "4 for 5")
    assert row.first == "tail 2 for 3"
    row.add("wrong", 10, 1, {}, "9 for 1")
    row.add("wrong again", 10, 1, {}, "9 for 2")
    assert row.first == "wrong 9 for 1"


def test_more_allowances_than_differences_is_a_mistake_of_the_check():
    with pytest.raises(AssertionError):
        Row("codes", "").add("a", 10, 1, {"quotient": 2})
    with pytest.raises(AssertionError):
        Row("codes", "").add("a", 10, 1, {"no such allowance": 1})


def test_rows_merge_into_new_ones():
    rows = Rows()
    rows.row("codes", "nf4 f32").add("a", 10, 1, {"quotient": 1}, "1 for 2", 1.0)
    rows.row("codes", "nf4 f16").add("b", 10, 1, {}, "1 for 9", 8.0)
    rows.row("codebooks", "nf4").add("c", 16)
    assert [row.quantity for row in rows.all()] == ["codebooks", "codes", "codes"]
    first, second = merged(rows.all(), lambda row: (row.quantity, ""))
    assert (first.quantity, first.compared, first.verdict) == ("codebooks", 16, "equal")
    assert (second.compared, second.equal, second.beyond, second.largest) == (20, 18, 1, 8.0)
    assert (second.first, second.verdict, len(second.cases)) == ("b 1 for 9", DIFFERS, 2)
    assert rows.row("codes", "nf4 f32").compared == 10  # as it was


def test_every_allowance_says_what_and_why():
    assert all(one.verdict and one.rule and one.reason for one in ALLOWANCES.values())
    assert len({one.rule for one in ALLOWANCES.values()}) == len(ALLOWANCES)


def test_a_quantity_that_nobody_declared_is_refused():
    with pytest.raises(KeyError):
        Rows().row("colours")
    assert "codes" in QUANTITIES
