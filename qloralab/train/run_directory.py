"""What a run leaves behind.

=================  =================================================================================================
run.yaml           the settings as they were given: finetune --config run.yaml repeats the run
config.json        the settings, what they came to and why; the versions and the machine that ran them
metrics.jsonl      a line for each step: step, tokens, loss, val_loss, lr, grad_norm, tokens_per_s, rss_mb
loss.png           the curves
samples.md         held-out prompts, answered before and after
tensorboard/       the numbers of metrics.jsonl again, with --tensorboard
adapter/           the adapter, in PEFT's format (or model/, the whole model, after full fine-tuning)
=================  =================================================================================================
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import platform
import shutil
from pathlib import Path
from typing import Any, TextIO

import torch

from qloralab.lora.files import save_adapter
from qloralab.nf4.files.atomic import replacing
from qloralab.nf4.processor import processor_class

from .. import __version__
from ..checkpoint.models import is_default, quiet
from ..errors import UserError
from ..run_file import NAME
from ..run_file import write as write_settings
from ..settings import Settings
from .tensorboard import Scalars


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

    Attributes:
        path: of the directory.
        trained: where what was trained is saved.
        metrics: the lines of metrics.jsonl.

    Raises:
        UserError: another run has taken it.
        OSError: it cannot be written.
    """

    def __init__(self, settings: Settings, **fields: Any):
        self.path, self._lines = _take(settings.out)
        self.trained = self.path / ("model" if settings.method == "full" else "adapter")
        self.metrics: list[Metrics] = []
        given = {"out": None, **dataclasses.asdict(settings)}  # out comes first in the file
        resolved = {"out": self.path, "lr": settings.learning_rate, "too_long": settings.treats_too_long}
        self._config = {**given, **resolved, **fields, "versions": versions()}
        self.update_config()
        write_settings(settings, self.path / NAME, model=is_default(settings.model), steps=settings.epochs is not None)
        self._scalars = Scalars(self.path / "tensorboard") if settings.tensorboard else None

    def update_config(self, **fields: Any) -> None:
        """Add fields to config.json, which is either as before or as after."""
        self._config.update(fields)
        with replacing(self.path / "config.json") as (part,):
            part.write_text(json.dumps(self._config, indent=2, default=str) + "\n", encoding="utf-8")

    def log(self, metrics: Metrics) -> None:
        """Append a line to metrics.jsonl; it is on disk when this returns."""
        self.metrics.append(metrics)
        self._lines.write(json.dumps(dataclasses.asdict(metrics)) + "\n")
        self._lines.flush()
        if self._scalars:
            self._scalars.log(dataclasses.asdict(metrics))

    def save(self, model: Any, tokenizer: Any) -> None:
        """Write what was trained into ``trained``: the adapters of a model, or all of it and its tokenizer.

        An earlier one stays until the new one is complete. A model is then put aside, and removed behind the new one.

        Raises:
            OSError, SafetensorError: it cannot be written; what there was of it is removed.
        """
        if self.trained.name == "adapter":
            save_adapter(model, self.trained)
            return
        part, old = self.path / ".model.part", self.path / ".model.old"
        try:
            with quiet():
                model.save_pretrained(part)
            for weights in part.glob("*.safetensors"):  # which transformers writes for this user alone
                weights.chmod((part / "config.json").stat().st_mode)
            tokenizer.save_pretrained(part)
            if self.trained.exists():
                self.trained.rename(old)
            part.rename(self.trained)
        finally:
            if old.exists() and not self.trained.exists():
                old.rename(self.trained)
            for folder in (part, old):
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Close metrics.jsonl. What could not be written was an error of ``log`` already."""
        with contextlib.suppress(OSError):
            self._lines.close()
            if self._scalars:
                self._scalars.close()


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

    threads, features = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return {
        "qloralab": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {threads} threads, {features}",
        "processor": processor_class(),
    }
