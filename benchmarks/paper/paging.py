"""The paged optimizer: time of a step against the share of its state that fits (QLoRA, section 3).

The paper pages between GPU and host by unified memory and reports no times. This is the same optimizer on a CPU, where
the state that does not fit goes to a file (``optim/pager.py``): 28 bytes an element move through memory, and those of
the state that are not kept, 8 in and 8 out, through the disk as well.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import nn

from qloralab.optim.paged_adamw import PagedAdamW

from ..view import picture as figure
from .table import Context, Record, Records, grid

TITLE = "Paged optimizer: a step against the share of the state that fits"
LEAST = 16 * 2**20  # bytes that a budget has at least


@dataclass(frozen=True)
class Settings:
    """Parameters (float32), tensors that they lie in, shares of the state that may be in memory, steps timed."""

    parameters: int = 64 * 2**20
    tensors: int = 64
    shares: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25, 0.1)
    steps: int = 7


SETTINGS = {
    "full": Settings(),
    "quick": Settings(parameters=16 * 2**20, shares=(1.0, 0.5, 0.25), steps=4),
    "tiny": Settings(parameters=4 * 2**20, tensors=8, shares=(1.0, 0.5), steps=2),
}


def rows(context: Context) -> list[Record]:
    """A record for each share."""
    settings, records = context.of(SETTINGS), []
    size, state = settings.parameters // settings.tensors, 8 * settings.parameters
    with context.display.busy("paging", "shares") as progress:
        for done, share in enumerate(settings.shares, 1):
            generator = torch.Generator().manual_seed(0)
            parameters = [nn.Parameter(torch.randn(size, generator=generator)) for _ in range(settings.tensors)]
            for parameter in parameters:
                parameter.grad = torch.randn(size, generator=generator)
            budget = None if share == 1 else max(LEAST, int(share * state))
            optimizer = PagedAdamW(parameters, budget=budget)
            optimizer.step()  # makes the state
            seconds = []
            for _ in range(settings.steps):
                start = time.perf_counter()
                optimizer.step()
                seconds.append(time.perf_counter() - start)
            records.append(
                {"kind": "paging", "share": 1.0 if budget is None else budget / state, "budget": budget}
                | {"parameters": settings.parameters, "state_bytes": state, "seconds": seconds}
                | {"sum": float(sum(parameter.detach().double().sum() for parameter in parameters))}
            )
            progress(done, len(settings.shares))
    return records


def markdown(records: Records) -> str:
    """A row for each share, beside all of the state in memory."""
    whole = median(records[0]["seconds"])
    first = records[0]
    cells = [
        [
            f"{one['share']:.0%}",
            "none" if one["budget"] is None else f"{one['budget'] / 1e6:.0f}",
            f"{median(one['seconds']):.3f}",
            f"{min(one['seconds']):.3f} to {max(one['seconds']):.3f}",
            f"{median(one['seconds']) / whole:.2f}",
        ]
        for one in records
    ]
    same = all(one["sum"] == first["sum"] for one in records)
    headings = ("share that fits", "budget, MB", "seconds a step", "fastest to slowest", "to all in memory")
    return "\n\n".join(
        [
            f"AdamW with float32 moments, {first['parameters'] / 1e6:.0f} M parameters, "
            f"{first['state_bytes'] / 1e6:.0f} MB of "
            f"state; the median of {len(first['seconds'])} steps. The parameters after them are "
            f"{'the same to the last bit' if same else 'NOT the same'} at every share. The paper has no such figures, "
            "and "
            "a disk is no PCI bus; times of a machine that others use tell only the order.",
            grid(headings, cells),
        ]
    )


def picture(records: Records, path: Path) -> None:
    """Seconds a step over the share."""
    with figure(path, 1, 1, figsize=(7, 4)) as (_, axes):
        axis = axes[0][0]
        axis.plot([100 * one["share"] for one in records], [median(one["seconds"]) for one in records], marker="o")
        for one in records:
            axis.scatter([100 * one["share"]] * len(one["seconds"]), one["seconds"], s=12, alpha=0.5, color="C0")
        axis.set(xlabel="share of the state that fits, %", ylabel="seconds a step", ylim=(0, None))
