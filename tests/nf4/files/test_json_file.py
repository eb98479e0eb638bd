"""JSON that nobody vouches for is an object, or one line that says why it is none."""

from __future__ import annotations

import math
import os

import pytest

from qloralab.nf4.files.errors import FormatError
from qloralab.nf4.files.json_file import parse_object, read_object, write_object

REFUSED = {
    b"": "is not JSON: Expecting value",
    b'{"a": 1': "is not JSON: Expecting ',' delimiter",
    b"\xff": "is not JSON: 'utf-8' codec can't decode",
    b"[]": "holds a JSON list, not an object",
    b"null": "holds a JSON NoneType, not an object",
    b"[" * 100_000: "is not JSON: maximum recursion depth exceeded",
    b'{"a":' * 100_000: "is not JSON: maximum recursion depth exceeded",
    b'{"a": 1, "b": {"c": 2, "c": 3}}': "is not JSON: the name 'c' occurs twice",
    b'{"a": %s}' % (b"9" * 10_000): "is not JSON: Exceeds the limit",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: repr(text[:12]))
def test_what_is_refused(text):
    with pytest.raises(FormatError) as caught:
        parse_object(text, file="x.json", tensor="w", field="f")
    assert caught.value.message.startswith(REFUSED[text])
    assert (caught.value.file, caught.value.tensor, caught.value.field) == ("x.json", "w", "f")


@pytest.mark.parametrize("text", [b'{"a": {"n": 1%s}}', b'{"a": [{"n": [0, -1%s]}]}'], ids=["value", "in a list"])
def test_a_number_that_no_float_holds_is_named(text):
    with pytest.raises(FormatError) as caught:
        parse_object(text % (b"0" * 400), file="x.json", field="header")
    assert (caught.value.message, caught.value.field) == ("is a number of 401 digits", "n")


def test_numbers_that_are_taken_are_floats_too():
    """Such as the infinite time step in the config of a Mamba 2."""
    found = parse_object(b'{"a": %s, "b": -Infinity, "c": 1e999, "d": "\xce\xa9"}' % (b"9" * 300))
    assert [float(found[name]) for name in "abc"] == [pytest.approx(1e300), -math.inf, math.inf]
    assert found["d"] == "Ω"


def test_written_and_read(tmp_path):
    path = tmp_path / "config.json"
    fields = {"b": [1, math.inf], "a": {"Ω": None}}
    write_object(path, fields)
    assert read_object(path) == fields
    with pytest.raises(TypeError):
        write_object(path, {"a": {1, 2}})
    assert read_object(path) == fields
    assert os.listdir(tmp_path) == ["config.json"]


def test_only_regular_files_of_a_likely_size_are_read(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError):
        read_object(path)
    os.mkfifo(path)  # nobody writes to it: reading would wait for ever
    with pytest.raises(FormatError, match="is not a regular file"):
        read_object(path)
    path.unlink()
    path.write_text("")
    os.truncate(path, 1 << 40)
    with pytest.raises(FormatError, match=f"has {1 << 40} bytes; at most 100000000 are read"):
        read_object(path)
