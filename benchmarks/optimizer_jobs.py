"""What the processes of ``benchmarks/optimizer.py`` do: one job each, so that nothing is left of the one before.

    python -m benchmarks.optimizer_jobs JOB '{"state": 40000000, "budget": 17000000, ...}'

The last line on stdout is the result, in JSON.
"""

from __future__ import annotations

import qloralab as ql  # isort: skip  # before torch: how OpenMP's threads wait is read when torch is loaded

import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from benchmarks.optimizer_disk import Disk, kind
from benchmarks.optimizer_problem import RATE, Problem, advance, digest, make, sizes
from benchmarks.optimizer_resident import resident
from benchmarks.optimizer_watch import Watch, status_bytes
from qloralab.optim.pager import Chunk

SPARE = 64 * 10**6  # bytes beyond the budget: what is allowed for tables, temporary tensors and threads
TOO_LATE = 3  # exit status: the step was over before the process could be killed in it


def paged(state: int, budget: int, steps: int, rounds: int, directory: str) -> dict[str, Any]:
    """Watched steps, and then steps in turns with the disk.

    Args:
        state, budget, steps: see ``Problem``.
        rounds: of steps and disk.
        directory: for the state and for the disk's file.
    """
    problem = Problem(state, budget, steps)
    params = make(sizes(problem.elements))
    _load_code()
    before = status_bytes("VmRSS")
    optimizer = ql.PagedAdamW(params, lr=RATE, budget=budget, state_dir=directory)
    with Watch(optimizer, before) as watch:
        for step in range(steps):
            if step:
                advance(params)
            optimizer.step()
            watch.end_of_step()
    found = {"digest": digest(params), "tensors": len(params), "ends": watch.ends, "samples": watch.samples}
    paging = optimizer.paging()
    found |= {"state_bytes": paging.state_bytes, "chunks_missed": paging.misses}
    return found | throughput(optimizer, rounds, directory)


def throughput(optimizer: ql.PagedAdamW, rounds: int, directory: str) -> dict[str, Any]:
    """Bytes and seconds of steps, and of the disk alone, in turns.

    A step is timed from rest to rest: until its last chunks are on the disk and the first ones of the next are there.
    So it has all of its traffic, and no more.
    """
    settle(optimizer)
    before = optimizer.paging()
    optimizer.step()
    settle(optimizer)
    disk = Disk(directory, optimizer.paging().fetched - before.fetched)
    seconds: dict[str, list[float]] = {"step": [], "write": [], "read": [], "mixed": []}
    traffic, stalled, device_read, device_written = [], [], [], []
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(["step", "write", "read", "mixed"], 4):
            if name != "step":
                seconds[name].append(getattr(disk, name)())
                continue
            before, (read, written) = optimizer.paging(), device_bytes()
            start = time.perf_counter()
            optimizer.step()
            settle(optimizer)
            seconds[name].append(time.perf_counter() - start)
            after, (read_now, written_now) = optimizer.paging(), device_bytes()
            traffic.append(after.fetched - before.fetched + after.evicted - before.evicted)
            stalled.append(after.stalled - before.stalled)
            device_read.append(read_now - read)
            device_written.append(written_now - written)
    disk.close()
    return {
        "seconds": seconds,
        "traffic": traffic,
        "stalled": stalled,
        "device_read": device_read,
        "device_written": device_written,
        "disk_bytes": disk.nbytes,
        "direct": disk.direct,
        "file_system": kind(directory),
    }


def settle(optimizer: ql.PagedAdamW) -> None:
    """Wait until nothing is on its way between memory and disk."""
    for device in optimizer._storage.devices.values():
        if device.pager is not None:
            device.pager.settle()


def device_bytes() -> tuple[int, int]:
    """What this process made the disk read, and write, so far, as the kernel counts it (/proc/self/io)."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"]), int(fields["write_bytes"])


def unpaged(state: int, steps: int) -> dict[str, Any]:
    """The same steps, the state in ordinary memory."""
    params = make(sizes(state // 8))
    optimizer = ql.PagedAdamW(params, lr=RATE)
    _steps(params, optimizer, steps)
    return {"digest": digest(params), "where": optimizer.paging().where}


def limited(state: int, budget: int, steps: int, directory: str, which: str) -> dict[str, Any]:
    """Steps within the memory that the parameters take, the budget, and some to spare (RLIMIT_DATA).

    The limit is on private memory that is written. Shared mappings of a file are not private.

    Args:
        state, budget, steps, directory: as for `paged`.
        which: "torch", or "ours".
    """
    params = make(sizes(state // 8))
    _load_code()
    limit = status_bytes("VmData") + budget + SPARE
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        if which == "torch":
            optimizer = torch.optim.AdamW(params, lr=RATE)
        else:
            optimizer = ql.PagedAdamW(params, lr=RATE, budget=budget, state_dir=directory)
        _steps(params, optimizer, steps)
    except (RuntimeError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return {"finished": False, "error": reason, "limit": limit}
    return {"finished": True, "digest": digest(params), "limit": limit}


def train(
    state: int, budget: int, steps: int, directory: str, checkpoint: str, every: int, kill_in: int | None = None
) -> dict[str, Any]:
    """Steps with a checkpoint, which is resumed from where it exists.

    Args:
        state, budget, steps, directory: as for `paged`.
        checkpoint: the file.
        every: steps between two checkpoints.
        kill_in: the number of the step, from 0, in the middle of which the process kills itself with SIGKILL.
    """
    params = make(sizes(state // 8))
    optimizer = ql.PagedAdamW(params, lr=RATE, budget=budget, state_dir=directory)
    file, first = Path(checkpoint), 0
    if file.exists():
        saved = torch.load(file, mmap=True)
        first = saved["step"]
        with torch.no_grad():
            for param, value in zip(params, saved["params"], strict=True):
                param.copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
        del saved
        advance(params, first)
    for step in range(first, steps):
        if step == kill_in:
            _kill_midway(optimizer)
        optimizer.step()
        if step == kill_in:
            os._exit(TOO_LATE)
        advance(params)
        if step + 1 < steps and (step + 1) % every == 0:
            contents = {"step": step + 1, "params": params, "optimizer": optimizer.state_dict()}
            torch.save(contents, file.with_suffix(".new"))
            os.replace(file.with_suffix(".new"), file)
    return {"digest": digest(params), "resumed_at": first}


def _kill_midway(optimizer: ql.PagedAdamW) -> None:
    """Let the next step send SIGKILL to this process, when half of the chunks that page have been updated."""
    (pager,) = (device.pager for device in optimizer._storage.devices.values() if device.pager is not None)
    left = sum(chunk is not None for part in optimizer._storage.parts for chunk in part.moments.chunks) // 2
    acquire = pager.acquire

    def acquire_or_die(chunk: Chunk) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        acquire(chunk)

    pager.acquire = acquire_or_die


def _load_code() -> None:
    """What Python and PyTorch load at the first step of any optimizer: 150 MB that are not of this one."""
    for optimizer in (torch.optim.AdamW, ql.PagedAdamW):
        optimizer(make([256])).step()


def _steps(params: list[Parameter], optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        if step:
            advance(params)
        optimizer.step()


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    job.__name__: job for job in (paged, unpaged, limited, train, resident)
}


if __name__ == "__main__":
    print(json.dumps(JOBS[sys.argv[1]](**json.loads(sys.argv[2]))))
