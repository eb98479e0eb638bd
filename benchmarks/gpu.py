"""The one command for a machine with an NVIDIA GPU: is everything right on it, and how fast is it.

    python -m benchmarks.gpu            under eight minutes, no network; benchmarks/records/gpu-<device>.json
    python -m benchmarks.gpu --view benchmarks/records/gpu-<device>.json      show it again
    python -m benchmarks.gpu --save     and print what belongs into the table of kernels/gpu/choice.py

In this order, in one process: the facts (device, driver, versions); the canaries (``gpu_canaries.py``); the ceilings
of this run, a copy and a bfloat16 product; the points, each provider checked before it is timed; one table.

A provider that fails at a point is a record that says why, and the rest goes on. What would not fit into the memory
that is free is skipped, and so is what comes after the deadline. After an error that ends the CUDA context nothing more
can be measured; what was measured until then is written and shown. Records are written after every point.

Without a GPU the command says so in one line and exits with 0.

**Roofline.** ``bound_ms`` of a record is the time that the least traffic takes at the rate of the copy, or the
arithmetic at that of the product, whichever is longer; ``roofline_share`` is that over the median. A copy of a large
buffer and a large product are what a device reaches, not what its data sheet says, so a share can pass 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from benchmarks.gpu_canaries import Canary, canaries, verdict
from benchmarks.gpu_problem import Problem, Weight, WrongResultError
from benchmarks.gpu_providers import PROVIDERS, Provider
from benchmarks.gpu_timing import Clock, CudaClock, Timer, interleave
from benchmarks.gpu_views import points as by_point
from benchmarks.gpu_views import tables, with_ratios
from benchmarks.provenance import commit, parse
from benchmarks.timing import quantiles
from qloralab.kernels.gpu import choice

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # [N, K]: attention and MLP of a model with 8 billion weights
ROWS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
POINTS: list[tuple[str, int | None]] = [
    ("dequantize", None),
    ("quantize", None),
    *(("linear", M) for M in ROWS),
    *(("input gradient", M) for M in ROWS),
    *(("adapted layer", M) for M in (1024, 4096)),
    *(("adapted layer, eager", M) for M in (1024, 4096)),
]
SECONDS = 0.12  # of samples, a provider and point
BUDGET = 450.0  # seconds in all
ROOM = 0.9  # of the free memory
PACKAGES = ("torch", "triton", "bitsandbytes", "unsloth", "transformers", "peft")
DIRECTIONS = ("linear", "input gradient")
PROVIDER_KERNELS = {"ours, fused": "fused", "ours": "two-pass"}
WIDTH = 200  # of the tables, where the terminal says less or is none


@dataclass(frozen=True)
class Limits:
    """What a device can do at most.

    Attributes:
        copy_gb_per_s: bytes read plus bytes written by a large copy, 10**9 a second.
        gemm_tflop_per_s: a large bfloat16 product, 10**12 floating-point operations a second.
    """

    copy_gb_per_s: float
    gemm_tflop_per_s: float


@dataclass(frozen=True)
class Device:
    """What is measured on.

    Attributes:
        device: for torch.
        name: of the hardware.
        cache: bytes of its last-level cache.
        clock: that times there.
        free: bytes of memory that can be had now.
    """

    device: torch.device
    name: str
    cache: int
    clock: Clock
    free: Callable[[], int]

    def synchronize(self) -> None:
        """Wait; raises what a kernel of before has done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Deadline:
    """A moment after which nothing new begins.

    Attributes:
        at: on the clock of ``time.monotonic``.
    """

    at: float

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return time.monotonic() >= self.at


def cuda_device() -> Device:
    """The current GPU."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    device = torch.device("cuda", torch.cuda.current_device())

    def free() -> int:
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused

    return Device(device, properties.name, properties.L2_cache_size, CudaClock(), free)


def facts(name: str) -> dict[str, Any]:
    """The fields that every record carries: device, versions, commit."""
    return {"benchmark": "gpu", "device": name, "versions": library_versions(), "commit": commit()}


def library_versions() -> dict[str, str]:
    """Of what is installed, and of CUDA and the driver where there is one."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if driver := _driver():
        found["driver"] = driver
    return found


def _driver() -> str | None:
    """The version of the NVIDIA kernel module, as Linux has it."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", text)
    return found[1] if found else None


def check(
    device: Device, common: Mapping[str, Any], which: Sequence[Canary], deadline: Deadline
) -> Iterator[dict[str, Any]]:
    """A record for each canary; ``wrong`` is None where it holds."""
    for canary in which:
        wrong = "the time was up" if deadline.passed else verdict(canary, device.device)
        yield {**common, "kind": "canary", "name": canary.name, "wrong": wrong}


def ceilings(
    device: Device, nbytes: int = 2**30, shape: tuple[int, int, int] = (8192, 8192, 8192), seconds: float = 0.5
) -> Limits:
    """Measure the rates of a copy and of a bfloat16 product; the best sample counts, it is a bound.

    Args:
        device: to measure.
        nbytes: of the copy.
        shape: (M, N, K) of the product.
        seconds: for each.
    """
    M, N, K = shape
    nbytes = min(nbytes, int(device.free() * ROOM) // 4)
    source = torch.ones(nbytes, dtype=torch.uint8, device=device.device)
    target = torch.empty_like(source)
    x, weight = (torch.randn(rows, K, device=device.device).bfloat16() for rows in (M, N))
    timers = {
        "copy": device.clock.prepare([lambda: target.copy_(source)], graph=True),
        "gemm": device.clock.prepare([lambda: F.linear(x, weight)], graph=True),
    }
    times = interleave(timers, seconds)
    return Limits(1e-6 * 2 * nbytes / min(times["copy"]), 1e-9 * 2 * M * N * K / min(times["gemm"]))


def measure(
    device: Device,
    common: Mapping[str, Any],
    limits: Limits | None,
    deadline: Deadline,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    points: Sequence[tuple[str, int | None]] = POINTS,
    providers: Sequence[Provider] = PROVIDERS,
    seconds: float = SECONDS,
) -> Iterator[list[dict[str, Any]]]:
    """Time every provider at every point.

    Args:
        device: to measure on.
        common: fields of every record.
        limits: of this device, or None where they could not be measured.
        deadline: after which points are skipped.
        shapes: [N, K] of the weights.
        points: operation, and M where it has one.
        providers: to compare.
        seconds: a provider and point.

    Yields:
        the records of a point: ``status`` is ok, wrong, failed, skipped or missing, ``why`` says more, and ``ms`` is
        None unless it is ok.
    """
    missing = {provider.name: provider.missing() for provider in providers}
    lost: str | None = None  # why nothing more can be measured
    for shape in shapes:
        weight: Weight | None = None
        for operation, M in points:
            able = [provider for provider in providers if provider.does(operation, M)]
            head = {**common, "kind": "point", "operation": operation, "shape": list(shape), "M": M}
            why = lost or ("the time was up" if deadline.passed else None)
            problem = None
            if why is None:
                try:
                    weight = weight or _weight(shape, device)
                    problem = Problem(operation, weight, M)
                    why = _too_large(problem, len(able), device)
                except Exception as error:
                    why = _text(error)
                    lost = _lost(device)
            if problem is None or why:
                yield [_record(head, one, limits, None, "skipped", why) for one in able]
                continue
            results = {one.name: _prepare(problem, one, missing[one.name], device) for one in able}
            timers = {name: result for name, result in results.items() if isinstance(result, Prepared)}
            samples: dict[str, list[float]] = {}
            try:
                samples = interleave({name: prepared.timer for name, prepared in timers.items()}, seconds)
            except Exception as error:
                results |= dict.fromkeys(timers, ("failed", _text(error)))
            records = []
            for one in able:
                result = results[one.name]
                if isinstance(result, Prepared):
                    more = {"ms": quantiles(samples[one.name]), "reps": len(samples[one.name]), **result.fields}
                    records.append(_record(head, one, limits, problem, "ok", None, **more))
                else:
                    records.append(_record(head, one, limits, problem, *result))
            timers.clear()
            results.clear()  # the graphs hold memory
            lost = _lost(device)
            yield with_ratios(records)


@dataclass(frozen=True)
class Prepared:
    """A provider that gave a right result and can be timed.

    Attributes:
        timer: of it.
        fields: of its record.
    """

    timer: Timer
    fields: Mapping[str, Any]


def _weight(shape: tuple[int, int], device: Device) -> Weight:
    """Raises MemoryError where making it would not fit."""
    need, free = 40 * shape[0] * shape[1], device.free()
    if need > ROOM * free:
        raise MemoryError(f"a weight needs {need / 1e9:.1f} GB to make, {free / 1e9:.1f} are free")
    return Weight(shape, device.device, device.cache)


def _too_large(problem: Problem, providers: int, device: Device) -> str | None:
    need, free = problem.memory(providers), device.free()
    return f"it needs {need / 1e9:.1f} GB, {free / 1e9:.1f} are free" if need > ROOM * free else None


def _prepare(problem: Problem, provider: Provider, missing: str | None, device: Device) -> Prepared | tuple[str, str]:
    """Check and warm up, or (status, why)."""
    if missing:
        return "missing", missing
    try:
        with torch.no_grad():
            runs = provider.runs(problem)
            error = provider.check(problem, runs[0]())
            timer = device.clock.prepare(runs, provider.graph and not problem.eager)
    except WrongResultError as wrong:
        return "wrong", str(wrong)
    except Exception as failure:
        return "failed", _text(failure)
    return Prepared(timer, {"error": error, "timing": timer.kind, "note": timer.note, "copies": len(runs)})


def _record(
    head: Mapping[str, Any],
    provider: Provider,
    limits: Limits | None,
    problem: Problem | None,
    status: str,
    why: str | None,
    **fields: Any,
) -> dict[str, Any]:
    bound = None
    if problem and limits:
        nbytes, flops = problem.work(provider.dense)
        bound = max(1e-6 * nbytes / limits.copy_gb_per_s, 1e-9 * flops / limits.gemm_tflop_per_s)
    empty = {"ms": None, "reps": 0, "error": None, "timing": None, "note": None, "copies": None, "ratios": {}}
    record = {**head, "provider": provider.name, "status": status, "why": why, **empty, **fields}
    share = bound / record["ms"]["p50"] if bound and record["ms"] else None
    return {**record, "roofline": limits and asdict(limits), "bound_ms": bound, "roofline_share": share}


def _lost(device: Device) -> str | None:
    """Why nothing more can run on the device, or None."""
    try:
        device.synchronize()
    except Exception as error:
        return f"the device was lost: {_text(error)}"
    return None


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def fused_up_to(records: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int], int]:
    """A row of ``choice.FUSED_UP_TO``: by [N, K] the most tokens up to which the fused products took less time than the
    two-pass ones, the sum of both directions; 0 where they never did. Weights not timed both ways are left out.
    """
    times: dict[tuple[int, int], dict[int, list[tuple[str, float]]]] = {}
    for point in by_point(records):
        for name, kernel in PROVIDER_KERNELS.items():
            record = point.get(name)
            if record and record["ms"] and record["operation"] in DIRECTIONS:
                by_tokens = times.setdefault(tuple(record["shape"]), {})
                by_tokens.setdefault(record["M"], []).append((kernel, record["ms"]["p50"]))
    rows = {}
    for shape, by_tokens in times.items():
        for M, found in sorted(by_tokens.items()):
            if len(found) == 4:  # both kernels, both directions
                fused, two_pass = (sum(ms for one, ms in found if one == kernel) for kernel in choice.KERNELS)
                rows.setdefault(shape, 0)
                if fused >= two_pass:
                    break
                rows[shape] = M
    return rows


def record_file(folder: Path, name: str) -> Path:
    """Where the records of a device go: gpu-nvidia-h100-80gb-hbm3.json."""
    return folder / f"gpu-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def write(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the records as a JSON list, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")


def view(path: Path, tables: Callable[[Sequence[Mapping[str, Any]]], Iterator[Table]] = tables) -> None:
    """Show the records of a file, by default those of this benchmark."""
    console = Console()
    console.width = max(console.width, WIDTH)
    for table in tables(json.loads(path.read_text())):
        console.print(table)


def run(device: Device, path: Path, deadline: Deadline, **options: Any) -> list[dict[str, Any]]:
    """Everything, on a device; the records, which are in the file after every step.

    Args:
        device: to measure on.
        path: of the records.
        deadline: of all of it.
        options: ``canaries``, and what ``ceilings`` and ``measure`` take, as ``ceilings={...}``, ``measure={...}``.
    """
    common = facts(device.name)
    print(json.dumps(common), file=sys.stderr)
    records: list[dict[str, Any]] = []
    for record in check(device, common, options.get("canaries", list(canaries())), deadline):
        records.append(record)
        print(f"canary {record['name']}: {record['wrong'] or 'holds'}", file=sys.stderr)
    write(records, path)
    limits = None
    try:
        limits = ceilings(device, **options.get("ceilings", {}))
    except Exception as error:
        print(f"no ceilings: {_text(error)}", file=sys.stderr)
    for point in measure(device, common, limits, deadline, **options.get("measure", {})):
        records += point
        write(records, path)
        for record in point:
            time_ = f"{1000 * record['ms']['p50']:,.1f} µs" if record["ms"] else f"{record['status']}, {record['why']}"
            rows = f" M={record['M']}" if record["M"] else ""
            shape = "x".join(map(str, record["shape"]))
            print(f"{record['operation']} {shape}{rows} {record['provider']}: {time_}", file=sys.stderr)
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything that can be run here, or show what was measured."""
    parser = argparse.ArgumentParser(description="Check and measure the GPU kernels beside cuBLAS and their peers.")
    parser.add_argument("--view", type=Path, metavar="FILE", help="show these records, measure nothing")
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("N", "K"), help="may be repeated")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds in all")
    parser.add_argument("--save", action="store_true", help="print the rows for kernels/gpu/choice.py")
    args = parse(parser, arguments)
    if args.view:
        view(args.view)
        return
    if not torch.cuda.is_available():
        print("no GPU was measured: torch.cuda.is_available() is False")
        return
    device = cuda_device()
    path = record_file(args.out, device.name)
    shapes = [(N, K) for N, K in args.shape or SHAPES]
    with choice.use("two-pass"):  # "ours" and "ours, fused" are to be the two ways, whatever was measured
        records = run(device, path, Deadline(time.monotonic() + args.budget), measure={"shapes": shapes})
    view(path)
    if args.save:
        rows = fused_up_to(records)
        print(f'    "{choice.architecture(device.device)}": {rows},' if rows else "nothing to save")


if __name__ == "__main__":
    main()
