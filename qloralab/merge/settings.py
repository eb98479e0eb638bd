"""What ``qloralab merge`` is asked for. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal, get_args

from typer import Option

from ..errors import UserError
from ..settings import MODEL_OPTION

Into = Literal["bf16", "4bit"]
Onto = Literal["dequantized", "original"]
LEAST_KEPT = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """The settings of a merge, each with the option that sets it. One that would be ignored is refused.

    Raises:
        UserError: a value is out of its range, or would be ignored.
    """

    model: Annotated[Path, MODEL_OPTION]
    adapter: Annotated[Path, Option(help="Directory of the adapter.")]
    out: Annotated[Path, Option(help="Directory to make, new or empty.")]
    into: Annotated[Into, Option(help="Dense weights, or weights in 4 bits again, where little of it survives.")] = (
        "bf16"
    )
    onto: Annotated[
        Onto | None,
        Option(
            help="The weights that training saw, or those that it quantized.",
            show_default="dequantized; 4bit of a dense model: original",
        ),
    ] = None
    data_type: Annotated[
        str | None, Option(help="That the run trained on: a name, or FILE.py:NAME.", show_default="the run's, else nf4")
    ] = None
    block_size: Annotated[
        int | None, Option(help="Weights that share a scale.", show_default="the run's, else data type's")
    ] = None
    double_quant: Annotated[
        bool | None,
        Option(
            "--double-quant/--no-double-quant",
            help="Scales in 8 bits, or float32.",
            show_default="the run's, else data type's",
        ),
    ] = None
    activations: Annotated[
        bool, Option("--activations", help="Error of the layers' outputs on a text, too; reads the model whole.")
    ] = False
    force: Annotated[
        bool, Option("--force", help=f"Into 4 bits, also where less than {LEAST_KEPT} of the update is kept.")
    ] = False

    def __post_init__(self) -> None:
        for name, choices in (("into", get_args(Into)), ("onto", get_args(Onto))):
            if getattr(self, name) not in choices and (name, self.onto) != ("onto", None):
                raise UserError(f"--{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        if self.into == "bf16":
            self.refuse("--into bf16 loses nothing of the adapter", "activations", "force")
            if self.onto == "original":
                self.refuse_quantization("--onto original quantizes nothing")
        if self.activations and self.onto == "original":
            raise UserError("--activations would be ignored: it goes with --onto dequantized; leave it out")

    def refuse(self, why: str, *names: str) -> None:
        """Raise a ``UserError`` where one of these fields is given."""
        for name in names:
            if getattr(self, name) not in (None, False) or (name == "double_quant" and self.double_quant is False):
                raise UserError(f"--{name.replace('_', '-')} would be ignored: {why}; leave it out")

    def refuse_quantization(self, why: str) -> None:
        """Raise a ``UserError`` where it is said how weights are quantized."""
        self.refuse(why, "data_type", "block_size", "double_quant")
