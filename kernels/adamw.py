"""AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2).

With gradient g, first and second moment m and v, and the step t counted from 1::

    p <- p * (1 - lr * weight_decay)
    m <- m + (1 - beta1) * (g - m)               from g, as g - beta1 * (g - m), where beta1 <= 0.5
    v <- beta2 * v + (1 - beta2) * g * g
    p <- p - lr / (1 - beta1**t) * m / (sqrt(v) / sqrt(1 - beta2**t) + eps)

The order and the bias correction are those of ``torch.optim.AdamW``: the decay comes first, eps is added to the
corrected root. m is computed from the nearer end, as by ``torch.lerp``: from m, a beta1 of 0 would leave nothing of a
gradient that is small against it. The factors are computed in float64, the rest in float32.

Plain PyTorch goes over the memory eight times, C (``cpu/adamw.c``) and Triton (``gpu/adamw.py``) once. The update of a
float32 element reads 16 bytes and writes 12, and little else happens. `formula` has the bits of
``torch.optim.AdamW(foreach=False)``, some of whose operations round once for a product and a sum. C and Triton round
after each operation (`rounded`), so they have each other's bits, on any machine and with any number of threads.

NaN and infinity in a gradient show in p, m and v of that element, and in no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .rule import Moment, Rule


@dataclass(frozen=True)
class Rates:
    """The options of a group, those of ``torch.optim.AdamW``, and the numbers that kernels get of them."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float

    @property
    def decay(self) -> float:
        """p is multiplied by this before the update."""
        return 1 - self.lr * self.weight_decay

    @property
    def lerp(self) -> float:
        """g - m times this is added to m where it is positive, and to g where it is not."""
        weight = 1 - self.beta1
        return weight if weight < 0.5 else -self.beta1

    @property
    def constants(self) -> tuple[float, ...]:
        """The numbers that all segments share, in the order in which kernels have them."""
        return self.decay, self.beta2, self.lerp, 1 - self.beta2, self.eps

    def factors(self, step: int) -> tuple[float, float]:
        """The numbers that depend on the step: lr / (1 - beta1**step), and the root of 1 - beta2**step."""
        return self.lr / (1 - self.beta1**step), (1 - self.beta2**step) ** 0.5


def formula(p: Tensor, g: Tensor, moments: Sequence[Tensor], step: int, rates: Rates) -> None:
    """The update with the bits of ``torch.optim.AdamW``."""
    m, v = moments
    step_size, root = rates.factors(step)
    p.mul_(rates.decay)
    m.lerp_(g, 1 - rates.beta1)
    v.mul_(rates.beta2).addcmul_(g, g, value=1 - rates.beta2)
    p.addcdiv_(m, (v.sqrt() / root).add_(rates.eps), value=-step_size)


def rounded(p: Tensor, g: Tensor, moments: Sequence[Tensor], step: int, rates: Rates) -> None:
    """The update rounded to float32 after each operation.

    The root is taken in float64, because PyTorch's own of float32 is not always the nearest one; the divisor is a
    tensor, because PyTorch divides by a number, on a GPU, through its reciprocal.
    """
    m, v = moments
    step_size, root = rates.factors(step)
    change = (g - m).mul_(rates.lerp)
    m.copy_(change.add_(m if rates.lerp > 0 else g))
    v.mul_(rates.beta2).add_((g * (1 - rates.beta2)).mul_(g))
    denominator = v.double().sqrt().float().div_(v.new_tensor(root)).add_(rates.eps)
    p.mul_(rates.decay).sub_((m * step_size).div_(denominator))


ADAMW = Rule("AdamW", (Moment("exp_avg"), Moment("exp_avg_sq", signed=False)), Rates, formula, rounded, "adamw")
