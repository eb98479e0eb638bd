"""How long a step takes where all of the state is in memory, beside PyTorch's fused AdamW and bitsandbytes.

Two sets of parameters: one large tensor, and 1,000 of the size of LoRA's. All optimizers of a set step on the same
parameters and gradients, in turns with a copy (``benchmarks/timing.py``), each with a state of its own. Before, each
has to train small tensors to where PyTorch's trains them.

bitsandbytes pages on NVIDIA GPUs only. On a CPU its paged classes warn, and keep the state in ordinary memory.

**Roofline.** An update with float32 moments moves 28 bytes an element: p, m and v in and out, g in. With 8 bits it is
16.06: codes, and two scales for 256. The copy's best repetition is the rate, and the bound the time at that rate.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

import qloralab as ql
from benchmarks.optimizer_problem import LORA, RATE, make
from benchmarks.timing import interleave, quantiles

DECAY = 0.01
FEWEST = 9
ROOM = 2**26  # bytes of budget beyond the state: chunks are whole pieces
BYTES = {32: 28.0, 8: 12 + 4 + 4 * 8 / 256}  # of traffic for an element
TOLERANCES = {32: 1e-5, 8: 0.1}  # of the change of the parameters; the second is what 8 bits round
COPY = 2**28

Make = Callable[[Sequence[Parameter]], Optimizer]


class WrongResultError(Exception):
    """An optimizer does not train to where PyTorch's does."""


def optimizers() -> dict[str, tuple[int, Make]]:
    """Who takes part: bits of the state, and how it is made for parameters."""
    from bitsandbytes.optim.adamw import PagedAdamW8bit, PagedAdamW32bit

    from benchmarks import peer  # noqa: F401  # before bitsandbytes: what it logs at import

    def ours(bits: int, budget: bool = False) -> Make:
        def made(params: Sequence[Parameter]) -> Optimizer:
            room = sum(param.numel() for param in params) * 2 * bits // 8 + ROOM
            return ql.PagedAdamW(params, lr=RATE, weight_decay=DECAY, state_bits=bits, budget=room if budget else None)  # pyright: ignore[reportArgumentType]

        return made

    def theirs(kind: Any) -> Make:
        return lambda params: kind(list(params), lr=RATE, weight_decay=DECAY)

    return {
        "torch fused": (32, lambda params: torch.optim.AdamW(params, lr=RATE, weight_decay=DECAY, fused=True)),
        "ours": (32, ours(32)),
        "ours, in a budget": (32, ours(32, budget=True)),
        "ours, 8 bits": (8, ours(8)),
        "bitsandbytes": (32, theirs(PagedAdamW32bit)),
        "bitsandbytes, 8 bits": (8, theirs(PagedAdamW8bit)),
    }


def check(name: str, bits: int, make_optimizer: Make) -> float:
    """Train some tensors for 3 steps, and compare with ``torch.optim.AdamW``.

    Returns:
        root-mean-square difference over the root mean square of the change.

    Raises:
        WrongResultError: it is too large.
    """
    numels = [10**5, 5000, 256]
    ends = []
    for chosen in (make_optimizer, lambda params: torch.optim.AdamW(params, lr=RATE, weight_decay=DECAY)):
        params = make(numels)
        optimizer = _quietly(partial(chosen, params))
        for _ in range(3):
            _quietly(optimizer.step)
        ends.append(torch.cat([param.detach() for param in params]).double())
    change = ends[1] - torch.cat([param.detach() for param in make(numels)]).double()
    error = float(torch.linalg.vector_norm(ends[0] - ends[1]) / torch.linalg.vector_norm(change))
    if not error <= TOLERANCES[bits]:
        raise WrongResultError(f"{name}: error {error:.2g}, allowed {TOLERANCES[bits]:.2g}")
    return error


def resident(elements: int, seconds: float = 2.0) -> dict[str, Any]:
    """Time each optimizer on each set of parameters.

    Args:
        elements: of a set, about.
        seconds: for an optimizer and a set.

    Returns:
        points: a dictionary for each optimizer and set.
    """
    sets = {"one large": [elements], "LoRA-sized": [LORA[0]] * max(1, elements // LORA[0])}
    source = torch.ones(COPY, dtype=torch.uint8)
    target = torch.empty_like(source)
    candidates = optimizers()
    errors = {name: check(name, *candidate) for name, candidate in candidates.items()}
    points = []
    for title, numels in sets.items():
        params = make(numels)
        made = {name: _quietly(partial(build, params)) for name, (_, build) in candidates.items()}
        for optimizer in made.values():
            _quietly(optimizer.step)
        runs = {name: [optimizer.step] for name, optimizer in made.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            times = interleave({**runs, "copy": [lambda: target.copy_(source)]}, seconds, FEWEST)
        rate = 1e-6 * 2 * COPY / min(times["copy"])  # GB/s
        total = sum(numels)
        for name, optimizer in made.items():
            bits = candidates[name][0]
            points.append(
                {
                    "set": title,
                    "optimizer": name,
                    "bits": bits,
                    "elements": total,
                    "tensors": len(numels),
                    "ms": quantiles(times[name]),
                    "reps": len(times[name]),
                    "bound_ms": 1e-6 * BYTES[bits] * total / rate,
                    "state_bytes": _state_bytes(optimizer),
                    "error": errors[name],
                    "copy_gb_per_s": rate,
                }
            )
    return {"points": points}


def _state_bytes(optimizer: Optimizer) -> int:
    """All tensors of the state, tables that are shared counted once."""
    tensors = [value for entry in optimizer.state.values() for value in entry.values() if torch.is_tensor(value)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _quietly(call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():  # bitsandbytes: no paging on CPUs, for each tensor
        warnings.simplefilter("ignore")
        return call()
