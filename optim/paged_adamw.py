"""``torch.optim.AdamW`` whose state pages: two numbers beside each parameter.

An update with float32 parameters moves 28 bytes an element through memory, and where nothing is kept, 8 in and 8 out of
the arena. The slower of the two decides what a step costs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Literal

from qloralab.kernels.adamw import ADAMW

from .paged_optimizer import PagedOptimizer


class PagedAdamW(PagedOptimizer):
    """``torch.optim.AdamW`` with a state that pages.

    The update, its order and its rounding are those of ``kernels/adamw.py``. Parameters are float32, bfloat16 or
    float16, contiguous, on CPUs or NVIDIA GPUs; a group may lie on several devices. Of a ``DTensor`` (``fully_shard``)
    each process updates its part.

    ``state`` and ``param_groups`` are the truth, as in PyTorch: the next step goes on from what is assigned there, from
    nothing where an entry was removed, and with the rates of the group that a parameter is in by then.

    Args:
        params: parameters, (name, parameter) pairs or groups, as for any PyTorch optimizer.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        state_bits: 32: float32 moments, 8 bytes an element. 8: codes with a scale for 256 (``moment_codes.py``), 2.03.
        budget: bytes of state that may be resident on each device, 16 MiB at least. None: on a CPU all of it is, in
            ordinary memory; on a GPU it is managed memory, of which the driver evicts what others need (ordinary
            memory, with a warning, where ``cuda.bindings`` is not installed).
        nonfinite: what a step does with a gradient that has NaN or infinity. "update": what AdamW does, without
            looking. "skip": nothing (``skipped`` counts these steps). "raise": ValueError, and nothing.
        update_in_backward: update each parameter as soon as its gradient is accumulated, and free the gradient. Then
            a backward is a step: gradients cannot be clipped, unscaled, or accumulated over several. ``step`` behind
            it ends the step, and says what could not be written.
        state_dir: for the file, on a CPU; None: the first of the directory for temporary files, /var/tmp and the
            current one that is on a disk.
        oversubscribe: allocate managed memory even if the GPU has less free. A GPU that others use may hang.

    Attributes:
        skipped: steps that were skipped.

    Raises:
        ValueError: an argument is out of range, a parameter not contiguous, twice in a group or, with 8 bits, a DTensor
            (a checkpoint for other numbers of processes could not have the scales of its codes); a group asks for
            amsgrad, maximize or coupled weight decay.
        TypeError: a parameter has another dtype, or values that are not in its own memory.
        OSError: the disk has no room for the state.
        MemoryError: the GPU has none.
        ImportError: a budget on a GPU, and no ``cuda.bindings``; the message says what to install.
    """

    rule = ADAMW

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        state_bits: Literal[32, 8] = 32,
        budget: int | None = None,
        *,
        nonfinite: Literal["update", "skip", "raise"] = "update",
        update_in_backward: bool = False,
        state_dir: str | os.PathLike[str] | None = None,
        oversubscribe: bool = False,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, state_bits, budget, nonfinite, update_in_backward, state_dir, oversubscribe)
