"""FormatError says where."""

from __future__ import annotations

from pathlib import Path

import pytest

from qloralab.nf4.files.errors import FormatError


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ({}, "is broken"),
        ({"file": Path("a")}, "a: is broken"),
        ({"tensor": "w"}, "tensor 'w': is broken"),
        ({"field": "shape"}, "field 'shape': is broken"),
        ({"tensor": "w", "field": "shape"}, "tensor 'w', field 'shape': is broken"),
        ({"file": "f", "tensor": "w", "field": "shape"}, "f, tensor 'w', field 'shape': is broken"),
    ],
    ids=["nowhere", "file", "tensor", "field", "tensor-field", "all"],
)
def test_message_names_what_is_known(where, text):
    error = FormatError("is broken", **where)
    assert isinstance(error, ValueError)
    assert str(error) == text
    assert (error.file, error.tensor, error.field) == tuple(
        None if name not in where else str(where[name]) for name in ("file", "tensor", "field")
    )
