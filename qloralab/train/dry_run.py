"""``qloralab finetune --dry-run``: what would run, and what it would take.

The data is read and made tokens as for the run; of the model only its configuration and tokenizer. The rest is counted:
the tokens of the steps by the order of the batches, the parameters that train and the memory by
``memory/predict.py``, for the largest batch there can be. Nothing is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from qloralab.lora.files import read_adapter

from ..checkpoint.models import model_name
from ..checkpoint.output_directory import count_text, size_text
from ..data.batches import length_grouped_batches
from ..data.encoding import NO_LABEL
from ..data_types import named_data_type
from ..display import Display
from ..memory.predict import Job, Memory, predict
from ..settings import DATA_TYPE, Settings
from .prepare import Material, read_data
from .trainer import LENGTH_MULTIPLE


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run would be.

    Attributes:
        examples, held_out: to train on, and to validate with.
        steps: of the optimizer.
        epochs: passes over the examples.
        tokens: trained on, padding not counted.
        memory: predicted, with the largest batch.
    """

    examples: int
    held_out: int
    steps: int
    epochs: float
    tokens: int
    memory: Memory


def dry_run(settings: Settings, display: Display | None = None) -> Plan:
    """Read the data, count, and show what was found.

    Raises:
        UserError: the data or a setting is not usable, or the model cannot be laid out without its weights.
    """
    display = display or Display()
    read = read_data(settings, display)
    steps = settings.in_steps(len(read.train)).steps
    lengths = [len(example.input_ids) for example in read.train]
    with display.busy("counting parameters and memory"):
        memory = predict(read.model_config, _job(settings, read))
    batches = -(-len(lengths) // settings.batch_size)
    tokens = tokens_of(lengths, settings.batch_size, settings.seed, steps)
    plan = Plan(len(lengths), len(read.held_out), steps, steps / batches, tokens, memory)
    _show(plan, settings, read, display)
    return plan


def tokens_of(lengths: Sequence[int], batch_size: int, seed: int, steps: int) -> int:
    """The tokens of the first steps of a run.

    Args:
        lengths: tokens of each example.
        batch_size, seed: of the run.
        steps: how many.
    """
    epochs, rest = divmod(steps, -(-len(lengths) // batch_size))
    begun = length_grouped_batches(lengths, batch_size, seed, epochs)[:rest]
    return epochs * sum(lengths) + sum(lengths[i] for batch in begun for i in batch)


def _job(settings: Settings, read: Material) -> Job:
    """What decides the memory; the largest batch is of the longest examples and of those with the longest answers."""
    rows = -(-min(settings.batch_size, len(read.train)) // settings.accumulate)
    longest = max(len(example.input_ids) for example in read.train)
    labels = sorted((sum(label != NO_LABEL for label in example.labels) for example in read.train), reverse=True)
    lora = read_adapter(None, settings.adapter)[0] if settings.adapter else read.lora
    return Job(
        method=settings.method,
        dtype=read.precision.dtype,
        data_type=read.data_type or named_data_type(DATA_TYPE),
        r=lora.r,
        batch_size=rows,
        max_length=-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE,
        labelled=sum(labels[:rows]),
        checkpointing=settings.checkpointing,
        state_bits=settings.state_bits,
        state_budget=None if settings.state_budget is None else settings.state_budget * 10**6,
        target_modules=lora.target_modules,
        skip=settings.skipped,
    )


def _show(plan: Plan, settings: Settings, read: Material, display: Display) -> None:
    fact, memory = display.fact, plan.memory
    fact("model", f"{model_name(settings.model)}, {count_text(memory.parameters)} parameters")
    fact("dtype", read.precision.described(settings.method))
    what = "parameters" if settings.method == "full" else "parameters of adapters"
    fact("trains", f"{count_text(memory.trained)} {what}")
    examples = f"{plan.steps:,} of {settings.batch_size} examples"
    fact("steps", f"{examples}, {plan.epochs:.3g} epochs: {plan.tokens:,} tokens")
    fact("memory", f"about {size_text(memory.peak)} at the peak, predicted for the largest batch")
    runs = f"each of {settings.seeds} runs is such a one; " if settings.seeds else ""
    fact("dry run", f"{runs}no weight was read, nothing was written")
