"""JSON objects in files that nobody vouches for: read strictly, and written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .atomic import replacing
from .errors import FormatError

_MAX_BYTES = 100_000_000  # the longest, the index of the largest models, has a few million
_MAX_INTEGER = 10**308  # a float holds no larger one


def parse_object(text: bytes, **where: Any) -> dict[str, Any]:
    """A JSON object from its text.

    Args:
        text: in UTF-8.
        where: file, tensor and field of ``FormatError``.

    Raises:
        FormatError: it is not UTF-8, not JSON, nested too deeply, has a name twice or a whole number that no float
            holds, or is no object.
    """

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            for number in value if isinstance(value, list) else (value,):
                if isinstance(number, int) and abs(number) > _MAX_INTEGER:
                    raise FormatError(f"is a number of {len(str(abs(number)))} digits", **{**where, "field": name})
            if name in found:
                raise ValueError(f"the name {name!r:.60} occurs twice")
            found[name] = value
        return found

    try:
        found = json.loads(text.decode(), object_pairs_hook=checked)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise FormatError(f"is not JSON: {error}", **where) from None
    if not isinstance(found, dict):
        raise FormatError(f"holds a JSON {type(found).__name__}, not an object", **where)
    return found


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: it is not a regular file, or larger than any that means something; see ``parse_object``.
    """
    if os.path.lexists(path) and not path.is_file():
        raise FormatError("is not a regular file", file=path)
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise FormatError(f"has {size} bytes; at most {_MAX_BYTES} are read", file=path)
    return parse_object(path.read_bytes(), file=path)


def to_text(fields: dict[str, Any]) -> str:
    """An object as transformers and PEFT write it."""
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def write_object(path: Path, fields: dict[str, Any]) -> None:
    """Write an object to a file, which is as before until all of it is on disk."""
    with replacing(path) as (part,):
        part.write_text(to_text(fields), encoding="utf-8")
