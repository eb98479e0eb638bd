"""What a file seems to be that was expected to hold JSON Lines: for the message that refuses it.

A binary format says so in its first bytes. A table is text whose first two rows have as many fields, two or more, at
one of the usual delimiters; JSON of another shape begins as JSON does.
"""

from __future__ import annotations

import csv
import json
from os import PathLike

_BEGINNINGS = {
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ\x00": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstandard archive",
    b"PK\x03\x04": "a zip archive or an Excel file",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"%PDF": "a PDF",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
_TABLES = {"\t": "TSV", ",": "CSV", ";": "CSV"}
_LOOKED_AT = 65_536  # bytes


def kind_of(path: str | PathLike[str]) -> str | None:
    """What a file looks like, as in "it looks like CSV"; None where nothing speaks for anything.

    Args:
        path: the file; only its first 64 KiB are read.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(_LOOKED_AT)
    for beginning, kind in _BEGINNINGS.items():
        if start.startswith(beginning):
            return kind
    if b"\0" in start:
        return "a binary file"
    text = start.decode("utf-8-sig", errors="replace").lstrip()
    if text.startswith("["):
        return "a JSON array (`jq -c .[]` makes JSON Lines of one)"
    if text.startswith("{"):
        return "one JSON object over several lines" if _goes_on(text) else None
    return next((kind for delimiter, kind in _TABLES.items() if _is_table(text, delimiter)), None)


def _goes_on(text: str) -> bool:
    """Whether the object that begins on the first line ends on a later one."""
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return "\n" in text[:end]


def _is_table(text: str, delimiter: str) -> bool:
    rows = csv.reader(text.splitlines(keepends=True), delimiter=delimiter)
    try:
        first, second = next(rows), next(rows)
    except (csv.Error, StopIteration):
        return False
    return len(first) == len(second) > 1
