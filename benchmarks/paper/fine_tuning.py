"""One fine-tuning of the tables: the library's own ``Trainer``, on docstrings, measured on files that nobody has seen.

The task is that of ``qloralab finetune``: write the docstring of a function. The examples to train on come from the
files that tinylm was trained on, the others from those held out. What counts is the mean loss of the held-out answers,
in nats a token. Two runs of one seed see the same examples in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qloralab.checkpoint.models import load_model, load_tokenizer
from qloralab.data.encoding import Encoded, encode_all
from qloralab.lora.config import LoraConfig
from qloralab.lora.inject import inject_, trainable
from qloralab.nf4.data_type import DataType
from qloralab.nf4.model import quantize_
from qloralab.settings import Method, Settings
from qloralab.train.trainer import Trainer

from .corpus import docstrings
from .tinylm import spread

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Budget:
    """What every run gets.

    Attributes:
        seeds: of the order of the examples and of the adapters.
        steps, batch: optimizer steps, examples of a step.
        length: tokens of an example; longer ones are left out.
        read: functions whose docstrings are encoded, of those to train on; an eighth as many are held out.
        held_out: of these, how many are measured.
    """

    seeds: int
    steps: int
    batch: int = 4
    length: int = 192
    read: int = 3000
    held_out: int = 96


@dataclass(frozen=True)
class Task:
    """Examples, encoded once for all runs, and the directory of the model."""

    model: Path
    train: list[Encoded]
    held_out: list[Encoded]
    budget: Budget

    @classmethod
    def of(cls, model: Path, budget: Budget) -> Task:
        """Encode the docstrings for a model."""
        tokenizer = load_tokenizer(model)
        halves = []
        for half, number in ((False, budget.read), (True, budget.read // 8)):
            some = spread(docstrings(half), number)
            halves.append(encode_all(some, tokenizer, budget.length, too_long="skip"))
        return cls(model, halves[0], list(spread(halves[1], budget.held_out)), budget)

    def run(
        self, method: Method, lr: float, seed: int, data_type: DataType | None = None, config: LoraConfig | None = None
    ) -> dict[str, Any]:
        """Train once.

        Args:
            method: full; lora; or qlora, with a data type.
            lr: the largest learning rate; it falls (``Trainer``).
            seed: of the examples' order and of the adapters.
            data_type: of the linear layers; None: dense.
            config: of the adapters; None: all weights train.

        Returns:
            before and after: losses of the held-out answers, nats a token; parameters that train; tokens trained on.
        """
        torch.manual_seed(seed)
        model: Any = load_model(self.model, torch.float32)
        if data_type is not None:
            quantize_(model, data_type, compute_dtype=torch.float32)
        if config is not None:
            inject_(model, config)
        budget = self.budget
        settings = Settings(
            model=self.model, out=None, method=method, lr=lr, seed=seed, steps=budget.steps, batch_size=budget.batch
        )
        trainer = Trainer(model, self.train, self.held_out, settings, torch.float32)
        before = trainer.validate()
        for _ in range(budget.steps):
            trainer.train_step()
        count = sum(parameter.numel() for parameter in trainable(model))
        return {"before": before, "after": trainer.validate(), "parameters": count, "tokens": trainer.tokens}
