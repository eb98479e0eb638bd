"""The check of the kernels of update rules on a device: a small update by kernel and by definition.

``self_check.py`` says what the check is for. The definition is that of the rule, rounded after each operation, bit for
bit. This file does not import Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..adamw import Rates
from ..moment_codes import BLOCK_SIZE
from ..rule import Rule, Segments

RATES = Rates(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)  # of AdamW
SIZES = (3000, 1, 255, 4096)  # of the segments of the check: short blocks and short tiles, and aligned whole ones
STEPS = (1, 2, 3, 1)


def check(
    rule: Rule, rates: Any, has_codes: bool, launch: Callable[[Segments, Any], None], device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """What the kernel of a rule has written after two updates, the second one from moments that are not 0; and what its
    definition has."""
    found, expected = (_segments(rule, has_codes, device) for _ in range(2))
    for _ in range(2):
        launch(found, rates)
        rule.apply_(expected, rates, rounded=True)
    return [*chain(*found.tensors)], [*chain(*expected.tensors)]


def _segments(rule: Rule, has_codes: bool, device: torch.device) -> Segments:
    """Segments whose moments are 0; numbers of many magnitudes, the same every time."""
    n = torch.arange(sum(SIZES), dtype=torch.float64, device=device)
    p, g = (n * 0.7390851).sin(), (n * 0.4567).sin() * (n * 0.0123).cos().exp() ** 9
    params, grads = ([part.clone() for part in one.bfloat16().split(SIZES)] for one in (p, g))

    def zeros(dtype: torch.dtype, shared: int = 1) -> list[list[Tensor]]:
        return [[torch.zeros(-(-n // shared), dtype=dtype, device=device) for n in SIZES] for _ in rule.moments]

    if has_codes:
        return Segments(params, grads, zeros(torch.uint8), zeros(torch.float32, BLOCK_SIZE), STEPS)
    return Segments(params, grads, zeros(torch.float32), None, STEPS)
