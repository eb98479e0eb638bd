"""What a run leaves behind.

=================  =================================================================================================
run.yaml           the settings as they were given: finetune --config run.yaml repeats the run
config.json        the settings, what they came to and why; the versions and the machine that ran them
metrics.jsonl      a line for each step: step, tokens, loss, val_loss, lr, grad_norm, tokens_per_s, rss_mb
loss.png           the curves
samples.md         held-out prompts, answered before and after
tensorboard/       the numbers of metrics.jsonl again, with --tensorboard
wandb/             what W&B keeps or has yet to send, with --track wandb
adapter/           the adapter, in PEFT's format (or model/, the whole model, after full fine-tuning)
base/              with --init loftq or pissa: the weights in 4 bits that the adapter belongs to, and the tokenizer
checkpoints/       step-000050.safetensors, ...: the last few of those that ``--resume`` goes on from
=================  =================================================================================================

The process that writes holds the lock of metrics.jsonl, which the system takes back when it ends, however it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any, TextIO

import torch

from qloralab.lora.files import save_adapter
from qloralab.lora.inject import without_adapters
from qloralab.nf4.distributed import whole
from qloralab.nf4.files.atomic import replacing
from qloralab.nf4.files.json_file import read_object
from qloralab.nf4.processor import processor_class

from .. import __version__
from ..checkpoint.models import is_default, quiet
from ..checkpoint.quantized_model import save_quantized
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
    """A directory that this run alone writes into, as it goes: a new one, from ``create``, or ``reopen``'s.

    Of several processes the first one does; the others follow it with ``of_another``, by which nothing is written, and
    what all have to gather is gathered.

    Attributes:
        path: of the directory.
        trained: where what was trained is saved.
        base: where weights in 4 bits are saved that are not the model's.
        metrics: the lines of metrics.jsonl.
        config: the fields of config.json.
        logged: the last step whose metrics were written when it was reopened, taken back or not; -1 for none.
    """

    def __init__(self, path: Path, lines: TextIO | None, config: dict[str, Any]):
        self.path, self._lines, self.config = path, lines, config
        self.trained = path / ("model" if config.get("method") == "full" else "adapter")
        self.base = path / "base"
        self.metrics: list[Metrics] = []
        self.logged = -1
        self._scalars: Scalars | None = None

    @classmethod
    def create(cls, settings: Settings, **fields: Any) -> RunDirectory:
        """A new directory.

        Args:
            settings: of the run.
            fields: more of config.json.

        Raises:
            UserError: another run has taken it.
            OSError: it cannot be written.
        """
        path, lines = _take(settings.out)
        given = {"out": None, **dataclasses.asdict(settings)}  # out comes first in the file
        resolved = {"out": path, "lr": settings.learning_rate, "too_long": settings.treats_too_long}
        run = cls(path, lines, {**given, **resolved, **fields, "given": settings.given(), "versions": versions()})
        run.update_config()
        write_settings(settings, path / NAME, model=is_default(settings.model), steps=settings.epochs is not None)
        run._follow(None)
        return run

    @classmethod
    def reopen(cls, path: Path) -> RunDirectory:
        """The directory of a run that has ended, or was killed.

        Raises:
            UserError: there is none, it was killed before it began, or it still lives.
            FormatError: its config.json is damaged.
        """
        try:
            lines = (path / "metrics.jsonl").open("r+", encoding="utf-8")
        except OSError:
            raise UserError(f"{path} is no run directory; --resume takes one that `qloralab finetune` wrote") from None
        try:
            _lock(lines, path)
            config = read_object(path / "config.json")
        except FileNotFoundError:
            lines.close()
            raise UserError(f"{path} was killed before it began; start it again, with another --out") from None
        except BaseException:
            lines.close()
            raise
        run = cls(path, lines, config)
        run._tidy()
        return run

    @classmethod
    def of_another(cls, path: Path, config: dict[str, Any]) -> RunDirectory:
        """The directory that another process writes into."""
        return cls(path, None, config)

    def _tidy(self) -> None:
        """Remove what a killed process was writing; put a model back that it had put aside."""
        old = self.path / ".model.old"
        if old.exists() and not self.trained.exists():
            old.rename(self.trained)
        for left in [old, *self.path.rglob(".*.part")]:
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)

    def settings(self, steps: int | None = None) -> Settings:
        """The settings that the run began with; ``out`` is None, for the directory is here.

        Args:
            steps: in the place of its own; not fewer.

        Raises:
            UserError: they are fewer; or another version wrote settings that this one does not have.
        """
        given = self.config.get("given")
        if not isinstance(given, dict):
            raise UserError(f"{self.path / 'config.json'} does not tell how the run was started: it cannot be resumed")
        before, total = Settings.from_given(given), self.config["steps"]
        if steps is not None and steps < total:
            raise UserError(f"--steps is {steps}, and the run has {total}; a run that goes on may have more")
        return dataclasses.replace(before, epochs=None, steps=steps or total)

    @property
    def checkpoints(self) -> list[Path]:
        """Those that there are, the oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*.safetensors"))

    def new_checkpoint(self, step: int) -> Path:
        """The file for the checkpoint after a step. The metrics until then are made durable, for it to go on from.

        Raises:
            OSError: they cannot be written.
        """
        if self._lines:
            os.fsync(self._lines.fileno())
            (self.path / "checkpoints").mkdir(exist_ok=True)
        return self.path / "checkpoints" / f"step-{step:06}.safetensors"

    def forget_checkpoints(self, keep: int) -> None:
        """Remove all checkpoints but the last few."""
        for path in self.checkpoints[:-keep] if self._lines else ():
            path.unlink(missing_ok=True)

    def rewind(self, step: int | None) -> None:
        """Take back the metrics behind a step, and a line that a killed process left half written; None: all.

        Raises:
            UserError: metrics up to this step are missing.
        """
        if not self._lines:
            return
        self._lines.seek(0)
        kept, end = [], 0
        for line in iter(self._lines.readline, ""):
            try:
                metrics = Metrics(**json.loads(line))
            except (ValueError, TypeError):
                break
            if not line.endswith("\n") or step is None or metrics.step > step:
                break
            kept.append(metrics)
            end = self._lines.tell()
        if step is not None and [metrics.step for metrics in kept] != list(range(step + 1)):
            raise UserError(f"{self.path / 'metrics.jsonl'} does not have the {step} steps of the checkpoint")
        self._lines.seek(0)
        self.logged = sum(line.endswith("\n") for line in self._lines) - 1
        self._lines.seek(end)
        self._lines.truncate()
        self.metrics = kept
        self._follow(-1 if step is None else step)

    def _follow(self, after: int | None) -> None:
        """Write for TensorBoard, too, where the settings say so; of a run that goes on, what is after a step anew."""
        if self.config.get("tensorboard"):
            self._scalars = Scalars(self.path / "tensorboard", after)

    def update_config(self, **fields: Any) -> None:
        """Add fields to config.json, which is either as before or as after."""
        self.config.update(fields)
        if not self._lines:
            return
        with replacing(self.path / "config.json") as (part,):
            part.write_text(json.dumps(self.config, indent=2, default=str) + "\n", encoding="utf-8")

    def log(self, metrics: Metrics) -> None:
        """Append a line to metrics.jsonl; it is on disk when this returns."""
        self.metrics.append(metrics)
        if not self._lines:
            return
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
        tensors = _whole_state(model)
        if not self._lines:
            return
        part, old = self.path / ".model.part", self.path / ".model.old"
        try:
            with quiet():
                model.save_pretrained(part, state_dict=tensors)
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

    def save_base(self, model: Any, tokenizer: Any) -> None:
        """Write the model without its adapters into ``base``, in place of what a killed process left there.

        Raises:
            OSError: it cannot be written.
        """
        shutil.rmtree(self.base, ignore_errors=True)
        tokenizer.save_pretrained(self.base)
        with without_adapters(model):
            save_quantized(model, self.base)

    def close(self) -> None:
        """Close metrics.jsonl. What could not be written was an error of ``log`` already."""
        with contextlib.suppress(OSError):
            if self._lines:
                self._lines.close()
            if self._scalars:
                self._scalars.close()


def _whole_state(model: Any) -> dict[str, torch.Tensor]:
    """All of the tensors of a model, of which processes may have parts; names that share one go on sharing it."""
    found, known = model.state_dict(keep_vars=True), dict[int, torch.Tensor]()
    for tensor in found.values():
        if id(tensor) not in known:
            known[id(tensor)] = whole(tensor.detach())
    return {name: known[id(tensor)] for name, tensor in found.items()}


def _take(out: Path | None) -> tuple[Path, TextIO]:
    """The directory, and metrics.jsonl in it: the run that makes this file has the directory."""
    start = out or Path("runs", f"{datetime.datetime.now():%Y%m%d-%H%M%S}")
    path, number = start, 1
    while True:
        path.mkdir(parents=True, exist_ok=True)
        try:
            lines = (path / "metrics.jsonl").open("x", encoding="utf-8")
            _lock(lines, path)
            return path, lines
        except FileExistsError:
            if out is not None:
                raise UserError(f"{out} was taken by another run in the meantime; give --out a new name") from None
        number += 1
        path = start.with_name(f"{start.name}-{number}")


def _lock(lines: TextIO, path: Path) -> None:
    try:
        fcntl.flock(lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path}: another process is writing this run; wait for it, or stop it") from None
    except OSError:  # a file system without locks
        pass


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
