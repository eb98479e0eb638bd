"""Fine-tuning, from the settings to the run directory.

The recipe is the paper's (QLoRA, section 4 and appendix B): adapters beside every linear layer, AdamW without weight
decay, gradients clipped to a norm of 0.3, examples grouped by length, a loss on the answers only.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qloralab.lora.config import LoraConfig
from qloralab.lora.files import load_adapter_, save_adapter
from qloralab.lora.inject import adapters, inject_, quantize_, trainable
from qloralab.lora.quantized_linear import QuantizedLinear

from .batches import collate, length_grouped_batches, split
from .display import Display
from .encoding import NO_LABEL, Encoded, encode_all
from .errors import UserError
from .examples import Example, read_jsonl
from .generate import generate
from .interrupt import StopRequest
from .loss import AnswerLoss
from .memory import peak_mb, resident_mb
from .models import load_model, load_tokenizer, pad_id
from .report import plot_loss, write_samples
from .run_directory import Metrics, RunDirectory
from .settings import STDLIB, Settings
from .stdlib_corpus import stdlib_examples

_SAMPLES = 4
LENGTH_MULTIPLE = 16  # oneDNN compiles kernels for each new length, and keeps a thousand of them
_SAMPLE_TOKENS = 48


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
    """Run a fine-tuning. Nothing is written before the data and the model have been read.

    Raises:
        UserError: the data, the model or a setting is not usable, or the loss became infinite.
        FormatError: the adapter to start from is not one.
    """
    display = display or Display()
    config = _lora_config(settings)
    tokenizer, train, held_out = _read_data(settings, display)
    torch.manual_seed(settings.seed)
    model = _prepare_model(settings, config, display)
    trainer = Trainer(model, tokenizer, train, held_out, settings)

    try:
        run = RunDirectory(settings)
    except OSError as error:
        raise UserError(f"{settings.out} cannot be written: {error.strerror}") from error
    display.fact("run", str(run.path))
    try:
        return _train(trainer, run, settings, display)
    finally:
        run.close()


class Trainer:
    """The state of a run: the model, the order of the examples, the optimizer."""

    def __init__(
        self, model: Any, tokenizer: Any, train: Sequence[Encoded], held_out: Sequence[Encoded], settings: Settings
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.train = train
        self.held_out = held_out
        self.settings = settings
        self.device = next(model.parameters()).device
        self.loss = AnswerLoss(model)
        self.parameters = trainable(model)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, betas=(0.9, 0.999), weight_decay=0.0, fused=True
        )
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self._order = self._batches()

    def _batches(self) -> Iterator[list[Encoded]]:
        lengths = [len(example.input_ids) for example in self.train]
        epoch = 0
        while True:
            for batch in length_grouped_batches(lengths, self.settings.batch_size, self.settings.seed, epoch):
                yield [self.train[i] for i in batch]
            epoch += 1

    def _tensors(self, examples: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = collate(examples, pad_id(self.tokenizer), LENGTH_MULTIPLE)
        return batch["input_ids"].to(self.device), batch["labels"].to(self.device)

    def _autocast(self) -> torch.autocast:
        # Full fine-tuning keeps float32 weights, for small updates to count, and computes in bfloat16.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.method == "full")

    def train_step(self) -> Metrics:
        """One optimizer step.

        Raises:
            UserError: the loss is NaN or infinite; the parameters are as before the step.
        """
        start = time.perf_counter()
        self.model.train()
        examples = next(self._order)
        answers = sum(label != NO_LABEL for example in examples for label in example.labels[1:])
        lr = self._set_lr()
        total = 0.0
        for part in range(self.settings.accumulate):
            micro_batch = examples[part :: self.settings.accumulate]
            if not micro_batch:
                continue
            with self._autocast():
                loss, _ = self.loss(*self._tensors(micro_batch))
            loss = loss / answers
            loss.backward()
            total += loss.item()
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm))
        if not (total < float("inf") and norm < float("inf")):
            raise UserError(
                f"the loss is {total:.4g} and the gradient {norm:.4g} at step {self.step + 1}; try a smaller --lr"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        seconds = time.perf_counter() - start
        tokens = sum(len(example.input_ids) for example in examples)
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        return Metrics(self.step, self.tokens, total, None, lr, norm, tokens / seconds, resident_mb())

    def _set_lr(self) -> float:
        lr = self.settings.learning_rate * schedule(self.step, self.settings.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    @torch.no_grad()
    def validate(self) -> float:
        """The mean loss of the held-out answers, in nats per token."""
        self.model.eval()
        order = sorted(self.held_out, key=lambda example: len(example.input_ids))
        size = 2 * self.settings.batch_size
        total, count = 0.0, 0
        for start in range(0, len(order), size):
            with self._autocast():
                loss, answers = self.loss(*self._tensors(order[start : start + size]))
            total += loss.item()
            count += answers
        return total / count

    def save(self, path: Path) -> Path:
        """Write what was trained below the run directory: the adapter, or the whole model."""
        if self.settings.method == "full":
            self.model.save_pretrained(path / "model")
            self.tokenizer.save_pretrained(path / "model")
            return path / "model"
        save_adapter(self.model, path / "adapter")
        return path / "adapter"


def schedule(step: int, steps: int) -> float:
    """The learning rate of a step (from 0) as a part of the largest: a warm-up of 3 %, then linearly towards 0."""
    warmup = max(1, round(0.03 * steps))
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / max(1, steps - warmup)


def prompt_and_answer(example: Encoded) -> tuple[list[int], list[int]]:
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


def _read_data(settings: Settings, display: Display) -> tuple[Any, list[Encoded], list[Encoded]]:
    with display.busy("reading the examples"):
        stdlib = settings.data == STDLIB
        examples: list[Example] = stdlib_examples() if stdlib else read_jsonl(Path(settings.data), settings.format)
    with display.busy("reading the tokenizer"):
        tokenizer = load_tokenizer(settings.model)
    with display.busy("tokenizing"):
        # The standard library is there to be sampled: what is too long in it is left out.
        too_long = "skip" if stdlib else settings.too_long
        encoded = encode_all(examples, tokenizer, settings.max_length, too_long)
        train, held_out = split(encoded, settings.held_out, settings.seed)
    source = "docstrings of the Python standard library" if stdlib else settings.data
    left_out = f"; {len(examples) - len(encoded):,} left out as too long" if len(encoded) < len(examples) else ""
    display.fact("data", f"{source}: {len(train):,} examples + {len(held_out)} held out{left_out}")
    return tokenizer, train, held_out


def _prepare_model(settings: Settings, config: LoraConfig, display: Display) -> Any:
    with display.busy(f"reading {settings.model.name}"):
        model = load_model(settings.model, torch.float32 if settings.method == "full" else torch.bfloat16)
    parameters = sum(p.numel() for p in model.parameters())
    display.fact("model", f"{settings.model.stem}, {parameters / 1e6:.1f} M parameters")
    if settings.method == "qlora":
        with display.busy("quantizing"):
            quantize_(model)
        weights = [module.weight for module in model.modules() if isinstance(module, QuantizedLinear)]
        count, size = sum(w.numel() for w in weights), sum(w.nbytes for w in weights)
        bits = 8 * size / count
        display.fact(
            "4 bits",
            f"{len(weights)} linear layers, {count / 1e6:.1f} M weights at {bits:.3f} bits: {size / 1e6:.1f} MB",
        )
    if settings.method != "full":
        try:
            load_adapter_(model, settings.adapter) if settings.adapter else inject_(model, config)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(str(error)) from error
        chosen = next(iter(adapters(model).values())).config
        start = f", from {settings.adapter}" if settings.adapter else ""
        count = sum(p.numel() for p in trainable(model))
        display.fact(
            "adapters",
            f"r = {chosen.r}, alpha = {chosen.lora_alpha:g}: {count / 1e6:.2f} M trainable parameters{start}",
        )
    if settings.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if torch.cuda.is_available():
        model.to("cuda")
    return model


def _train(trainer: Trainer, run: RunDirectory, settings: Settings, display: Display) -> Result:
    samples = [prompt_and_answer(example) for example in trainer.held_out[:_SAMPLES]]
    prompts = [prompt for prompt, _ in samples]
    with display.busy("answering held-out prompts before training"):
        before = generate(trainer.model, trainer.tokenizer, prompts, _SAMPLE_TOKENS)
        val_before = val_after = trainer.validate()
    run.log(Metrics(0, 0, None, val_before, None, None, None, resident_mb()))

    stop = StopRequest(lambda: display.fact("stopping", "after this step; Ctrl-C again to stop at once"))
    with stop, display.training(settings.steps):
        display.step(run.metrics[-1], settings.steps)
        while trainer.step < settings.steps and not stop.requested:
            metrics = trainer.train_step()
            last = metrics.step == settings.steps
            if last or (metrics.step % settings.eval_every == 0 and not stop.requested):
                val_after = trainer.validate()
                metrics = dataclasses.replace(metrics, val_loss=val_after)
                trainer.save(run.path)
            run.log(metrics)
            display.step(metrics, settings.steps)
    saved = trainer.save(run.path)
    interrupted = trainer.step < settings.steps
    answers = {"before": before}
    if not interrupted:
        with display.busy("answering the same prompts after training"):
            answers["after"] = generate(trainer.model, trainer.tokenizer, prompts, _SAMPLE_TOKENS)
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


def _write_reports(
    trainer: Trainer,
    run: RunDirectory,
    samples: Sequence[tuple[list[int], list[int]]],
    answers: dict[str, list[str]],
) -> None:
    settings = trainer.settings
    title = f"{settings.model.stem}, {settings.method}, {trainer.step} steps"
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
    what = f"--model {saved}" if settings.method == "full" else f"--adapter {saved}"
    display.fact("try it", f'qloralab generate {what} --prompt "…"')
