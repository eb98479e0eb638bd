"""Run directories, read back: by whoever wants to see them, while they run, after they ended, or after a kill.

A run writes ``config.json`` first, then a line of ``metrics.jsonl`` after each step, and the rest now and at its end
(``train/run_directory.py``). So a directory is usable from its first line on: an adapter, samples and a result are
there or not. A kill, or a full disk, may have cut the last line of ``metrics.jsonl``; what was cut is left out. A
directory of ``--seeds`` stands for the runs in it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qloralab.lora.files import read_adapter
from qloralab.nf4.files.errors import FormatError
from qloralab.nf4.files.json_file import parse_object, read_object

from ..errors import UserError
from ..inspection.adapter import Update, update
from ..train.report import read_samples
from ..train.run_directory import Metrics
from ..train.seeds import FILE as SEEDS_FILE

_FIELDS = [field.name for field in dataclasses.fields(Metrics)]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as its directory tells it.

    Attributes:
        name: short, and no other run's of the same report.
        path: of the directory.
        config: as ``config.json`` has it.
        metrics: a line for each step, at least one.
        samples: source and texts of held-out prompts, see ``read_samples``.
        updates: what its adapter adds to each layer; empty where none is saved.
        notes: what a reader has to know.
    """

    name: str
    path: Path
    config: dict[str, Any]
    metrics: list[Metrics]
    samples: list[tuple[str, dict[str, str]]]
    updates: list[Update]
    notes: list[str]

    @property
    def state(self) -> str:
        """How it ended, as far as is known."""
        if not isinstance(result := self.config.get("result"), dict):
            return "running or killed"
        return "interrupted" if result.get("interrupted") else "complete"

    @property
    def seconds(self) -> float:
        """Of training, validation left out."""
        before = [0, *(line.tokens for line in self.metrics)]
        return sum(
            (line.tokens - then) / line.tokens_per_s
            for line, then in zip(self.metrics, before, strict=False)
            if line.tokens_per_s
        )

    @property
    def peak_mb(self) -> float:
        """The largest resident memory, in 10**6 bytes; of an unfinished run the largest after a step."""
        result = self.config.get("result")
        peak = result.get("peak_mb") if isinstance(result, dict) else None
        return peak if isinstance(peak, int | float) else max(line.rss_mb for line in self.metrics)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in some directories, in their order.

    Args:
        paths: run directories, or directories of ``--seeds``.

    Raises:
        UserError, FormatError: one is no such directory, is there twice, or cannot be read.
    """
    found: dict[Path, Path] = {}
    for path in (run for given in paths for run in _directories(given)):
        if (same := path.resolve()) in found:
            raise UserError(f"{path} is there twice; give each run once")
        found[same] = path
    short = [path.name for path in found]
    alone = [short.count(name) == 1 for name in short]
    return [
        _read(path, name if single else str(path))
        for path, name, single in zip(found.values(), short, alone, strict=True)
    ]


def read_seeds(paths: Sequence[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """The ``seeds.json`` of those directories that have one."""
    return [(path, read_object(path / SEEDS_FILE)) for path in paths if (path / SEEDS_FILE).is_file()]


def _directories(path: Path) -> list[Path]:
    """The run directories that a path stands for."""
    if not path.is_dir():
        why = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {why}; give the directory of a run")
    if (path / "metrics.jsonl").is_file():
        return [path]
    seeds = [below for below in path.glob("seed-*") if (below / "metrics.jsonl").is_file()]
    if not seeds:
        raise UserError(f"{path} holds no metrics.jsonl: it is not the directory of a run")
    return sorted(seeds, key=lambda below: (len(below.name), below.name))


def _read(path: Path, name: str) -> Run:
    if not (path / "config.json").is_file():
        raise UserError(f"{path} holds no config.json: it is not the directory of a run")
    config = read_object(path / "config.json")
    metrics, notes = _metrics(path / "metrics.jsonl")
    samples, updates = [], []
    try:
        samples = read_samples(path / "samples.md")
    except (OSError, UnicodeDecodeError):
        notes.append("there are no samples")
    adapter = path / "adapter"
    try:
        if adapter.is_dir():
            lora, tensors = read_adapter(None, adapter)
            updates = [update(layer, A, B, lora.scaling) for layer, (A, B) in tensors.items()]
    except (OSError, FormatError) as error:
        notes.append(f"the adapter cannot be read: {error}")
    return Run(name, path, config, metrics, samples, updates, [*notes, *map(str, config.get("notes") or ())])


def _metrics(path: Path) -> tuple[list[Metrics], list[str]]:
    """The lines of ``metrics.jsonl``, and what to say of them."""
    *lines, last = path.read_bytes().split(b"\n")
    found = {line.step: line for line in (_line(path, number, text) for number, text in enumerate(lines, 1))}
    if not found:
        raise UserError(f"{path} is empty: the run has no step yet")
    return list(found.values()), ["the last line of metrics.jsonl is cut, and left out"] if last else []


def _line(path: Path, number: int, text: bytes) -> Metrics:
    """One line; fields that are missing are None, as those that were not measured."""
    where = f"{path}, line {number}"
    try:
        given = parse_object(text)
    except FormatError as error:
        raise UserError(f"{where}: {error}") from None
    values: dict[str, Any] = {name: given.get(name) for name in _FIELDS}
    for name, value in values.items():
        needed = name in ("step", "tokens", "rss_mb")
        number_like = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number_like and (needed or value is not None):
            raise UserError(f"{where}: {name} is {json.dumps(value)}, not a number")
    return Metrics(**values)
