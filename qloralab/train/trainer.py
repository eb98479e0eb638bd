"""The training loop's one step, and the validation: a model, the order of the examples, an optimizer.

AdamW without weight decay, gradients clipped to a norm of 0.3, examples grouped by length and a loss on the answers
only are the recipe of the paper (QLoRA, appendix B). Its learning rate is constant; here it falls, which a short run
gains from.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qloralab.lora.inject import trainable
from qloralab.nf4.distributed import whole
from qloralab.optim.paged_adamw import PagedAdamW

from ..checkpoint.limits import Limits
from ..checkpoint.output_directory import size_text
from ..data.batches import collate, length_grouped_batches
from ..data.encoding import NO_LABEL, Encoded
from ..errors import UserError
from ..resident import resident_mb
from ..settings import Settings
from .checkpoint import load_checkpoint_, random_states, restore_random_states, save_checkpoint
from .graphs import StepGraphs
from .loss import AnswerLoss
from .processes import ALONE, Processes
from .run_directory import Metrics

LENGTH_MULTIPLE = 16  # oneDNN compiles kernels for each new length, and keeps a thousand of them


class Diverged(UserError):
    """The loss or the gradient of a step is NaN or infinite; parameters, optimizer and generators are as before it."""


class Trainer:
    """The state of a run: the model, the order of the examples, the optimizer.

    Args:
        model: with adapters, or, for "full", in float32.
        train: the examples to train on.
        held_out: those to validate with.
        settings: of the run.
        dtype: what is computed in. The model has it already, but for "full": there it is that of autocast.
        processes: that train the model together. All have the same examples, and call the same methods.

    Attributes:
        step, tokens, seconds: done so far.
        graphs: that forward and backward of a step are replayed from; None: they run as they are.

    Raises:
        UserError: there is no room for the optimizer's state.
    """

    def __init__(
        self,
        model: Any,
        train: Sequence[Encoded],
        held_out: Sequence[Encoded],
        settings: Settings,
        dtype: torch.dtype,
        processes: Processes = ALONE,
    ):
        self.model, self.train, self.held_out = model, train, held_out
        self.settings, self.dtype, self.processes = settings, dtype, processes
        self.device = next(model.parameters()).device
        self.loss = processes.spread(AnswerLoss(model))
        self.positions = Limits.of(model).positions
        self.parameters = trainable(model)
        self.optimizer = self._optimizer()
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.graphs: StepGraphs | None = None
        self._order = self._batches(0)

    def capture(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Have all later steps replayed from CUDA graphs (``graphs.py``). Nothing else changes.

        Args:
            progress: called with how many of how many pieces of the work are done.

        Raises:
            RuntimeError: they cannot be captured; steps run as they are.
        """
        self.model.train()
        rows = -(-min(self.settings.batch_size, len(self.train)) // self.settings.accumulate)
        graphs = StepGraphs(self._loss_at, self.parameters, self.train, rows, LENGTH_MULTIPLE, self.positions)
        try:
            graphs.capture(progress)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        self.graphs = graphs

    def _optimizer(self) -> PagedAdamW:
        settings = self.settings
        budget = None if settings.state_budget is None else settings.state_budget * 10**6
        bits = 32 if settings.state_bits == 32 else 8
        try:
            return PagedAdamW(
                self.parameters, lr=settings.learning_rate, weight_decay=0.0, state_bits=bits, budget=budget
            )
        except OSError as error:  # in the words of the command, whose directory for temporary files it is
            why = str(error.strerror or error).replace("state_dir= (or TMPDIR)", "TMPDIR")
            raise UserError(f"--state-budget {settings.state_budget}: {why}") from error
        except ImportError as error:  # what a budget needs on a GPU
            raise UserError(str(error)) from error
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):  # which is what PyTorch says
                raise
            size = size_text(sum(parameter.numel() for parameter in self.parameters) * bits / 4)
            raise UserError(
                f"there is no memory for the optimizer's state ({size}); give --state-budget the MB of it that may be "
                "in memory, or --state-bits 8"
            ) from error

    def _batches(self, step: int) -> Iterator[list[Encoded]]:
        """The batches from a step on: a function of the seed, so that a run that goes on sees what it would have."""
        lengths = [len(example.input_ids) for example in self.train]
        epoch, done = divmod(step, self._steps_per_epoch)
        while True:
            batches = length_grouped_batches(lengths, self.settings.batch_size, self.settings.seed, epoch)
            for batch in batches[done:]:
                yield [self.train[i] for i in batch]
            epoch, done = epoch + 1, 0

    @property
    def _steps_per_epoch(self) -> int:
        return -(-len(self.train) // self.settings.batch_size)

    def save(self, path: Path, **progress: Any) -> None:
        """Write a checkpoint: all that a new trainer of the same settings, model and examples needs to go on.

        Args:
            path: of the file.
            progress: more to be kept in it, as JSON.

        Raises:
            OSError: it cannot be written.
        """
        done = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds}
        save_checkpoint(path, self.model, self.optimizer, {**done, **progress})

    def load(self, path: Path) -> dict[str, Any]:
        """Go on from a checkpoint; returns the progress in it.

        Raises:
            FormatError, ValueError: it is none, or another model's.
        """
        progress = load_checkpoint_(path, self.model, self.optimizer)
        self.step, self.tokens, self.seconds = progress["step"], progress["tokens"], progress["seconds"]
        self._order = self._batches(self.step)
        return progress

    @property
    def tokens_per_step(self) -> float:
        """On average over an epoch, padding not counted."""
        return sum(len(example.input_ids) for example in self.train) / self._steps_per_epoch

    def train_step(self) -> Metrics:
        """One optimizer step.

        Raises:
            Diverged: the loss is NaN or infinite.
        """
        start, generators = time.perf_counter(), random_states()
        self.processes.seed(self.settings.seed, self.step)
        self.model.train()
        examples = next(self._order)
        lr = self._set_lr()
        try:
            loss = self._backward(examples)
            norm = float(whole(nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)))
            if not (loss < float("inf") and norm < float("inf")):
                at = f"at step {self.step + 1}{self._advice()}"
                raise Diverged(f"the loss is {loss:.4g} and the gradient {norm:.4g} {at}")
        except BaseException:
            restore_random_states(*generators)  # what is saved now is the state before this step
            raise
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        seconds = time.perf_counter() - start
        tokens = sum(len(example.input_ids) for example in examples)
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        return Metrics(self.step, self.tokens, loss, None, lr, norm, tokens / seconds, resident_mb())

    def _backward(self, examples: Sequence[Encoded]) -> float:
        """The mean loss of a batch, whose gradients the parameters get, in as many parts as the settings say."""
        answers, count, total = _answers(examples), self.processes.count, 0.0
        parts = min(self.settings.accumulate, -(-len(examples) // count))
        if self.graphs is not None:
            return self.graphs.backward([examples[part::parts] for part in range(parts)], answers)
        for part in range(parts):
            mine = self.processes.share(examples)[part::parts]
            with self.processes.exchanging(self.loss, last=part == parts - 1):
                loss = self._loss(mine or [_unlabelled(examples[0])]) / answers
                (loss * count).backward()  # of the gradients of all processes, PyTorch takes the mean
            total += loss.item()
        return self.processes.total(total)[0]

    def _loss(self, examples: Sequence[Encoded]) -> torch.Tensor:
        """The summed loss of some examples."""
        batch = collate(examples, LENGTH_MULTIPLE, self.positions)
        with self._precision():
            loss, _ = self.loss(batch["input_ids"].to(self.device), batch["labels"].to(self.device))
        return loss

    def _loss_at(self, *inputs: torch.Tensor) -> torch.Tensor:
        """``AnswerLoss.at``, of a run of one process."""
        loss: Any = self.loss
        with self._precision():
            return loss.at(*inputs)

    def _precision(self) -> torch.autocast:
        """Full fine-tuning keeps float32 weights, for small updates to count, and computes in bfloat16 where that is
        faster."""
        mixed = self.settings.method == "full" and self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=mixed)

    def paging(self) -> str:
        """How much of the optimizer's state is in memory, in words; empty without a budget."""
        if self.settings.state_budget is None:
            return ""
        paging = self.optimizer.paging()
        return f"state {paging.resident_bytes / 1e6:.0f}/{paging.state_bytes / 1e6:.0f} MB, {paging.stalls} stalls"

    def _set_lr(self) -> float:
        lr = self.settings.learning_rate * schedule(self.step, self.settings.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    @torch.no_grad()
    def validate(self, progress: Callable[[int, int], None] | None = None) -> float:
        """The mean loss of the held-out answers, in nats per token.

        Args:
            progress: called after each batch with how many tokens are done and how many there are.

        Raises:
            UserError: it is NaN or infinite.
        """
        self.model.eval()
        order = sorted(self.held_out, key=lambda example: len(example.input_ids))
        size = 2 * self.settings.batch_size
        total, count, done = 0.0, 0, 0
        tokens = sum(len(example.input_ids) for example in order)
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            total += self._loss(self.processes.share(batch) or [_unlabelled(batch[0])]).item()
            count += _answers(batch)
            done += sum(len(example.input_ids) for example in batch)
            if progress:
                progress(done, tokens)
        (total,) = self.processes.total(total)
        if not total < float("inf"):
            raise UserError(f"the validation loss is {total / count:.4g} after step {self.step}{self._advice()}")
        return total / count

    def _advice(self) -> str:
        return "; try a smaller --lr" if self.step else ", before --lr was used: the model overflows"


def _answers(examples: Sequence[Encoded]) -> int:
    """How many tokens are predicted that count."""
    return sum(label != NO_LABEL for example in examples for label in example.labels[1:])


def _unlabelled(example: Encoded) -> Encoded:
    """What a process computes that has no example in a batch, because all have to take part: a loss of 0."""
    return dataclasses.replace(example, labels=[NO_LABEL] * len(example.labels))


def schedule(step: int, steps: int) -> float:
    """The learning rate of a step (from 0) as a part of the largest: a warm-up of 3 %, then linearly towards 0."""
    warmup = max(1, round(0.03 * steps))
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / max(1, steps - warmup)
