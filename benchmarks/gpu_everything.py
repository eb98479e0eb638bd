"""All that one visit to a GPU is for, in one call of less than ten minutes.

    python -m benchmarks.gpu --everything --out FOLDER

Each part is a process of its own, so that an error that ends its CUDA context, or a kernel that never returns, ends
that part alone. The time that is left is divided among the parts that are left, in proportion to what each is expected
to take; what one does not use is for those after it. A part that is late is killed.

A part writes into ``parts/NAME`` of the folder, ``log.txt`` besides. After each part the records that are there are
joined: those in files of one name are one file in the folder, in the order of the parts.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .record import ROOT, write

BUDGET = 570.0  # seconds in all
STARTING = 20.0  # of a part's seconds: to load torch, and for the last point to end
DYING = 10.0  # until a process that was killed is left alone
PYTHON = (sys.executable, "-m")


@dataclass(frozen=True)
class Part:
    """One process of all.

    Attributes:
        name: of its folder.
        seconds: that it is expected to take.
        module: of this folder.
        arguments: of its command; "{budget}" is the seconds that it has to measure in.
    """

    name: str
    seconds: float
    module: str
    arguments: Sequence[str] = ()


def parts() -> list[Part]:
    """All, those first without which the others say less: a benchmark of a GPU that is new is one more of these."""

    def gpu(name: str, seconds: float, *only: str) -> Part:
        return Part(name, seconds, "gpu", ["--budget", "{budget}", "--only", *only])

    return [
        gpu("canaries", 90, "canaries"),
        gpu("linear", 100, "linear"),
        gpu("input gradient", 100, "input gradient"),
        gpu("chain", 40, "chain"),
        gpu("weights", 30, "dequantize", "quantize"),
        gpu("adapted layer", 60, "adapted layer", "adapted layer, eager"),
        Part("optimizer", 60, "gpu_optimizer"),
        Part("generate", 50, "generate", ["--device", "cuda"]),
        Part("host", 40, "host"),
    ]


def everything(
    out: Path, deadline: float, which: Sequence[Part] | None = None, python: Sequence[str] = PYTHON
) -> dict[str, str]:
    """Run the parts, one after the other.

    Args:
        out: folder of the records.
        deadline: of all, on the clock of ``time.monotonic``.
        which: parts; None: all.
        python: what a command begins with, before the module's name.

    Returns:
        by name, what became of each part: "done", or what else.
    """
    left, verdicts = list(parts() if which is None else which), {}
    shutil.rmtree(out / "parts", ignore_errors=True)
    while left:
        seconds = (deadline - time.monotonic()) * left[0].seconds / sum(one.seconds for one in left)
        part, start = left.pop(0), time.monotonic()
        verdicts[part.name] = verdict = _run(part, out / "parts" / part.name, seconds, python)
        print(f"{part.name}: {verdict}, {time.monotonic() - start:.0f} s of {seconds:.0f}", file=sys.stderr, flush=True)
        join(out, verdicts)
    return verdicts


def _run(part: Part, folder: Path, seconds: float, python: Sequence[str]) -> str:
    if seconds <= 0:
        return "the time was up"
    arguments = [argument.format(budget=max(0.0, seconds - STARTING)) for argument in part.arguments]
    command = [*python, f"benchmarks.{part.module}", *arguments, "--out", str(folder.absolute())]
    folder.mkdir(parents=True)
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            with suppress(subprocess.TimeoutExpired):  # a driver may not let go of it
                process.wait(DYING)
            return "killed, it was late"
    last = [*(folder / "log.txt").read_text(errors="replace").splitlines(), ""][-2:][0]
    return f"ended with code {code}: {last}" if code else "done"


def join(out: Path, names: Sequence[str] | dict[str, Any]) -> None:
    """Write the records of these parts, those in files of one name into one, in the order of the names."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        for file in sorted((out / "parts" / name).glob("*.json")):
            found.setdefault(file.name, []).extend(json.loads(file.read_text()))
    for name, records in found.items():
        write(records, out / name)
