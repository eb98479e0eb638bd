"""A tokenizer as the fields of a GGUF file: byte-level BPE, which GGUF calls "gpt2".

    tokenizer.ggml.tokens        for each row of the embedding a string, spelled in 256 letters that stand for bytes
    tokenizer.ggml.token_type    of each: normal 1, control 3, user-defined 4 (added, not special), unused 5
    tokenizer.ggml.merges        "Ġ t": the pairs, the first learned first
    tokenizer.ggml.pre           how text is split before it is merged: a name, of code that each reader has
    ..._token_id                 of begin, end, unknown, padding
    tokenizer.chat_template      Jinja

A regular expression has no place in the file. So the splitting is recognized by what tokenizer.json says of it, and one
that has no name here is refused: a reader would split otherwise, and silently. Rows of the embedding that no token has
are called [PAD12], unused.
"""

from __future__ import annotations

import json
from typing import Any

from ..errors import UserError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}
_SPECIAL = ("bos", "eos", "unk", "pad")


def describe(tokenizer: Any, rows: int, writer: Any, pre: str | None = None) -> None:
    """Write the fields of a tokenizer.

    Args:
        tokenizer: of transformers.
        rows: of the embedding.
        writer: a ``gguf.GGUFWriter``.
        pre: the name of the splitting; by default it is recognized.

    Raises:
        UserError: it is no byte-level BPE, has more tokens than the embedding has rows, or splits in a way that has no
            name here.
    """
    from gguf import TokenType

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"the tokenizer is a {type(tokenizer).__name__}; byte-level BPE alone is written as GGUF")
    fields = json.loads(backend.to_str())
    model = fields["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or (fields["decoder"] or {}).get("type") != "ByteLevel":
        kind = "BPE of characters" if model["type"] == "BPE" else model["type"]
        raise UserError(f"the tokenizer is {kind}; byte-level BPE alone is written as GGUF")
    pre = pre or _splitting(fields)
    tokens, types = [f"[PAD{number}]" for number in range(rows)], [TokenType.UNUSED] * rows
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda one: one[1]):
        if number >= rows:
            raise UserError(f"token {token!r} has the number {number}, and the embedding {rows} rows")
        tokens[number], types[number] = token, TokenType.NORMAL
    for number, token in tokenizer.added_tokens_decoder.items():
        types[number] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in model["merges"]])
    for name in _SPECIAL:
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    added = tokenizer("").input_ids
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(added[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(added[-1:] == [tokenizer.eos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _splitting(fields: dict[str, Any]) -> str:
    """The name of what tokenizer.json does to text before merging.

    Raises:
        UserError: it has none here.
    """
    found = fields["pre_tokenizer"] or {}
    steps = found.get("pretokenizers", [found])
    kinds = [step.get("type") for step in steps]
    bytes_last = kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space")
    normalizer = (fields["normalizer"] or {}).get("type")
    if bytes_last and normalizer in (None, "NFC"):
        words = steps[-1].get("use_regex", True)  # the regular expression of GPT-2
        if kinds == ["ByteLevel"] and words:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and words:
            return "smollm"
        whole = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        if kinds == ["Split", "ByteLevel"] and not words and whole:
            name = _SPLITS.get(steps[0]["pattern"].get("Regex"))
            if name is not None:
                return name
    raise UserError(
        "how the tokenizer splits text is not recognized; give --pre-tokenizer the name that llama.cpp has for it"
    )
