"""The one command for a machine with an NVIDIA GPU: is everything right on it, and how fast is it.

    python -m benchmarks.gpu            under eight minutes, no network; benchmarks/records/gpu-<device>.json
    python -m benchmarks.gpu --view benchmarks/records/gpu-<device>.json      show it again, and draw it beside it
    python -m benchmarks.gpu --compare before.json after.json     what became slower, see ``gpu_compare.py``
    python -m benchmarks.gpu --save     and print what belongs into the table of kernels/gpu/choice.py
    python -m benchmarks.gpu --provider module:NAME     a function of yours besides, see ``provider.py``
    python -m benchmarks.gpu --model config.json     the shapes of a model, and sums over its layers
    python -m benchmarks.gpu --only canaries "input gradient"     some of it
    python -m benchmarks.gpu --everything     this and the other benchmarks of a GPU, see ``gpu_everything.py``

In this order, in one process: the facts (device, driver, versions); the canaries (``gpu_canaries.py``); the ceilings
of this run, reading, a copy and a bfloat16 product; the points, each provider checked before it is timed; seven
products in a chain (``gpu_chain.py``), checked likewise; tables.
Clocks, power and temperature are recorded before the points and after them.

A provider that fails at a point is a record that says why, and the rest goes on. What would not fit into the memory
that is free is skipped, and so is what comes after the deadline. After an error that ends the CUDA context nothing more
can be measured; what was measured until then is written and shown. Records are written after every canary and point.

Without a GPU the command says so in one line and exits with 0.

**Roofline.** ``bound_ms`` of a record is the time that the least traffic takes at the rates of this run, or the
arithmetic at that of the product, whichever is longer (``gpu_device.py``); ``roofline_share`` is that over the median.
Reading a large buffer, a copy of it and a large product are what a device reaches, not what its data sheet says, so a
share can pass 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qloralab.kernels.gpu import choice

from . import gpu_chain, gpu_model
from .case import OPERATIONS, RANK, Case, Weight
from .gpu_canaries import Canary, canaries, verdict
from .gpu_compare import compare as compare_records
from .gpu_compare import percentage
from .gpu_device import MOST, Device, Limits, ceilings, cuda_device, fields, state
from .gpu_everything import BUDGET as FOR_EVERYTHING
from .gpu_everything import everything
from .gpu_plot import plot
from .gpu_providers import FUSED, OPTIONS, PROVIDERS
from .gpu_views import tables, with_ratios
from .provider import Outcome, Provider, compare, from_user, text
from .record import existing, gpu_provenance, gpu_record_file, parse, write
from .view import p50, show
from .view import points as by_point

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
COPIES = 32  # of a weight, at most
BUDGET = 450.0  # seconds in all
DIRECTIONS = ("linear", "input gradient")
ADAPTED = OPERATIONS[-2:]
PROVIDER_KERNELS = {"ours, fused": "fused", "ours": "two-pass"}
WIDTH = 200  # of the tables, where the terminal says less or is none


def measure(
    device: Device,
    common: Mapping[str, Any],
    limits: Limits | None,
    deadline: float,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    points: Sequence[tuple[str, int | None]] = POINTS,
    providers: Sequence[Provider] = PROVIDERS,
    seconds: float = SECONDS,
    rank: int = RANK,
    dropout: float = 0.0,
    model: tuple[str, Mapping[tuple[int, int], int]] | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Time every provider at every point.

    Args:
        device: to measure on.
        common: fields of every record.
        limits: of this device, or None where they could not be measured.
        deadline: on the clock of ``time.monotonic``, after which points are skipped.
        shapes: [N, K] of the weights.
        points: operation, and M where it has one.
        providers: to compare.
        seconds: a provider and point.
        rank, dropout: of adapters.
        model: its name, and how many of its layers have each shape.

    Yields:
        the records of a point: ``status`` is ok, wrong, failed, skipped or missing, ``why`` says more, and ``ms`` is
        None unless it is ok.
    """
    lost: str | None = None
    for shape in shapes:
        weight: Weight | None = None
        for operation, M in points:
            able = [provider for provider in providers if provider.does(operation, M)]
            why = lost or ("the time was up" if time.monotonic() >= deadline else None)
            case = None
            if why is None:
                try:
                    if weight is None and (large := device.too_large("a weight needs", 40 * shape[0] * shape[1])):
                        raise MemoryError(f"{large}, to make it")
                    weight = weight or Weight(shape, device.device, device.cache, COPIES)
                    case = Case(operation, weight, M, dropout=dropout, rank=rank)
                    why = device.too_large("it needs", case.memory(len(able)))
                except Exception as error:
                    why, case = text(error), None
                    lost = device.lost()
            if case is None or why:
                outcomes: Mapping[str, Outcome] = {one.name: Outcome("skipped", why) for one in able}
                case = None
            else:
                cases = dict.fromkeys((one.name for one in able), case)
                outcomes = compare(cases, able, device.prepare, seconds=seconds, most=MOST)
            head = {**common, "kind": "point", "operation": operation, "shape": list(shape), "M": M}
            if operation in ADAPTED:
                head |= {"rank": rank, "dropout": dropout}
            if model:
                head |= {"model": model[0], "count": model[1][shape]}
            records = [
                {**head, "provider": one.name, **fields(outcomes[one.name], one, limits, case)}
                for one in able
                if one.name in outcomes
            ]
            del outcomes  # the graphs hold memory
            lost = lost or device.lost()
            yield with_ratios(records)


def fused_up_to(records: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int], int]:
    """Rows of ``choice.MEASURED``: by [N, K] the most tokens up to which the fused products took less time than the
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


def saved(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The line for ``choice.MEASURED``."""
    rows = fused_up_to(records)
    yield f'    "{records[0]["device"]}": {rows},' if rows else "nothing to save"


def run(
    device: Device, path: Path, deadline: float, which: Sequence[Canary] | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Everything, on a device; the records, which are in the file after every step.

    Args:
        device: to measure on.
        path: of the records.
        deadline: of all of it, on the clock of ``time.monotonic``.
        which: canaries; None: all.
        options: what ``ceilings``, ``measure`` and ``gpu_chain.measure`` take, as ``ceilings={...}``, ``measure={...}``
            and ``chain={...}``; without the last there is no chain.
    """
    common = {**gpu_provenance("gpu", device.name), "architecture": choice.device(device.device).architecture}
    print(json.dumps(common), file=sys.stderr)
    records: list[dict[str, Any]] = []

    def keep(some: Sequence[dict[str, Any]]) -> None:
        records.extend(some)
        write(records, path)

    for canary in canaries() if which is None else which:
        wrong = "the time was up" if time.monotonic() >= deadline else verdict(canary, device.device)
        keep([{**common, "kind": "canary", "name": canary.name, "wrong": wrong}])
        print(f"canary {canary.name}: {wrong or 'holds'}", file=sys.stderr)
    limits, asked = None, {"points": POINTS, **options.get("measure", {})}
    try:
        limits = ceilings(device, **options.get("ceilings", {})) if asked["points"] or "chain" in options else None
    except Exception as error:
        print(f"no ceilings: {text(error)}", file=sys.stderr)
    keep([{**common, "kind": "state", "when": "before", **state(device)}])
    steps = measure(device, common, limits, deadline, **asked)
    if "chain" in options:
        steps = itertools.chain(steps, gpu_chain.measure(device, common, limits, deadline, **options["chain"]))
    for point in steps:
        keep(point)
        for record in point:
            time_ = f"{1000 * p50(record):,.1f} µs" if record["ms"] else f"{record['status']}, {record['why']}"
            rows = f" M={record['M']}" if record["M"] else ""
            shape = "x".join(map(str, record["shape"]))
            print(f"{record['operation']} {shape}{rows} {record['provider']}: {time_}", file=sys.stderr)
    keep([{**common, "kind": "state", "when": "after", **state(device)}])
    return records


def chosen(only: Sequence[str] | None, rows: Sequence[int] | None) -> list[tuple[str, int | None]]:
    """Of `POINTS` those of some operations, where they have rows with these instead; None: all."""
    found = [(operation, M) for operation, M in POINTS if not only or operation in only]
    if not rows:
        return found
    return list(dict.fromkeys((operation, one) for operation, M in found for one in (rows if M else (None,))))


def listing(providers: Sequence[Provider]) -> Iterator[str]:
    """A line for each operation, with its rows, and for each provider, with its operations."""
    for operation in OPERATIONS:
        yield f"{operation}: " + (", ".join(f"{M}" for one, M in POINTS if one == operation and M) or "no rows")
    yield f"{gpu_chain.CHAIN}: {', '.join(map(str, gpu_chain.ROWS))}"
    for one in providers:
        yield f'"{one.name}": {", ".join(one.operations)}' + (f" ({why})" if (why := one.missing()) else "")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything that can be run here, or show what was measured."""
    parser = argparse.ArgumentParser(description="Check and measure the GPU kernels beside cuBLAS and their peers.")
    parser.add_argument("--view", type=existing, metavar="FILE", help="show and draw these records, measure nothing")
    parser.add_argument(
        "--compare", type=existing, nargs=2, metavar="FILE", help="show what became slower, measure nothing"
    )
    parser.add_argument("--fail-over", type=percentage, default=0.03, metavar="PERCENT", help="of --compare: 3%%")
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("N", "K"), help="may be repeated")
    parser.add_argument("--model", type=existing, metavar="CONFIG.JSON", help="the shapes of its linear layers")
    parser.add_argument(
        "--only", nargs="+", choices=("canaries", *OPERATIONS, gpu_chain.CHAIN), metavar="OPERATION", help="of these"
    )
    parser.add_argument("--rows", type=int, nargs="+", metavar="M", help="of products and layers")
    parser.add_argument("--rank", type=int, default=RANK, help="of adapters")
    parser.add_argument("--dropout", type=float, default=0.0, help="of adapters; peers then take no part")
    parser.add_argument("--list", action="store_true", help="show operations and providers, measure nothing")
    parser.add_argument(
        "--budget", type=float, help=f"seconds in all: {BUDGET:.0f}, for everything {FOR_EVERYTHING:.0f}"
    )
    parser.add_argument("--everything", action="store_true", help="and the other benchmarks of a GPU, in ten minutes")
    parser.add_argument("--provider", action="append", metavar="MODULE:NAME", help="a function of yours besides")
    parser.add_argument("--save", action="store_true", help="print the rows for kernels/gpu/choice.py, of --view too")
    args = parse(parser, arguments)
    if args.view:
        records = json.loads(args.view.read_text())
        show(tables(records), WIDTH, lines=saved(records) if args.save else ())
        plot(records, args.view.with_suffix(".png"))
        return
    if args.compare:
        table, over = compare_records(*[json.loads(file.read_text()) for file in args.compare], limit=args.fail_over)
        show([table], WIDTH)
        raise SystemExit(bool(over))
    providers = [*PROVIDERS, *(from_user(name, **{**OPTIONS, "tolerance": FUSED}) for name in args.provider or ())]
    if args.list:
        show([], lines=listing(providers))
        return
    if not torch.cuda.is_available():
        print("no GPU was measured: torch.cuda.is_available() is False")
        return
    usual = FOR_EVERYTHING if args.everything else BUDGET
    deadline = time.monotonic() + (usual if args.budget is None else args.budget)
    if args.everything:
        verdicts = everything(args.out, deadline)
        for file in sorted(args.out.glob("gpu-*.json")):
            show([], lines=[str(file)])
        if set(verdicts.values()) != {"done"}:
            raise SystemExit(1)
        return
    device = cuda_device()
    path = gpu_record_file(args.out, device.name)
    shapes = [(N, K) for N, K in args.shape or SHAPES]
    options: dict[str, Any] = {"providers": providers, "rank": args.rank, "dropout": args.dropout}
    linears, more = gpu_chain.linears(args.model) if args.model else None, {}
    if gpu_chain.CHAIN in (args.only or [gpu_chain.CHAIN]):
        if linears != {}:
            more["chain"] = {"shapes": linears, "rows": args.rows or gpu_chain.ROWS}
        else:
            print(f"no chain: no layer of {args.model} has q, k, v, o, gate, up and down", file=sys.stderr)
    if args.model:
        counts, title = gpu_model.linear_shapes(args.model), gpu_model.name(args.model)
        path, shapes, options["model"] = gpu_record_file(args.out, f"{title} {device.name}"), [*counts], (title, counts)
        args.only, args.rows = args.only or DIRECTIONS, args.rows or gpu_model.ROWS
    options |= {"shapes": shapes, "points": chosen(args.only, args.rows)}
    which = [] if args.only and "canaries" not in args.only else None
    with choice.use("two-pass"):  # the canaries of what is registered are those of the definition's bits
        records = run(device, path, deadline, which, measure=options, **more)
    show(tables(records), WIDTH, lines=saved(records) if args.save else ())


if __name__ == "__main__":
    main()
