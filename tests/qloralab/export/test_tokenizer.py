"""A tokenizer in a GGUF file gives the tokens that it gave, and what cannot be said in one is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from qloralab.checkpoint.models import quiet
from qloralab.export.run import export
from qloralab.export.settings import ExportSettings
from qloralab.export.tokenizer import describe

TEXT = "It is red. It's 1234 of them,  and   more: 12 and 345\n\n\tthe end<|end|><think> naïve 日本 \r\n last"
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
QWEN2 = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
# As Meta's tokenizer.json of Llama 3 has it.
LLAMA3 = pre_tokenizers.Split(
    Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "isolated",
)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
sequence: Any = pre_tokenizers.Sequence


def written(tokenizer: Any, path: Path, rows: int = 300, pre: str | None = None) -> dict[str, Any]:
    """The fields of a file with the tokenizer and nothing else."""
    writer = gguf.GGUFWriter(path, "llama")
    describe(tokenizer, rows, writer, pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize(
    ("splitting", "name"),
    [
        (WORDS, "gpt-2"),
        (sequence([LLAMA3, BYTES]), "llama-bpe"),
        (sequence([QWEN2, BYTES]), "qwen2"),
    ],
    ids=["gpt-2", "llama-bpe", "qwen2"],
)
def test_tokens_are_those_that_it_gave(splitting, name, exportable, bpe, tmp_path, silent):
    model, tokenizer = exportable("llama"), bpe(splitting)
    tokenizer.save_pretrained(model)
    export(ExportSettings(model=model, gguf=tmp_path / "out.gguf"), silent)
    with quiet():
        again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="out.gguf")
    assert gguf.GGUFReader(tmp_path / "out.gguf").fields["tokenizer.ggml.pre"].contents() == name
    expected = tokenizer(TEXT).input_ids
    assert len(expected) < len(TEXT.encode()) - 20  # it merges
    assert again(TEXT).input_ids == expected
    assert again.decode(expected) == TEXT
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [getattr(again, one) for one in names] == [getattr(tokenizer, one) for one in names]
    messages = [{"role": "user", "content": "Hi"}]
    render = {"tokenize": False}
    assert again.apply_chat_template(messages, **render) == tokenizer.apply_chat_template(messages, **render)


def test_what_the_fields_say(bpe, tmp_path):
    tokenizer = bpe()
    fields = written(tokenizer, tmp_path / "a.gguf")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    vocabulary = tokenizer.get_vocab()
    assert len(tokens) == len(types) == 300
    assert all(tokens[number] == token for token, number in vocabulary.items())
    special = [vocabulary[name] for name in ("<|bos|>", "<|end|>", "<|pad|>")]
    assert [number for number, kind in enumerate(types) if kind == 3] == special
    assert [number for number, kind in enumerate(types) if kind == 4] == [vocabulary["<think>"]]
    unused = range(len(vocabulary), 300)
    assert [number for number, kind in enumerate(types) if kind == 5] == [*unused]
    assert [tokens[number] for number in unused] == [f"[PAD{number}]" for number in unused]
    assert {*types} == {1, 3, 4, 5}
    assert [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")] == special
    assert "tokenizer.ggml.unknown_token_id" not in fields
    assert [fields[f"tokenizer.ggml.add_{name}_token"] for name in ("bos", "eos")] == [False, False]
    assert fields["tokenizer.ggml.add_space_prefix"] is False
    first = fields["tokenizer.ggml.merges"][0].split(" ")
    assert len(first) == 2
    assert tokens.index("".join(first)) == 256  # the first word after the bytes


def test_a_token_that_is_always_added_is_said(bpe, tmp_path):
    tokenizer = bpe()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|end|>",
        special_tokens=[(name, tokenizer.get_vocab()[name]) for name in ("<|bos|>", "<|end|>")],
    )
    fields = written(tokenizer, tmp_path / "a.gguf")
    assert [fields[f"tokenizer.ggml.add_{name}_token"] for name in ("bos", "eos")] == [True, True]


def test_the_splitting_of_smollm_is_recognized(bpe, tmp_path):
    assert written(bpe(sequence([DIGITS, WORDS])), tmp_path / "a.gguf")["tokenizer.ggml.pre"] == "smollm"


@pytest.mark.parametrize(
    "splitting",
    [
        BYTES,
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        sequence([pre_tokenizers.Digits(individual_digits=False), WORDS]),
        sequence([LLAMA3, WORDS]),
        sequence([pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "removed"), BYTES]),
        sequence([pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated", invert=True), BYTES]),
        sequence([pre_tokenizers.Split(Regex(r"\w+"), "isolated"), BYTES]),
        sequence([pre_tokenizers.Split(" ", "isolated"), BYTES]),
    ],
    ids=["no-words", "prefix", "digits", "twice", "removed", "inverted", "regex", "string"],
)
def test_another_splitting_is_refused_or_named(splitting, bpe, tmp_path, refusal):
    tokenizer = bpe(splitting)
    said = "how the tokenizer splits text is not recognized; give --pre-tokenizer the name that llama.cpp has for it"
    assert refusal(written, tokenizer, tmp_path / "a.gguf") == said
    assert written(tokenizer, tmp_path / "b.gguf", pre="mine")["tokenizer.ggml.pre"] == "mine"


def test_a_normalizer_is_refused(bpe, tmp_path, refusal):
    tokenizer = bpe()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()  # as Qwen2's
    assert written(tokenizer, tmp_path / "a.gguf")["tokenizer.ggml.pre"] == "gpt-2"
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert "is not recognized" in refusal(written, tokenizer, tmp_path / "b.gguf")


def test_what_is_no_byte_level_bpe_is_refused(bpe, tmp_path, refusal):
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", -1.0)], None)))
    said = "the tokenizer is {}; byte-level BPE alone is written as GGUF"
    assert refusal(written, unigram, tmp_path / "a.gguf") == said.format("Unigram")
    assert refusal(written, bpe(decoder=decoders.Fuse()), tmp_path / "a.gguf") == said.format("BPE of characters")
    said = "token '<|pad|>' has the number 282, and the embedding 282 rows"
    assert refusal(written, bpe(), tmp_path / "a.gguf", rows=282) == said


def test_the_default_model_has_what_we_write(default_gguf, bpe, tmp_path):
    """The same fields, of the same types."""
    mine = written(bpe(), tmp_path / "a.gguf")
    theirs = gguf.GGUFReader(default_gguf).fields
    ours = gguf.GGUFReader(tmp_path / "a.gguf").fields
    for name in mine:
        if name.startswith("tokenizer") and name in theirs:
            assert ours[name].types == theirs[name].types, name
    missing = {name for name in theirs if name.startswith("tokenizer")} - mine.keys()
    assert missing == {"tokenizer.ggml.unknown_token_id"}
