"""Opening a model to look at or to ask: weights dense or in a data type, an adapter, on the device of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qloralab.lora.inject import train_merge_aware_
from qloralab.nf4.data_type import DataType
from qloralab.nf4.files.json_file import read_object

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
            if run_of(self.adapter).get("merge_aware"):
                self._compute_merged(loaded, self.adapter, display)
        return loaded.to(run_device())

    def _compute_merged(self, loaded: Any, adapter: Path, display: Display) -> None:
        """Let an adapter that was trained merge-aware compute so; added to the base it is another model."""
        try:
            train_merge_aware_(loaded)
        except ValueError as error:
            raise UserError(f"{adapter} was trained merge-aware, and {error}") from None
        display.fact(
            "note", "trained merge-aware: weights are merged at each call; qloralab merge --into 4bit is faster"
        )


def run_of(adapter: Path) -> dict[str, Any]:
    """config.json of the run that an adapter belongs to; empty where there is none.

    Raises:
        FormatError: it is damaged.
    """
    folder = adapter.absolute().parent
    if not ((folder / "metrics.jsonl").is_file() and (folder / "config.json").is_file()):
        return {}
    return read_object(folder / "config.json")
