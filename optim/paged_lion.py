"""Lion whose state pages: one number beside each parameter, half of AdamW's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qloralab.kernels.lion import LION

from .paged_optimizer import PagedOptimizer


class PagedLion(PagedOptimizer):
    """Lion (arXiv 2302.06675), the update of ``kernels/lion.py``; in every other respect ``PagedAdamW``.

    Args:
        params: as for ``PagedAdamW``.
        lr, betas, weight_decay: of the paper, which advises an lr 3 to 10 times smaller than AdamW's, and a weight
            decay as much larger.
        options: all others of ``PagedAdamW``. The smallest budget is 8 MiB.
    """

    rule = LION

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Any,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, **options)
