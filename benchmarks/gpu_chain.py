"""Seven products one after the other, as those of a decoder layer: what is left of a product's rate in a row of them.

    q, k, v = products of x        o = product of q        gate, up = products of o        down = product of gate

No attention, activation, norm or residual stands between: what is timed is the chain of products, and no layer's time.
x is N(0, 1); a product with weights of standard deviation 0.02 makes its values 0.02 sqrt(K) times as large, 1.3 to 2.4
times here: far from where bfloat16 ends. The seven weights differ, and each result is held to the float64 product of
what the same provider computed before it, within the tolerance of a single product.

"ours" is the operator that a layer calls, fused: few tokens go to ``few_tokens.py`` where it serves. "chain" is
captured: a graph holds some chains, one after the other, over copies of all weights that fill the cache twice; what
cannot be captured is launched, and marked. "chain, eager" launches each product, which takes the device's time or the
host's, whichever is longer. The share is the bytes of the weights, packed or bfloat16, over the time, over the rate of
reading in the same run; what goes from product to product is not counted.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from qloralab.kernels.gpu import choice
from qloralab.nf4.ops import linear
from qloralab.nf4.packed import Packed

from .case import Case, Weight, WrongResultError, within
from .clock import Run
from .gpu_device import MOST, Device, Limits, fields
from .gpu_providers import FUSED, ONCE, PEER
from .provider import Outcome, Provider, compare, text
from .view import Record, grid, p50, points
from .work import Work, least

CHAIN, EAGER = "chain", "chain, eager"
INPUTS = {"q": "x", "k": "x", "v": "x", "o": "q", "gate": "o", "up": "o", "down": "gate"}
LINEARS = {  # [N, K] of Llama 3 8B
    "q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096),
    "gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336),
}  # fmt: skip
ROWS = (1, 16)
SECONDS = 0.12  # of samples, a provider and point
COPIES = 32  # at most
Shapes = Mapping[str, tuple[int, int]]
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Chain(Case):
    """The chain for M tokens.

    Attributes:
        linears: the weights by name; ``weight`` is that of q.
    """

    linears: Mapping[str, Weight] = field(default_factory=dict)

    def least(self, dense: bool) -> Work:
        """Reading the weights, and the arithmetic."""
        works = [least("linear", one.shape, 0, dense).read for one in self.linears.values()]
        flops = sum(2 * (self.M or 0) * math.prod(one.shape) for one in self.linears.values())
        return Work(sum(works), 0, flops)


def linears(path: Path) -> Shapes:
    """The shapes [N, K] of the first decoder layer of a config.json that has all seven; empty where none has."""
    from qloralab.checkpoint.quantized_model import quantizable, skeleton

    model, layers = skeleton(path), {}
    for name in quantizable(model):
        if match := re.fullmatch(r"(.*\.\d+)\.(?:.*\.)?(\w+)_proj", name):
            layers.setdefault(match[1], {})[match[2]] = tuple(model.get_submodule(name).weight.shape)
    return next(({name: one[name] for name in INPUTS} for one in layers.values() if INPUTS.keys() <= one.keys()), {})


def check(chain: Any, provider: Provider, result: Mapping[str, Tensor]) -> float:
    """The largest error of the products, each beside the float64 product of its own input; see ``case.check``."""
    return max(_check(chain, provider, name, result) for name in INPUTS)


def _check(chain: Chain, provider: Provider, name: str, result: Mapping[str, Tensor]) -> float:
    x, y, weight = result[INPUTS[name]], result[name], chain.linears[name]
    shape = (chain.M, weight.shape[0])
    try:
        if y.shape != shape or y.dtype != chain.dtype:
            raise WrongResultError(f"{y.dtype} {list(y.shape)}, not {chain.dtype} {list(shape)}")
        return within(y[chain.rows], x[chain.rows].double() @ weight.dequantized().double().T, provider.tolerance)
    except WrongResultError as wrong:
        raise WrongResultError(f"{name}: {wrong}") from wrong


def _run(products: Mapping[str, Product], x: Tensor) -> dict[str, Tensor]:
    values = {"x": x}
    for name, product in products.items():
        values[name] = product(values[INPUTS[name]])
    return values


def _runs(make: Callable[[Weight, Chain], Sequence[Product]], chain: Any) -> list[Run]:
    each = [make(chain.linears[name], chain) for name in INPUTS]
    return [partial(_run, dict(zip(INPUTS, products, strict=True)), chain.x) for products in zip(*each, strict=True)]


def _ours(weight: Weight, chain: Chain) -> list[Product]:
    held = weight.form("packed", weight.quantized.clone, chain.copies())
    return [partial(_fused, part.operands()) for part in held]


def _fused(weight: Packed, x: Tensor) -> Tensor:
    return linear(x, *weight, None)


def _bf16(weight: Weight, chain: Chain) -> list[Product]:
    return [partial(F.linear, weight=W) for W in weight.form("bf16", weight.dequantized, chain.copies(dense=True))]


def _bitsandbytes(weight: Weight, chain: Chain) -> list[Product]:
    from . import peer

    held = weight.form("bitsandbytes", partial(peer.parameter, weight.quantized), chain.copies())
    return [lambda x, part=part: peer.matmul_4bit(x, part.data, quant_state=part.quant_state) for part in held]


PROVIDERS = [
    Provider("ours", partial(_runs, _ours), tolerance=FUSED, fewest=5, inside=partial(choice.use, "fused")),
    Provider("bf16", partial(_runs, _bf16), tolerance=ONCE, fewest=5, dense=True),
    Provider("bitsandbytes", partial(_runs, _bitsandbytes), tolerance=PEER, fewest=5, package="bitsandbytes"),
]


def measure(
    device: Device,
    common: Mapping[str, Any],
    limits: Limits | None,
    deadline: float,
    shapes: Shapes | None = None,
    rows: Sequence[int] = ROWS,
    providers: Sequence[Provider] = PROVIDERS,
    seconds: float = SECONDS,
) -> Iterator[list[dict[str, Any]]]:
    """Time the chain for each M, captured and eager: as ``gpu.measure``, whose arguments and records these are.

    ``shapes`` are those of the seven linears (None: of `LINEARS`), ``shape`` of a record is the widths in them, and
    ``weight_bytes`` what a provider reads of them.
    """
    shapes, weights = LINEARS if shapes is None else shapes, {}
    head = {**common, "kind": "chain", "shape": list(dict.fromkeys(width for NK in shapes.values() for width in NK))}
    for M, operation in itertools.product(rows, (CHAIN, EAGER)):
        chain, why = None, device.lost() or ("the time was up" if time.monotonic() >= deadline else None)
        try:
            if not why:
                weights = weights or make_weights(device, shapes, max(rows))
                chain = Chain(operation, weights["q"], M, linears=weights)
        except Exception as error:
            why = text(error)
        outcomes: Mapping[str, Outcome] = {one.name: Outcome("skipped", why) for one in providers}
        if chain:
            cases = dict.fromkeys(outcomes, chain)
            outcomes = compare(cases, providers, device.prepare, check=check, seconds=seconds, most=MOST)
        yield [
            head
            | {"operation": operation, "M": M, "provider": one.name}
            | {"weight_bytes": sum(least("linear", NK, 0, one.dense).read for NK in shapes.values())}
            | fields(outcomes[one.name], one, limits, chain)
            for one in providers
        ]
        del outcomes  # the graphs hold memory


def make_weights(device: Device, shapes: Shapes, M: int) -> dict[str, Weight]:
    """Seven weights that differ; raises MemoryError where they and chains for M tokens would not fit."""
    sizes, widths = [N * K for N, K in shapes.values()], sum(N for N, _ in shapes.values())
    # To make a weight; all in every form, in copies that fill the cache twice; the results of three graphs.
    need = 40 * max(sizes) + 14 * sum(sizes) + 6 * device.cache + 20 * M * widths
    if large := device.too_large("the chain needs", need):
        raise MemoryError(large)
    seeded = enumerate(shapes.items(), start=10)  # x has a seed below
    return {name: Weight(NK, device.device, device.cache, COPIES, seed) for seed, (name, NK) in seeded}


def tables(records: Sequence[Record]) -> Iterator[Table]:
    """A row for each M and provider; nothing where no chain was measured."""
    found = {(one["operation"], one["M"]): point for point in points(records) for one in point.values()}
    rows = [
        _row(record, found[CHAIN, M].get("bf16"), found.get((EAGER, M), {}).get(name))
        for (operation, M), point in found.items()
        if operation == CHAIN
        for name, record in point.items()
    ]
    if rows:
        widths = ", ".join(map(str, records[0]["shape"]))
        headings = ("provider", "M", "µs", "bf16/this", "weights, MB", "GB/s", "of reading", "eager, µs")
        caption = "products only, nothing between them; e: not from a CUDA graph; eager: launched by the host"
        title = f"q, k, v, o, gate, up, down in a chain, of widths {widths}: median"
        yield grid(headings, rows, left=headings[:1], title=title, caption=caption)


def _row(record: Record, dense: Record | None, eager: Record | None) -> tuple[str, ...]:
    name, M, nbytes, limits = record["provider"], str(record["M"]), record["weight_bytes"], record["roofline"]
    launched = f"{1000 * p50(eager):,.1f}" if eager and eager["ms"] else eager["status"] if eager else ""
    if not record["ms"]:
        return name, M, record["status"], "", f"{1e-6 * nbytes:.1f}", "", "", launched
    rate = 1e-6 * nbytes / p50(record)
    reading = limits and (limits["read_gb_per_s"] or limits["copy_gb_per_s"])
    return (
        *(name, M, f"{1000 * p50(record):,.1f}{' e' if record['timing'] == 'events' else ''}"),
        f"{p50(dense) / p50(record):.2f}" if dense and dense["ms"] else "",
        *(f"{1e-6 * nbytes:.1f}", f"{rate:,.0f}", f"{rate / reading:.0%}" if reading else "", launched),
    )
