"""What ``qloralab inspect`` is asked for. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from ..errors import UserError
from ..settings import STDLIB

By = Literal["block", "module", "kind"]
DATA_TYPES = ("nf4", "bof4-s", "int4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectSettings:
    """The settings of an inspection, each with the option that sets it. One that would be ignored is refused.

    Raises:
        UserError: a value is out of its range, or would be ignored.
    """

    path: Annotated[
        Path,
        Argument(
            metavar="[PATH]",
            help="Model, checkpoint in 4 bits, GGUF file or adapter.",
            show_default="SmolLM2-135M-Instruct",
        ),
    ]
    data_type: Annotated[
        list[str] | None,
        Option(
            help="To quantize dense weights to; may be repeated. Or your own, FILE.py:NAME.",
            show_default=", ".join(DATA_TYPES),
        ),
    ] = None
    base: Annotated[
        Path | None,
        Option(help="Dense model that 4-bit weights or an adapter belong to.", show_default="an adapter's, if here"),
    ] = None
    activations: Annotated[bool, Option("--activations", help="Error of the layers' outputs on a text, too.")] = False
    budget: Annotated[bool, Option("--budget", help="Which layers, and which roundings, cause how much KL.")] = False
    by: Annotated[By | None, Option(help="Layers that are quantized together.", show_default="block")] = None
    text: Annotated[
        str | None, Option(help="Text file, JSONL, or 'stdlib': held-out docstrings.", show_default=STDLIB)
    ] = None
    documents: Annotated[
        int | None, Option(help="Pieces of the text, of 256 tokens at most, that are read.", show_default="4")
    ] = None
    top: Annotated[int, Option(help="Layers that the tables list.")] = 5
    json: Annotated[Path | None, Option(help="JSON file to write: everything, for every layer.")] = None
    plot: Annotated[Path | None, Option(help="Directory for pictures.")] = None

    def __post_init__(self) -> None:
        for name in ("top", "documents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} is {value}; it must be at least 1")
        if self.by is not None and not self.budget:
            raise UserError("--by would be ignored: it says what --budget quantizes together; leave it out")
        for name in ("text", "documents"):
            if getattr(self, name) is not None and not self.reads_text:
                raise UserError(f"--{name} would be ignored: only --activations and --budget read a text; leave it out")
        if self.text == "":
            raise UserError(f"--text is empty; give a text file, a JSONL file or {STDLIB!r}")
        if len(set(self.data_type or ())) < len(self.data_type or ()):
            raise UserError("--data-type names a data type twice")

    @property
    def reads_text(self) -> bool:
        """Whether the model is run."""
        return self.activations or self.budget

    def refuse(self, why: str, *names: str) -> None:
        """Raise a ``UserError`` where one of these fields is given."""
        for name in names:
            if getattr(self, name):
                raise UserError(f"--{name.replace('_', '-')} would be ignored: {why}; leave it out")

    def as_json(self) -> dict[str, Any]:
        """The fields; paths as text."""
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
