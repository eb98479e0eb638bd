"""What the benchmarks of optimizers share: parameters and gradients, who takes part, the check, and steps in turns.

Parameters are float32, the same in every process. The gradients of a step are those of the step before times -0.75: so
they differ, and a process that resumes can make them again. Each optimizer has to train small tensors to where
``torch.optim.AdamW`` trains them before it is timed.

An update with float32 moments moves 28 bytes an element: p, m and v in and out, g in. With 8 bits it is 16.06: codes,
and two scales for 256.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

import qloralab as ql

from .case import WrongResultError
from .clock import Run, Timer, interleave

LORA = (16 * 4096, 16 * 11008, 1000)  # elements: adapters of rank 16 on a model with 7 billion weights, and a bias
LARGE = 4096 * 4096
RATE, DECAY = 1e-3, 0.01
BYTES = {32: 28.0, 8: 12 + 4 + 2 * 2 * 4 / 256}  # of traffic for an element
ROOM = 2**26  # bytes of budget beyond the state: chunks are whole pieces
SMALLEST = 1 << 24  # bytes of a budget
_NOISE = 2**22
_SHIFTS = 2**16

Make = Callable[[Sequence[Parameter]], Optimizer]


@dataclass(frozen=True)
class Contender:
    """An optimizer.

    Attributes:
        name: in records and tables.
        bits: of its state.
        make: it, for parameters.
        away: whether its state is in the host's memory, and the parameters are not.
        tolerance: of the change of the parameters, relative; 0.1 is what 8 bits round.
    """

    name: str
    bits: int
    make: Make
    away: bool = False
    tolerance: float = 1e-5

    def check(self, device: str | torch.device = "cpu") -> float:
        """Train some tensors for 3 steps and compare with ``torch.optim.AdamW``.

        Returns:
            root-mean-square difference over the root mean square of the change.

        Raises:
            WrongResultError: it is larger than the tolerance.
        """
        numels, ends = [3 * 10**5, 5000, 256], []
        for build in (self.make, lambda params: torch.optim.AdamW(params, lr=RATE, weight_decay=DECAY)):
            params = make(numels, device)
            with quiet():
                optimizer = build(params)
                for _ in range(3):
                    optimizer.step()
            ends.append(flat(params))
        change = torch.linalg.vector_norm(ends[1] - flat(make(numels, device)))
        error = float(torch.linalg.vector_norm(ends[0] - ends[1]) / change)
        if not error <= self.tolerance:
            raise WrongResultError(f"{self.name}: error {error:.2g}, allowed {self.tolerance:.2g}")
        return error


def torch_fused() -> Contender:
    """PyTorch's own."""
    return Contender(
        "torch fused", 32, lambda params: torch.optim.AdamW(params, lr=RATE, weight_decay=DECAY, fused=True)
    )


def ours(name: str, bits: Any, budget: int | None = None, room: bool = False, away: bool = False) -> Contender:
    """Ours, with a budget or none; ``room`` asks for one in which all of the state fits."""

    def build(params: Sequence[Parameter]) -> Optimizer:
        fits = sum(param.numel() for param in params) * 2 * bits // 8 + ROOM if room else budget
        return ql.PagedAdamW(params, lr=RATE, weight_decay=DECAY, state_bits=bits, budget=fits)

    return Contender(name, bits, build, away, 1e-5 if bits == 32 else 0.1)


def bitsandbytes(name: str, tolerance: float) -> list[Contender]:
    """Its paged ones, with 32 and with 8 bits; on GPUs it divides in fewer bits."""
    from . import peer  # noqa: F401  # isort: skip  # before bitsandbytes: what it logs at import
    from bitsandbytes.optim.adamw import PagedAdamW8bit, PagedAdamW32bit

    def build(kind: Any) -> Make:
        return lambda params: kind(list(params), lr=RATE, weight_decay=DECAY)

    return [
        Contender(name, 32, build(PagedAdamW32bit), tolerance=tolerance),
        Contender(f"{name}, 8 bits", 8, build(PagedAdamW8bit), tolerance=0.1),
    ]


def steps(
    which: Sequence[Contender],
    params: Sequence[Parameter],
    prepare: Callable[[Sequence[Run], bool], Timer],
    others: Mapping[str, Timer] | None = None,
    **limits: Any,
) -> tuple[dict[str, list[float]], dict[str, Optimizer]]:
    """Time a step of each optimizer on the same parameters, in turns, each with a state of its own.

    Args:
        which: take part.
        params: with gradients.
        prepare: makes a timer, see ``clock.py``.
        others: that take turns with them.
        limits: of ``interleave``.

    Returns:
        by name, the samples, ms; and the optimizers.
    """
    with quiet():
        made = {one.name: one.make(params) for one in which}
        timers = {name: prepare([optimizer.step], False) for name, optimizer in made.items()}
        return interleave({**timers, **(others or {})}, **limits), made


def quiet() -> warnings.catch_warnings:
    """A body without warnings: on CPUs bitsandbytes says for each tensor that it does not page."""
    return warnings.catch_warnings(action="ignore")


def sizes(elements: int) -> list[int]:
    """Elements of each parameter; their sum is ``elements``, at least 4.

    A quarter of them is in tensors of the size of LoRA's, the rest in large ones, in turns.
    """
    large = min(LARGE, elements // 4)
    pattern = [large, *(max(1, large // (3 * sum(LORA))) * LORA)]
    found, left = [], elements
    while left:
        found += (size := min(pattern[len(found) % len(pattern)], left),)
        left -= size
    return found


def make(numels: Sequence[int], device: str | torch.device = "cpu") -> list[Parameter]:
    """Parameters with gradients: float32 [numel] each, N(0, 0.02) and N(0, 1)."""
    noise = torch.randn(_NOISE + _SHIFTS, generator=torch.Generator(device).manual_seed(0), device=device)
    made = []
    for number, numel in enumerate(numels):
        grad = torch.empty(numel, device=device)
        for piece in grad.split(_NOISE):
            piece.copy_(noise[number * 4099 % _SHIFTS :][: len(piece)])
        param = Parameter(grad * 0.02)
        param.grad = grad
        made.append(param)
    return made


def advance(params: Sequence[Parameter], steps: int = 1) -> None:
    """Let the gradients be those of a later step."""
    for param in params:
        assert param.grad is not None
        for _ in range(steps):
            param.grad.mul_(-0.75)


def flat(params: Sequence[Parameter]) -> torch.Tensor:
    """All parameters in one tensor, float64."""
    return torch.cat([param.detach() for param in params]).double()


def digest(params: Sequence[Parameter]) -> str:
    """The sha256 of all parameters, in order."""
    found = hashlib.sha256()
    for param in params:
        found.update(param.detach().numpy().data)
    return found.hexdigest()
