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

**Rooflines.** On the device an update moves what ``adamw.py`` says, at the rate of the copy. State in the host's memory
crosses the link both ways: 16 bytes an element, or 4, at the rate of both directions at once. Parameters are float32,
as those of adapters are: with bfloat16 PyTorch's AdamW keeps moments in bfloat16 too, and does less.

All managed memory that is asked for is less than the device has free.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import qloralab as ql
from qloralab.optim.unified_memory import HOST, Allocation, Runtime, as_tensor, load_runtime

from . import adamw
from .adamw import BYTES, DECAY, RATE, SMALLEST, Contender, make, ours, torch_fused
from .case import WrongResultError
from .clock import interleave, quantiles
from .gpu_device import Device, cuda_device, state
from .record import gpu_provenance, gpu_record_file, parse, write
from .view import Record, grid, p50, show

MIB = 2**20
LORA = adamw.LORA[0]
ELEMENTS = 2**26  # of each set
SECONDS = 0.5  # of samples, an optimizer and a set
LIMITS: dict[str, Any] = {"fewest": 5, "most": 60}
OVER_LINK = {32: 16.0, 8: 4.0}  # bytes an element
WIDTH = 200


def contenders(peer: bool = True, away: bool = True) -> list[Contender]:
    """Who takes part: bitsandbytes too, and ours with the smallest budget too."""
    found = [torch_fused(), ours("ours", 32), ours("ours, 8 bits", 8)]
    if peer:
        found += adamw.bitsandbytes("bitsandbytes paged", 1e-4)
    if away:
        found += [ours("ours, on the host", 32, SMALLEST, away=True)]
        found += [ours("ours, on the host, 8 bits", 8, SMALLEST, away=True)]
    return found


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


def ceilings(device: torch.device, nbytes: int = 2**28) -> dict[str, float]:
    """GB/s of this run, 10**9 bytes, the best of some runs: it is a bound. Both directions of a pair are counted.

    Returns:
        copy: on the device, read and written; to_device, to_host, both: from and to pinned memory; the same with
        prefetch before it: of managed memory, 32 MiB at a time.
    """
    pinned = [torch.ones(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    there = [torch.ones(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream(device) for _ in range(2)]

    def copy_in() -> None:
        with torch.cuda.stream(streams[0]):
            there[0].copy_(pinned[0], non_blocking=True)

    def copy_out() -> None:
        with torch.cuda.stream(streams[1]):
            pinned[1].copy_(there[1], non_blocking=True)

    runtime = Runtime(load_runtime())
    managed = [_managed(runtime, nbytes, device) for _ in range(2)]
    number = device.index or 0

    def prefetch(*moves: tuple[int, int]) -> None:
        """Move memory, each by its index and to where it goes, in turns."""
        for first in range(0, nbytes, 32 * MIB):
            size = min(32 * MIB, nbytes - first)
            for index, to in moves:
                runtime.prefetch(managed[index].data_ptr() + first, size, to, streams[index].cuda_stream)

    into, out = (0, number), (1, HOST)
    away, back = (0, HOST), (1, number)  # to where they begin
    return {
        "copy": _best(lambda: there[0].copy_(there[1]), 2 * nbytes),
        "to_device": _best(copy_in, nbytes),
        "to_host": _best(copy_out, nbytes),
        "both": _best(lambda: (copy_in(), copy_out()), 2 * nbytes),
        "prefetch_to_device": _best(partial(prefetch, into), nbytes, partial(prefetch, away)),
        "prefetch_to_host": _best(partial(prefetch, out), nbytes, partial(prefetch, back)),
        "prefetch_both": _best(partial(prefetch, into, out), 2 * nbytes, partial(prefetch, away, back)),
    }


def points(
    device: Device,
    limits: Mapping[str, float] | None,
    which: Sequence[Contender],
    sets: Mapping[str, Sequence[int]],
    seconds: float,
) -> Iterator[dict[str, Any]]:
    """Time a step of each optimizer on each set of parameters, in turns; a record each."""
    for title, numels in sets.items():
        times, _ = adamw.steps(which, make(numels, device.device), device.prepare, seconds=seconds, **LIMITS)
        total, middle = sum(numels), {name: quantiles(some)["p50"] for name, some in times.items()}
        for one in which:
            bytes_, rate = (OVER_LINK, "both") if one.away else (BYTES, "copy")
            bound: Any
            bound, ms = limits and 1e-6 * bytes_[one.bits] * total / limits[rate], middle[one.name]
            yield {
                "kind": "point",
                "set": title,
                "optimizer": one.name,
                "bits": one.bits,
                "away": one.away,
                "elements": total,
                "tensors": len(numels),
                "ms": quantiles(times[one.name]),
                "reps": len(times[one.name]),
                "bound_ms": bound,
                "roofline_share": bound and bound / ms,
                "link_gb_per_s": 1e-6 * OVER_LINK[one.bits] * total / ms if one.away else None,
                "ratios": {name: other / ms for name, other in middle.items() if name != one.name},
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
    times = interleave({name: device.prepare([run], False) for name, run in runs.items()}, SECONDS, **LIMITS)
    return {"kind": "overlap", "elements": elements, **{name: quantiles(some) for name, some in times.items()}}


def run(device: Device, path: Path) -> list[dict[str, Any]]:
    """Everything; the records, which are in the file after every step."""
    common = gpu_provenance("gpu-optimizer", device.name)
    print(json.dumps(common), file=sys.stderr)
    records: list[dict[str, Any]] = []

    def keep(record: Mapping[str, Any]) -> None:
        records.append({**common, **record})
        write(records, path)
        print(json.dumps(record)[:300], file=sys.stderr)

    which = contenders(peer=find_spec("bitsandbytes") is not None)
    keep({"kind": "errors", **{one.name: one.check(device.device) for one in which}})
    for bits in (32, 8):
        keep({"kind": "paging", **check_paging(device.device, bits)})
    limits = ceilings(device.device)
    keep({"kind": "ceilings", **limits})
    keep(overlap(device))
    keep({"kind": "state", "when": "before", **state(device)})
    sets = {"one large": [ELEMENTS], "LoRA-sized": [LORA] * (ELEMENTS // LORA)}
    for record in points(device, limits, which, sets, SECONDS):
        keep(record)
    keep({"kind": "state", "when": "after", **state(device)})
    return records


def tables(records: Sequence[Record]) -> Iterator[Table]:
    """The steps; beneath, the ceilings, the overlap and the budgets."""
    first, lines = records[0], []
    for record in records:
        if record["kind"] == "ceilings":
            lines += [
                "GB/s: copy on the device {copy:,.0f}; pinned memory to the device {to_device:.0f}, to the host "
                "{to_host:.0f}, both {both:.0f}; managed memory by prefetch to the device {prefetch_to_device:.0f}, "
                "to the host {prefetch_to_host:.1f}, both {prefetch_both:.0f}".format(**record)
            ]
        elif record["kind"] == "overlap":
            read, written, updated = (record[name]["p50"] for name in ("read", "write", "update"))
            lines += [f"state on the host, ms: read {read:.1f}, written {written:.1f}, updated {updated:.1f}"]
        elif record["kind"] == "paging":
            some = record["budget"]
            lines += [
                f"{record['bits']} bits, budget: {some['state_bytes'] / 1e6:.0f} MB of state, "
                f"{some['resident_bytes'] / 1e6:.0f} resident; the device gave {some['given_by_device'] / 1e6:.0f}; "
                f"{', '.join(some['pointers'])} memory; bits as without"
            ]

    def row(record: Record) -> list[str]:
        peer = "bitsandbytes paged" + ("" if record["bits"] == 32 else ", 8 bits")
        return [
            f"{record['set']}, {record['elements'] / 1e6:.0f} M in {record['tensors']:,}",
            record["optimizer"],
            "host" if record["away"] else "device",
            f"{p50(record):.3f}",
            f"{record['roofline_share']:.0%}" if record["roofline_share"] else "",
            f"{record['link_gb_per_s']:.0f}" if record["link_gb_per_s"] else "",
            *(f"{record['ratios'][name]:.2f}" if name in record["ratios"] else "" for name in ("torch fused", peer)),
        ]

    yield grid(
        ("set", "optimizer", "state", "median ms", "bound", "link GB/s", "torch/this", "bnb/this"),
        [row(record) for record in records if record["kind"] == "point"],
        left=("set", "optimizer", "state"),
        title=f"{first['device']}, commit {first['commit']}: a step of AdamW",
        caption="\n".join(sorted(lines, key=lambda line: (not line.startswith("GB/s"), not line.startswith("state")))),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything that can be run here, or show what was measured."""
    parser = argparse.ArgumentParser(description="Check and measure AdamW with state in unified memory.")
    parser.add_argument("--view", type=Path, metavar="FILE", help="show these records, measure nothing")
    args = parse(parser, arguments)
    if args.view:
        show(tables(json.loads(args.view.read_text())), WIDTH)
        return
    if not torch.cuda.is_available():
        print("no GPU was measured: torch.cuda.is_available() is False")
        return
    device = cuda_device()
    show(tables(run(device, gpu_record_file(args.out, f"optimizer {device.name}"))), WIDTH)


def _managed(runtime: Runtime, nbytes: int, device: torch.device) -> Tensor:
    """Managed memory on the host, zero, that its tensor frees."""
    allocation = Allocation(runtime, nbytes, device.index or 0)
    memory = as_tensor(allocation, device)
    runtime.prefer(allocation.address, nbytes, HOST)
    runtime.map_into(allocation.address, nbytes, device.index or 0)
    return memory.zero_()


def _best(run: Callable[[], Any], nbytes: int, before: Callable[[], Any] = lambda: None, times: int = 5) -> float:
    """GB/s, from a device at rest to a device at rest."""
    seconds = []
    for _ in range(times):
        before()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 1e-9 * nbytes / min(seconds)


if __name__ == "__main__":
    main()
