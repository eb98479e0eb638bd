"""Fine-tuning, from the settings to the run directory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from qloralab.lora.config import LoraConfig
from qloralab.lora.inject import adapters, inject_, trainable
from qloralab.lora.quantized_linear import QuantizedLinear

from .batches import split
from .compute import Precision, precision, prepare_kernels, prepare_memory, run_device
from .display import Display
from .encoding import NO_LABEL, Encoded, encode_all
from .errors import UserError
from .examples import Example, read_jsonl
from .generate import generate
from .interrupt import StopRequest
from .limits import Limits
from .memory import peak_mb, resident_mb
from .models import (
    DENSE_DTYPE,
    check_adapter,
    check_model,
    holds_4bit,
    is_default,
    load_adapter,
    load_model,
    load_tokenizer,
    model_name,
    quantize_loaded_,
)
from .outlook import LONG, note, seconds_left
from .output_directory import check_writable
from .quantized_model import parameter_count
from .report import plot_loss, write_samples
from .run_directory import Metrics, RunDirectory
from .settings import STDLIB, Settings
from .stdlib_corpus import stdlib_examples
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
        interrupted: by Ctrl-C.
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
    settings = dataclasses.replace(_as_trained(settings, model), dtype=chosen.name, held_out=len(held_out))
    try:
        trainer = Trainer(model, tokenizer, train, held_out, settings, chosen.dtype)
    except (OSError, MemoryError) as error:  # no room for the state of the optimizer
        raise UserError(getattr(error, "strerror", None) or str(error)) from error
    samples = [prompt_and_answer(example) for example in held_out[:_SAMPLES]]
    before = _answer(trainer, samples, "before", display)
    start = time.perf_counter()
    val_before = _validate(trainer, display)
    validation_s = time.perf_counter() - start

    try:
        run = RunDirectory(settings, dtype_reason=chosen.why)
    except OSError as error:
        raise UserError(f"{settings.out} cannot be written: {error.strerror}") from error
    display.fact("run", str(run.path))
    try:
        run.log(Metrics(0, 0, None, val_before, None, None, None, resident_mb()))
        return _train(trainer, run, samples, before, validation_s, chosen, display)
    except (OSError, SafetensorError) as error:  # mostly a full disk
        raise UserError(f"{settings.out} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        run.close()


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
        return LoraConfig(r=settings.r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout)
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
    check_writable(settings.out, settings.out.absolute())


def _as_trained(settings: Settings, model: Any) -> Settings:
    """The settings with the rank, alpha and dropout of the adapters that are there, read or new."""
    layers = adapters(model)
    if not layers:
        return settings
    config = next(iter(layers.values())).config
    return dataclasses.replace(settings, r=config.r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout)


def _read_data(settings: Settings, display: Display) -> tuple[Any, list[Encoded], list[Encoded]]:
    with display.busy("reading the examples"):
        stdlib = settings.data == STDLIB
        examples: list[Example] = stdlib_examples() if stdlib else read_jsonl(Path(settings.data), settings.format)
    with display.busy("reading the tokenizer"):
        tokenizer = load_tokenizer(settings.model)
        limits = Limits.of_directory(settings.model)
    positions = limits and limits.positions
    with display.busy("tokenizing", "examples") as progress:
        # The standard library is there to be sampled: what is too long in it is left out.
        too_long = "skip" if stdlib else settings.too_long
        encoded = encode_all(examples, tokenizer, settings.max_length, too_long, progress, positions)
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
    display.fact("model", f"{name}, {parameter_count(model) / 1e6:.1f} M parameters")
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
            f"{len(weights)} linear layers, {count / 1e6:.1f} M weights at {bits:.3f} bits: {size / 1e6:.1f} MB",
        )
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
            f"r = {used.r}, alpha = {used.lora_alpha:g}: {count / 1e6:.2f} M trainable parameters{start}",
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


def _answer(trainer: Trainer, samples: Sequence[Sample], when: str, display: Display) -> list[str]:
    prompts = [prompt for prompt, _ in samples]
    with display.busy(f"answering held-out prompts {when} training", "tokens") as progress:
        return generate(trainer.model, trainer.tokenizer, prompts, _SAMPLE_TOKENS, progress)


def _validate(trainer: Trainer, display: Display) -> float:
    with display.busy("validating", "tokens") as progress:
        return trainer.validate(progress)


def _train(
    trainer: Trainer,
    run: RunDirectory,
    samples: Sequence[Sample],
    before: list[str],
    validation_s: float,
    chosen: Precision,
    display: Display,
) -> Result:
    settings = trainer.settings
    val_before = val_after = run.metrics[0].val_loss
    assert val_before is not None
    stop = StopRequest(lambda: display.fact("stopping", "after this step; Ctrl-C again to stop at once"))
    with stop, display.training(settings.steps):
        display.step(run.metrics[-1], settings.steps)
        while trainer.step < settings.steps and not stop.requested:
            metrics = trainer.train_step()
            last = metrics.step == settings.steps
            if last or (metrics.step % settings.eval_every == 0 and not stop.requested):
                val_after = _validate(trainer, display)
                metrics = dataclasses.replace(metrics, val_loss=val_after)
                with display.busy("saving"):
                    trainer.save(run.path)
            run.log(metrics)
            display.step(metrics, settings.steps, trainer.paging())
            if not (last or stop.requested):
                _tell_if_long(trainer, metrics, validation_s, chosen, display)
    with display.busy("saving"):
        saved = trainer.save(run.path)
    interrupted = trainer.step < settings.steps
    answers = {"before": before}
    if not interrupted:
        answers["after"] = _answer(trainer, samples, "after", display)
    with display.busy("drawing the losses"):
        _write_reports(trainer, run, samples, answers)
    result = Result(
        path=run.path,
        steps=trainer.step,
        interrupted=interrupted,
        val_before=val_before,
        val_after=None if interrupted else val_after,
        tokens_per_s=trainer.tokens / trainer.seconds if trainer.seconds else 0.0,
        peak_mb=peak_mb(),
        seconds=trainer.seconds,
    )
    run.update_config(result={**dataclasses.asdict(result), "path": str(result.path)})
    _summarize(result, saved, settings, display)
    return result


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


def _write_reports(
    trainer: Trainer,
    run: RunDirectory,
    samples: Sequence[Sample],
    answers: dict[str, list[str]],
) -> None:
    settings = trainer.settings
    title = f"{model_name(settings.model)}, {settings.method}, {trainer.step} steps"
    plot_loss(run.metrics, title, run.path / "loss.png")

    def decode(tokens: Sequence[int]) -> str:
        return trainer.tokenizer.decode(tokens, skip_special_tokens=False)

    write_samples(
        run.path / "samples.md",
        [decode(prompt) for prompt, _ in samples],
        {**answers, "reference": [decode(answer) for _, answer in samples]},
        [example.source for example in trainer.held_out[: len(samples)]],
        title,
    )


def _summarize(result: Result, saved: Path, settings: Settings, display: Display) -> None:
    after = "not measured: interrupted" if result.val_after is None else f"{result.val_after:.2f}"
    display.fact("val loss", f"{result.val_before:.2f} -> {after}")
    memory = f"{result.peak_mb / 1000:.2f} GB of memory"
    display.fact("speed", f"{result.tokens_per_s:,.0f} tokens/s, {result.seconds:.0f} s of training, {memory}")
    display.fact("saved", f"{saved}, {result.path / 'loss.png'}, {result.path / 'samples.md'}")
    model = f"--model {settings.model} " if not is_default(settings.model) else ""
    what = f"--model {saved} --dense" if settings.method == "full" else f"{model}--adapter {saved}"
    what += " --dense" if settings.method == "lora" else ""
    display.fact("try it", f'qloralab generate {what} --prompt "…"')
