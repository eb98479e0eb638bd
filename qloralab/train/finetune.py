"""Fine-tuning, from the settings to the run directory, and from a run directory to its end.

A run that is killed at any moment loses the steps since its last checkpoint and nothing else: ``resume`` prepares the
same model and the same examples, which must have the fingerprints of the run, loads the checkpoint and takes the steps
that are left. On a CPU, with the same versions and number of threads, metrics and adapter are bit for bit those of a
run that was never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor

from qloralab.kernels.gpu import dense_cache
from qloralab.lora.inject import adapters
from qloralab.nf4.dense_shares import LOGGER

from ..checkpoint.models import is_default
from ..checkpoint.output_directory import check_writable, size_text
from ..data.encoding import fingerprint
from ..display import Display
from ..errors import UserError
from ..interrupt import StopRequest
from ..resident import peak_mb, resident_mb
from ..settings import ADAPTERS, DATA_TYPE, SPLITTING, Settings
from .checkpoint import read_progress
from .outlook import LONG, note, seconds_left
from .prepare import Prepared, prepare
from .processes import ALONE, Processes, held_bytes
from .report import Reports
from .run_directory import Metrics, RunDirectory, versions
from .trainer import Diverged, Trainer


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


def finetune(settings: Settings, display: Display | None = None, processes: Processes = ALONE) -> Result:
    """Run a fine-tuning. Nothing is written before the data and the model have been read and the model was measured.

    After Ctrl-C, SIGTERM, SIGHUP, an infinite loss or an error that nobody expects, what was trained is saved. After a
    second Ctrl-C or another UserError, the directory holds the last checkpoint. A sample or a picture that cannot be
    made ends nothing and is noted, and so is a display that nobody reads.

    Args:
        settings: of the run.
        display: shows what is going on.
        processes: that train together (``processes.py``). Each of them calls this, with the same settings.

    Raises:
        UserError: the data, the model, the adapter or a setting is not usable, the loss became infinite, or the run
            directory cannot be written.
    """
    display = _shown(display, processes)
    _check_together(settings, processes)
    out = settings.out or Path("runs")
    check_writable(out, out.absolute())
    prepared = prepare(settings, display)
    fingerprints = _fingerprints(prepared)
    processes.check_same(fingerprints)
    in_steps = settings.in_steps(len(prepared.train))
    run = _Run.of(in_steps, prepared, display, processes)
    first = run.before()
    with _writing(out):
        directory = None
        if processes.first:
            directory = _directory(settings, prepared, in_steps.steps, fingerprints, processes)
    directory = _followed(directory, processes)
    display.fact("run", str(directory.path))
    return run.train(directory, first)


def resume(
    path: Path, steps: int | None = None, display: Display | None = None, processes: Processes = ALONE
) -> Result:
    """Go on with a run that was interrupted or killed, or that is to have more steps, in its own directory.

    Args:
        path: of the run directory.
        steps: the run is to have in all; by default as many as it was started with. The learning rate falls towards
            the new end from where it goes on, so that such a run is not the one that had these steps from the start.
        display: shows what is going on.
        processes: that go on together; not necessarily as many as before, or in the same way.

    Raises:
        UserError: there is no run, it lives or is complete; its model, data or a setting has changed; or see
            ``finetune``.
        FormatError: a checkpoint is damaged.
    """
    display = _shown(display, processes)
    directory = _followed(RunDirectory.reopen(path) if processes.first else None, processes)
    try:
        settings = directory.settings(steps)
        _check_together(settings, processes)
        checkpoint = processes.from_first(directory.checkpoints[-1] if directory.checkpoints else None)
        progress = read_progress(checkpoint) if checkpoint else None
        _check_unchanged(directory, settings, progress)
        prepared = prepare(settings, display)
        fingerprints = _fingerprints(prepared)
        for what, found in fingerprints.items():
            if directory.config["fingerprints"][what] != found:
                raise UserError(f"{path} began with {_CHANGED[what]}: its {what} changed since; it cannot go on")
        processes.check_same(fingerprints)
        run = _Run.of(settings, prepared, display, processes)
        if checkpoint is None:  # it was killed before the first one: from the start
            first = run.before()
            directory.rewind(None)
        else:
            first = None
            run.reports.answers = run.trainer.load(checkpoint)["answers"]
            directory.rewind(run.trainer.step)
        directory.metrics = processes.from_first(directory.metrics)
        display.fact("run", f"{path}, from step {run.trainer.step} of {settings.steps}")
        with _writing(path):
            again = {"step": run.trainer.step, "versions": versions(), **_told(processes)}
            again = [*directory.config.get("resumed", []), again]
            directory.update_config(steps=settings.steps, given=settings.given(), resumed=again)
    except BaseException:
        directory.close()
        raise
    return run.train(directory, first)


def _shown(display: Display | None, processes: Processes) -> Display:
    """The display of the first process; one that nobody sees in all others."""
    return display or Display() if processes.first else Display(Console(file=io.StringIO(), quiet=True))


def _check_together(settings: Settings, processes: Processes) -> None:
    """Refuse what several processes cannot do."""
    if processes.parallel is not None and settings.graph:
        raise UserError("--graph takes one process, --parallel exchanges gradients in between; leave one out")
    if processes.parallel is not None and settings.seeds is not None:
        raise UserError("--seeds takes one process; start a run with --parallel for each --seed")
    if processes.sharded and settings.state_bits == 8:
        raise UserError(
            "--parallel fsdp has no --state-bits 8, whose scales cannot be split; each process holds a part"
        )
    if processes.sharded and settings.init in SPLITTING:
        raise UserError(
            f"--parallel fsdp has no --init {settings.init}, which saves a base; start from one that a run has saved: "
            "--model RUN/base --adapter RUN/adapter"
        )


def _followed(directory: RunDirectory | None, processes: Processes) -> RunDirectory:
    """The directory that the first process has, in all of them."""
    found = processes.from_first(None if directory is None else (directory.path, directory.config))
    assert found is not None
    return directory or RunDirectory.of_another(*found)


def _told(processes: Processes) -> dict[str, Any]:
    """The processes, for config.json."""
    return {} if processes.parallel is None else {"parallel": processes.parallel, "processes": processes.count}


_CHANGED = {"data": "other examples, or another tokenizer", "model": "other weights"}


def _fingerprints(prepared: Prepared) -> dict[str, str]:
    """What a run must find again to go on: SHA-256 of the tokens of all examples, and of all that is frozen."""
    digest, model = hashlib.sha256(), prepared.model
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            if name not in training:
                digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return {"data": fingerprint([*prepared.train, *prepared.held_out]), "model": digest.hexdigest()}


def _check_unchanged(directory: RunDirectory, settings: Settings, progress: Mapping[str, Any] | None) -> None:
    """Refuse a run that is complete, or whose config.json is no longer that of its checkpoint."""
    path, result = directory.path, directory.config.get("result")
    if result and not result["interrupted"] and result["steps"] >= settings.steps:
        raise UserError(f"{path} is complete, with {result['steps']} steps; give --steps to go on")
    now, then = settings.given(), {} if progress is None else progress["settings"]
    for name in sorted((now.keys() | then.keys()) - {"steps", "epochs"}) if progress else ():
        if now.get(name) != then.get(name):
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{path}: {option} was {then.get(name)} and is {now.get(name)} in config.json now; undo that"
            )
    before, here = directory.config["versions"], versions()
    changed = [f"{name} {before.get(name)}, now {here[name]}" for name in here if before.get(name) != here[name]]
    if changed:
        LOGGER.warning("%s began with %s: the steps may differ in the last bits", path, "; ".join(changed))


def _directory(
    settings: Settings, prepared: Prepared, steps: int, fingerprints: dict[str, str], processes: Processes
) -> RunDirectory:
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
    if prepared.init_errors is not None:
        used["init_errors"] = prepared.init_errors
    used |= {"steps": steps, "epochs": None, "held_out": len(prepared.held_out), "fingerprints": fingerprints}
    used |= _told(processes)
    return RunDirectory.create(settings, dtype=chosen.name, dtype_reason=chosen.why, **used)


@contextlib.contextmanager
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
    """The steps of a run, and what is left of them."""

    trainer: Trainer
    prepared: Prepared
    reports: Reports
    display: Display
    processes: Processes
    directory: RunDirectory = dataclasses.field(init=False)
    validation_s: float = 0.0
    saved_at: int = -1  # the step after which it was saved last
    stopping: bool = False  # a signal has reached one of the processes

    @classmethod
    def of(cls, settings: Settings, prepared: Prepared, display: Display, processes: Processes) -> _Run:
        model, before = prepared.model, held_bytes(prepared.model)
        trainer = Trainer(model, prepared.train, prepared.held_out, settings, prepared.precision.dtype, processes)
        if processes.parallel is not None:
            held = f"{size_text(held_bytes(model))} of the model in each, of {size_text(before)}"
            display.fact("processes", f"{processes.count}, {processes.parallel}: {held}")
        return cls(trainer, prepared, Reports(trainer, prepared.tokenizer, display), display, processes)

    def before(self) -> Metrics:
        """The model before training: its answers, and its loss."""
        self.reports.answer("before")
        start = time.perf_counter()
        val_loss = _validate(self.trainer, self.display)
        self.validation_s = time.perf_counter() - start
        return Metrics(0, 0, None, val_loss, None, None, None, resident_mb())

    def train(self, directory: RunDirectory, first: Metrics | None) -> Result:
        """Take the steps and finish, whatever ends them but a mistake of the user's.

        Args:
            directory: to write into; it is closed at the end.
            first: the metrics of step 0, where the run begins.
        """
        self.directory = directory
        if self.prepared.init_errors is not None:
            self.trainer.model.config._name_or_path = str(directory.base)  # what the adapter's file says it is for
        with contextlib.closing(directory), contextlib.closing(self.reports):
            self.reports.follow(directory)
            if first is not None:
                with _writing(directory.path):
                    if self.prepared.init_errors is not None and self.processes.first:
                        directory.save_base(self.trainer.model, self.prepared.tokenizer)
                    directory.log(first)
                self.reports.track(first)
            return self._train()

    def _train(self) -> Result:
        launched = self.processes.parallel is not None
        saying = functools.partial(self.display.fact, "stopping", "and saving; Ctrl-C again to stop at once")
        with StopRequest(saying, launched) as stop:
            try:
                self._steps(stop)
            except Diverged as error:
                raise UserError(f"{error}; {self._last_good()}") from None
            except UserError:
                raise
            except Exception as error:
                self.reports.notes.append(f"unexpected {type(error).__name__}: {error}")
                try:
                    self._finish(interrupted=True)
                finally:
                    raise error
            return self._finish(interrupted=self.trainer.step < self.trainer.settings.steps)

    def _last_good(self) -> str:
        """After a step that went wrong: save the model before it if its validation loss is finite; what there is."""
        with contextlib.suppress(UserError):
            _validate(self.trainer, self.display)
            self._save()
        kept = self.directory.checkpoints
        return f"what was trained before is in {kept[-1]}" if kept else "nothing was saved before"

    def _steps(self, stop: StopRequest) -> None:
        steps = self.trainer.settings.steps
        if self.trainer.settings.graph:
            self._capture()
        with self.display.training(steps, self.trainer.step), self._dense_weights():
            self.display.step(self.directory.metrics[-1], steps)
            self.stopping = self.processes.any(stop.requested)
            while self.trainer.step < steps and not self.stopping:
                self._step(stop)
                if self.trainer.step < steps and not self.stopping:
                    self._tell_if_long(self.directory.metrics[-1])

    def _capture(self) -> None:
        """The steps as CUDA graphs; where that fails they run as they are, and it is said and noted."""
        try:
            with self.display.busy("capturing the steps", "parts") as progress:
                self.trainer.capture(progress)
        except RuntimeError as error:
            why = f"the steps run without CUDA graphs: {' '.join(str(error).split())[:300]}"
            LOGGER.warning("%s", why)
            self.reports.notes.append(why)
        else:
            assert self.trainer.graphs is not None
            self.display.fact("graphs", self.trainer.graphs.described())

    def _dense_weights(self) -> contextlib.AbstractContextManager[None]:
        """Those of a block that is computed again, on a GPU, until its gradients are known."""
        if not self.trainer.settings.checkpointing:
            return contextlib.nullcontext()
        return dense_cache.while_recomputing(self.trainer.device)

    def _step(self, stop: StopRequest) -> None:
        """One step; a validation where one is due; a checkpoint where one is due, when the metrics are written."""
        settings, metrics = self.trainer.settings, self.trainer.train_step()
        last = metrics.step == settings.steps
        self.stopping = self.processes.any(stop.requested)
        if last or (metrics.step % settings.eval_every == 0 and not self.stopping):
            metrics = dataclasses.replace(metrics, val_loss=_validate(self.trainer, self.display))
        with _writing(self.directory.path):
            self.directory.log(metrics)
        self.reports.track(metrics)
        if last or metrics.step % (settings.save_every or settings.eval_every) == 0:
            self._save()
        self.display.step(metrics, settings.steps, self.trainer.paging())

    def _tell_if_long(self, metrics: Metrics) -> None:
        """Once, after the first step; on a GPU after the second: the kernels of backward are compiled in the first."""
        device, settings = self.trainer.device.type, self.trainer.settings
        if metrics.step != (1 if device == "cpu" else 2) or not self.validation_s:
            return
        left = seconds_left(settings, metrics, self.trainer.tokens_per_step, self.validation_s)
        if left > LONG:
            self.display.fact("note", note(settings, metrics.step, left, self.prepared.precision, device))

    def _save(self) -> None:
        """What was trained, as others open it, and the checkpoint that a run goes on from.

        After an error in a validation the metrics lack the step, and the checkpoint before stays the last one.
        """
        trainer, directory = self.trainer, self.directory
        if self.processes.first or self.processes.sharded:
            self._write(trainer, directory)
        self.saved_at = trainer.step

    def _write(self, trainer: Trainer, directory: RunDirectory) -> None:
        with self.display.busy("saving"), _writing(directory.path):
            directory.save(trainer.model, self.prepared.tokenizer)
            if directory.metrics[-1].step == trainer.step:
                given = {"settings": trainer.settings.given(), "answers": self.reports.answers}
                trainer.save(directory.new_checkpoint(trainer.step), **given)
                directory.forget_checkpoints(trainer.settings.keep)

    def _finish(self, interrupted: bool) -> Result:
        """Save, report and sum up."""
        if self.saved_at != self.trainer.step:
            self._save()
        if not interrupted:
            self.reports.answer("after")
        if self.processes.first:
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
        if self.prepared.init_errors is not None:
            model = f"--model {self.directory.base} "
        what = f"--model {saved}" if settings.method == "full" else f"{model}--adapter {saved}"
        if settings.merge_aware:
            fact("try it", f"qloralab merge {what} --into 4bit --out DIR")
            return
        how = "" if settings.method == "qlora" else " --dense"
        how = how if settings.data_type is None else f" --data-type {settings.data_type}"
        how = how if self.prepared.init_errors is None else ""  # base is in 4 bits already
        own = settings.block_size, settings.double_quant, settings.skip
        if self.prepared.init_errors is not None or own == (None, None, None):  # generate has no such options
            fact("try it", f'qloralab generate {what}{how} --prompt "…"')
