"""From examples to token ids and labels, with the loss on the answer only.

Every example is first written as one string, in which the answers are known as spans of characters:

    <|im_start|>user⏎What is 2 + 3?<|im_end|>⏎<|im_start|>assistant⏎5<|im_end|>⏎
                                                                    └────┬────┘
                                                        label = token; everywhere else -100

The string is tokenized once, as a whole, and a token has a label when it holds at least one character of an answer. The
end of the turn is part of the answer, or the model would never learn to stop; the line break after it is not.

Where an answer begins and ends is what the chat template itself says: the template rendered on the messages before the
answer, with the prompt for an answer, and on the messages including it, are both beginnings of the whole. A template
for which they are not has no such spans, and is refused.

Without a chat template an instruction is written in Alpaca's prompt. Its answer, like a plain text, ends with the
tokenizer's eos token. Where the tokenizer starts texts with a bos token, so do these; a chat template writes its own.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from .errors import UserError
from .examples import Example, Message

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
    """

    input_ids: list[int]
    labels: list[int]
    source: str


def encode(example: Example, tokenizer: Any) -> Encoded:
    """Tokens and labels of one example; see the module for what has a label.

    Args:
        example: of any format.
        tokenizer: a fast tokenizer of transformers, which knows the characters of each token.

    Raises:
        UserError: the example needs a chat template that is missing or does not work for it; no token has a label.
    """
    return next(_encode([example], tokenizer))


def encode_all(
    examples: Sequence[Example],
    tokenizer: Any,
    max_length: int,
    too_long: str = "error",
    progress: Callable[[int, int], None] | None = None,
) -> list[Encoded]:
    """Tokens and labels of examples of at most max_length tokens, in the order given.

    Args:
        examples: of any format.
        tokenizer: see ``encode``.
        max_length: tokens.
        too_long: what happens to a longer example. "error" refuses all of them. "skip" leaves the example out. "cut"
            keeps its first max_length tokens, and leaves the example out when none of those has a label.
        progress: called now and then with how many examples are done and how many there are.

    Returns:
        One per example that was not left out; ``len(examples) - len(result)`` were.

    Raises:
        UserError: see ``encode``; too_long is "error" and an example is too long; no example is left.
    """
    if too_long not in TOO_LONG:
        raise UserError(f"unknown way {too_long!r} to treat long examples; --too-long takes {', '.join(TOO_LONG)}")
    encoded = list(_encode(examples, tokenizer, progress))
    longer = [one for one in encoded if len(one.input_ids) > max_length]
    if longer and too_long == "error":
        raise _too_long_error(longer, len(encoded), max_length)
    if longer and too_long == "cut":
        encoded = [_cut(one, max_length) for one in encoded]
    kept = [one for one in encoded if len(one.input_ids) <= max_length and _is_labelled(one)]
    if not kept:
        raise UserError(f"none of the {len(examples)} examples has an answer within --max-length {max_length}")
    return kept


def prompt_text(example: Example, tokenizer: Any) -> str:
    """What a model is given to answer: all before the last assistant turn, or the first half of the words of a text.

    Special tokens are part of the text: tokenize it with ``add_special_tokens=False``.

    Raises:
        UserError: see ``encode``.
    """
    if example.text is not None:
        words = example.text.split(" ")
        return _bos(tokenizer, example.text) + " ".join(words[: max(1, len(words) // 2)])
    if not tokenizer.chat_template:
        prompt = _plain_prompt(example)
        return _bos(tokenizer, prompt) + prompt
    return _apply_template(example, example.messages[: _answers(example)[-1]], tokenizer, prompt=True)


@dataclass(frozen=True)
class _Written:
    """An example as one string, and its answers as spans of characters [start, end)."""

    text: str
    answers: list[tuple[int, int]]
    source: str


def _write(example: Example, tokenizer: Any) -> _Written:
    if example.text is not None:
        start, end = _bos(tokenizer, example.text), _eos(tokenizer, example.text)
        text = start + example.text + end
        return _Written(text, [(0, len(text))], example.source)
    if not tokenizer.chat_template:
        prompt, answer = _plain_prompt(example), example.messages[-1].content
        prompt = _bos(tokenizer, prompt) + prompt
        text = prompt + answer + _eos(tokenizer, answer)
        return _Written(text, [(len(prompt), len(text))], example.source)
    return _write_chat(example, tokenizer)


def _write_chat(example: Example, tokenizer: Any) -> _Written:
    answers = _answers(example)
    messages = example.messages[: answers[-1] + 1]  # nothing is learned from what follows the last answer
    whole = _apply_template(example, messages, tokenizer)
    spans = []
    for index in answers:
        before = _apply_template(example, messages[:index], tokenizer, prompt=True)
        after = whole if index == answers[-1] else _apply_template(example, messages[: index + 1], tokenizer)
        if not (whole.startswith(after) and after.startswith(before)):
            raise UserError(
                f"{example.source}: the tokenizer's chat template writes an answer without the prompt for it, "
                "or a turn differently once others follow, so the answers cannot be told from the rest"
            )
        spans.append((len(before), len(after.rstrip())))
    return _Written(whole, spans, example.source)


def _answers(example: Example) -> list[int]:
    return [index for index, message in enumerate(example.messages) if message.role == "assistant"]


def _apply_template(example: Example, messages: Sequence[Message], tokenizer: Any, prompt: bool = False) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
    except (TemplateError, ValueError) as error:  # often: a role or an order that the model was not trained on
        why = " ".join(str(error).split())
        raise UserError(f"{example.source}: the tokenizer's chat template refuses the messages: {why}") from error


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
    for first in range(0, len(examples), _CHUNK):
        written = [_write(example, tokenizer) for example in examples[first : first + _CHUNK]]
        tokens = tokenizer(
            [one.text for one in written], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        for one, ids, offsets in zip(written, tokens["input_ids"], tokens["offset_mapping"], strict=True):
            encoded = Encoded(ids, _labels(ids, offsets, one.answers), one.source)
            if not _is_labelled(encoded):
                raise UserError(f"{one.source}: no token of the answer is left, so there is nothing to learn")
            yield encoded
        if progress:
            progress(first + len(written), len(examples))


def _labels(ids: list[int], offsets: list[tuple[int, int]], answers: list[tuple[int, int]]) -> list[int]:
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
    return Encoded(encoded.input_ids[:length], encoded.labels[:length], encoded.source)


def _too_long_error(longer: list[Encoded], total: int, max_length: int) -> UserError:
    first, longest = len(longer[0].input_ids), max(len(one.input_ids) for one in longer)
    return UserError(
        f"{longer[0].source}: {first} tokens, and the limit is {max_length}; {len(longer)} of {total} examples are "
        f"too long. Give --max-length {longest} to keep them all, or --too-long skip|cut"
    )
