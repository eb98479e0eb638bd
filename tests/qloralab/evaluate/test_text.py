"""Texts: what is a document, and which tokens count."""

from __future__ import annotations

import json

import pytest

from qloralab.checkpoint.models import load_tokenizer
from qloralab.data.encoding import NO_LABEL
from qloralab.evaluate.text import ALL, ANSWERS, encode_texts, read_text
from qloralab.settings import Settings
from qloralab.train.prepare import prepare


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
    return byte_tokenizer()


def test_a_text_file_is_one_document_in_which_all_counts(tokenizer, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("One.\n\nTwo: Ω.\n", encoding="utf-8-sig")
    found = read_text(str(file), tokenizer)
    assert (found.source, found.counts) == (str(file), ALL)
    (document,) = found.documents
    assert tokenizer.decode(document.input_ids) == "One.\n\nTwo: Ω.\n"  # no eos
    assert document.labels == document.input_ids


def test_a_bos_token_is_what_the_tokenizer_writes(tokenizer):
    class WithBos:
        def __call__(self, texts, verbose):
            return {"input_ids": [[258, *ids] for ids in tokenizer(texts)["input_ids"]]}

    (document,) = encode_texts(["ab"], WithBos())
    assert document.input_ids[0] == 258
    assert document.labels[1:] == document.input_ids[1:]


def test_jsonl_of_texts_has_a_document_a_line(tokenizer, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("red", "green", "blue")))
    found = read_text(str(file), tokenizer, documents=2)
    assert [tokenizer.decode(one.input_ids) for one in found.documents] == ["red", "green"]
    assert [one.source for one in found.documents] == [f"{file}:1", f"{file}:2"]
    assert found.counts == ALL


def test_of_instructions_the_answers_count(tokenizer, colours):
    found = read_text(str(colours), tokenizer, documents=3)
    assert found.counts == ANSWERS
    counted = [[label for label in one.labels if label != NO_LABEL] for one in found.documents]
    assert [tokenizer.decode(labels) for labels in counted] == [
        "It is red.<|end|>", "It is blue..<|end|>", "It is green...<|end|>"
    ]  # fmt: skip


def test_stdlib_is_what_the_default_job_holds_out(model_dir, silent, tmp_path):
    """The whole of ``prepare``, whose training examples are the others."""
    prepared = prepare(Settings(model=model_dir, out=tmp_path / "run"), silent)
    found = read_text("stdlib", load_tokenizer(model_dir))
    assert found.documents == prepared.held_out
    assert found.counts == ANSWERS
    assert 0 < len(found.documents) <= 64  # a tenth, where there are few
    assert not {one.source for one in found.documents} & {one.source for one in prepared.train}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "cannot be read: No such file or directory; --text takes a text file, a JSONL file or"),
        ("none.jsonl", None, "cannot be read: No such file or directory; --text takes a JSONL file on this machine"),
        ("empty.txt", b"\n \n", "empty.txt holds no text"),
        ("latin.txt", b"caf\xe9", "latin.txt is not UTF-8 (byte 4)"),
        ("a.json", b'[{"text": "a"}]', "--text reads JSON Lines"),
        ("empty.jsonl", b"", "empty.jsonl holds no record"),
    ],
)
def test_refused(refusal, tokenizer, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    found = refusal(read_text, str(tmp_path / name), tokenizer)
    assert message in found
    assert "--data" not in found


def test_part_of_a_text_file_is_refused(refusal, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    assert "--documents would be ignored" in refusal(read_text, str(tmp_path / "a.txt"), tokenizer, 3)
