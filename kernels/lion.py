"""Lion (Chen et al., arXiv 2302.06675, program 1): AdamW's decay, one moment, and steps of one size.

With gradient g and moment m::

    s <- beta1 * m + (1 - beta1) * g
    p <- p * (1 - lr * weight_decay) - lr * sign(s)
    m <- beta2 * m + (1 - beta2) * g

The factors are computed in float64, the rest in float32, rounded after each operation; C (``cpu/lion.c``) has the same
bits. NaN in a gradient shows in p and m of that element; infinity has a sign, and shows in m.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .rule import Moment, Rule


@dataclass(frozen=True)
class Rates:
    """The options of a group, and the numbers that kernels get of them."""

    lr: float
    beta1: float
    beta2: float
    weight_decay: float

    @property
    def constants(self) -> tuple[float, ...]:
        """The numbers that all segments share, in the order in which kernels have them."""
        decay = 1 - self.lr * self.weight_decay
        return decay, self.lr, self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2

    def factors(self, step: int) -> tuple[float, ...]:
        """No number depends on the step."""
        return ()


def formula(p: Tensor, g: Tensor, moments: Sequence[Tensor], step: int, rates: Rates) -> None:
    """The update rounded to float32 after each operation. The sign of a zero is +0.0, and that of NaN is NaN."""
    (m,) = moments
    decay, lr, beta1, rest1, beta2, rest2 = rates.constants
    s = (m * beta1).add_(g * rest1)
    p.mul_(decay).sub_(s.sign().mul_(lr).masked_fill_(s.isnan(), torch.nan))
    m.mul_(beta2).add_(g * rest2)


LION = Rule("Lion", (Moment("exp_avg"),), Rates, formula, kernel="lion")
