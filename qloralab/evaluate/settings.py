"""What ``qloralab eval`` is asked for. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from ..errors import UserError
from ..settings import MODEL_OPTION, STDLIB, DtypeOption

DENSE = "dense"
NONE = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """The settings of an evaluation, each with the option that sets it. One that would be ignored is refused.

    Raises:
        UserError: a value is out of its range, or would be ignored.
    """

    model: Annotated[Path, MODEL_OPTION]
    data_type: Annotated[
        str | None,
        Option(
            help="Of the linear layers: dense, nf4, fp4, bof4-s, ... or your own, FILE.py:NAME.", show_default="nf4"
        ),
    ] = None
    block_size: Annotated[
        int | None, Option(help="Weights that share a scale.", show_default="the data type's own")
    ] = None
    double_quant: Annotated[
        bool | None,
        Option(
            "--double-quant/--no-double-quant",
            help="Quantize the scales too, or keep them in float32.",
            show_default="the data type's own",
        ),
    ] = None
    skip: Annotated[
        list[str] | None, Option(metavar="NAME", help="A module that stays dense; may be repeated.", show_default=False)
    ] = None
    adapter: Annotated[Path | None, Option(help="Directory of an adapter.", show_default="none: the model alone")] = (
        None
    )
    reference: Annotated[
        Path | None,
        Option(
            help="Model that KL divergence and agreement are taken from; 'none': neither, which takes half the time.",
            show_default="--model, dense",
        ),
    ] = None
    text: Annotated[
        str,
        Option(help="Text file, JSONL, or 'stdlib': the docstrings that the default fine-tuning holds out."),
    ] = STDLIB
    documents: Annotated[int | None, Option(help="The first so many.", show_default="all")] = None
    window: Annotated[int, Option(help="Tokens that the model is given at once.")] = 256
    stride: Annotated[int, Option(help="Tokens from one window to the next; the rest of a window is context.")] = 128
    dtype: DtypeOption = "auto"
    out: Annotated[Path | None, Option(help="JSON file to write, with the sums of each document.")] = None
    against: Annotated[
        Path | None, Option(help="JSON file of another run: show the differences, paired over documents.")
    ] = None

    def __post_init__(self) -> None:
        from .windows import check_window

        check_window(self.window, self.stride)
        if self.documents is not None and self.documents < 1:
            raise UserError(f"--documents is {self.documents}; it must be at least 1")
        if not self.text:
            raise UserError(f"--text is empty; give a text file, a JSONL file or {STDLIB!r}")
        if self.data_type == DENSE:
            self.refuse_quantizing("--data-type dense quantizes nothing")

    def refuse_quantizing(self, why: str) -> None:
        """Raise a ``UserError`` where an option says how to quantize."""
        for name in ("block_size", "double_quant", "skip"):
            value = getattr(self, name)
            if value is not None and value != []:
                option = name.replace("_", "-") if value is not False else f"no-{name}".replace("_", "-")
                raise UserError(f"--{option} would be ignored: {why}; leave it out")

    def as_json(self) -> dict[str, Any]:
        """The fields; paths as text."""
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
