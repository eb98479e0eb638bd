"""What a model is evaluated on: documents of tokens, and which of the tokens count.

=============  ====================================  ===================================================================
text           documents                             tokens that count
=============  ====================================  ===================================================================
a text file    one: all of it, as it lies            all but the first
JSONL, text    a record each                         all but the first of each
JSONL, other   a record each                         those of the answers, as in validation
stdlib         64: those that the default            those of the answers, as in validation
               fine-tuning holds out
=============  ====================================  ===================================================================

A text file is one document because perplexity on a long text is usually given so, and because every cut takes context
from the tokens behind it. Texts are encoded as the tokenizer encodes them by itself: with a bos token where it writes
one, and then the first token of the text counts too. No eos token is added. JSONL has the formats of
``data/examples.py``.

``stdlib`` is the default job of ``qloralab finetune``: docstrings of the running interpreter's standard library in the
model's chat format, at most 256 tokens, split with seed 0. A model fine-tuned with other data, another seed or other
values of --max-length and --held-out has seen some of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from ..data.batches import split
from ..data.encoding import Encoded, encode_all
from ..data.examples import Example, read_jsonl
from ..data.stdlib_corpus import stdlib_examples
from ..errors import UserError
from ..settings import STDLIB, Settings

JSONL = (".jsonl", ".ndjson", ".json")
ALL = "every token but the first of a document"
ANSWERS = "the tokens of the answers"


@dataclass(frozen=True)
class Text:
    """Documents.

    Attributes:
        source: a phrase for a person.
        counts: which tokens count, in words.
        documents: their tokens and labels.
    """

    source: str
    counts: str
    documents: list[Encoded]


def read_text(text: str, tokenizer: Any, documents: int | None = None, positions: int | None = None) -> Text:
    """The documents that ``--text`` names.

    Args:
        text: a path, or "stdlib".
        tokenizer: a fast tokenizer of transformers.
        documents: the first so many; None: all.
        positions: that the model has room for. Of the standard library, longer examples are left out, as in training.

    Raises:
        UserError: it cannot be read or has no text, or is one document and documents is given.
    """
    if text == STDLIB:
        held_out = stdlib_held_out(tokenizer, positions)
        return Text("docstrings of the standard library, held out", ANSWERS, held_out[:documents])
    path = Path(text)
    if path.suffix.lower() not in JSONL:
        if documents is not None:
            raise UserError(f"--documents would be ignored: {text} is one document; leave it out, or give JSONL")
        return Text(text, ALL, encode_texts([_plain(path)], tokenizer, [text]))
    try:
        examples = read_jsonl(path)[:documents]
    except UserError as error:
        raise UserError(str(error).replace("--data", "--text")) from None
    if examples[0].text is None:
        return Text(text, ANSWERS, encode_all(examples, tokenizer, sys.maxsize))
    return Text(text, ALL, encode_texts([_text(one) for one in examples], tokenizer, [one.source for one in examples]))


def encode_texts(texts: Sequence[str], tokenizer: Any, sources: Sequence[str] | None = None) -> list[Encoded]:
    """Documents of plain texts, in which every token counts.

    Args:
        texts: at least one.
        tokenizer: of transformers.
        sources: what to call them; by default their numbers.
    """
    sources = [f"document {number}" for number in range(1, len(texts) + 1)] if sources is None else sources
    tokens = tokenizer(list(texts), verbose=False)[
        "input_ids"
    ]  # verbose: a text may be longer than the model's context
    return [Encoded(ids, ids, source) for ids, source in zip(tokens, sources, strict=True)]


def stdlib_held_out(tokenizer: Any, positions: int | None = None) -> list[Encoded]:
    """The docstrings that ``qloralab finetune`` holds out with its defaults, in the order drawn."""
    default = Settings(model=Path(), out=None)
    encoded = encode_all(stdlib_examples(), tokenizer, default.max_length, default.treats_too_long, positions=positions)
    groups = [list(group) for _, group in groupby(encoded, key=lambda one: one.source)]
    return list(chain.from_iterable(split(groups, default.held_out, default.seed)[1]))


def _text(example: Example) -> str:
    assert example.text is not None  # one file has one format
    return example.text


def _plain(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        what = f"{path} cannot be read: {error.strerror or error}"
        raise UserError(f"{what}; --text takes a text file, a JSONL file or {STDLIB!r}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start + 1}); --text takes a text") from None
    if not text.strip():
        raise UserError(f"{path} holds no text")
    return text
