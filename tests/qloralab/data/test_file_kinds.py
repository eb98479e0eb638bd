"""A file that is not JSON Lines is called what it is; one that may be is called nothing."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from qloralab.data.file_kinds import kind_of

RECORD = {"instruction": "Add, and say why.", "output": "5"}
LINE = json.dumps(RECORD) + "\n"


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.jsonl", LINE)
    return file.getvalue()


def table(dialect: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, dialect)
    writer.writerows([RECORD.keys(), ['A "quoted"\nquestion, of two lines\tand a tab', "5"], ["b", "c"]])
    return file.getvalue().encode("utf-8-sig")


KINDS = {
    "gzip": (gzip.compress(LINE.encode()), "a gzip archive"),
    "bzip2": (bz2.compress(LINE.encode()), "a bzip2 archive"),
    "xz": (lzma.compress(LINE.encode()), "an xz archive"),
    "zip": (zipped(), "a zip archive or an Excel file"),
    "zstandard": (bytes.fromhex("28b52ffd2002110000") + b"{}", "a zstandard archive"),  # RFC 8878, a raw block
    "parquet": (b"PAR1\x15\x04\x15", "Parquet"),
    "arrow": (b"ARROW1\0\0", "Arrow"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3", "a PDF"),
    "utf-16": (LINE.encode("utf-16"), "text in UTF-16"),
    "utf-16, big end first": (b"\xfe\xff" + LINE.encode("utf-16-be"), "text in UTF-16"),
    "safetensors": (save({"a": torch.zeros(2)}), "a binary file"),
    "csv": (table("excel"), "CSV"),
    "tsv": (table("excel-tab"), "TSV"),
    "semicolons": (b"a;b\n1,5;2\n", "CSV"),
    "array": (json.dumps([RECORD]).encode(), "a JSON array (`jq -c .[]` makes JSON Lines of one)"),
    "indented array": (json.dumps([RECORD], indent=2).encode(), "a JSON array (`jq -c .[]` makes JSON Lines of one)"),
    "indented object": (json.dumps(RECORD, indent=2).encode(), "one JSON object over several lines"),
    "nothing": (b"", None),
    "a line": (LINE.encode(), None),
    "two objects": (LINE.encode() * 2, None),
    "a broken line": (b'{"instruction": \n' + LINE.encode(), None),
    "an object without end": (b"{" * 100_000, None),
    "deep": (b'{"a":' * 10_000, None),
    "one word": (b"hello\n", None),
    "prose": (b"One, two and three\nand one more line.\n", None),
    "one column": (b"text\nTwo and three make five.\n", None),
    "a header": (b"instruction,output\n", None),
    "a field too long for a table": (b"a,b\n" + b"x" * 200_000, None),
}


@pytest.mark.parametrize(("content", "kind"), KINDS.values(), ids=KINDS)
def test_kinds(tmp_path, content, kind):
    file = tmp_path / "data"
    file.write_bytes(content)
    assert kind_of(file) == kind


@given(st.binary(max_size=200))
def test_any_bytes_have_an_answer(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any"
    file.write_bytes(content)
    kind_of(file)
