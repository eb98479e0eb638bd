"""What a call costs the host before a GPU has done anything: launches, allocations, calls of the dispatcher, time.

    python -m benchmarks.host                 a minute, on any machine; benchmarks/records/host-<class>.json
    python -m benchmarks.host --view FILE     show it again

No GPU is needed, and none is used: ``no_device.py`` puts in the place of Triton's driver one that launches nothing.
Kernels are compiled for sm_90; the operators, autograd and Triton's own Python run as they do on a GPU.

The counts are exact, and a test holds them. The times are those of this processor: the best of seven turns, each
between turns of an empty ``autograd.Function``, whose time says how loaded the machine is. Calls are replayed
(``kernels/gpu/replay.py``), as they are from the fourth on. A launch here is a call of C's, which writes its arguments
down; the driver's takes 2 to 5 microseconds more.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import no_device
from .record import existing, parse, provenance, record_file, write
from .view import grid, show

N = K = 256
RANK = 16
TOKENS = 16
TURNS = 7
SECONDS = 0.05  # of a turn
WIDTH = 100
Case = Callable[[], Any]


class Counter(TorchDispatchMode):
    """Counts the calls of PyTorch's dispatcher, and those that made memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.allocations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.calls.append(str(func))
        known = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        self.allocations += sum(isinstance(leaf, Tensor) and _memory(leaf) not in known for leaf in tree_leaves(found))
        return found


class _Empty(torch.autograd.Function):
    """What any operator with a gradient costs, both ways."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        return grads[0]


def cases() -> dict[str, Case]:
    """What is measured, by name."""
    import qloralab as ql
    from qloralab.lora.layer import LoRALinear
    from qloralab.nf4.linear import QuantizedLinear

    def quantized() -> QuantizedLinear:
        return QuantizedLinear(ql.quantize(torch.randn(N, K)), None, torch.bfloat16)

    def adapted(dropout: float) -> LoRALinear:
        return LoRALinear(quantized(), ql.LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=dropout))

    x, grad = torch.randn(TOKENS, K).bfloat16(), torch.randn(TOKENS, N).bfloat16()
    one, wanting = x[:1].contiguous(), x.clone().requires_grad_()

    def both_ways(layer: LoRALinear) -> Case:
        return lambda: torch.autograd.grad(layer(wanting), (wanting, layer.lora_A, layer.lora_B), grad)

    def forward(layer: torch.nn.Module, x: Tensor) -> Case:
        return torch.no_grad()(lambda: layer(x))

    weight = ql.quantize(torch.randn(N, K))
    return {
        "adapted layer, both ways, dropout": both_ways(adapted(0.05)),
        "adapted layer, both ways": both_ways(adapted(0.0)),
        "adapted layer, one token": forward(adapted(0.0).eval(), one),
        "layer without adapter, one token": forward(quantized(), one),
        "dequantize": lambda: weight.dequantize(torch.bfloat16),
    }


def counts(case: Case) -> dict[str, Any]:
    """Launches by name, calls of the dispatcher and allocations of a case, which was recorded before."""
    from qloralab.nf4 import operator

    for _ in range(3):  # a codebook becomes known, the kind is seen, it is recorded
        case()
    no_device.launches()
    watched, operator._is_watched = operator._is_watched, bool  # an operator that is looked at goes another way
    try:
        with Counter() as counter:
            case()
    finally:
        operator._is_watched = watched
    names = [one.name for one in no_device.launches()]
    found = {"launches": names, "calls": len(counter.calls), "allocations": counter.allocations}
    return found | {"dispatched": counter.calls}


def microseconds(case: Case) -> dict[str, float]:
    """The best time of a case, and of an empty Function in turns with it."""
    x = torch.randn(TOKENS, K, requires_grad=True)
    grad = torch.randn(TOKENS, K)
    runs: dict[str, Case] = {"case": case, "empty": lambda: torch.autograd.grad(_Empty.apply(x), x, grad)}
    return {name: min(best) for name, best in _turns(runs).items()}


def _turns(runs: Mapping[str, Case]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(TURNS):
        for name, run in runs.items():
            begin, count = time.perf_counter(), 0
            while (now := time.perf_counter()) - begin < SECONDS:
                run()
                count += 1
            times[name].append(1e6 * (now - begin) / count)
    return times


def measure() -> list[dict[str, Any]]:
    """A record for each case."""
    from qloralab.kernels.gpu import choice

    common = {"benchmark": "host", **provenance()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with no_device.pretend(), choice.use("fused"):
            return [{**common, "case": name, **counts(run), "us": microseconds(run)} for name, run in cases().items()]
    finally:
        torch.set_num_threads(threads)


def table(records: Sequence[Mapping[str, Any]]) -> Any:
    """A row for each record."""
    headings = ("case", "launches", "dispatcher", "allocations", "µs", "empty Functions")
    rows = [
        (
            record["case"],
            str(len(record["launches"])),
            str(record["calls"]),
            str(record["allocations"]),
            f"{record['us']['case']:.0f}",
            f"{record['us']['case'] / record['us']['empty']:.1f}",
        )
        for record in records
    ]
    return grid(headings, rows, left=headings[:1], title="the host's part of a call, nothing launched")


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and show, or show what was measured."""
    parser = argparse.ArgumentParser(description="What the host does for a call of the GPU's operators.")
    parser.add_argument("--view", type=existing, metavar="FILE", help="show these records, measure nothing")
    args = parse(parser, arguments)
    if args.view:
        show([table(json.loads(args.view.read_text()))], WIDTH)
        return
    records = measure()
    write(records, record_file(args.out, "host"))
    show([table(records)], WIDTH)


if __name__ == "__main__":
    main()
