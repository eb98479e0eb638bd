"""What a run leaves behind.

=================  =================================================================================================
config.json        the settings, the dtype that they came to and why; the versions and the machine that ran them
metrics.jsonl      a line for each step: step, tokens, loss, val_loss, lr, grad_norm, tokens_per_s, rss_mb
loss.png           the curves
samples.md         held-out prompts, answered before and after
adapter/           the adapter, in PEFT's format (or model/, the whole model, after full fine-tuning)
=================  =================================================================================================
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import platform
from pathlib import Path
from typing import Any, TextIO

import torch

from qloralab.nf4.processor import processor_class

from ..errors import UserError
from ..settings import Settings


@dataclasses.dataclass(frozen=True)
class Metrics:
    """One line of metrics.jsonl.

    Attributes:
        step: optimizer steps done; 0 is the model before training.
        tokens: trained on so far, padding not counted.
        loss: mean over the answer tokens of the batch, in nats; None at step 0.
        val_loss: mean over the answer tokens of the held-out examples, or None where there was no validation.
        lr: learning rate of the step.
        grad_norm: before clipping.
        tokens_per_s: of this step, padding not counted.
        rss_mb: resident memory after the step, in 10**6 bytes.
    """

    step: int
    tokens: int
    loss: float | None
    val_loss: float | None
    lr: float | None
    grad_norm: float | None
    tokens_per_s: float | None
    rss_mb: float


class RunDirectory:
    """Takes the directory for this run alone, and writes into it as the run goes.

    Args:
        settings: of the run.
        fields: more of config.json.

    Raises:
        UserError: another run has taken it.
        OSError: it cannot be written.
    """

    def __init__(self, settings: Settings, **fields: Any):
        self.path, self._lines = _take(settings.out)
        self.metrics: list[Metrics] = []
        resolved = {"out": str(self.path), "lr": settings.learning_rate, "too_long": settings.treats_too_long}
        self._config = {**_plain(settings), **resolved, **fields, "versions": versions()}
        self.update_config()

    def update_config(self, **fields: Any) -> None:
        """Add fields to config.json, which is either as before or as after."""
        self._config.update(fields)
        part = self.path / ".config.json.part"
        try:
            part.write_text(json.dumps(self._config, indent=2) + "\n", encoding="utf-8")
            part.replace(self.path / "config.json")
        finally:
            part.unlink(missing_ok=True)

    def log(self, metrics: Metrics) -> None:
        """Append a line to metrics.jsonl; it is on disk when this returns."""
        self.metrics.append(metrics)
        self._lines.write(json.dumps(dataclasses.asdict(metrics)) + "\n")
        self._lines.flush()

    def close(self) -> None:
        """Close metrics.jsonl. What could not be written was an error of ``log`` already."""
        with contextlib.suppress(OSError):
            self._lines.close()


def _take(out: Path | None) -> tuple[Path, TextIO]:
    """The directory, and metrics.jsonl in it: the run that makes this file has the directory."""
    start = out or Path("runs", f"{datetime.datetime.now():%Y%m%d-%H%M%S}")
    path, number = start, 1
    while True:
        path.mkdir(parents=True, exist_ok=True)
        try:
            return path, (path / "metrics.jsonl").open("x", encoding="utf-8")
        except FileExistsError:
            if out is not None:
                raise UserError(f"{out} was taken by another run in the meantime; give --out a new name") from None
        number += 1
        path = start.with_name(f"{start.name}-{number}")


def versions() -> dict[str, str]:
    """The versions, and the machine, that a result depends on."""
    import transformers

    from .. import __version__

    threads, features = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return {
        "qloralab": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {threads} threads, {features}",
        "processor": processor_class(),
    }


def _plain(settings: Settings) -> dict[str, Any]:
    fields = dataclasses.asdict(settings)
    return {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}
