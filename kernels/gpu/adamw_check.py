"""The check of the AdamW kernels on a device, at first use: a small update by the kernel and by its definition.

``self_check.py`` says what the check is for, and what ``QLORALAB_GPU`` chooses. This file does not import Triton. The
definition is `adamw_rounded_`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..adamw import Rates, adamw_rounded_
from ..adamw_8bit import BLOCK_SIZE, adamw_8bit_reference_
from . import self_check

SIZES = (3000, 1, 255, 4096)  # of the segments of the check: short blocks and short tiles, and aligned whole ones
RATES = Rates(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
STEPS = (1, 2)  # the second one from moments that are not 0

Compared = tuple[list[Tensor], list[Tensor]]  # what the kernel has written, and the definition


def kernel(name: str, device: torch.device) -> Callable[..., Any] | None:
    """The launcher of ``adamw`` or ``adamw_8bit``, or None where the reference is to run; see ``self_check.kernel``."""
    return self_check.kernel(name, device)


def _chunk(device: torch.device, moments: torch.dtype) -> list[list[Tensor]]:
    """p, g, m and v of all segments; numbers of many magnitudes, the same every time."""
    n = torch.arange(sum(SIZES), dtype=torch.float64, device=device)
    p, g = (n * 0.7390851).sin(), (n * 0.4567).sin() * (n * 0.0123).cos().exp() ** 9
    zeros = [torch.zeros(len(n), dtype=moments, device=device) for _ in range(2)]
    return [[part.clone() for part in one.split(SIZES)] for one in (p.bfloat16(), g.bfloat16(), *zeros)]


def check_adamw(launch: Callable[..., Any], device: torch.device) -> Compared:
    """With float32 moments."""
    found, expected = (_chunk(device, torch.float32) for _ in range(2))
    for step in STEPS:
        launch(*found, [step] * len(SIZES), RATES)
        for p, g, m, v in zip(*expected, strict=True):
            adamw_rounded_(p, g, m, v, step, RATES)
    return [*chain(*found)], [*chain(*expected)]


def check_adamw_8bit(launch: Callable[..., Any], device: torch.device) -> Compared:
    """With 8-bit moments."""
    found, expected = (_chunk(device, torch.uint8) for _ in range(2))
    for some in (found, expected):
        some += [
            [torch.zeros(-(-n // BLOCK_SIZE), dtype=torch.float32, device=device) for n in SIZES] for _ in range(2)
        ]
    definition: Callable[..., Any] = adamw_8bit_reference_
    for step in STEPS:
        launch(*found, [step] * len(SIZES), RATES)
        definition(*expected, [step] * len(SIZES), RATES)
    return [*chain(*found)], [*chain(*expected)]
