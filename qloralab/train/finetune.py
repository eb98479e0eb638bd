"""Fine-tuning, from the settings to the run directory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from qloralab.lora.config import LoraConfig
from qloralab.lora.inject import adapters, inject_, trainable
from qloralab.nf4.dense_shares import described
from qloralab.nf4.linear import QuantizedLinear

from ..checkpoint.limits import Limits
from ..checkpoint.models import (
    DENSE_DTYPE,
    check_adapter,
    check_adapter_fits,
    check_model,
    holds_4bit,
    is_default,
    load_adapter,
    load_model,
    load_tokenizer_and_config,
    model_name,
    quantize_loaded_,
)
from ..checkpoint.output_directory import check_writable, count_text, size_text
from ..checkpoint.quantized_model import parameter_count
from ..compute import Precision, precision, prepare_kernels, prepare_memory, run_device
from ..data.batches import split
from ..data.encoding import NO_LABEL, Encoded, encode_all
from ..data.examples import Example, read_jsonl
from ..data.stdlib_corpus import stdlib_examples
from ..display import Display
from ..errors import UserError
from ..interrupt import StopRequest
from ..resident import peak_mb, resident_mb
from ..settings import ADAPTERS, STDLIB, Settings
from .generate import generate
from .outlook import LONG, note, seconds_left
from .report import plot_loss, write_samples
from .run_directory import Metrics, RunDirectory
from .trainer import Trainer

_SAMPLES = 3
_SAMPLE_TOKENS = 32

Sample = tuple[list[int], list[int]]  # the tokens of a prompt and of its answer


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

    Whatever ends the training later, what was trained is saved first: Ctrl-C, SIGTERM, SIGHUP, an error that nobody
    expects. That samples or pictures cannot be made, or nobody reads the display, ends nothing, and is noted.

    Raises:
        UserError: the data, the model, the adapter or a setting is not usable, the loss became infinite, or the run
            directory cannot be written.
    """
    display = display or Display()
    config = _lora_config(settings)
    chosen = precision(settings.dtype, run_device())
    _check_paths(settings)
    tokenizer, train, held_out = _read_data(settings, display)
    torch.manual_seed(settings.seed)
    model = _prepare_model(settings, config, chosen, display)
    _check_limits(Limits.of(model), [*train, *held_out], tokenizer, display)
    trainer = Trainer(model, tokenizer, train, held_out, settings, chosen.dtype)
    reports = _Reports(trainer, display)
    reports.answer("before")
    start = time.perf_counter()
    val_before = _validate(trainer, display)
    validation_s = time.perf_counter() - start

    with _writing(settings.out or Path("runs")):
        run = RunDirectory(
            settings,
            dtype=chosen.name,
            dtype_reason=chosen.why,
            held_out=len(held_out),
            **_adapters_of(model),
        )
    display.fact("run", str(run.path))
    try:
        with _writing(run.path):
            run.log(Metrics(0, 0, None, val_before, None, None, None, resident_mb()))
        return _train(trainer, run, reports, validation_s, chosen, display)
    finally:
        run.close()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Writing what a run is for: that it fails, mostly because the disk is full, ends the run."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error


def prompt_and_answer(example: Encoded) -> Sample:
    """The tokens before the last answer, and that answer. A text without a question is cut after 16 tokens."""
    labels = example.labels
    end = max(i for i, label in enumerate(labels) if label != NO_LABEL) + 1
    start = end
    while start > 0 and labels[start - 1] != NO_LABEL:
        start -= 1
    start = start or min(16, end - 1)
    return example.input_ids[:start], example.input_ids[start:end]


def _lora_config(settings: Settings) -> LoraConfig:
    try:
        return LoraConfig(**settings.new_adapters)
    except ValueError as error:
        raise UserError(str(error)) from None


def _check_paths(settings: Settings) -> None:
    """Refuse at once what would be refused after the data, or the model, has been read."""
    check_model(settings.model)
    if settings.method != "qlora" and holds_4bit(settings.model):
        needs = "trains all weights" if settings.method == "full" else "trains adapters beside dense ones"
        raise UserError(
            f"{settings.model} holds 4-bit weights and --method {settings.method} {needs}; "
            "give --model the dense model, or use --method qlora"
        )
    if settings.adapter:
        check_adapter(settings.adapter)
    out = settings.out or Path("runs")
    check_writable(out, out.absolute())


def _adapters_of(model: Any) -> dict[str, Any]:
    """The fields of config.json about the adapters that are there, read or new."""
    configs = [layer.config for layer in adapters(model).values()]
    return {name: getattr(configs[0], name) for name in ADAPTERS} if configs else {}


def _read_data(settings: Settings, display: Display) -> tuple[Any, list[Encoded], list[Encoded]]:
    with display.busy("reading the examples"):
        stdlib = settings.data == STDLIB
        examples: list[Example] = stdlib_examples() if stdlib else read_jsonl(Path(settings.data), settings.format)
    with display.busy("reading the tokenizer"):
        tokenizer, config = load_tokenizer_and_config(settings.model)
        limits = Limits.of_directory(settings.model)
    if settings.adapter and (other_model := check_adapter_fits(settings.adapter, config)):
        display.fact("note", other_model)
    positions = limits and limits.positions
    with display.busy("tokenizing", "examples") as progress:
        encoded = encode_all(examples, tokenizer, settings.max_length, settings.treats_too_long, progress, positions)
    if limits:
        limits.check(((one.source, one.input_ids) for one in encoded), tokenizer)
    of_an_example = [list(group) for _, group in groupby(encoded, key=lambda one: one.source)]
    halves = split(of_an_example, settings.held_out, settings.seed)  # the answers of a conversation stay together
    train, held_out = (list(chain.from_iterable(half)) for half in halves)
    source = "docstrings of the Python standard library" if stdlib else settings.data
    counts = {
        "left out as too long": len(examples) - len(of_an_example),
        f"cut to {min(settings.max_length, positions or settings.max_length)} tokens": sum(
            group[0].cut for group in of_an_example
        ),
        "conversations as one example for each answer": sum(len(group) > 1 for group in of_an_example),
        "duplicates": len(encoded) - len({tuple(one.input_ids) for one in encoded}),
    }
    said = [f"{source}: {len(train):,} examples + {len(held_out)} held out"]
    said += [f"{count:,} {what}" for what, count in counts.items() if count]
    if unused := dict.fromkeys(name for example in examples for name in example.unused):
        said.append(f"fields that are not used: {', '.join(unused)}")
    display.fact("data", "; ".join(said))
    return tokenizer, train, held_out


def _check_limits(limits: Limits, encoded: Sequence[Encoded], tokenizer: Any, display: Display) -> None:
    limits.check(((one.source, one.input_ids) for one in encoded), tokenizer)
    longer = sum(len(one.input_ids) > (limits.context or len(one.input_ids)) for one in encoded)
    if longer:
        display.fact(
            "note", f"{longer:,} examples are longer than the {limits.context:,} tokens the model was made for"
        )


def _prepare_model(settings: Settings, config: LoraConfig, chosen: Precision, display: Display) -> Any:
    name = model_name(settings.model)
    to_quantize = settings.method == "qlora" and not holds_4bit(settings.model)
    with display.busy(f"reading {name}"):
        dtype = torch.float32 if settings.method == "full" else chosen.dtype
        model = load_model(settings.model, DENSE_DTYPE if to_quantize else dtype)
    display.fact("model", f"{name}, {count_text(parameter_count(model))} parameters")
    display.fact("dtype", chosen.described(settings.method))
    prepare_kernels(display)
    prepare_memory(display)
    if settings.method == "qlora":
        if to_quantize:  # in a model with 4-bit weights, what is dense is to stay dense
            with display.busy("quantizing", "weights") as progress:
                quantize_loaded_(model, chosen.dtype, progress)
        weights = [module.weight for module in model.modules() if isinstance(module, QuantizedLinear)]
        count, size = sum(w.numel() for w in weights), sum(w.nbytes for w in weights)
        bits = 8 * size / count
        display.fact(
            "4 bits",
            f"{len(weights)} linear layers, {count_text(count)} weights at {bits:.3f} bits: {size_text(size)}",
        )
        display.fact("dense", described(model))
    if settings.method != "full":
        if settings.adapter:
            load_adapter(model, settings.adapter)
        else:
            _inject(model, config)
        used = next(iter(adapters(model).values())).config
        start = f", from {settings.adapter}" if settings.adapter else ""
        count = sum(p.numel() for p in trainable(model))
        display.fact(
            "adapters",
            f"r = {used.r}, alpha = {used.lora_alpha:g}: {count_text(count)} trainable parameters{start}",
        )
    if settings.checkpointing:
        # transformers renames it; the old name goes in version 6
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model.to(run_device())


def _inject(model: Any, config: LoraConfig) -> None:
    try:
        inject_(model, config)
    except ValueError as error:
        raise UserError(str(error)) from error


class _Reports:
    """What a run tells beside its numbers. That a part of it cannot be made ends no run, and is a note.

    Args:
        trainer: of the run.
        display: shows the notes too.

    Attributes:
        notes: for config.json.
    """

    def __init__(self, trainer: Trainer, display: Display):
        self.notes: list[str] = []
        self._trainer, self._display = trainer, display
        self._examples = trainer.held_out[:_SAMPLES]
        self._samples = [prompt_and_answer(example) for example in self._examples]
        self._answers: dict[str, list[str]] = {}

    def answer(self, when: str) -> None:
        """Answer the held-out prompts, "before" or "after" training."""
        trainer, prompts = self._trainer, [prompt for prompt, _ in self._samples]
        with (
            self._optional(f"answers {when} training"),
            self._display.busy(f"answering held-out prompts {when} training", "tokens") as progress,
        ):
            self._answers[when] = generate(trainer.model, trainer.tokenizer, prompts, _SAMPLE_TOKENS, progress)

    def write(self, run: RunDirectory) -> None:
        """Write loss.png and samples.md."""
        settings, decode = self._trainer.settings, self._trainer.tokenizer.decode
        title = f"{model_name(settings.model)}, {settings.method}, {self._trainer.step} steps"
        with self._optional("loss.png"):
            plot_loss(run.metrics, title, run.path / "loss.png")
        with self._optional("samples.md"):
            prompts, references = zip(*self._samples, strict=True)
            write_samples(
                run.path / "samples.md",
                [decode(prompt, skip_special_tokens=False) for prompt in prompts],
                {**self._answers, "reference": [decode(one, skip_special_tokens=False) for one in references]},
                [example.source for example in self._examples],
                title,
            )

    @contextmanager
    def _optional(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.notes.append(f"no {what}: {' '.join(str(error).split()) or type(error).__name__}")
            self._display.fact("note", self.notes[-1])


def _validate(trainer: Trainer, display: Display) -> float:
    with display.busy("validating", "tokens") as progress:
        return trainer.validate(progress)


def _train(
    trainer: Trainer,
    run: RunDirectory,
    reports: _Reports,
    validation_s: float,
    chosen: Precision,
    display: Display,
) -> Result:
    settings = trainer.settings
    unexpected: Exception | None = None
    with StopRequest(lambda: display.fact("stopping", "and saving; Ctrl-C again to stop at once")) as stop:
        try:
            with display.training(settings.steps):
                display.step(run.metrics[-1], settings.steps)
                while trainer.step < settings.steps and not stop.requested:
                    _train_step(trainer, run, stop, display)
                    if not (trainer.step == settings.steps or stop.requested):
                        _tell_if_long(trainer, run.metrics[-1], validation_s, chosen, display)
        except UserError:
            raise
        except Exception as error:
            unexpected = error
            reports.notes.append(f"unexpected {type(error).__name__}: {error}")
        interrupted = trainer.step < settings.steps or unexpected is not None
        try:
            if trainer.saved_at != trainer.step:
                _save(trainer, run, display)
            if not interrupted:
                reports.answer("after")
            with display.busy("drawing the losses"):
                reports.write(run)
            if display.failure:
                reports.notes.append(f"the display could not be written: {display.failure}")
            result = _result(trainer, run, interrupted)
            with _writing(run.path):
                run.update_config(result={**dataclasses.asdict(result), "path": str(run.path)}, notes=reports.notes)
            _summarize(result, trainer.place(run.path), settings, display)
        finally:
            if unexpected is not None:
                raise unexpected
    return result


def _train_step(trainer: Trainer, run: RunDirectory, stop: StopRequest, display: Display) -> None:
    """A step; a validation where one is due, and what was trained so far on the disk."""
    settings, metrics = trainer.settings, trainer.train_step()
    if metrics.step == settings.steps or (metrics.step % settings.eval_every == 0 and not stop.requested):
        metrics = dataclasses.replace(metrics, val_loss=_validate(trainer, display))
        _save(trainer, run, display)
    with _writing(run.path):
        run.log(metrics)
    display.step(metrics, settings.steps, trainer.paging())


def _save(trainer: Trainer, run: RunDirectory, display: Display) -> None:
    with display.busy("saving"), _writing(run.path):
        trainer.save(run.path)


def _result(trainer: Trainer, run: RunDirectory, interrupted: bool) -> Result:
    val_before, val_after = run.metrics[0].val_loss, run.metrics[-1].val_loss
    assert val_before is not None
    return Result(
        path=run.path,
        steps=trainer.step,
        interrupted=interrupted,
        val_before=val_before,
        val_after=None if interrupted else val_after,
        tokens_per_s=trainer.tokens / trainer.seconds if trainer.seconds else 0.0,
        peak_mb=peak_mb(),
        seconds=trainer.seconds,
    )


def _tell_if_long(trainer: Trainer, metrics: Metrics, validation_s: float, chosen: Precision, display: Display) -> None:
    """Once, after the first step; on a GPU after the second: the kernels of backward are compiled in the first."""
    device = trainer.device.type
    if metrics.step != (1 if device == "cpu" else 2):
        return
    assert metrics.tokens_per_s is not None
    settings = trainer.settings
    left = seconds_left(settings, metrics.step, trainer.tokens_per_step, metrics.tokens_per_s, validation_s)
    if left > LONG:
        display.fact("note", note(settings, metrics.step, left, chosen, device))


def _summarize(result: Result, saved: Path, settings: Settings, display: Display) -> None:
    after = "not measured" if result.val_after is None else f"{result.val_after:.2f}"
    display.fact("val loss", f"{result.val_before:.2f} -> {after}")
    memory = f"{result.peak_mb / 1000:.2f} GB of memory"
    display.fact("speed", f"{result.tokens_per_s:,.0f} tokens/s, {result.seconds:.0f} s of training, {memory}")
    reports = (result.path / name for name in ("loss.png", "samples.md"))
    display.fact("saved", ", ".join(map(str, [saved, *filter(Path.exists, reports)])))
    model = f"--model {settings.model} " if not is_default(settings.model) else ""
    what = f"--model {saved} --dense" if settings.method == "full" else f"{model}--adapter {saved}"
    what += " --dense" if settings.method == "lora" else ""
    display.fact("try it", f'qloralab generate {what} --prompt "…"')
