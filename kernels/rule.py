"""What an update rule of an optimizer is: its moments, its formula in plain PyTorch, and the name of its kernels.

``adamw.py`` and ``lion.py`` are rules. The optimizer pages, saves and loads whatever moments a rule names
(``optim/paged_optimizer.py``), and ``update.py`` runs a kernel where there is one and the formula elsewhere.

Elements do not depend on each other, so a parameter may be cut into segments anywhere; with codes of 8 bits, at
multiples of 256.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .moment_codes import dequantize_moment, quantize_moment

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of parameters
Formula = Callable[[Tensor, Tensor, Sequence[Tensor], int, Any], None]


@dataclass(frozen=True)
class Segments:
    """What one call updates. Entry i of each list belongs to segment i, a piece of a parameter with n elements.

    All tensors are contiguous, of one dimension and on one device; no two segments overlap.

    Attributes:
        params: float32, bfloat16 or float16 [n].
        grads: the dtype of the parameter [n].
        moments: a list for each moment of the rule: float32 [n], or codes uint8 [n] that begin a block.
        scales: a list for each moment, of codes: float32 [ceil(n / 256)]; None: the moments are float32.
        steps: the number of this update of the segment, from 1.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    moments: Sequence[Sequence[Tensor]]
    scales: Sequence[Sequence[Tensor]] | None
    steps: Sequence[int]

    @property
    def tensors(self) -> list[Sequence[Tensor]]:
        """All lists of tensors: params, grads, moments and scales."""
        return [self.params, self.grads, *self.moments, *(self.scales or ())]


@dataclass(frozen=True)
class Moment:
    """A number that a rule keeps beside each element of a parameter.

    Attributes:
        name: its key in a state dictionary of 32 bits.
        signed: whether it can be negative, which chooses the map of its 8-bit codes.
    """

    name: str
    signed: bool = True


@dataclass(frozen=True)
class Rule:
    """An update rule.

    Attributes:
        name: of the optimizer, as in "AdamW": messages have it.
        moments: what it keeps, zero before the first update.
        rates: makes what the formula gets of a group's options, as floats in their order, those of pairs one by one.
        formula: ``formula(p, g, moments, step, rates)`` updates p and the moments in place, all float32 and flat.
            A parameter in bfloat16 or float16 is widened before and rounded once behind it, to nearest, ties to even.
        rounded: the same, each operation rounded to float32 by itself: the bits of kernels, and of any update with
            moments in 8 bits. None: ``formula`` is that already.
        kernel: what its kernels are called: ``qloralab_<kernel>`` in C, and in Triton ``gpu/<kernel>.py``, both with
            ``_8bit`` behind it for moments in 8 bits. Where there is none, the formula runs.
    """

    name: str
    moments: tuple[Moment, ...]
    rates: Callable[..., Any]
    formula: Formula
    rounded: Formula | None = None
    kernel: str | None = None

    @torch.no_grad()
    def apply_(self, segments: Segments, rates: Any, rounded: bool = False) -> None:
        """Update segments in plain PyTorch, on any device: the definition.

        Moments in 8 bits are decoded before the formula, and encoded again behind it.

        Args:
            segments: what `check` of ``update.py`` lets pass.
            rates: made by ``rates``.
            rounded: have the bits of kernels; with moments in 8 bits there are no others.
        """
        formula = (self.rounded or self.formula) if rounded or segments.scales is not None else self.formula
        pieces = zip(segments.params, segments.grads, segments.steps, strict=True)
        for k, (param, grad, step) in enumerate(pieces):
            p, g = param.float(), grad.float()  # themselves, where they are float32
            stored = [some[k] for some in segments.moments]
            if segments.scales is None:
                formula(p, g, stored, step, rates)
            else:
                coded = list(zip(stored, (some[k] for some in segments.scales), self.moments, strict=True))
                decoded = [dequantize_moment(codes, absmax, kind.signed) for codes, absmax, kind in coded]
                formula(p, g, decoded, step, rates)
                for (codes, absmax, kind), moment in zip(coded, decoded, strict=True):
                    for into, new in zip((codes, absmax), quantize_moment(moment, kind.signed), strict=True):
                        into.copy_(new)
            param.copy_(p)
