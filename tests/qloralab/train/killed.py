"""Runs that are killed: a process of its own forks them, so that one import of PyTorch serves all.

    python killed.py '{"settings": {…}, "trials": […], "seconds": null}'

Each trial is a new run, killed by SIGKILL and resumed to its end: {"out": DIR, "moment": 0.4} after that part of the
time from its first file to its end, {"out": DIR, "call": 3} at its third call of those that make a file durable. A
line of JSON for each tells whether it was killed, and the steps in metrics.jsonl then. To be run with
OMP_NUM_THREADS=1: a fork has one thread, and nothing of PyTorch may have run before it.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401  here and below: what each child would import again
import transformers.models.llama.modeling_llama  # noqa: F401
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

from qloralab.display import Display
from qloralab.errors import UserError
from qloralab.settings import Settings
from qloralab.train.finetune import finetune, resume


def in_a_fork(work: Callable[[], Any], out: Path | None = None, seconds: float = 1e9) -> tuple[int, float]:
    """The status of a child that does some work, and how many seconds it took from the moment that a run began in out;
    after more than the seconds given it is killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
    start = None
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if start is None and (out is None or (out / "metrics.jsonl").exists()):
            start = time.perf_counter()
        if start is not None and time.perf_counter() - start > seconds:
            os.kill(child, signal.SIGKILL)
            seconds = 1e9
        time.sleep(0.001)
    return ended[1], time.perf_counter() - (start or 0.0)


def killing_at(call: int) -> None:
    """Let this process kill itself at a call of ``os.fsync``, ``os.replace`` or ``os.rename``, before that."""
    left = [call]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return counting

    os.fsync, os.replace, os.rename = counted(os.fsync), counted(os.replace), counted(os.rename)


def main() -> None:
    asked = json.loads(sys.argv[1])
    display = Display(Console(file=io.StringIO()))

    def begin(out: str, call: int | None = None) -> None:
        if call is not None:
            killing_at(call)
        given = {**asked["settings"], "out": Path(out), "model": Path(asked["settings"]["model"])}
        finetune(Settings(**given), display)

    status, whole = in_a_fork(lambda: begin(asked["whole"]), Path(asked["whole"]))
    assert status == 0
    for trial in asked["trials"]:
        out = Path(trial["out"])
        seconds = trial.get("moment", 1e9) * whole
        status, took = in_a_fork(lambda: begin(str(out), trial.get("call")), out, seconds)  # noqa: B023  it has ended
        if status == 0:  # before it could be killed: the machine has less to do than it had
            whole = min(whole, took)
        lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
        found = {"killed": status == signal.SIGKILL, "steps": len(lines) - 1}
        if not (out / "config.json").exists():  # it was killed before it began
            again, _ = in_a_fork(lambda: begin(f"{out}-again"))  # noqa: B023
        else:

            def go_on() -> None:
                try:
                    resume(out, display=display)  # noqa: B023
                except UserError as error:
                    if "is complete" not in str(error):
                        raise

            again, _ = in_a_fork(go_on)
        print(json.dumps({**found, "again": again}), flush=True)


if __name__ == "__main__":
    main()
