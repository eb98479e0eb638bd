"""The conditions that conftest.py promises to every test hold."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

DRAWS: dict[str, tuple[float, float, float]] = {}
EXAMPLES: dict[int, float] = {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "allocate",
    [
        lambda dtype: torch.empty(1000, dtype=dtype),
        lambda dtype: torch.empty_like(torch.zeros(1000, dtype=dtype)),
        lambda dtype: torch.zeros(1, dtype=dtype).new_empty(1000),
        lambda dtype: torch.empty_strided((1000,), (1,), dtype=dtype),
        lambda dtype: torch.zeros(0, dtype=dtype).resize_(1000),
    ],
    ids=["empty", "empty_like", "new_empty", "empty_strided", "resize_"],
)
def test_uninitialised_floats_are_nan(allocate, dtype):
    assert allocate(dtype).isnan().all()


def test_uninitialised_integers_are_the_largest_value():
    assert (torch.empty(1000, dtype=torch.uint8) == 255).all()


def test_poison_reaches_a_result_that_was_never_written():
    out = torch.empty(8)
    out[:7] = 1.0  # a kernel that forgets its tail
    assert out.sum().isnan()


@pytest.mark.parametrize("turn", ["first", "second"])
def test_two_tests_draw_the_same_numbers(turn):
    DRAWS[turn] = (torch.rand(()).item(), float(np.random.rand()), random.random())  # noqa: NPY002
    assert DRAWS[turn] == next(iter(DRAWS.values()))


@given(st.integers(0, 3))
def test_hypothesis_resets_torch_before_each_example(example):
    drawn = torch.rand(()).item()
    assert EXAMPLES.setdefault(0, drawn) == drawn


def test_no_test_reaches_the_network():
    import huggingface_hub.constants

    assert huggingface_hub.constants.HF_HUB_OFFLINE


def test_no_more_threads_than_processors():
    assert torch.get_num_threads() <= len(os.sched_getaffinity(0))
