"""The AdamW update of one chunk of memory, in place (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2).

With gradient g, first and second moment m and v, and the step t counted from 1::

    p <- p * (1 - lr * weight_decay)
    m <- m + (1 - beta1) * (g - m)
    v <- beta2 * v + (1 - beta2) * g * g
    p <- p - lr / (1 - beta1**t) * m / (sqrt(v) / sqrt(1 - beta2**t) + eps)

The order, the bias correction and the rounding of the steps are those of ``torch.optim.AdamW``: the decay comes first,
eps is added to the corrected root. The factors are computed in float64, the rest in float32.

One update reads 16 bytes per element and writes 12, and little else happens. Plain PyTorch goes over the memory eight
times; the C in ``cpu/adamw.c`` once. Elements do not depend on each other, so a parameter may be cut into chunks
anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Update a chunk of a parameter and its moments, in place.

    Args:
        param, grad, exp_avg, exp_avg_sq: p, g, m and v; float32 [numel], contiguous, on the CPU, any numel.
        step: the number of this update, from 1.
        lr, beta1, beta2, eps, weight_decay: as in ``torch.optim.AdamW``.

    Raises:
        TypeError: a tensor is not float32.
        ValueError: a tensor is not contiguous, not of one dimension, not as long as param or not on the CPU; or step
            is below 1.
        BuildError: QLORALAB_CPU=native, and the C does not compile here.
    """
    tensors = {"param": param, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} is {tensor.dtype}, not float32")
        if tensor.shape != (param.numel(),) or not tensor.is_contiguous() or tensor.device.type != "cpu":
            found = f"{list(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"
            raise ValueError(f"{name} is not contiguous [{param.numel()}] on the CPU, but {found}")
    if step < 1:
        raise ValueError(f"step counts from 1, not {step}")
    library = dispatch.native()
    update = adamw_reference_ if library is None else library.adamw
    update(param, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay)


@torch.no_grad()
def adamw_reference_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """The same in plain PyTorch: the definition."""
    param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
