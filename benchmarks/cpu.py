"""The CPU operators, beside bitsandbytes and PyTorch's bfloat16: how long each takes, and what bounds it.

    python -m benchmarks.cpu            measure, write benchmarks/records/cpu.json, show it
    python -m benchmarks.cpu --view     show it again: tables on the terminal, a picture in cpu.png

A point is an operation on a weight of [N, K], for products with M rows of input. All providers of a point take turns in
one process (``benchmarks/timing.py``), after each has passed the check of its result (``benchmarks/cpu_check.py``);
one that fails is not timed. Each rotates over copies of its weight that fill the last-level cache twice, so that a
product with one row reads memory, not cache.

**Memory.** A dequantized weight is new memory at every call. glibc returns a block of more than 32 MiB to the system
when it is freed, and the next one is cleared page by page on first touch, which takes longer than the dequantization.
So the points are measured twice, each time in a process of its own: ``recycled``, where freed memory is kept for the
next call, is the operation itself; ``fresh``, where glibc does as it does by default, is what a program sees that
dequantizes a large weight and drops it. What writes no such block is the same in both.

**Roofline.** The same process measures the rate of a large copy and of a large bfloat16 product. ``bound_ms`` of a
record is the time that its least traffic takes at the one or its arithmetic at the other, whichever is longer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.cpu_check import WrongResultError, check
from benchmarks.cpu_problem import Problem, Weight
from benchmarks.cpu_providers import PROVIDERS, Provider
from benchmarks.cpu_views import plot, tables
from benchmarks.provenance import RECORDS, provenance
from benchmarks.timing import interleave, quantiles
from qloralab.kernels import dispatch

SHAPES = ((4096, 4096), (11008, 4096))  # [N, K]: attention and MLP of a model with 7 billion weights
POINTS = [
    ("dequantize", None),
    ("quantize", None),
    *(("linear", M) for M in (1, 4, 16, 128, 512)),
    *(("input gradient", M) for M in (128, 512)),
]
MEMORY = {
    "recycled": {"GLIBC_TUNABLES": f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**40}"},
    "fresh": {},
}
HEAP = 2**30
WIDTH = 132  # of the tables, where the terminal says less or is none
SECONDS = 1.0  # a provider and point
OPERATORS = {
    "dequantize": "dequantize",
    "quantize": "quantize_blockwise",
    "linear": "linear",
    "input gradient": "linear_grad_input",
}


@dataclass(frozen=True)
class Roofline:
    """What this machine can do at most.

    Attributes:
        copy_gb_per_s: bytes read plus bytes written by a copy of 256 MiB, 10**9 a second.
        gemm_gflop_per_s: a bfloat16 product [512, 4096] x [4096, 4096], 10**9 floating-point operations a second.
    """

    copy_gb_per_s: float
    gemm_gflop_per_s: float

    def bound_ms(self, nbytes: int, flops: int) -> float:
        """The least time for this much traffic and arithmetic, in milliseconds."""
        return 1e-6 * max(nbytes / self.copy_gb_per_s, flops / self.gemm_gflop_per_s)


def roofline(nbytes: int = 2**28, shape: tuple[int, int, int] = (512, 4096, 4096), seconds: float = 1.0) -> Roofline:
    """Measure the rates; the best repetition counts, it is a bound.

    Args:
        nbytes: of the copy.
        shape: (M, N, K) of the product.
        seconds: for each of the two.
    """
    M, N, K = shape
    source = torch.ones(nbytes, dtype=torch.uint8)  # zeros would all be one page of the kernel's
    target = torch.empty_like(source)
    x, weight = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16()
    times = interleave(
        {"copy": [lambda: target.copy_(source)], "gemm": [lambda: torch.nn.functional.linear(x, weight)]}, seconds
    )
    return Roofline(1e-6 * 2 * nbytes / min(times["copy"]), 1e-6 * 2 * M * N * K / min(times["gemm"]))


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
            memory for the first calls, a place further each, although the last one is free again.
        fields: that every record gets besides.

    Yields:
        a record for each provider and point; ``ms`` is None and ``wrong`` says why when its result was refused.
    """
    common = {"benchmark": "cpu", **fields, "roofline": vars(limits), **provenance()}
    served = {row["operator"]: row["implementation"] for row in dispatch.report()}
    for shape in shapes:
        weight = Weight(shape)
        for operation, M in points:
            problem = Problem(operation, weight, M)
            runs, results = {}, {}
            for provider in providers:
                if operation not in provider.operations:
                    continue
                contender = provider.runs(problem)
                result = {"provider": provider.name, "error": None, "wrong": None, "ms": None, "reps": 0}
                result["bound_ms"] = limits.bound_ms(*problem.work(provider.dense))
                if provider.name == "ours":
                    result["implementation"] = served[OPERATORS[operation]]
                results[provider.name] = result
                try:
                    result["error"] = check(problem, provider, contender[0]())
                except WrongResultError as error:
                    result["wrong"] = str(error)
                else:
                    result["copies"] = len(contender)
                    runs[provider.name] = contender
            torch.ones(heap, dtype=torch.uint8)
            fewest = {provider.name: provider.fewest for provider in providers}
            for name, times in interleave(runs, seconds, fewest).items():
                results[name] |= {"ms": quantiles(times), "reps": len(times)}
            for result in results.values():
                yield {**common, "operation": operation, "shape": list(shape), "M": M, **result}


def write(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the records as a JSON list, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")


def view(out: Path) -> None:
    """Show the records in a folder: tables on the terminal, the picture beside them."""
    records = json.loads((out / "cpu.json").read_text())
    console = Console()
    console.width = max(console.width, WIDTH)
    for table in tables(records):
        console.print(table)
    plot(records, out / "cpu.png")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure in a process for each kind of memory, write the records, show them."""
    parser = argparse.ArgumentParser(description="The CPU operators beside bitsandbytes and PyTorch's bfloat16.")
    parser.add_argument("--view", action="store_true", help="show the records, measure nothing")
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder of the records")
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("N", "K"), help="may be repeated")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="a provider and point")
    parser.add_argument("--worker", choices=MEMORY, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        shapes = [(N, K) for N, K in args.shape or SHAPES]
        for record in measure(shapes, POINTS, roofline(), seconds=args.seconds, heap=HEAP, memory=args.worker):
            print(json.dumps(record), flush=True)
        return
    if not args.view:
        command = [sys.executable, "-m", "benchmarks.cpu", "--seconds", str(args.seconds)]
        command += [word for shape in args.shape or () for word in ("--shape", *map(str, shape))]
        write([r for memory in MEMORY for r in _worker([*command, "--worker", memory], memory)], args.out / "cpu.json")
    view(args.out)


def _worker(command: list[str], memory: str) -> Iterator[dict[str, Any]]:
    """The records of a process with this kind of memory, as they come; a line each on stderr."""
    environment = {**os.environ, **MEMORY[memory]}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            record = json.loads(line)
            N, K = record["shape"]
            rows = f" M={record['M']}" if record["M"] else ""
            time = record["wrong"] or f"{record['ms']['p50']:.2f} ms"
            print(f"{memory} {record['operation']} {N}x{K}{rows} {record['provider']}: {time}", file=sys.stderr)
            yield record
    if process.returncode:
        raise SystemExit(f"the measurement ended with code {process.returncode}")


if __name__ == "__main__":
    main()
