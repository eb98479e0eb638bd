"""What ``benchmarks/optimizer.py`` updates: parameters of mixed sizes, the same in every process, and their gradients.

A quarter of the elements is in tensors of the size of LoRA's, the rest in large ones, in turns. The gradients of a step
are those of the step before times -0.75: so they differ, and a process that resumes can make them again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

LORA = (16 * 4096, 16 * 11008, 1000)  # elements: adapters of rank 16 on a model with 7 billion weights, and a bias
LARGE = 4096 * 4096
RATE = 1e-3
_NOISE = 2**22
_SHIFTS = 2**16


@dataclass(frozen=True)
class Problem:
    """How much there is to page.

    Attributes:
        state: bytes of float32 moments, 8 for each element.
        budget: bytes of them that may be resident.
        steps: of the optimizer.
    """

    state: int
    budget: int
    steps: int = 5

    @property
    def elements(self) -> int:
        """Of all parameters."""
        return self.state // 8


def sizes(elements: int) -> list[int]:
    """Elements of each parameter; their sum is ``elements``, at least 4."""
    large = min(LARGE, elements // 4)
    pattern = [large, *(max(1, large // (3 * sum(LORA))) * LORA)]
    found, left = [], elements
    while left:
        found += (size := min(pattern[len(found) % len(pattern)], left),)
        left -= size
    return found


def make(numels: Sequence[int]) -> list[Parameter]:
    """Parameters with gradients: float32 [numel] each, N(0, 0.02) and N(0, 1)."""
    noise = torch.randn(_NOISE + _SHIFTS, generator=torch.Generator().manual_seed(0))
    made = []
    for number, numel in enumerate(numels):
        grad = torch.empty(numel)
        for piece in grad.split(_NOISE):
            piece.copy_(noise[number * 4099 % _SHIFTS :][: len(piece)])
        param = Parameter(grad * 0.02)
        param.grad = grad
        made.append(param)
    return made


def advance(params: Sequence[Parameter], steps: int = 1) -> None:
    """Let the gradients be those of a later step."""
    for param in params:
        for _ in range(steps):
            _grad(param).mul_(-0.75)


def digest(params: Sequence[Parameter]) -> str:
    """The sha256 of all parameters, in order."""
    found = hashlib.sha256()
    for param in params:
        found.update(param.detach().numpy().data)
    return found.hexdigest()


def _grad(param: Parameter) -> Tensor:
    assert param.grad is not None
    return param.grad
