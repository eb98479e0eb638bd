"""The numbers of a run for TensorBoard, beside ``metrics.jsonl``: ``tensorboard --logdir runs`` follows it.

The same names, over the steps: loss, val_loss, lr, grad_norm, tokens_per_s, rss_mb. Written by PyTorch's own writer,
which needs the package ``tensorboard``; that is an extra.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from ..errors import UserError

NAMES = ("loss", "val_loss", "lr", "grad_norm", "tokens_per_s", "rss_mb")
_FLUSH_S = 10  # what a kill may cost


def check() -> None:
    """Refuse, by a ``UserError``, what cannot be written, before anything is read."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs a package: pip install 'qloralab[tensorboard]'")


class Scalars:
    """Writes the event file of a run.

    Args:
        directory: made if missing.
        after: of a run that goes on, the step after which what was written before is void.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, directory: Path, after: int | None = None):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(directory), purge_step=None if after is None else after + 1, flush_secs=_FLUSH_S
        )

    def log(self, metrics: Mapping[str, float | None]) -> None:
        """Add those of ``NAMES`` that were measured in a step, whose number is ``metrics["step"]``."""
        for name in NAMES:
            if (value := metrics[name]) is not None:
                self._writer.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        """Write what is left, and end the writer's thread."""
        self._writer.close()
