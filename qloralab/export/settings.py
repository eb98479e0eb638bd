"""What ``qloralab export`` is asked for. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal, get_args

from typer import Option

from ..errors import UserError
from ..settings import MODEL_OPTION

FloatType = Literal["bf16", "f16", "f32"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """The settings of an export, each with the option that sets it. One that would be ignored is refused.

    Raises:
        UserError: a value is out of its range, or would be ignored.
    """

    model: Annotated[Path, MODEL_OPTION]
    gguf: Annotated[Path, Option(help="GGUF file to make.")]
    adapter: Annotated[
        Path | None, Option(help="Directory of an adapter for the model: it alone is written.", show_default="none")
    ] = None
    dtype: Annotated[
        FloatType | None, Option(help="Of the matrices; norms are in f32.", show_default="bf16; of an adapter f32")
    ] = None
    pre_tokenizer: Annotated[
        str | None, Option(help="Name that llama.cpp has for how text is split.", show_default="recognized")
    ] = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, *get_args(FloatType)):
            raise UserError(f"--dtype is {self.dtype!r}; it must be one of {', '.join(get_args(FloatType))}")
        if self.adapter is not None and self.pre_tokenizer is not None:
            raise UserError("--pre-tokenizer would be ignored: an adapter has no tokenizer; leave it out")

    @property
    def float_type(self) -> FloatType:
        """dtype, or its default."""
        return self.dtype or ("bf16" if self.adapter is None else "f32")
