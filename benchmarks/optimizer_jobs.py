"""What the processes of ``optimizer.py`` do: one job each, so that nothing is left of the one before.

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
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from qloralab.optim.pager import Chunk

from .adamw import BYTES, LORA, RATE, advance, bitsandbytes, digest, make, ours, sizes, steps, torch_fused
from .clock import host, quantiles
from .disk import Disk, kind

SPARE = 64 * 10**6  # bytes beyond the budget: what is allowed for tables, temporary tensors and threads
TOO_LATE = 3  # exit status: the step was over before the process could be killed in it
EVERY = 0.05  # seconds between two samples
COPY = 2**28  # bytes


class Watch:
    """Samples what of an optimizer's state is in memory, by a thread, while it is entered and steps.

    Three witnesses, none of which is the pager itself:

    * ``mincore`` on all of the state: pages in the kernel's cache, whether this process has them mapped or not;
    * the resident set of the mapping, from /proc/self/smaps;
    * the growth of the process's whole resident set since before the optimizer was made, from /proc/self/status. So it
      has everything that the optimizer takes, tables and temporary tensors too, and neither parameters nor gradients.

    Args:
        optimizer: to look at.
        before: bytes of VmRSS before it was made.

    Attributes:
        samples: by name, a list each: seconds since the start; mincore_mb, mapping_mb, process_mb, 10**6 bytes.
        ends: seconds when the steps ended.
    """

    def __init__(self, optimizer: ql.PagedAdamW, before: int):
        self._optimizer, self._before = optimizer, before
        self._start = time.perf_counter()
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run)
        self.samples: dict[str, list[float]] = {"seconds": [], "mincore_mb": [], "mapping_mb": [], "process_mb": []}
        self.ends: list[float] = []

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def end_of_step(self) -> None:
        """Take a sample now, and note the time."""
        self.ends.append(round(time.perf_counter() - self._start, 3))
        self._sample()

    def _run(self) -> None:
        while not self._stop.wait(EVERY):
            self._sample()

    def _sample(self) -> None:
        with self._lock:
            at, paging = time.perf_counter() - self._start, self._optimizer.paging()
            self.samples["seconds"].append(round(at, 3))
            found = paging.resident_bytes, paging.rss_bytes or 0, status_bytes("VmRSS") - self._before
            for name, value in zip(("mincore_mb", "mapping_mb", "process_mb"), found, strict=True):
                self.samples[name].append(round(value / 1e6, 1))


def status_bytes(field: str) -> int:
    """A field of /proc/self/status, such as VmRSS or VmData, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def paged(state: int, budget: int, steps: int, rounds: int, directory: str) -> dict[str, Any]:
    """Watched steps, and then steps in turns with the disk.

    Args:
        state: bytes of float32 moments, 8 for each element.
        budget: bytes of them that may be resident.
        steps: of the optimizer.
        rounds: of steps and disk.
        directory: for the state and for the disk's file.
    """
    params = make(sizes(state // 8))
    _load_code()
    before = status_bytes("VmRSS")
    optimizer = ql.PagedAdamW(params, lr=RATE, budget=budget, state_dir=directory)
    with Watch(optimizer, before) as watch:
        _steps(params, optimizer, steps, watch.end_of_step)
    found = {"digest": digest(params), "tensors": len(params), "ends": watch.ends, "samples": watch.samples}
    paging = optimizer.paging()
    found |= {"state_bytes": paging.state_bytes, "chunks_missed": paging.misses}
    return found | throughput(optimizer, rounds, directory)


def throughput(optimizer: ql.PagedAdamW, rounds: int, directory: str) -> dict[str, Any]:
    """Bytes and seconds of steps, and of the disk alone, in turns.

    A step is timed from rest to rest: until its last chunks are on the disk and the first ones of the next are there.
    So it has all of its traffic, and no more.
    """

    def settled_step() -> None:
        optimizer.step()
        for device in optimizer._storage.devices.values():
            if device.pager is not None:
                device.pager.settle()

    settled_step()
    before = optimizer.paging()
    settled_step()
    disk = Disk(directory, optimizer.paging().fetched - before.fetched)
    seconds: dict[str, list[float]] = {"step": [], "write": [], "read": [], "mixed": []}
    counted: dict[str, list[float]] = {"traffic": [], "stalled": [], "device_read": [], "device_written": []}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(seconds), len(seconds)):
            if name != "step":
                seconds[name].append(getattr(disk, name)())
                continue
            before, (read, written) = optimizer.paging(), _device_bytes()
            start = time.perf_counter()
            settled_step()
            seconds[name].append(time.perf_counter() - start)
            after, (read_now, written_now) = optimizer.paging(), _device_bytes()
            counted["traffic"].append(after.fetched - before.fetched + after.evicted - before.evicted)
            counted["stalled"].append(after.stalled - before.stalled)
            counted["device_read"].append(read_now - read)
            counted["device_written"].append(written_now - written)
    disk.close()
    about = {"disk_bytes": disk.nbytes, "direct": disk.direct, "file_system": kind(directory)}
    return {"seconds": seconds, **counted, **about}


def _device_bytes() -> tuple[int, int]:
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


def resident(elements: int, seconds: float = 2.0) -> dict[str, Any]:
    """Steps with all of the state in memory, in turns with a copy whose best repetition is the rate of the bound.

    Two sets of so many elements: one large tensor, and tensors of the size of LoRA's. bitsandbytes pages on NVIDIA GPUs
    only; on a CPU it keeps the state in ordinary memory.
    """
    source = torch.ones(COPY, dtype=torch.uint8)
    target = torch.empty_like(source)
    which = [torch_fused(), ours("ours", 32), ours("ours, in a budget", 32, room=True), ours("ours, 8 bits", 8)]
    which += bitsandbytes("bitsandbytes", 1e-5)
    errors = {one.name: one.check() for one in which}
    points = []
    for title, numels in {"one large": [elements], "LoRA-sized": [LORA[0]] * max(1, elements // LORA[0])}.items():
        copy = {"copy": host([lambda: target.copy_(source)])}
        times, made = steps(which, make(numels), host, copy, seconds=seconds, fewest=9)
        rate = 1e-6 * 2 * COPY / min(times["copy"])  # GB/s
        points += [
            {
                "set": title,
                "optimizer": one.name,
                "bits": one.bits,
                "elements": sum(numels),
                "tensors": len(numels),
                "ms": quantiles(times[one.name]),
                "reps": len(times[one.name]),
                "bound_ms": 1e-6 * BYTES[one.bits] * sum(numels) / rate,
                "state_bytes": _state_bytes(made[one.name]),
                "error": errors[one.name],
                "copy_gb_per_s": rate,
            }
            for one in which
        ]
    return {"points": points}


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """All tensors of the state, tables that are shared counted once."""
    tensors = [value for entry in optimizer.state.values() for value in entry.values() if torch.is_tensor(value)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _load_code() -> None:
    """What Python and PyTorch load at the first step of any optimizer: 150 MB that are not of this one."""
    for optimizer in (torch.optim.AdamW, ql.PagedAdamW):
        optimizer(make([256])).step()


def _steps(
    params: list[Parameter], optimizer: torch.optim.Optimizer, steps: int, after: Callable[[], None] = lambda: None
) -> None:
    for step in range(steps):
        if step:
            advance(params)
        optimizer.step()
        after()


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    job.__name__: job for job in (paged, unpaged, limited, train, resident)
}


if __name__ == "__main__":
    print(json.dumps(JOBS[sys.argv[1]](**json.loads(sys.argv[2]))))
