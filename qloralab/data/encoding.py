"""From examples to token ids and labels, with the loss on the answer only.

Every example is first written as one string, in which the answers are known as spans of characters:

    <|im_start|>user⏎What is 2 + 3?<|im_end|>⏎<|im_start|>assistant⏎5<|im_end|>⏎
                                                                    └────┬────┘
                                                        label = token; everywhere else -100

The string is tokenized once, as a whole, and a token has a label when it holds at least one character of an answer. The
end of the turn is part of the answer, or the model would never learn to stop; the line break after it is not.
``chat_template.py`` tells where in the string of a chat template the answers are, and which conversations become
several strings.

Without a chat template an instruction is written in Alpaca's prompt. Its answer, like a plain text, ends with the
tokenizer's eos token. Where the tokenizer starts texts with a bos token, so do these; a chat template writes its own.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..errors import UserError
from .chat_template import ChatTemplate, Span, Written
from .examples import Example

NO_LABEL = -100  # the index that torch's cross_entropy ignores
TOO_LONG = ("error", "skip", "cut")
_CHUNK = 256  # texts per call of the tokenizer, which bounds the memory of their offsets


@dataclass(frozen=True)
class Encoded:
    """An example as the model sees it.

    Attributes:
        input_ids: the tokens.
        labels: as long as input_ids; the token itself where there is a loss, else -100. Position i holds the label of
            token i: the loss shifts by one, so that labels[0] is never used.
        source: of the example.
        cut: whether tokens of the example were left out at its end.
    """

    input_ids: list[int]
    labels: list[int]
    source: str
    cut: bool = False


def encode_all(
    examples: Sequence[Example],
    tokenizer: Any,
    max_length: int,
    too_long: str = "error",
    progress: Callable[[int, int], None] | None = None,
    positions: int | None = None,
) -> list[Encoded]:
    """Tokens and labels of examples of at most max_length tokens, in the order given.

    Args:
        examples: of any format.
        tokenizer: a fast tokenizer of transformers, which knows the characters of each token.
        max_length: tokens.
        too_long: what happens to a longer example. "error" refuses all of them. "skip" leaves the example out. "cut"
            keeps its first max_length tokens, and leaves the example out when none of those has a label.
        progress: called now and then with how many examples are done and how many there are.
        positions: tokens that the model has room for, or None where there is no end to it; max_length is at most that.

    Returns:
        one for each example that was not left out, or one for each answer of a conversation that the chat template
        cannot write at once; ``source`` tells which belong together.

    Raises:
        UserError: an example needs a chat template that is missing or does not work for it, or has no token with a
            label; too_long is "error" and an example is too long; no example is left.
    """
    if too_long not in TOO_LONG:
        raise UserError(f"unknown way {too_long!r} to treat long examples; --too-long takes {', '.join(TOO_LONG)}")
    limit = min(max_length, positions or max_length)
    kept, longer, total = [], [], 0
    for _, group in groupby(_encode(examples, tokenizer, progress), key=lambda one: one.source):
        parts = list(group)
        total += len(parts)
        too_many = [one for one in parts if len(one.input_ids) > limit]
        longer += too_many
        if too_many and too_long == "cut":
            kept += [one for one in (_cut(one, limit) for one in parts) if _is_labelled(one)]
        elif not too_many:
            kept += [one for one in parts if _is_labelled(one)]
    if longer and too_long == "error":
        raise _too_long_error(longer, total, limit, positions)
    if not kept:
        raise UserError(f"none of the {len(examples)} examples has an answer within --max-length {limit}")
    return kept


def prompt_text(question: str, tokenizer: Any) -> str:
    """What a model is given to answer a question; tokenize it with ``add_special_tokens=False``.

    Raises:
        UserError: the chat template refuses it.
    """
    example = Example.from_instruction(question, "…", source="prompt")
    if tokenizer.chat_template:
        return ChatTemplate(tokenizer).prompt(example, 1)
    prompt = _plain_prompt(example)
    return _bos(tokenizer, prompt) + prompt


def _write(example: Example, tokenizer: Any, template: ChatTemplate | None) -> list[Written]:
    if example.text is not None:
        start, end = _bos(tokenizer, example.text), _eos(tokenizer, example.text)
        text = start + example.text + end
        return [Written(text, [(0, len(text))], example.source)]
    if template is None:
        prompt, answer = _plain_prompt(example), example.messages[-1].content
        prompt = _bos(tokenizer, prompt) + prompt
        text = prompt + answer + _eos(tokenizer, answer)
        return [Written(text, [(len(prompt), len(text))], example.source)]
    return template.write(example)


def _plain_prompt(example: Example) -> str:
    if example.plain_prompt is None:
        raise UserError(f"{example.source}: a conversation, but the tokenizer has no chat template to write it with")
    return example.plain_prompt


def _bos(tokenizer: Any, text: str) -> str:
    """The bos token, if the tokenizer puts one before texts and the text does not have it already."""
    if tokenizer.bos_token is None or text.startswith(tokenizer.bos_token):
        return ""
    return tokenizer.bos_token if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else ""


def _eos(tokenizer: Any, text: str) -> str:
    """The eos token, if the text does not end with it already."""
    if tokenizer.eos_token is None:
        raise UserError("the tokenizer has no eos token, so the model could not learn where a text ends")
    return "" if text.endswith(tokenizer.eos_token) else tokenizer.eos_token


def _encode(
    examples: Sequence[Example], tokenizer: Any, progress: Callable[[int, int], None] | None = None
) -> Iterator[Encoded]:
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("the tokenizer does not tell which characters a token holds; give the model a tokenizer.json")
    template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
    for first in range(0, len(examples), _CHUNK):
        chunk = examples[first : first + _CHUNK]
        written = [one for example in chunk for one in _write(example, tokenizer, template)]
        tokens = tokenizer(
            [one.text for one in written], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        for one, ids, offsets in zip(written, tokens["input_ids"], tokens["offset_mapping"], strict=True):
            encoded = Encoded(ids, _labels(ids, offsets, one.answers), one.source)
            if not _is_labelled(encoded):
                raise UserError(f"{one.source}: no token of the answer is left, so there is nothing to learn")
            yield encoded
        if progress:
            progress(first + len(chunk), len(examples))


def fingerprint(examples: Sequence[Encoded]) -> str:
    """SHA-256 of the tokens of examples, and of their labels: the same text, by the same tokenizer."""
    digest = hashlib.sha256()
    for one in examples:
        digest.update(array("q", [len(one.input_ids), *one.input_ids, *one.labels]).tobytes())
    return digest.hexdigest()


def _labels(ids: list[int], offsets: list[tuple[int, int]], answers: list[Span]) -> list[int]:
    """The tokens that hold a character of an answer, and -100 for the others. Both ends of the tokens ascend."""
    labels = [NO_LABEL] * len(ids)
    for start, end in answers:
        first = bisect_right(offsets, start, key=lambda token: token[1])  # the first token that ends after the start
        last = bisect_left(offsets, end, key=lambda token: token[0])  # behind the last one that begins before the end
        labels[first:last] = ids[first:last]
    return labels


def _is_labelled(encoded: Encoded) -> bool:
    return any(label != NO_LABEL for label in encoded.labels[1:])


def _cut(encoded: Encoded, length: int) -> Encoded:
    return Encoded(encoded.input_ids[:length], encoded.labels[:length], encoded.source, cut=True)


def _too_long_error(longer: list[Encoded], total: int, limit: int, positions: int | None) -> UserError:
    first, longest = len(longer[0].input_ids), max(len(one.input_ids) for one in longer)
    to_keep_all = f"Give --max-length {longest} to keep them all, or"
    if positions and longest > positions:
        to_keep_all = f"The model has {positions} positions: give"
    return UserError(
        f"{longer[0].source}: {first} tokens, and the limit is {limit}; {len(longer)} of {total} examples are "
        f"too long. {to_keep_all} --too-long skip|cut"
    )
