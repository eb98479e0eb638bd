"""A data type as an option names it: one of the table, or an object of the user's file."""

from __future__ import annotations

import pytest
import torch

from qloralab import DATA_TYPES, quantize
from qloralab.data_types import named_data_type

SOURCE = """
from qloralab import DataType

TERNARY = DataType("ternary", (-1.0, -0.5, 0.0, 1.0), block_size=32, scale="least_squares")
GRID = [-1.0, -0.3, 0.0, 0.3, 1.0]
NUMBER = 4
NAME = "af4"
"""


@pytest.fixture
def file(tmp_path) -> str:
    path = tmp_path / "my_types.py"
    path.write_text(SOURCE)
    return str(path)


@pytest.mark.parametrize("name", DATA_TYPES)
def test_a_name_of_the_table(name):
    assert named_data_type(name) is DATA_TYPES[name]


def test_ones_own(file):
    mine = named_data_type(f"{file}:TERNARY")
    assert (mine.name, mine.block_size) == ("ternary", 32)
    assert quantize(torch.randn(4, 64), mine).codebook == "ternary"
    grid = named_data_type(f"{file}:GRID")
    assert (grid.name, grid.codebook, grid.encoding) == (
        "GRID",
        (-1.0, pytest.approx(-0.3), 0.0, pytest.approx(0.3), 1.0),
        "double",
    )
    assert named_data_type(f"{file}:NAME") is DATA_TYPES["af4"]


def test_a_module_that_python_finds(file, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    assert named_data_type("my_types:TERNARY").name == "ternary"


def test_another_block_size_and_encoding(file):
    assert named_data_type("nf4", 128, False).settings() == {
        "name": "nf4", "codebook": "nf4", "block_size": 128, "scale": "absmax", "encoding": "float32"
    }  # fmt: skip
    assert named_data_type(f"{file}:TERNARY", 64, True).encoding == "double"


def test_what_is_none_is_refused_in_one_line(file, tmp_path, refusal):
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    for text, options, message in (
        ("nf9", (), "there is no data type 'nf9'; give one of nf4, fp4, "),
        (f"{tmp_path}/none.py:X", (), f"{tmp_path}/none.py:X: cannot import {tmp_path}/none.py: FileNotFoundError: "),
        (f"{broken}:X", (), f"{broken}:X: cannot import {broken}: ZeroDivisionError: division by zero"),
        ("no_such_module:X", (), "no_such_module:X: cannot import no_such_module: ModuleNotFoundError"),
        (f"{file}:MINE", (), f"{file}:MINE: {file} has no MINE"),
        (f"{file}:NUMBER", (), f"{file}:NUMBER: a codebook is a name, or 4 to 256 numbers, not 4"),
        ("nf4", (48,), "nf4: block_size is 48; it must be one of 16, 32, "),
        ("mxfp4", (None, False), "mxfp4: mxfp4 encodes its scales as e8m0; leave double_quant out"),
    ):
        assert refusal(named_data_type, text, *options).startswith(message)
