"""What an adapter looks like: fields of ``peft.LoraConfig``, with their names and their meaning."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from qloralab.nf4.files.module_names import ends_with

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: y = W x + scaling * B A dropout(x), with A [r, in] and B [out, r].

    Attributes:
        r: rank of the adapters.
        lora_alpha: scaling is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
        lora_dropout: probability that an input of the adapter (not of the layer) is zeroed in training, in [0, 1).
        target_modules: "all-linear" (every linear layer but the output head; the paper shows that this is needed to
            match 16-bit fine-tuning); or a list of names, each a full path or its last components; or a regular
            expression for the full path.
        bias: "none": biases stay frozen. PEFT's other values are not supported.
        task_type: passed through to PEFT's file.
        use_rslora: rank-stabilized scaling (arXiv 2312.03732).
        init_lora_weights: how A starts; B starts at zero. True: Kaiming-uniform, U(-b, b) with b = 1 / sqrt(in).
            "gaussian": N(0, 1 / r**2). Of PEFT's values, those that leave the weight beside the adapter as it is.

    Raises:
        ValueError: a field has a value that it cannot have.
    """

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = ALL_LINEAR
    bias: str = "none"
    task_type: str | None = "CAUSAL_LM"
    use_rslora: bool = False
    init_lora_weights: bool | str = True

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r is {self.r!r}; the rank of an adapter is a whole number from 1")
        if not self.lora_alpha > 0 or not math.isfinite(self.lora_alpha):
            raise ValueError(f"lora_alpha is {self.lora_alpha!r}; it must be positive")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout!r}; it must be in [0, 1)")
        if self.bias != "none":
            raise ValueError(f"bias is {self.bias!r}; only 'none' is supported, biases stay frozen")
        if self.init_lora_weights not in (True, "gaussian"):
            raise ValueError(f"init_lora_weights is {self.init_lora_weights!r}; only True and 'gaussian' are supported")
        if not self.target_modules:
            raise ValueError("target_modules is empty; name at least one module, or 'all-linear'")

    @property
    def scaling(self) -> float:
        """The factor on B A x."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def select(self, names: Sequence[str], left_out: Mapping[str, str] | None = None) -> list[str]:
        """The names, in their order, that target_modules means.

        Args:
            names: full paths of the layers to choose from.
            left_out: why others are not among them, by full path.

        Raises:
            ValueError: a name or the expression matches none of them.
        """
        targets = self.target_modules
        if isinstance(targets, str):
            try:
                pattern = re.compile(targets)
            except re.error as error:
                raise ValueError(f"target_modules: {targets!r} is no regular expression: {error}") from None
            chosen = [name for name in names if targets == ALL_LINEAR or pattern.fullmatch(name)]
            missing = [] if chosen else [targets]
        else:
            chosen = [name for name in names if any(ends_with(name, target) for target in targets)]
            missing = [target for target in targets if not any(ends_with(name, target) for name in names)]
        if missing:
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names)) or "none"
            why = [f"; {n} is left out: {why}" for n, why in (left_out or {}).items() if ends_with(n, missing[0])]
            raise ValueError(
                f"target_modules: no linear layer matches {missing[0]!r}{''.join(why[:1])}; linear layers here: {known}"
            )
        return chosen
