"""Everything that a fine-tuning run depends on. ``config.json`` of a run is this, and the versions that ran."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from .errors import UserError

Method = Literal["qlora", "lora", "full"]
Dtype = Literal["auto", "bfloat16", "float32"]
METHODS: tuple[Method, ...] = ("qlora", "lora", "full")
DTYPES: tuple[Dtype, ...] = ("auto", "bfloat16", "float32")
STDLIB = "stdlib"
LEAST_STATE_BUDGET = 17  # 10**6 bytes: the 16 MiB of ``PagedAdamW``
ADAPTERS = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05}  # of new ones

# Of the three methods of the paper's Figure 1, only full fine-tuning moves all weights, and wants smaller steps.
_LEARNING_RATES = {"qlora": 1e-3, "lora": 1e-3, "full": 1e-4}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a run. One that another makes meaningless is refused, not ignored.

    Attributes:
        out: the run directory; it must not exist, or be empty. None: runs/DATE-TIME, with a number where that is taken.
        model: a Hugging Face directory or a GGUF file.
        data: a JSONL file, or "stdlib": the docstrings of the running interpreter's standard library.
        format: of the JSONL file, "alpaca", "chat" or "text"; None detects it.
        method: "qlora" (4-bit weights and adapters), "lora" (weights in dtype, and adapters) or "full" (all weights,
            float32, train).
        dtype: of the products, and of the weights that are neither in 4 bits nor train: "bfloat16", "float32", or
            "auto", what the device multiplies in hardware.
        adapter: directory of an adapter to start from; it has its own r, lora_alpha and lora_dropout.
        steps: optimizer steps.
        batch_size: examples per step.
        accumulate: parts that a batch is computed in, one after the other, to save memory.
        max_length: tokens per example, at most.
        too_long: what happens to a longer example: "error", "skip" or "cut"; by default an error, and "stdlib" skips.
        lr: the largest learning rate; by default 1e-3, and 1e-4 for "full".
        r, lora_alpha, lora_dropout: see ``LoraConfig``; by default those of ``ADAPTERS``.
        max_grad_norm: gradients are scaled down to this norm.
        held_out: examples kept from training, for the validation loss and the samples; by default a tenth, at most 64.
        eval_every: steps between validations; there is one before the first step and one after the last in any case.
        state_bits: of the moments of AdamW, 32 or 8.
        state_budget: of them, 10**6 bytes that may be in memory at a time; the rest pages. None: all.
        checkpointing: keep no activations inside a transformer block, compute them again in backward.
        seed: of the split, the order, the adapters and the dropout.
    """

    out: Path | None
    model: Path
    data: str = STDLIB
    format: str | None = None
    method: Method = "qlora"
    dtype: Dtype = "auto"
    adapter: Path | None = None
    steps: int = 150
    batch_size: int = 4
    accumulate: int = 1
    max_length: int = 256
    too_long: str | None = None
    lr: float | None = None
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    max_grad_norm: float = 0.3
    held_out: int | None = None
    eval_every: int = 50
    state_bits: int = 32
    state_budget: int | None = None
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "max_length", "held_out", "eval_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{_option(name)} is {value}; it must be at least 1")
        if self.accumulate > self.batch_size:
            raise UserError(f"--accumulate {self.accumulate} is more than the {self.batch_size} examples of a batch")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{_option(name)} is {getattr(self, name)}; it must be positive and finite")
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.state_bits not in (32, 8):
            raise UserError(f"--state-bits is {self.state_bits}; it must be 32 or 8")
        if self.state_budget is not None and self.state_budget < LEAST_STATE_BUDGET:
            raise UserError(f"--state-budget is {self.state_budget} MB; it must be at least {LEAST_STATE_BUDGET}")
        for ignores, names, why in (
            (self.method == "full", ("adapter", *ADAPTERS), "--method full trains all weights, without adapters"),
            (self.adapter is not None, tuple(ADAPTERS), f"the adapter in {self.adapter} has its own"),
            (self.data == STDLIB, ("format",), f"--data {STDLIB} is no JSONL file"),
        ):
            for name in names if ignores else ():
                if getattr(self, name) is not None:
                    raise UserError(f"{_option(name)} would be ignored: {why}; leave it out")
        if not -(2**63) <= self.seed < 2**64:
            raise UserError(f"--seed is {self.seed}; it must be a number of 64 bits")
        if not self.data:
            raise UserError(f"--data is empty; give a JSONL file or {STDLIB!r}")
        if self.out is None:
            return
        if self.out.is_file():
            raise UserError(f"{self.out} is a file; give --out the name of a new directory")
        if self.out.is_dir() and any(self.out.iterdir()):
            raise UserError(
                f"{self.out} exists and is not empty; a run never writes over another, give --out a new name"
            )

    @property
    def learning_rate(self) -> float:
        """lr, or the default of the method."""
        return self.lr if self.lr is not None else _LEARNING_RATES[self.method]

    @property
    def new_adapters(self) -> dict[str, Any]:
        """r, lora_alpha and lora_dropout, or their defaults."""
        given = {name: getattr(self, name) for name in ADAPTERS}
        return {name: ADAPTERS[name] if value is None else value for name, value in given.items()}

    @property
    def treats_too_long(self) -> str:
        """too_long, or its default. The standard library is there to be sampled."""
        if self.too_long is not None:
            return self.too_long
        return "skip" if self.data == STDLIB else "error"


def _option(name: str) -> str:
    return "--lr" if name == "learning_rate" else f"--{name.replace('_', '-')}"
