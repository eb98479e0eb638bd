"""Parameters and gradients cut out of one noise, steps with them, and what these leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

MIB = 2**20
BUDGET = 16 * MIB  # the smallest of AdamW: four chunks of 4 MiB
NOISE = torch.randn(2**22 + 2**16, generator=torch.Generator().manual_seed(7))

Bits = Any  # 32 or 8


def make(shapes: Sequence[Any], dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """Parameters without gradients; a number is the length of a vector."""
    sizes = [torch.Size([shape] if isinstance(shape, int) else shape) for shape in shapes]
    return [Parameter(NOISE[i:][: size.numel()].view(size).to(dtype, copy=True)) for i, size in enumerate(sizes)]


def give(params: Sequence[Tensor], step: int) -> list[Tensor]:
    """Set the gradients of a step, and return them. Frozen parameters have none."""
    for i, param in enumerate(params):
        grad = NOISE[997 * step + 101 * i + 11 :][: param.numel()].view(param.shape)
        param.grad = grad.to(param.device, param.dtype, copy=True) if param.requires_grad else None
    return [param.grad for param in params if param.grad is not None]


def run(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: range = range(3)) -> None:
    """Make steps."""
    for step in steps:
        give(params, step)
        optimizer.step()


def take(params: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """Copy the values of other parameters."""
    for one, other in zip(params, source, strict=True):
        one.data.copy_(other.data)


def state_of(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    """Copies of all of the state."""
    return [value.detach().clone() for param in params for value in optimizer.state.get(param, {}).values()]


def bits(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the parameters and of all of their state."""
    return [*(param.detach().clone() for param in params), *state_of(optimizer, params)]


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether all bits are the same."""
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
