"""The check of the kernels of update rules on a device, at first use: a small update by kernel and by definition.

Importing this module enters them into ``self_check.py``, which says what the check is for, and what ``QLORALAB_GPU``
chooses. It does not import Triton. The definition is that of the rule, rounded after each operation, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..adamw import ADAMW, Rates
from ..moment_codes import BLOCK_SIZE
from ..rule import Rule, Segments
from . import self_check

RULES = {ADAMW: Rates(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)}  # that have kernels, with some rates
SIZES = (3000, 1, 255, 4096)  # of the segments of the check: short blocks and short tiles, and aligned whole ones
STEPS = (1, 2, 3, 1)


def kernel(name: str, device: torch.device) -> Callable[[Segments, Any], None] | None:
    """The launcher of a kernel, or None where the formula is to run; see ``self_check.kernel``."""
    return self_check.kernel(name, device) if name in self_check.MODULES else None


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


def _check(rule: Rule, has_codes: bool, launch: Callable[[Segments, Any], None], device: torch.device) -> bool:
    """Whether no bit differs after two updates, the second one from moments that are not 0."""
    found, expected = (_segments(rule, has_codes, device) for _ in range(2))
    for _ in range(2):
        launch(found, RULES[rule])
        rule.apply_(expected, RULES[rule], rounded=True)
    pairs = zip(chain(*found.tensors), chain(*expected.tensors), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


for _rule in RULES:
    for _has_codes in (False, True):
        _name = f"{_rule.kernel}_8bit" if _has_codes else str(_rule.kernel)
        self_check.MODULES[_name] = _name
        self_check.CHECKS[_name] = partial(_check, _rule, _has_codes)
