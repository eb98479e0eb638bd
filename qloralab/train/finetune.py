"""Fine-tuning, from the settings to the run directory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qloralab.lora.inject import adapters

from ..checkpoint.models import is_default
from ..display import Display
from ..errors import UserError
from ..interrupt import StopRequest
from ..resident import peak_mb, resident_mb
from ..settings import ADAPTERS, DATA_TYPE, Settings
from .outlook import LONG, note, seconds_left
from .prepare import Prepared, prepare
from .report import Reports
from .run_directory import Metrics, RunDirectory
from .trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        path: the run directory.
        steps: done; fewer than asked for when interrupted.
        interrupted: by a signal, or an error.
        val_before, val_after: mean loss of the held-out answers, in nats per token; val_after is None when interrupted.
        tokens_per_s: over all steps, padding not counted, validation left out.
        peak_mb: the largest resident memory of the process, in 10**6 bytes.
        seconds: of training, validation left out.
    """

    path: Path
    steps: int
    interrupted: bool
    val_before: float
    val_after: float | None
    tokens_per_s: float
    peak_mb: float
    seconds: float


def finetune(settings: Settings, display: Display | None = None) -> Result:
    """Run a fine-tuning. Nothing is written before the data and the model have been read and the model was measured.

    After Ctrl-C, SIGTERM, SIGHUP or an error that nobody expects, what was trained is saved. After a second Ctrl-C or a
    UserError, the directory holds what the last validation saved. A sample or a picture that cannot be made ends
    nothing and is noted, and so is a display that nobody reads.

    Raises:
        UserError: the data, the model, the adapter or a setting is not usable, the loss became infinite, or the run
            directory cannot be written.
    """
    display = display or Display()
    prepared = prepare(settings, display)
    in_steps = settings.in_steps(len(prepared.train))
    trainer = Trainer(prepared.model, prepared.train, prepared.held_out, in_steps, prepared.precision.dtype)
    reports = Reports(trainer, prepared.tokenizer, display)
    reports.answer("before")
    start = time.perf_counter()
    val_before = _validate(trainer, display)
    validation_s = time.perf_counter() - start
    with _writing(settings.out or Path("runs")):
        directory = _directory(settings, prepared, in_steps.steps)
    display.fact("run", str(directory.path))
    try:
        with _writing(directory.path):
            directory.log(Metrics(0, 0, None, val_before, None, None, None, resident_mb()))
        return _Run(trainer, prepared, directory, reports, display, validation_s).train()
    finally:
        directory.close()


def _directory(settings: Settings, prepared: Prepared, steps: int) -> RunDirectory:
    """A new run directory, whose config tells what the settings came to."""
    chosen, layers = prepared.precision, [*adapters(prepared.model).values()]
    used: dict[str, Any] = {}
    if layers:
        config = layers[0].config
        used = {name: getattr(config, name) for name in ADAPTERS} | {"rslora": config.use_rslora}
        if not settings.adapter:  # whose file does not tell how it started
            used |= {"target_modules": config.target_modules, "init": settings.init or "kaiming"}
    if (kind := prepared.data_type) is not None:
        used |= {"data_type": settings.data_type or DATA_TYPE, "quantization": kind.settings()}
        used |= {"block_size": kind.block_size, "double_quant": kind.double_quant, "skip": settings.skipped}
    held_out = len(prepared.held_out)
    return RunDirectory(
        settings, steps=steps, epochs=None, dtype=chosen.name, dtype_reason=chosen.why, held_out=held_out, **used
    )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Writing what a run is for: that it fails, mostly because the disk is full, ends the run."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error


def _validate(trainer: Trainer, display: Display) -> float:
    with display.busy("validating", "tokens") as progress:
        return trainer.validate(progress)


@dataclasses.dataclass
class _Run:
    """A run whose model was measured: the steps, and what is left of them."""

    trainer: Trainer
    prepared: Prepared
    directory: RunDirectory
    reports: Reports
    display: Display
    validation_s: float
    saved_at: int = -1  # the step after which it was saved last

    def train(self) -> Result:
        """Take the steps and finish, whatever ends them but a mistake of the user's."""
        with StopRequest(lambda: self.display.fact("stopping", "and saving; Ctrl-C again to stop at once")) as stop:
            try:
                self._steps(stop)
            except UserError:
                raise
            except Exception as error:
                self.reports.notes.append(f"unexpected {type(error).__name__}: {error}")
                try:
                    self._finish(interrupted=True)
                finally:
                    raise error
            return self._finish(interrupted=self.trainer.step < self.trainer.settings.steps)

    def _steps(self, stop: StopRequest) -> None:
        steps = self.trainer.settings.steps
        with self.display.training(steps):
            self.display.step(self.directory.metrics[-1], steps)
            while self.trainer.step < steps and not stop.requested:
                self._step(stop)
                if self.trainer.step < steps and not stop.requested:
                    self._tell_if_long(self.directory.metrics[-1])

    def _step(self, stop: StopRequest) -> None:
        """One step; a validation where one is due, and what was trained so far on the disk."""
        settings, metrics = self.trainer.settings, self.trainer.train_step()
        if metrics.step == settings.steps or (metrics.step % settings.eval_every == 0 and not stop.requested):
            metrics = dataclasses.replace(metrics, val_loss=_validate(self.trainer, self.display))
            self._save()
        with _writing(self.directory.path):
            self.directory.log(metrics)
        self.display.step(metrics, settings.steps, self.trainer.paging())

    def _tell_if_long(self, metrics: Metrics) -> None:
        """Once, after the first step; on a GPU after the second: the kernels of backward are compiled in the first."""
        device, settings = self.trainer.device.type, self.trainer.settings
        if metrics.step != (1 if device == "cpu" else 2):
            return
        left = seconds_left(settings, metrics, self.trainer.tokens_per_step, self.validation_s)
        if left > LONG:
            self.display.fact("note", note(settings, metrics.step, left, self.prepared.precision, device))

    def _save(self) -> None:
        with self.display.busy("saving"), _writing(self.directory.path):
            self.directory.save(self.trainer.model, self.prepared.tokenizer)
        self.saved_at = self.trainer.step

    def _finish(self, interrupted: bool) -> Result:
        """Save, report and sum up."""
        if self.saved_at != self.trainer.step:
            self._save()
        if not interrupted:
            self.reports.answer("after")
        with self.display.busy("drawing the losses"):
            self.reports.write(self.directory)
        if self.display.failure:
            self.reports.notes.append(f"the display could not be written: {self.display.failure}")
        result = self._result(interrupted)
        with _writing(self.directory.path):
            self.directory.update_config(result=dataclasses.asdict(result), notes=self.reports.notes)
        self._summarize(result)
        return result

    def _result(self, interrupted: bool) -> Result:
        trainer, metrics = self.trainer, self.directory.metrics
        assert metrics[0].val_loss is not None
        return Result(
            path=self.directory.path,
            steps=trainer.step,
            interrupted=interrupted,
            val_before=metrics[0].val_loss,
            val_after=None if interrupted else metrics[-1].val_loss,
            tokens_per_s=trainer.tokens / trainer.seconds if trainer.seconds else 0.0,
            peak_mb=peak_mb(),
            seconds=trainer.seconds,
        )

    def _summarize(self, result: Result) -> None:
        settings, fact = self.trainer.settings, self.display.fact
        after = "not measured" if result.val_after is None else f"{result.val_after:.2f}"
        fact("val loss", f"{result.val_before:.2f} -> {after}")
        memory = f"{result.peak_mb / 1000:.2f} GB of memory"
        fact("speed", f"{result.tokens_per_s:,.0f} tokens/s, {result.seconds:.0f} s of training, {memory}")
        saved, reports = self.directory.trained, (result.path / name for name in ("loss.png", "samples.md"))
        fact("saved", ", ".join(map(str, [saved, *filter(Path.exists, reports)])))
        model = "" if is_default(settings.model) else f"--model {settings.model} "
        what = f"--model {saved}" if settings.method == "full" else f"{model}--adapter {saved}"
        how = "" if settings.method == "qlora" else " --dense"
        how = how if settings.data_type is None else f" --data-type {settings.data_type}"
        if (settings.block_size, settings.double_quant, settings.skip) == (
            None,
            None,
            None,
        ):
            fact("try it", f'qloralab generate {what}{how} --prompt "…"')
