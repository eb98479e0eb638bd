"""AdamW on a GPU: how long a step takes where the state is on the device, and where it is in the host's memory.

    python -m benchmarks.gpu_optimizer          a minute; benchmarks/records/gpu-optimizer-<device>.json
    python -m benchmarks.gpu_optimizer --view benchmarks/records/gpu-optimizer-<device>.json      show it again

First the checks, without which nothing is timed:

* the state is managed memory, as ``cudaPointerGetAttributes`` says;
* with a budget, parameters and state have the same bits as without one. How much less memory the device has then is
  recorded, not judged: the driver keeps freed pages to itself for a while;
* each optimizer trains small tensors to where ``torch.optim.AdamW`` trains them.

Then the ceilings of this run: a copy on the device; copies from and to pinned memory of the host, alone and at once;
and what moving managed memory by ``cudaMemPrefetchAsync`` reaches, the way that ``optim/unified_memory.py`` does not
take. Then the steps, from event to event with all that the host does in between, in turns.

**Rooflines.** On the device an update of float32 parameters moves 28 bytes an element with float32 moments, and 16.06
with those of 8 bits, at the rate of the copy. State in the host's memory crosses the link both ways: 16 bytes an
element, or 4, at the rate of both directions at once. Parameters are float32, as those of adapters are: with bfloat16
PyTorch's AdamW keeps moments in bfloat16 too, and does less.

All managed memory that is asked for is less than the device has free.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import qloralab as ql
from benchmarks.gpu import Device, cuda_device, facts, record_file, view, write
from benchmarks.gpu_optimizer_views import tables
from benchmarks.gpu_timing import Timer, interleave
from benchmarks.provenance import parse
from benchmarks.timing import quantiles
from qloralab.optim.unified_memory import HOST, Runtime, load_runtime

MIB = 2**20
LORA = 16 * 4096  # elements of an adapter of rank 16
ELEMENTS = 2**26  # of each set
SMALLEST = 16 * MIB  # a budget
RATE, DECAY = 1e-3, 0.01
SECONDS = 0.5  # of samples, an optimizer and a set
ON_DEVICE = {32: 28.0, 8: 16 + 4 * 4 / 256}  # bytes an element, and the scales of 256: read and written, m and v
OVER_LINK = {32: 16.0, 8: 4.0}
TOLERANCES = {32: 1e-4, 8: 0.1}  # of the change of the parameters: bitsandbytes divides in fewer bits; 8 bits round

Make = Callable[[Sequence[Parameter]], Optimizer]


@dataclass(frozen=True)
class Ceilings:
    """GB/s of this run, 10**9 bytes; both directions of a pair are counted.

    Attributes:
        copy: on the device, read and written.
        to_device, to_host, both: from and to pinned memory.
        prefetch_to_device, prefetch_to_host, prefetch_both: of managed memory, 32 MiB at a time.
    """

    copy: float
    to_device: float
    to_host: float
    both: float
    prefetch_to_device: float
    prefetch_to_host: float
    prefetch_both: float


@dataclass(frozen=True)
class Contender:
    """An optimizer.

    Attributes:
        name: in records and tables.
        bits: of its state.
        make: it, for parameters.
        away: whether its state is in the host's memory.
    """

    name: str
    bits: int
    make: Make
    away: bool = False


class WrongResultError(Exception):
    """What was found is not what must be; nothing is timed."""


def contenders(peer: bool = True, away: bool = True) -> list[Contender]:
    """Who takes part.

    Args:
        peer: bitsandbytes too.
        away: ours with the smallest budget too.
    """

    def ours(bits: Any, budget: int | None = None) -> Make:
        return lambda params: ql.PagedAdamW(params, lr=RATE, weight_decay=DECAY, state_bits=bits, budget=budget)

    found = [
        Contender("torch fused", 32, lambda params: torch.optim.AdamW(params, lr=RATE, weight_decay=DECAY, fused=True)),
        Contender("ours", 32, ours(32)),
        Contender("ours, 8 bits", 8, ours(8)),
    ]
    if peer:
        from bitsandbytes.optim.adamw import PagedAdamW8bit, PagedAdamW32bit

        def theirs(kind: Any) -> Make:
            return lambda params: kind(list(params), lr=RATE, weight_decay=DECAY)

        found += [
            Contender("bitsandbytes paged", 32, theirs(PagedAdamW32bit)),
            Contender("bitsandbytes paged, 8 bits", 8, theirs(PagedAdamW8bit)),
        ]
    if away:
        found += [
            Contender("ours, on the host", 32, ours(32, SMALLEST), away=True),
            Contender("ours, on the host, 8 bits", 8, ours(8, SMALLEST), away=True),
        ]
    return found


def make(numels: Sequence[int], device: torch.device, seed: int = 0) -> list[Parameter]:
    """Parameters with gradients: float32 [numel] each, N(0, 0.02) and N(0, 1)."""
    generator = torch.Generator(device).manual_seed(seed)
    made = []
    for numel in numels:
        param = Parameter(torch.randn(numel, generator=generator, device=device) * 0.02)
        param.grad = torch.randn(numel, generator=generator, device=device)
        made.append(param)
    return made


def check_contender(one: Contender, device: torch.device) -> float:
    """Train some tensors for 3 steps and compare with ``torch.optim.AdamW``.

    Returns:
        root-mean-square difference over the root mean square of the change.

    Raises:
        WrongResultError: it is too large.
    """
    numels = [3 * 10**5, 5000, 256]
    start, ends = make(numels, device), []
    for build in (one.make, lambda params: torch.optim.AdamW(params, lr=RATE, weight_decay=DECAY)):
        params = make(numels, device)
        optimizer = build(params)
        for _ in range(3):
            optimizer.step()
        ends.append(_flat(params))
    change = torch.linalg.vector_norm(ends[1] - _flat(start))
    error = float(torch.linalg.vector_norm(ends[0] - ends[1]) / change)
    if not error <= TOLERANCES[one.bits]:
        raise WrongResultError(f"{one.name}: error {error:.2g}, allowed {TOLERANCES[one.bits]:.2g}")
    return error


def check_paging(device: torch.device, state_bits: Any, elements: int = 3 * 2**24) -> dict[str, Any]:
    """Steps with a budget and without, compared bit for bit; what the device gave, and what the runtime says.

    Raises:
        WrongResultError: something is not as it must be.
    """
    numels, budget = [elements // 2, *[LORA] * 64, elements // 2 + 5], 64 * MIB
    found: dict[str, Any] = {"bits": state_bits}
    bits: list[list[Tensor]] = []
    for name, bytes_ in (("all on the device", None), ("budget", budget)):
        params = make(numels, device)
        torch.cuda.synchronize()
        before = torch.cuda.mem_get_info(device)[0]
        reserved = torch.cuda.memory_reserved(device)
        optimizer = ql.PagedAdamW(params, lr=RATE, weight_decay=DECAY, state_bits=state_bits, budget=bytes_)
        for _ in range(3):
            optimizer.step()
        torch.cuda.synchronize()
        more = torch.cuda.memory_reserved(device) - reserved  # PyTorch's own, for the scales of 8 bits
        given = before - torch.cuda.mem_get_info(device)[0] - more
        moments = [tensor for param in params for tensor in list(optimizer.state[param].values())[1:3]]
        known = [load_runtime().cudaPointerGetAttributes(tensor.data_ptr())[1] for tensor in moments]
        kinds = {one.type.name.removeprefix("cudaMemoryType").lower() for one in known}
        paging = optimizer.paging()
        found[name] = {
            "state_bytes": paging.state_bytes,
            "resident_bytes": paging.resident_bytes,
            "given_by_device": given,
            "read_over_link": paging.fetched,
            "pointers": sorted(kinds),
        }
        bits.append([tensor.detach().clone() for tensor in (*params, *moments)])
        if kinds != {"managed"}:
            raise WrongResultError(f"{name}: the state is {', '.join(sorted(kinds))} memory, not managed")
        if bytes_ is not None and not 0 < paging.resident_bytes <= bytes_ < paging.state_bytes:
            raise WrongResultError(f"{paging.resident_bytes:,} bytes are resident, {bytes_:,} may be")
        del optimizer, moments
    if not all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(*bits, strict=True)):
        raise WrongResultError("with a budget the results have other bits")
    return found


def ceilings(device: Device, nbytes: int = 2**28) -> Ceilings:
    """Measure them; the best of some runs counts, it is a bound."""
    where = device.device
    pinned = [torch.ones(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    there = [torch.ones(nbytes, dtype=torch.uint8, device=where) for _ in range(2)]
    streams = [torch.cuda.Stream(where) for _ in range(2)]

    def copy_in() -> None:
        with torch.cuda.stream(streams[0]):
            there[0].copy_(pinned[0], non_blocking=True)

    def copy_out() -> None:
        with torch.cuda.stream(streams[1]):
            pinned[1].copy_(there[1], non_blocking=True)

    runtime = Runtime(load_runtime())
    managed = [_managed(runtime, nbytes, where) for _ in range(2)]

    number = where.index or 0

    def prefetch(*moves: tuple[int, int]) -> None:
        """Of each one, which memory and to where, in turns."""
        for first in range(0, nbytes, 32 * MIB):
            size = min(32 * MIB, nbytes - first)
            for index, to in moves:
                runtime.prefetch(managed[index].data_ptr() + first, size, to, streams[index].cuda_stream)

    into, out = (0, number), (1, HOST)
    away, back = (0, HOST), (1, number)  # to where they begin
    return Ceilings(
        copy=_best(lambda: there[0].copy_(there[1]), 2 * nbytes),
        to_device=_best(copy_in, nbytes),
        to_host=_best(copy_out, nbytes),
        both=_best(lambda: (copy_in(), copy_out()), 2 * nbytes),
        prefetch_to_device=_best(partial(prefetch, into), nbytes, partial(prefetch, away)),
        prefetch_to_host=_best(partial(prefetch, out), nbytes, partial(prefetch, back)),
        prefetch_both=_best(partial(prefetch, into, out), 2 * nbytes, partial(prefetch, away, back)),
    )


def points(
    device: Device,
    limits: Ceilings | None,
    which: Sequence[Contender],
    sets: Mapping[str, Sequence[int]],
    seconds: float,
) -> Iterator[dict[str, Any]]:
    """Time a step of each optimizer on each set of parameters, in turns; a record each."""
    for title, numels in sets.items():
        params = make(numels, device.device)
        made = {one.name: one.make(params) for one in which}
        for optimizer in made.values():
            optimizer.step()
        timers: dict[str, Timer] = {
            name: device.clock.prepare([optimizer.step], graph=False) for name, optimizer in made.items()
        }
        times = interleave(timers, seconds)
        total = sum(numels)
        for one in which:
            bound = None
            if limits:
                traffic, rate = (OVER_LINK, limits.both) if one.away else (ON_DEVICE, limits.copy)
                bound = 1e-6 * traffic[one.bits] * total / rate
            ms = quantiles(times[one.name])
            ratios = {name: quantiles(some)["p50"] / ms["p50"] for name, some in times.items() if name != one.name}
            yield {
                "kind": "point",
                "set": title,
                "optimizer": one.name,
                "bits": one.bits,
                "away": one.away,
                "elements": total,
                "tensors": len(numels),
                "ms": ms,
                "reps": len(times[one.name]),
                "bound_ms": bound,
                "roofline_share": bound and bound / ms["p50"],
                "link_gb_per_s": 1e-6 * OVER_LINK[one.bits] * total / ms["p50"] if one.away else None,
                "ratios": ratios,
            }


def overlap(device: Device, elements: int = 2**26) -> dict[str, Any]:
    """Both directions of the link at once: reading all of a state in the host's memory, writing it, and updating it."""
    params = make([elements], device.device)
    optimizer = ql.PagedAdamW(params, lr=RATE, budget=SMALLEST)
    optimizer.step()
    moments = [optimizer.state[params[0]][name] for name in ("exp_avg", "exp_avg_sq")]
    copies = [torch.zeros_like(moment, device=device.device) for moment in moments]
    runs = {
        "read": lambda: [copy.copy_(moment) for copy, moment in zip(copies, moments, strict=True)],
        "write": lambda: [moment.copy_(copy) for copy, moment in zip(copies, moments, strict=True)],
        "update": optimizer.step,
    }
    runs["read"]()  # what is written is what was there
    times = interleave({name: device.clock.prepare([run], graph=False) for name, run in runs.items()}, SECONDS)
    return {"kind": "overlap", "elements": elements, **{name: quantiles(some) for name, some in times.items()}}


def run(device: Device, path: Path) -> None:
    """Everything; the records are in the file after every step."""
    from importlib.util import find_spec

    common = {**facts(device.name), "benchmark": "gpu-optimizer"}
    print(json.dumps(common), file=sys.stderr)
    records: list[dict[str, Any]] = []

    def keep(record: Mapping[str, Any]) -> None:
        records.append({**common, **record})
        write(records, path)
        print(json.dumps(record)[:300], file=sys.stderr)

    which = contenders(peer=find_spec("bitsandbytes") is not None)
    keep({"kind": "errors", **{one.name: check_contender(one, device.device) for one in which}})
    for bits in (32, 8):
        keep({"kind": "paging", **check_paging(device.device, bits)})
    limits = ceilings(device)
    keep({"kind": "ceilings", **asdict(limits)})
    keep(overlap(device))
    sets = {"one large": [ELEMENTS], "LoRA-sized": [LORA] * (ELEMENTS // LORA)}
    for record in points(device, limits, which, sets, SECONDS):
        keep(record)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything that can be run here, or show what was measured."""
    parser = argparse.ArgumentParser(description="Check and measure AdamW with state in unified memory.")
    parser.add_argument("--view", type=Path, metavar="FILE", help="show these records, measure nothing")
    args = parse(parser, arguments)
    if args.view:
        view(args.view, tables)
        return
    if not torch.cuda.is_available():
        print("no GPU was measured: torch.cuda.is_available() is False")
        return
    device = cuda_device()
    path = record_file(args.out, f"optimizer {device.name}")
    run(device, path)
    view(path, tables)


def _flat(params: Sequence[Parameter]) -> Tensor:
    return torch.cat([param.detach() for param in params]).double()


def _managed(runtime: Runtime, nbytes: int, device: torch.device) -> Tensor:
    """Managed memory on the host, zero, that its tensor frees."""
    from qloralab.optim.unified_memory import Allocation, as_tensor

    allocation = Allocation(runtime, nbytes, device.index or 0)
    memory = as_tensor(allocation, device)
    runtime.prefer(allocation.address, nbytes, HOST)
    runtime.map_into(allocation.address, nbytes, device.index or 0)
    memory.zero_()
    return memory


def _best(run: Callable[[], Any], nbytes: int, before: Callable[[], Any] | None = None, times: int = 5) -> float:
    """GB/s, from a device at rest to a device at rest."""
    seconds = []
    for _ in range(times):
        if before is not None:
            before()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 1e-9 * nbytes / min(seconds)


if __name__ == "__main__":
    main()
