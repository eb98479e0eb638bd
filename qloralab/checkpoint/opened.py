"""Opening a model to look at or to ask: weights dense or in a data type, an adapter, on the device of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qloralab.nf4.data_type import DataType

from ..compute import Precision, prepare_kernels, run_device
from ..display import Display
from ..errors import UserError
from .limits import Limits
from .models import (
    DENSE_DTYPE,
    check_adapter,
    check_adapter_fits,
    check_model,
    holds_4bit,
    load_adapter,
    load_model,
    load_tokenizer_and_config,
    model_name,
    quantize_loaded_,
)

DENSE = "dense"


@dataclass(frozen=True)
class Source:
    """A model as it is to be opened; made once what can be refused without reading it is refused.

    Attributes:
        model: a Hugging Face directory or a GGUF file.
        data_type: of the linear layers; None: dense, or what the directory holds in 4 bits.
        adapter: directory of an adapter, or None.
        skip: modules that stay dense.
        tokenizer, limits: of the model; limits is None where only the model itself tells them.
    """

    model: Path
    data_type: DataType | None
    adapter: Path | None
    skip: Sequence[str]
    tokenizer: Any
    limits: Limits | None

    @classmethod
    def of(
        cls,
        model: Path,
        data_type: DataType | None,
        adapter: Path | None,
        display: Display,
        skip: Sequence[str] = (),
    ) -> Source:
        """Check the paths and read the tokenizer.

        Args:
            model: as above. Where it holds 4-bit weights, they stay as they are, and data_type is None.
            data_type, adapter, skip: as above.
            display: shows what is going on.

        Raises:
            UserError, FormatError: the model or the adapter cannot be used.
        """
        check_model(model)
        if data_type is not None and holds_4bit(model):
            raise UserError(f"{model} holds 4-bit weights, which are not quantized again; give the dense model")
        if adapter is not None:
            check_adapter(adapter)
        with display.busy("reading the tokenizer"):
            tokenizer, config = load_tokenizer_and_config(model)
            limits = Limits.of_directory(model)
        if adapter is not None and (other_model := check_adapter_fits(adapter, config)):
            display.fact("note", other_model)
        return cls(model, data_type, adapter, skip, tokenizer, limits)

    def open(self, chosen: Precision, display: Display) -> Any:
        """The model, in evaluation mode, on the device of the run.

        Args:
            chosen: what is computed in.
            display: shows what is going on.

        Raises:
            UserError, FormatError: the model or the adapter cannot be used.
        """
        with display.busy(f"reading {model_name(self.model)}"):
            loaded = load_model(self.model, chosen.dtype if self.data_type is None else DENSE_DTYPE)
        if self.data_type is not None or holds_4bit(self.model):
            prepare_kernels(display)
        if self.data_type is not None:
            with display.busy("quantizing", "weights") as progress:
                quantize_loaded_(loaded, chosen.dtype, progress, self.data_type, self.skip)
        if self.adapter is not None:
            load_adapter(loaded, self.adapter)
        return loaded.to(run_device())
