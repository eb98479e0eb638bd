"""The lengths that batches are padded to: the best there are, by trying all."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qloralab.data.buckets import MOST, buckets


def positions(lengths: Sequence[int], chosen: Sequence[int]) -> int:
    """Of all examples, each padded to the next of the chosen lengths."""
    return sum(min(bucket for bucket in chosen if bucket >= length) for length in lengths)


def by_trying(lengths: Sequence[int], most: int) -> int:
    *shorter, longest = sorted(set(lengths))
    sets = (some for count in range(min(most, len(shorter) + 1)) for some in combinations(shorter, count))
    return min(positions(lengths, (*some, longest)) for some in sets)


@given(st.lists(st.integers(1, 14), min_size=1, max_size=40), st.integers(1, 5))
def test_no_other_lengths_have_less_padding(lengths, most):
    found = buckets(lengths, most)
    assert found == sorted(set(found))
    assert len(found) == min(most, len(set(lengths)))
    assert found[-1] == max(lengths)
    assert positions(lengths, found) == by_trying(lengths, most)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 8), st.integers(1, 16))
def test_lengths_are_multiples_but_for_the_limit(lengths, most, multiple):
    limit = max(lengths)
    found = buckets(lengths, most, multiple, limit)
    assert all(length % multiple == 0 for length in found[:-1])
    assert found[-1] == limit


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([5], [16]), ([16, 17], [16, 32]), ([100] * 9 + [3], [16, 112]), (range(1, 129), [*range(16, 129, 16)])],
)
def test_buckets_of_a_few_examples(lengths, expected):
    assert buckets(lengths, multiple=16) == expected


def test_thousands_of_long_examples():
    lengths = random.Random(0).choices(range(1, 32_769), k=20_000)
    found = buckets(lengths, multiple=16)
    assert (len(found), found[-1]) == (MOST, 32_768)
    evenly = range(4_096, 32_769, 4_096)
    assert positions(lengths, found) <= positions(lengths, evenly)
