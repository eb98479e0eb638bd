"""The AdamW update of one chunk of memory, in place (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2).

With gradient g, first and second moment m and v, and the step t counted from 1::

    p <- p * (1 - lr * weight_decay)
    m <- m + (1 - beta1) * (g - m)               from g, as g - beta1 * (g - m), where beta1 <= 0.5
    v <- beta2 * v + (1 - beta2) * g * g
    p <- p - lr / (1 - beta1**t) * m / (sqrt(v) / sqrt(1 - beta2**t) + eps)

The order and the bias correction are those of ``torch.optim.AdamW``: the decay comes first, eps is added to the
corrected root. m is computed from the nearer end, as by ``torch.lerp``: from m, a beta1 of 0 would leave nothing of a
gradient that is small against it. The factors are computed in float64, the rest in float32. A parameter in bfloat16 or
float16 is updated in float32 and rounded once, to nearest, ties to even; it has no float32 copy beside it.

A chunk is a list of segments, each a piece of one parameter with its own step. It is one call: in C (``cpu/adamw.c``)
the threads share it without regard to where segments end; in Triton (``gpu/adamw.py``) it is one launch. Plain PyTorch
goes over the memory eight times, these once. The update of a float32 element reads 16 bytes and writes 12, and little
else happens.

**Bits.** Elements do not depend on each other, so a parameter may be cut into segments anywhere, and the number of
threads does not show. `adamw_reference_` has the bits of ``torch.optim.AdamW(foreach=False)``, some of whose operations
round once for a product and a sum. C and Triton round after each operation (`adamw_rounded_`), so they have each
other's bits, on any machine.

NaN and infinity in a gradient show in p, m and v of that element, and in no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import dispatch

_PLAIN: tuple[Any, ...] = (Tensor, torch.nn.Parameter)  # of these very types it is known
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of parameters


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[int],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Update the segments of a chunk and their moments, in place.

    All tensors are contiguous, of one dimension, and on one device. Entry i of each list belongs to segment i, of any
    length n. No two segments overlap.

    Args:
        params: p, float32, bfloat16 or float16 [n].
        grads: g, the dtype of p [n].
        exp_avgs, exp_avg_sqs: m and v, float32 [n].
        steps: the number of this update of the segment, from 1.
        lr, beta1, beta2, eps, weight_decay: as in ``torch.optim.AdamW``.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a tensor is not contiguous, not of one dimension, not as long as p or not on the device of the first
            one; a step is below 1; or the lists differ in length.
        BuildError: QLORALAB_CPU=native, and the C does not compile here.
        NotServedError: QLORALAB_GPU=triton, and the kernel does not serve.
    """
    moments = {"exp_avgs": (exp_avgs, torch.float32, 1), "exp_avg_sqs": (exp_avg_sqs, torch.float32, 1)}
    check_segments(params, grads, steps, moments)
    rates = Rates(lr, beta1, beta2, eps, weight_decay)
    adamw_unchecked_(params, grads, exp_avgs, exp_avg_sqs, steps, rates)


def adamw_unchecked_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[int],
    rates: Rates,
) -> None:
    """`adamw_` for a caller that has made sure of everything: what does not fit together is memory that is lost.

    Raises:
        BuildError, NotServedError: as for `adamw_`.
    """
    update = fast_update("adamw", params[0].device) if params else None
    if update is None:
        adamw_reference_(params, grads, exp_avgs, exp_avg_sqs, steps, rates)
    else:
        update(params, grads, exp_avgs, exp_avg_sqs, steps, rates)
        increment_version(params)


@dataclass(frozen=True)
class Rates:
    """What the segments of a chunk have in common: the arguments of ``torch.optim.AdamW``."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float

    @property
    def decay(self) -> float:
        """What p is multiplied by before the update."""
        return 1 - self.lr * self.weight_decay

    @property
    def lerp(self) -> float:
        """What g - m is multiplied by, and its sign says what that is added to: m where it is positive, else g."""
        weight = 1 - self.beta1
        return weight if weight < 0.5 else -self.beta1

    def corrections(self, step: int) -> tuple[float, float]:
        """What depends on the step: lr / (1 - beta1**step), and the root of 1 - beta2**step."""
        return self.lr / (1 - self.beta1**step), (1 - self.beta2**step) ** 0.5

    def of_segments(self, steps: Sequence[int]) -> tuple[list[float], list[float]]:
        """Both `corrections` of each segment."""
        known = {step: self.corrections(step) for step in set(steps)}
        return [known[step][0] for step in steps], [known[step][1] for step in steps]


@torch.no_grad()
def adamw_reference_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[int],
    rates: Rates,
) -> None:
    """The same in plain PyTorch, on any device: the definition."""
    for param, grad, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        step_size, root = rates.corrections(step)
        p, g = param.float(), grad.float()  # themselves, where they are float32
        p.mul_(rates.decay)
        m.lerp_(g, 1 - rates.beta1)
        v.mul_(rates.beta2).addcmul_(g, g, value=1 - rates.beta2)
        p.addcdiv_(m, (v.sqrt() / root).add_(rates.eps), value=-step_size)
        param.copy_(p)


@torch.no_grad()
def adamw_rounded_(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, rates: Rates) -> None:
    """One segment in plain PyTorch, float32 rounded after each operation of the formula: the bits of C and Triton.

    The root is taken in float64, because PyTorch's own of float32 is not always the nearest one; the divisor is a
    tensor, because PyTorch divides by a number, on a GPU, through its reciprocal.
    """
    step_size, root = rates.corrections(step)
    p, g = param.float(), grad.float()
    change = (g - m).mul_(rates.lerp)
    m.copy_(change.add_(m if rates.lerp > 0 else g))
    v.mul_(rates.beta2).add_((g * (1 - rates.beta2)).mul_(g))
    denominator = v.double().sqrt().float().div_(v.new_tensor(root)).add_(rates.eps)
    p.mul_(rates.decay).sub_((m * step_size).div_(denominator))
    param.copy_(p)


def check_segments(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[int],
    states: Mapping[str, tuple[Sequence[Tensor], torch.dtype, int]],
) -> None:
    """Refuse what no implementation may see: they follow addresses, and check nothing.

    Args:
        params, grads, steps: as for `adamw_`.
        states: further tensors by name, each list with its dtype and how many elements of p share one of theirs.

    Raises:
        TypeError, ValueError: as for `adamw_`.
    """
    lists = {"grads": grads, "steps": steps} | {name: tensors for name, (tensors, _, _) in states.items()}
    for name, entries in lists.items():
        if len(entries) != len(params):
            raise ValueError(f"{name} has {len(entries)} entries, and params has {len(params)}")
    device = params[0].device if params else torch.device("cpu")
    sizes, dtypes = [p.numel() for p in params], [p.dtype for p in params]
    for i, dtype in enumerate(dtypes):
        if dtype not in DTYPES:
            raise TypeError(f"params[{i}] is {dtype}, not float32, bfloat16 or float16")
    _check("params", params, dtypes, sizes, device)
    _check("grads", grads, dtypes, sizes, device)
    for name, (tensors, dtype, shared) in states.items():
        _check(name, tensors, repeat(dtype), [-(-n // shared) for n in sizes] if shared > 1 else sizes, device)
    for i, step in enumerate(steps):
        if step < 1:
            raise ValueError(f"steps count from 1; steps[{i}] is {step}")


def has_memory(tensor: Tensor) -> bool:
    """Whether the address of a tensor leads to its elements.

    Not so for subclasses that only stand for other tensors (``DTensor``, quantized weights, what is being traced), for
    other layouts than strided, and for views whose memory is still to be negated or filled with zeros.
    """
    kind: Any = type(tensor)
    plain = kind in _PLAIN or kind.__torch_dispatch__ is _PLAIN[0].__torch_dispatch__
    return plain and tensor.layout is torch.strided and not tensor.is_neg() and not tensor._is_zerotensor()


def _check(
    name: str, tensors: Sequence[Tensor], dtypes: Iterable[torch.dtype], sizes: Sequence[int], device: torch.device
) -> None:
    for i, (tensor, dtype, n) in enumerate(zip(tensors, dtypes, sizes, strict=False)):
        if not has_memory(tensor):
            raise TypeError(f"{name}[{i}] is a {type(tensor).__name__} ({tensor.layout}) without memory of its own")
        if tensor.dtype is not dtype:
            raise TypeError(f"{name}[{i}] is {tensor.dtype}, not {dtype}")
        if tensor.shape != (n,) or not tensor.is_contiguous() or tensor.device != device:
            found = f"{list(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"
            raise ValueError(f"{name}[{i}] is not contiguous [{n}] on {device}, but {found}")


def fast_update(name: str, device: torch.device) -> Callable[..., None] | None:
    """C on CPUs, Triton on NVIDIA GPUs; None where the reference is to run.

    Args:
        name: one of ``dispatch.CHUNK_UPDATES``.
        device: of the tensors.

    Raises:
        BuildError, NotServedError: as for `adamw_`.
    """
    if device.type == "cpu":
        library = dispatch.native()
        return None if library is None else getattr(library, name)
    if device.type == "cuda":
        from .gpu import adamw_check

        return adamw_check.kernel(name, device)
    return None
