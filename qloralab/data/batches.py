"""Which examples go into which batch, and how a batch becomes tensors.

As in the QLoRA paper (appendix B.2), a batch holds examples of similar length, because every row is padded to the
longest of its batch and padding costs as much as text. The order of an epoch:

    shuffle all indices -> cut into megabatches of 50 batches -> sort each by length -> cut into batches -> shuffle them

It is a pure function of the seed and the epoch, so a run that is resumed sees what it would have seen.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import UserError
from .encoding import NO_LABEL, Encoded

T = TypeVar("T")
_MEGABATCH = 50  # batches; transformers' group_by_length, which the paper's code uses, takes as many


def split(examples: Sequence[T], held_out: int | None = None, seed: int = 0) -> tuple[list[T], list[T]]:
    """Hold some examples out of training, drawn at random.

    Args:
        examples: all of them.
        held_out: how many to hold out; by default a tenth, at least 1 and at most 64.
        seed: of the draw.

    Returns:
        The examples to train on, in the order given, and the held-out ones, in the order drawn.

    Raises:
        UserError: no example would be left to train on.
    """
    if held_out is None:
        held_out = min(64, max(1, len(examples) // 10))
    if len(examples) <= held_out:
        raise UserError(
            f"{len(examples)} examples are too few to hold {held_out} out and train on the rest; "
            "give more, or a smaller --held-out"
        )
    drawn = _shuffled(range(len(examples)), random.Random(f"split {seed}"))[:held_out]
    chosen = set(drawn)
    return [one for index, one in enumerate(examples) if index not in chosen], [examples[index] for index in drawn]


def length_grouped_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch, as indices into lengths. Each index is in one batch.

    Args:
        lengths: tokens of each example.
        batch_size: examples per batch; one batch is smaller when it does not divide the number of examples.
        seed, epoch: what the order depends on, besides the lengths.
    """
    rng = random.Random(f"epoch {seed} {epoch}")
    order = _shuffled(range(len(lengths)), rng)
    batches = []
    for first in range(0, len(order), _MEGABATCH * batch_size):
        mega = sorted(order[first : first + _MEGABATCH * batch_size], key=lambda index: lengths[index])
        batches += [mega[start : start + batch_size] for start in range(0, len(mega), batch_size)]
    return _shuffled(batches, rng)


def collate(encoded: Sequence[Encoded], multiple: int = 1, most: int | None = None) -> dict[str, Tensor]:
    """The tensors of a batch, padded on the right to its longest example with token 0, which every embedding has.

    What is padding is told by its position. It has no label, and no token sees it.

    Args:
        encoded: the examples of the batch, at least one.
        multiple: the length is rounded up to a multiple of it.
        most: but not beyond this; None: no end. No example is longer.

    Returns:
        input_ids, labels and attention_mask, each int64 [examples, tokens of the longest]. Padding has label -100 and
        mask 0.
    """
    longest = max(len(one.input_ids) for one in encoded)
    width = -(-longest // multiple) * multiple
    width = width if most is None else max(longest, min(width, most))
    masks = [[1] * len(one.input_ids) for one in encoded]
    return {
        "input_ids": torch.tensor([_pad(one.input_ids, width, 0) for one in encoded]),
        "labels": torch.tensor([_pad(one.labels, width, NO_LABEL) for one in encoded]),
        "attention_mask": torch.tensor([_pad(mask, width, 0) for mask in masks]),
    }


def _pad(row: list[int], width: int, value: int) -> list[int]:
    return row + [value] * (width - len(row))


def _shuffled(items: Iterable[T], rng: random.Random) -> list[T]:
    """A random order. Only ``random()`` itself is promised to give the same numbers in every version of Python."""
    keyed = [(rng.random(), position, item) for position, item in enumerate(items)]
    return [item for _, _, item in sorted(keyed, key=lambda entry: entry[:2])]
