"""An evaluation as JSON: what was asked for, what came of it, and the sums of each document.

``--against`` reads the sums, so that two runs are compared document by document, however long ago the first one was.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qloralab.nf4.files.atomic import replacing
from qloralab.nf4.files.json_file import read_object

from ..checkpoint.output_directory import check_writable
from ..errors import UserError
from .evaluation import Comparison, Estimate, Evaluation


def check_out(path: Path) -> None:
    """Refuse a file that cannot be written, before anything takes time.

    Raises:
        UserError: it cannot.
    """
    if path.is_dir():
        raise UserError(f"{path} is a directory; give --out the name of a JSON file")
    check_writable(path, path.absolute().parent)


def write_record(
    path: Path,
    evaluation: Evaluation,
    sources: Sequence[str],
    facts: dict[str, Any],
    comparison: Comparison | None = None,
) -> None:
    """Write an evaluation, whole or not at all.

    Args:
        path: of the file; directories above it are made.
        evaluation: the sums.
        sources: what the documents are called.
        facts: settings, versions and all else that the figures depend on; they come first.
        comparison: with another run, if there is one.

    Raises:
        UserError: the file cannot be written.
    """
    document = {**facts, "results": {name: _estimate(one) for name, one in evaluation.estimates().items()}}
    if comparison is not None:
        differences = dataclasses.asdict(comparison)
        document["differences"] = {name: one for name, one in differences.items() if one is not None}
    document["evaluation"] = as_json(evaluation, sources)
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as (part,):
            part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def as_json(evaluation: Evaluation, sources: Sequence[str]) -> dict[str, Any]:
    """The fields of an evaluation, with a record for each document, or window."""
    is_document = evaluation.unit == "document"
    names = sources if is_document else [f"window {i}" for i in range(1, len(evaluation.tokens) + 1)]
    columns: dict[str, list[Any]] = {
        "source": list(names),
        "tokens": evaluation.tokens.tolist(),
        "nll": evaluation.nll_sums.tolist(),
    }
    beside = {"kl": evaluation.kl_sums, "agreed": evaluation.agreed, "reference_nll": evaluation.reference_nll_sums}
    columns |= {name: sums.tolist() for name, sums in beside.items() if sums is not None}
    units = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    shared = {name: getattr(evaluation, name) for name in ("window", "stride", "fingerprint", "unit")}
    return {**shared, "units": units}


def read_record(path: Path) -> Evaluation:
    """The evaluation in a file that ``write_record`` wrote.

    Raises:
        UserError, FormatError: there is none.
    """
    try:
        found = read_object(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        return _evaluation(found["evaluation"])
    except (LookupError, TypeError, ValueError, OverflowError):
        raise UserError(f"{path} is not what `qloralab eval --out` writes") from None


def _evaluation(fields: dict[str, Any]) -> Evaluation:
    units = fields["units"]
    tokens = _column(units, "tokens", np.int64)
    has_reference = "kl" in units[0]
    evaluation = Evaluation(
        window=int(fields["window"]),
        stride=int(fields["stride"]),
        fingerprint=str(fields["fingerprint"]),
        unit="document" if fields["unit"] == "document" else "window",
        tokens=tokens,
        nll_sums=_column(units, "nll", np.float64),
        kl_sums=_column(units, "kl", np.float64) if has_reference else None,
        agreed=_column(units, "agreed", np.int64) if has_reference else None,
        reference_nll_sums=_column(units, "reference_nll", np.float64) if has_reference else None,
    )
    if tokens.min() < 0 or not tokens.sum():
        raise ValueError("no tokens")
    return evaluation


def _column(units: Sequence[dict[str, Any]], name: str, dtype: type[np.generic]) -> Any:
    found = np.array([unit[name] for unit in units], dtype)
    if found.ndim != 1 or not np.isfinite(found).all():
        raise ValueError(f"{name} is not a number in each")
    return found


def _estimate(one: Estimate) -> dict[str, Any]:
    return dataclasses.asdict(one)
