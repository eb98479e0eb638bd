"""Everything that a fine-tuning run depends on. ``config.json`` of a run is this, and the versions that ran."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from typer import Option

from .errors import UserError

Method = Literal["qlora", "lora", "full"]
Dtype = Literal["auto", "bfloat16", "float32"]
Parallel = Literal["ddp", "fsdp"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
STDLIB = "stdlib"
LEAST_STATE_BUDGET = 17  # 10**6 bytes: the 16 MiB of ``PagedAdamW``
ADAPTERS = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05}  # of new ones
DATA_TYPE = "nf4"
STEPS = 150
QUANTIZATION = ("data_type", "block_size", "double_quant", "skip")  # what only a run that quantizes has
Init = Literal["kaiming", "gaussian", "loftq", "pissa"]
Tracking = Literal["wandb", "trackio"]
SPLITTING: tuple[Init, ...] = ("loftq", "pissa")  # those that put a part of the weight into the adapter

# Of the three methods of the paper's Figure 1, only full fine-tuning moves all weights, and wants smaller steps.
_LEARNING_RATES = {"qlora": 1e-3, "lora": 1e-3, "full": 1e-4}

MODEL_OPTION = Option(help="Hugging Face directory or GGUF file.", show_default="SmolLM2-135M-Instruct")
DtypeOption = Annotated[
    Dtype, Option(help="Of the products; auto is bfloat16 where the hardware multiplies it, else float32.")
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run. One that another makes meaningless is refused, not ignored.

    Each field has the option of the command line that sets it, whose help says what it is; those without a default
    here have one there. Where None stands for a default that depends on other settings, a property below gives it.

    Raises:
        UserError: a value is out of its range, or would be ignored; out is a file or a directory that is not empty.
    """

    model: Annotated[Path, MODEL_OPTION]
    data: Annotated[str, Option(help="JSONL file, or 'stdlib': docstrings of the Python standard library.")] = STDLIB
    format: Annotated[str | None, Option(help="Of the JSONL: alpaca, chat or text.", show_default="detected")] = None
    method: Annotated[Method, Option(help="4-bit weights and adapters; dense weights and adapters; all weights.")] = (
        "qlora"
    )
    dtype: DtypeOption = "auto"
    data_type: Annotated[
        str | None, Option(help="Of the weights: a name, or your own as FILE.py:NAME.", show_default=DATA_TYPE)
    ] = None
    block_size: Annotated[
        int | None, Option(help="Weights that share a scale: a power of two, 16 to 4096.", show_default="data type's")
    ] = None
    double_quant: Annotated[
        bool | None,
        Option("--double-quant/--no-double-quant", help="Scales in 8 bits, or float32.", show_default="data type's"),
    ] = None
    skip: Annotated[
        str | None, Option(help="Layers whose weights stay dense: names or paths, by commas.", show_default="none")
    ] = None
    out: Annotated[Path | None, Option(help="Run directory, new or empty.", show_default="runs/DATE-TIME")]
    adapter: Annotated[
        Path | None, Option(help="To start from; it sets r, alpha, dropout.", show_default="none: new ones")
    ] = None
    steps: Annotated[int, Option(help="Optimizer steps.")] = STEPS
    epochs: Annotated[int | None, Option(help="Passes over the examples, instead of --steps.", show_default="none")] = (
        None
    )
    batch_size: Annotated[int, Option(help="Examples per step.")] = 4
    accumulate: Annotated[int, Option(help="Parts a batch is computed in, to save memory.")] = 1
    max_length: Annotated[int, Option(help="Tokens per example, at most.")] = 256
    too_long: Annotated[
        str | None, Option(help="Longer examples: error, skip or cut.", show_default="error; stdlib: skip")
    ] = None
    lr: Annotated[float | None, Option(help="Largest learning rate.", show_default="1e-3; full: 1e-4")] = None
    r: Annotated[int | None, Option("--r", help="Rank of the adapters.", show_default=str(ADAPTERS["r"]))] = None
    lora_alpha: Annotated[
        float | None, Option(help="Adapters are scaled by alpha / r.", show_default=str(ADAPTERS["lora_alpha"]))
    ] = None
    lora_dropout: Annotated[
        float | None, Option(help="Dropout before the adapters.", show_default=str(ADAPTERS["lora_dropout"]))
    ] = None
    target_modules: Annotated[
        str | None, Option(help="Layers with adapters: names or paths, by commas.", show_default="all linear layers")
    ] = None
    rslora: Annotated[bool, Option("--rslora", help="Scale adapters by alpha / sqrt(r) (rsLoRA).")] = False
    init: Annotated[Init | None, Option(help="How new adapters start.", show_default="kaiming")] = None
    merge_aware: Annotated[
        bool, Option("--merge-aware", help="Train through the quantizer, to be merged into 4 bits; no dropout.")
    ] = False
    max_grad_norm: Annotated[float, Option(help="Gradients are clipped to this norm.")] = 0.3
    held_out: Annotated[
        int | None, Option(help="Examples kept for validation.", show_default="a tenth, at most 64")
    ] = None
    eval_every: Annotated[int, Option(help="Steps between validations.")] = 50
    save_every: Annotated[
        int | None, Option(help="Steps between checkpoints, to resume from.", show_default="as --eval-every")
    ] = None
    keep: Annotated[int, Option(help="Checkpoints that stay in the run directory.")] = 2
    state_bits: Annotated[int, Option(help="Of AdamW's moments: 32 or 8.")] = 32
    state_budget: Annotated[
        int | None, Option(help="MB of the moments to hold in memory; the rest pages.", show_default="all")
    ] = None
    checkpointing: Annotated[bool, Option("--checkpointing", help="Recompute activations: less memory, slower.")] = (
        False
    )
    graph: Annotated[bool, Option("--graph", help="Replay steps from CUDA graphs, captured for up to 8 lengths.")] = (
        False
    )
    seed: Annotated[int, Option(help="Of split, order, adapters and dropout.")] = 0
    seeds: Annotated[
        int | None, Option(help="Runs, each with the next seed; their mean and interval.", show_default="one run")
    ] = None
    tensorboard: Annotated[bool, Option("--tensorboard", help="Write the numbers for TensorBoard, too.")] = False
    track: Annotated[
        Tracking | None, Option(help="Follow the run in W&B or trackio, too.", show_default="in neither")
    ] = None

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_that_none_is_ignored()
        self._check_graph()
        if not -(2**63) <= self.seed <= self.last_seed < 2**64:
            raise UserError(f"--seed is {self.seed}; it must be a number of 64 bits")
        if not self.data:
            raise UserError(f"--data is empty; give a JSONL file or {STDLIB!r}")
        if self.out and self.out.is_file():
            raise UserError(f"{self.out} is a file; give --out the name of a new directory")
        if self.out and self.out.is_dir() and any(self.out.iterdir()):
            raise UserError(
                f"{self.out} exists and is not empty; a run never writes over another, give --out a new name"
            )

    def _check_graph(self) -> None:
        for given, option, why in (
            (self.checkpointing, "--checkpointing", "computes again with random states that a graph cannot read"),
            (self.merge_aware, "--merge-aware", "looks at the adapters' values in each call"),
        ):
            if self.graph and given:
                raise UserError(f"--graph cannot be had with {option}, which {why}; leave one out")

    def _check_ranges(self) -> None:
        counts = ("steps", "epochs", "batch_size", "accumulate", "max_length", "held_out", "eval_every", "save_every")
        for name in (*counts, "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{_option(name)} is {value}; it must be at least 1")
        if self.epochs is not None and self.steps != STEPS:
            raise UserError("--steps and --epochs say the same in two ways; give one")
        if self.seeds is not None and self.seeds < 2:
            raise UserError(f"--seeds is {self.seeds}; an interval takes at least 2 runs")
        for name in ("target_modules", "skip"):
            value = getattr(self, name)
            if value is not None and not all(map(str.strip, value.split(","))):
                raise UserError(f"{_option(name)} is {value!r}; it takes names with commas between them")
        if self.init not in (None, *get_args(Init)):
            raise UserError(f"--init is {self.init!r}; it must be one of {', '.join(get_args(Init))}")
        if self.track not in (None, *get_args(Tracking)):
            raise UserError(f"--track is {self.track!r}; it must be one of {', '.join(get_args(Tracking))}")
        if self.accumulate > self.batch_size:
            raise UserError(f"--accumulate {self.accumulate} is more than the {self.batch_size} examples of a batch")
        for option, value in (("--lr", self.learning_rate), ("--max-grad-norm", self.max_grad_norm)):
            if not 0 < value < float("inf"):
                raise UserError(f"{option} is {value}; it must be positive and finite")
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.state_bits not in (32, 8):
            raise UserError(f"--state-bits is {self.state_bits}; it must be 32 or 8")
        if self.state_budget is not None and self.state_budget < LEAST_STATE_BUDGET:
            raise UserError(f"--state-budget is {self.state_budget} MB; it must be at least {LEAST_STATE_BUDGET}")

    def _check_that_none_is_ignored(self) -> None:
        adapters = (*ADAPTERS, "target_modules", "rslora", "init")
        for ignores, names, why in (
            (self.method == "full", ("adapter", *adapters), "--method full trains all weights, without adapters"),
            (self.adapter is not None, adapters, f"the adapter in {self.adapter} has its own"),
            (self.method != "qlora" and self.init in SPLITTING, ("init",), "it splits weights that are quantized"),
            (self.method != "qlora", (*QUANTIZATION, "merge_aware"), f"--method {self.method} quantizes no weights"),
            (self.merge_aware, ("lora_dropout",), "--merge-aware has no dropout"),
            (self.data == STDLIB, ("format",), f"--data {STDLIB} is no JSONL file"),
        ):
            for name in names if ignores else ():
                if getattr(self, name) not in (None, False) or (name == "double_quant" and self.double_quant is False):
                    raise UserError(f"{_option(name)} would be ignored: {why}; leave it out")

    def given(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON, without ``out``."""
        fields = ((field, getattr(self, field.name)) for field in dataclasses.fields(self) if field.name != "out")
        return {f.name: str(value) if isinstance(value, Path) else value for f, value in fields if value != f.default}

    @classmethod
    def from_given(cls, given: Mapping[str, Any]) -> Settings:
        """The settings that ``given`` tells.

        Raises:
            UserError: there is no such setting, or a value is out of its range.
        """
        if unknown := given.keys() - {field.name for field in dataclasses.fields(cls)}:
            raise UserError(f"there is no setting {sorted(unknown)[0]!r}; another version of qloralab wrote it")
        paths = {name: Path(given[name]) for name in ("model", "adapter") if name in given}
        return cls(**{"out": None, **given, **paths})

    @property
    def learning_rate(self) -> float:
        """lr, or the default of the method."""
        return self.lr if self.lr is not None else _LEARNING_RATES[self.method]

    @property
    def new_adapters(self) -> dict[str, Any]:
        """The arguments of ``LoraConfig`` for new adapters."""
        given = {name: getattr(self, name) for name in ADAPTERS}
        fields = {name: ADAPTERS[name] if value is None else value for name, value in given.items()}
        fields |= {"lora_dropout": 0.0} if self.merge_aware else {}
        fields |= {"use_rslora": self.rslora, "init_lora_weights": "gaussian" if self.init == "gaussian" else True}
        return fields if self.target_modules is None else fields | {"target_modules": _names(self.target_modules)}

    @property
    def skipped(self) -> tuple[str, ...]:
        """The names in skip."""
        return () if self.skip is None else _names(self.skip)

    def in_steps(self, examples: int) -> Settings:
        """These settings with the epochs as steps, for so many examples to train on."""
        if self.epochs is None:
            return self
        return dataclasses.replace(self, epochs=None, steps=self.epochs * -(-examples // self.batch_size))

    @property
    def last_seed(self) -> int:
        """The seed of the last run."""
        return self.seed + (self.seeds or 1) - 1

    @property
    def treats_too_long(self) -> str:
        """too_long, or its default. The standard library is there to be sampled."""
        default = "skip" if self.data == STDLIB else "error"
        return default if self.too_long is None else self.too_long


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
