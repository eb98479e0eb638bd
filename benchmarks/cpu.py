"""The CPU operators, beside bitsandbytes and PyTorch's dense layers: how long each takes, and what bounds it.

    python -m benchmarks.cpu                measure, write benchmarks/records/cpu-CLASS.json, show it
    python -m benchmarks.cpu --view         show every class again: tables on the terminal, a picture in cpu-CLASS.png
    python -m benchmarks.cpu --view avx2    one of them
    python -m benchmarks.cpu --provider module:NAME     a function of yours besides, see ``provider.py``

A class lower than the processor's own is measured with variables, see ``record.py``.

A point is an operation on a weight of [N, K], for products with M rows of input. All providers of a point take turns in
one process (``clock.py``), after each has passed the check of its result (``case.py``); one that fails is not timed.
Each rotates over copies of its weight that fill the last-level cache twice, so that a product with one row reads
memory, not cache.

**Memory.** A dequantized weight is new memory at every call. glibc returns a block of more than 32 MiB to the system
when it is freed, and the next one is cleared page by page on first touch, which takes longer than the dequantization.
So the points are measured twice, each time in a process of its own: ``recycled``, where freed memory is kept for the
next call, is the operation itself; ``fresh``, where glibc does as it does by default, is what a program sees that
dequantizes a large weight and drops it. What writes no such block is the same in both.

**Roofline.** The same process measures the rate of a large copy and of a large product, in float32 and, where that is
in hardware, in bfloat16. ``bound_ms`` of a record is the time that its least traffic takes at the one or its arithmetic
at the other, whichever is longer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qloralab.kernels.report import implementations
from qloralab.nf4.processor import processor_class

from .case import Case, Weight
from .clock import host, interleave
from .cpu_providers import COMPUTE, DROPOUT, EMULATED, PROVIDERS
from .cpu_views import plot, tables
from .provider import Provider, compare, from_user
from .record import lower_mkl, parse, provenance, record_file, record_files, write
from .view import show

SHAPES = ((4096, 4096), (11008, 4096))  # [N, K]: attention and MLP of a model with 7 billion weights
POINTS = [
    ("dequantize", None),
    ("quantize", None),
    *(("linear", M) for M in (1, 4, 16, 128, 512)),
    *((operation, M) for operation in ("input gradient", "adapted layer") for M in (128, 512)),
]
MEMORY = {
    "recycled": {"GLIBC_TUNABLES": f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**40}"},
    "fresh": {},
}
HEAP = 2**30
WIDTH = 200  # of the tables, where the terminal says less or is none
SECONDS = 1.0  # a provider and point
OPERATORS = {
    "dequantize": "dequantize",
    "quantize": "quantize_blockwise",
    "linear": "linear",
    "input gradient": "linear_grad_input",
    "adapted layer": "adapted_linear",
}


@dataclass(frozen=True)
class Roofline:
    """What this machine can do at most.

    Attributes:
        copy_gb_per_s: bytes read plus bytes written by a copy of 256 MiB, 10**9 a second.
        float32_gflop_per_s: a product [512, 4096] x [4096, 4096], 10**9 floating-point operations a second.
        bfloat16_gflop_per_s: the same in bfloat16; None where PyTorch would emulate it.
    """

    copy_gb_per_s: float
    float32_gflop_per_s: float
    bfloat16_gflop_per_s: float | None

    def bound_ms(self, nbytes: int, flops: int, dtype: torch.dtype) -> float:
        """The least time for this much traffic and arithmetic, in milliseconds. bfloat16 that is not multiplied in
        hardware is multiplied in float32."""
        wanted = self.bfloat16_gflop_per_s if dtype == torch.bfloat16 else None
        return 1e-6 * max(nbytes / self.copy_gb_per_s, flops / (wanted or self.float32_gflop_per_s))


def roofline(nbytes: int = 2**28, shape: tuple[int, int, int] = (512, 4096, 4096), seconds: float = 1.0) -> Roofline:
    """Measure the rates, with a copy of so many bytes and products of (M, N, K); the best sample counts, it is a
    bound."""
    M, N, K = shape
    source = torch.ones(nbytes, dtype=torch.uint8)  # zeros would all be one page of the kernel's
    target = torch.empty_like(source)
    timers = {"copy": host([lambda: target.copy_(source)])}
    for name in ("float32",) if EMULATED else ("float32", "bfloat16"):
        x, weight = (torch.randn(size).to(getattr(torch, name)) for size in ((M, K), (N, K)))
        timers[name] = host([partial(torch.nn.functional.linear, x, weight)])
    least = {name: min(times) for name, times in interleave(timers, seconds).items()}
    rates = {name: 1e-6 * 2 * M * N * K / ms for name, ms in least.items()}
    return Roofline(1e-6 * 2 * nbytes / least["copy"], rates["float32"], rates.get("bfloat16"))


def measure(
    shapes: Sequence[tuple[int, int]],
    points: Sequence[tuple[str, int | None]],
    limits: Roofline,
    providers: Sequence[Provider] = PROVIDERS,
    seconds: float = SECONDS,
    heap: int = 0,
    **fields: Any,
) -> Iterator[dict[str, Any]]:
    """Time every provider at every point.

    Args:
        shapes: [N, K] of the weights.
        points: operation, and M where it has one.
        limits: of this machine.
        providers: to compare.
        seconds: a provider and point.
        heap: bytes to touch and free before each point. Where freed memory is kept, glibc would otherwise hand out new
            memory for the first calls, a bit further each time, although the last one is free again.
        fields: that every record gets besides.

    Yields:
        a record for each provider and point; ``ms`` is None where it was not timed: ``wrong`` says why its result was
        refused, ``skipped`` why it was not asked for one.
    """
    common = {"benchmark": "cpu", **fields, "roofline": vars(limits), **provenance()}
    served = {row["operator"]: row["implementation"] for row in implementations()}
    for shape in shapes:
        weight = Weight(shape)
        for operation, M in points:
            able = [provider for provider in providers if provider.does(operation, M)]
            dtypes = {one.name: one.dtype if M else torch.bfloat16 for one in able}
            made = {dtype: Case(operation, weight, M, dtype, DROPOUT) for dtype in dtypes.values()}
            cases = {name: made[dtype] for name, dtype in dtypes.items()}
            touch = partial(torch.ones, heap, dtype=torch.uint8)
            outcomes = compare(cases, able, host, touch, seconds=seconds)
            for one in able:
                if outcome := outcomes.get(one.name):
                    case = cases[one.name]
                    least = case.least(one.dense)
                    record = {
                        "operation": operation,
                        "shape": list(shape),
                        "M": M,
                        "provider": one.name,
                        "dtype": str(case.dtype).removeprefix("torch."),
                        "error": outcome.error,
                        "wrong": outcome.why if outcome.status in ("wrong", "failed") else None,
                        "skipped": outcome.why if outcome.status == "skipped" else None,
                        "ms": outcome.ms,
                        "reps": len(outcome.samples),
                        "bound_ms": limits.bound_ms(least.nbytes, least.flops, case.dtype),
                    }
                    if one.name.startswith("ours"):
                        record["implementation"] = served[OPERATORS[operation]]
                    if outcome.copies:
                        record["copies"] = outcome.copies
                    yield {**common, **record}


def view(out: Path, asked: str) -> None:
    """Show the records in a folder, of a class or of all: tables on the terminal, the picture beside them."""
    for file in record_files(out, "cpu", asked):
        records = json.loads(file.read_text())
        show(tables(records), WIDTH)
        plot(records, file.with_suffix(".png"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure in a process for each kind of memory, write the records, show them."""
    parser = argparse.ArgumentParser(description="The CPU operators beside bitsandbytes and PyTorch's dense layers.")
    parser.add_argument("--view", nargs="?", const="all", metavar="CLASS", help="show the records, measure nothing")
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("N", "K"), help="may be repeated")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="a provider and point")
    parser.add_argument("--provider", action="append", metavar="MODULE:NAME", help="a function of yours besides")
    parser.add_argument("--worker", choices=MEMORY, help=argparse.SUPPRESS)
    args = parse(parser, arguments)
    mine = [from_user(name, dtype=COMPUTE) for name in args.provider or ()]
    if args.worker:
        shapes = [(N, K) for N, K in args.shape or SHAPES]
        options = {"seconds": args.seconds, "heap": HEAP, "memory": args.worker}
        for record in measure(shapes, POINTS, roofline(), [*PROVIDERS, *mine], **options):
            print(json.dumps(record), flush=True)
        return
    if not args.view:
        lower_mkl()
        command = [sys.executable, "-m", "benchmarks.cpu", *(arguments if arguments is not None else sys.argv[1:])]
        records = [record for memory in MEMORY for record in _worker([*command, "--worker", memory], memory)]
        write(records, record_file(args.out, "cpu"))
    view(args.out, args.view or processor_class())


def _worker(command: list[str], memory: str) -> Iterator[dict[str, Any]]:
    """The records of a process with this kind of memory, as they come; a line each on stderr."""
    with subprocess.Popen(command, env={**os.environ, **MEMORY[memory]}, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            record = json.loads(line)
            N, K = record["shape"]
            rows = f" M={record['M']}" if record["M"] else ""
            time = record["wrong"] or record["skipped"] or f"{record['ms']['p50']:.2f} ms"
            print(f"{memory} {record['operation']} {N}x{K}{rows} {record['provider']}: {time}", file=sys.stderr)
            yield record
    if process.returncode:
        raise SystemExit(f"the measurement ended with code {process.returncode}")


if __name__ == "__main__":
    main()
