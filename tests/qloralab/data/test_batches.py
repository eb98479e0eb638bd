"""Batches: every example once, the same order for the same seed, little padding, and padding told by position."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qloralab.data.batches import collate, length_grouped_batches, split
from qloralab.data.encoding import Encoded


def test_split_parts_the_examples():
    train, held_out = split(range(1_000), 64, seed=0)
    assert len(held_out) == 64
    assert train == sorted(set(range(1_000)) - set(held_out))


def test_split_is_the_same_on_every_machine_and_version():
    assert split(range(100), 5, seed=0)[1] == [54, 87, 15, 44, 81]
    assert split(range(100), 5, seed=1)[1] != [54, 87, 15, 44, 81]
    assert sorted(map(len, split("ab", 1, seed=0))) == [1, 1], "one may be left"


@pytest.mark.parametrize("number", [0, 63, 64])
def test_split_of_too_few(number, refusal):
    assert refusal(split, range(number), 64, seed=0).startswith(f"{number} examples are too few to hold 64 out")


@pytest.mark.parametrize(("number", "expected"), [(2, 1), (19, 1), (20, 2), (65, 6), (640, 64), (5_000, 64)])
def test_a_tenth_is_held_out_and_at_most_64(number, expected):
    assert [len(part) for part in split(range(number))] == [number - expected, expected]


@given(st.lists(st.integers(1, 300), max_size=700), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_every_index_is_in_one_batch(lengths, batch_size, seed, epoch):
    batches = length_grouped_batches(lengths, batch_size, seed, epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    sizes = [len(batch) for batch in batches]
    assert all(size == batch_size for size in sorted(sizes)[1:])
    assert sizes == [] or 1 <= min(sizes) <= max(sizes) <= batch_size


LENGTHS = random.Random(1).choices(range(30, 257), k=5_000)


def padding(batches):
    """The part of the positions that is padding."""
    positions = sum(len(batch) * max(LENGTHS[index] for index in batch) for batch in batches)
    return 1 - sum(LENGTHS) / positions


def test_grouping_saves_padding():
    order = random.Random(2).sample(range(5_000), 5_000)
    shuffled = [order[start : start + 4] for start in range(0, 5_000, 4)]
    assert padding(shuffled) > 0.2
    assert padding(length_grouped_batches(LENGTHS, 4, seed=0, epoch=0)) < 0.02


def test_batches_of_an_epoch_are_not_sorted():
    longest = [max(LENGTHS[index] for index in batch) for batch in length_grouped_batches(LENGTHS, 4, 0, 0)]
    falls = sum(first > second for first, second in pairwise(longest))
    assert 0.4 < falls / len(longest) < 0.6


def test_order_is_a_function_of_seed_and_epoch():
    batches = length_grouped_batches(LENGTHS, 4, seed=0, epoch=0)
    assert batches == length_grouped_batches(LENGTHS, 4, seed=0, epoch=0)
    assert batches != length_grouped_batches(LENGTHS, 4, seed=0, epoch=1)
    assert batches != length_grouped_batches(LENGTHS, 4, seed=1, epoch=0)
    assert {frozenset(batch) for batch in batches} != {
        frozenset(batch) for batch in length_grouped_batches(LENGTHS, 4, seed=0, epoch=1)
    }, "an epoch has the batches of another in a new order"


def test_collate():
    batch = collate([Encoded([5, 2, 2], [-100, 2, 2], "a"), Encoded([7], [7], "b")])
    assert batch["input_ids"].tolist() == [[5, 2, 2], [7, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 2], [7, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize(("most", "width"), [(None, 16), (16, 16), (11, 11), (9, 9)])
def test_padding_stays_within_the_positions_of_the_model(most, width):
    assert collate([Encoded([5] * 9, [5] * 9, "a")], 16, most)["input_ids"].shape == (1, width)
