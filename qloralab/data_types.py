"""Data types as the command line names them: ``nf4``, ``bof4-s``, or one of the user's own, ``module:NAME``.

``my_types.py:MINE`` is the object ``MINE`` of that file; ``package.module:MINE`` of a module that Python
finds. It is a ``DataType``, or the 4 to 256 values of a codebook, whose data type is then called MINE.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from qloralab.nf4.data_type import DATA_TYPES, DataType, data_type

from .errors import UserError


def named_data_type(text: str, block_size: int | None = None, double_quant: bool | None = None) -> DataType:
    """The data type that an option names.

    Args:
        text: as above.
        block_size, double_quant: instead of the data type's own, where given.

    Raises:
        UserError: there is none of that name, or it has no such block size or encoding.
    """
    found: Any = text
    if ":" in text:
        found = _imported(text)
    elif text not in DATA_TYPES:
        raise UserError(
            f"there is no data type {text!r}; give one of {', '.join(DATA_TYPES)}, or your own as FILE.py:NAME"
        )
    try:
        if not isinstance(found, str | DataType):
            found = DataType(text.rpartition(":")[2], found, encoding="double")
        return data_type(found, block_size, double_quant)
    except (TypeError, ValueError) as error:
        raise UserError(f"{text}: {error}") from None


def _imported(text: str) -> Any:
    where, _, name = text.rpartition(":")
    try:
        module = _file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:  # the user's own code may raise anything
        raise UserError(f"{text}: cannot import {where}: {type(error).__name__}: {error}") from None
    if not hasattr(module, name):
        raise UserError(f"{text}: {where} has no {name}")
    return getattr(module, name)


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module
