"""An optimizer whose state does not fit: what is in memory, how fast it pages, what a kill leaves, and what it costs.

    python -m benchmarks.optimizer            five minutes, 10 GB of memory, 4 GB of disk
    python -m benchmarks.optimizer --view     show it again
    python -m benchmarks.optimizer --state 1e9 --budget 128e6 --directory /mnt/disk     otherwise

It writes records/optimizer.json and records/optimizer.png. Each question is answered by processes of its own
(``optimizer_jobs.py``), so that nothing is left in memory of the one before:

=========  =============================================================================================================
paging     some steps with a budget, watched by ``mincore``, smaps and the process's resident set; the same without one.
           Then steps in turns with the disk alone, from rest to rest: bytes read and written over the seconds
limit      a process that may have the parameters, the budget and 64 MB more (RLIMIT_DATA): torch's AdamW, and ours
kill       SIGKILL in the middle of a step, then from the last checkpoint on
resident   a step with all of the state in memory, in turns with torch's fused AdamW and bitsandbytes' paged one
=========  =============================================================================================================

The limit and the kill have a quarter of state and budget. The disk's file is as large as what a step reads, and is
written and read past the kernel's cache where the file system can.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .adamw import SMALLEST
from .optimizer_jobs import SPARE, TOO_LATE
from .optimizer_views import goals, plot, tables
from .record import ROOT, parse, provenance, write
from .view import show

STATE, BUDGET, STEPS = 4 * 10**9, 256 * 10**6, 5
ROUNDS = 3  # of steps and disk
ELEMENTS = 2**24  # of each set of the resident comparison
FILE = "optimizer"
WIDTH = 150


class JobError(Exception):
    """A process did not do what it was to do; the message has what it said last."""


def job(name: str, killed: bool = False, **options: Any) -> dict[str, Any]:
    """Run a job in a process of its own.

    Args:
        name: one of ``optimizer_jobs.JOBS``.
        killed: it is to die by SIGKILL.
        options: its arguments.

    Returns:
        what it found; nothing where it was killed.

    Raises:
        JobError: it failed, or was not killed, or was too late to be.
    """
    command = [sys.executable, "-m", "benchmarks.optimizer_jobs", name, json.dumps(options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if killed and done.returncode == -signal.SIGKILL:
        return {}
    if killed or done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        late = ": the step was over before the kill" if done.returncode == TOO_LATE else ""
        raise JobError(f"{name} ended with {done.returncode}{late}, not as it was to; it said: {said}")
    return json.loads(done.stdout.splitlines()[-1])


def paging(state: int, budget: int, steps: int, rounds: int, directory: str) -> dict[str, Any]:
    """The record of the first question."""
    found = job("paged", state=state, budget=budget, steps=steps, rounds=rounds, directory=directory)
    unpaged = job("unpaged", state=state, steps=steps)
    same = found.pop("digest") == unpaged["digest"]
    return {"kind": "paging", "budget": budget, "spare": SPARE, "steps": steps, "same_bits": same, **found}


def limit(state: int, budget: int, steps: int, directory: str) -> dict[str, Any]:
    """The record of the second."""
    options = {"state": state, "budget": budget, "steps": steps, "directory": directory}
    found = {which: job("limited", which=which, **options) for which in ("torch", "ours")}
    unlimited = job("unpaged", state=state, steps=steps)
    same = found["ours"].pop("digest", None) == unlimited["digest"]
    return {"kind": "limit", "state_bytes": state, "budget": budget, "same_bits": same, **found}


def kill(state: int, budget: int, directory: str) -> dict[str, Any]:
    """The record of the third: six steps, a checkpoint after two and four, a kill in the fourth."""
    options = {"state": state, "budget": budget, "steps": 6, "directory": directory, "every": 2}
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        whole = job("train", checkpoint=str(Path(folder, "whole.pt")), **options)
        checkpoint = str(Path(folder, "killed.pt"))
        job("train", killed=True, checkpoint=checkpoint, kill_in=3, **options)
        resumed = job("train", checkpoint=checkpoint, **options)
    return {
        "kind": "kill",
        "state_bytes": state,
        "killed_in": 3,
        "resumed_at": resumed["resumed_at"],
        "same_bits": resumed["digest"] == whole["digest"],
    }


def measure(state: int, budget: int, steps: int, rounds: int, elements: int, directory: str) -> list[dict[str, Any]]:
    """The records of all questions; the arguments are the command's options."""
    common = {"benchmark": FILE, **provenance()}
    answers: list[Mapping[str, Any]] = []
    quarter = state // 4, max(budget // 4, SMALLEST)
    for question in (
        lambda: [paging(state, budget, steps, rounds, directory)],
        lambda: [limit(*quarter, 2, directory)],
        lambda: [kill(*quarter, directory)],
        lambda: [{"kind": "resident", **point} for point in job("resident", elements=elements)["points"]],
    ):
        answers += question()
        print(answers[-1]["kind"], "done", file=sys.stderr)
    return [{**common, **answer} for answer in answers]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or show what was measured."""
    parser = argparse.ArgumentParser(description="Watch and measure the paged optimizer.")
    parser.add_argument("--view", action="store_true", help="show the records, measure nothing")
    parser.add_argument("--state", type=float, default=STATE, help="bytes of state")
    parser.add_argument("--budget", type=float, default=BUDGET, help="bytes of it that may be in memory")
    parser.add_argument("--steps", type=int, default=STEPS, help="that are watched")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of steps and disk, in turns")
    parser.add_argument("--elements", type=int, default=ELEMENTS, help="of each set where all is in memory")
    parser.add_argument("--directory", default="/var/tmp", help="on the disk that is paged to")
    args = parse(parser, arguments)
    file = args.out / f"{FILE}.json"
    if not args.view:
        sizes = int(args.state), int(args.budget)
        try:
            records = measure(*sizes, args.steps, args.rounds, args.elements, args.directory)
        except JobError as error:
            parser.exit(1, f"{error}\n")
        write(records, file)
        plot(records, file.with_suffix(".png"))
    records = json.loads(file.read_text())
    show(tables(records), WIDTH, goals(records))


if __name__ == "__main__":
    main()
