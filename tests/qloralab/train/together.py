"""Runs of several processes: a process of its own forks them, so that one import of PyTorch serves all.

    python together.py '[{"count": 2, "parallel": "ddp", "settings": {…}, "steps": null}, …]'

Each job is a run, or one that goes on ("resume": DIR). The children have the environment variables of ``torchrun``.
A line of JSON for each tells the exit status of each process, and what went wrong. To be run with OMP_NUM_THREADS=1: a
fork has one thread, and nothing of PyTorch may have run before it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401  here and below: what each child would import again
import torch.distributed.fsdp  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

from qloralab.display import Display
from qloralab.settings import Settings
from qloralab.train import finetune as program
from qloralab.train.processes import Processes, held_bytes, processes


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def work(job: dict[str, Any], rank: int) -> None:
    """What one process does. It leaves the bytes of the model that it held beside the run."""
    if job.get("data_of_its_own") == rank:
        job["settings"]["data"] = job["other_data"]
    held: list[tuple[Path, int]] = []
    of = program._Run.of

    def watched(settings: Settings, prepared: Any, display: Display, group: Processes) -> Any:
        run = of(settings, prepared, display, group)
        held.append((Path(job["out"]), held_bytes(prepared.model)))
        return run

    program._Run.of = watched  # type: ignore[method-assign]
    if job.get("fails") == rank:
        program._Run._step = lambda *_: os._exit(9)  # type: ignore[method-assign]
    with processes(job["parallel"]) as group:
        if "resume" in job:
            program.resume(Path(job["resume"]), job.get("steps"), processes=group)
            return
        given = {**job["settings"], "out": Path(job["out"]), "model": Path(job["settings"]["model"])}
        program.finetune(Settings(**given), processes=group)
    for out, count in held:
        (out / f"held-{rank}").write_text(str(count))


def child(job: dict[str, Any], rank: int, port: int, told: int) -> None:
    """A forked process, from its environment to its end."""
    if job["parallel"]:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(job["count"]), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    try:
        work(job, rank)
        os._exit(0)
    except BaseException as error:
        os.write(told, f"{rank} {type(error).__name__}: {' '.join(str(error).split())}\n".encode())
        os._exit(1)


def main() -> None:
    for job in json.loads(sys.argv[1]):
        port, (reading, writing), children = free_port(), os.pipe(), []
        for rank in range(job["count"]):
            if (made := os.fork()) == 0:
                child(job, rank, port, writing)
            children.append(made)
        os.close(writing)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]) for one in children]
        with os.fdopen(reading) as file:
            print(json.dumps({"statuses": statuses, "told": file.read().splitlines()}), flush=True)


if __name__ == "__main__":
    main()
