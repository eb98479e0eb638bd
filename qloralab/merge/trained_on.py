"""What an adapter was trained beside: weights in a data type, or dense ones.

``adapter/`` lies in the directory of its run, whose config.json tells. An adapter from elsewhere has none beside it;
then options tell, or the defaults of ``qloralab finetune`` are taken, which a line says.
"""

from __future__ import annotations

from dataclasses import dataclass

from qloralab.nf4.data_type import DataType
from qloralab.nf4.files.errors import FormatError

from ..checkpoint.models import holds_4bit
from ..checkpoint.opened import run_of
from ..data_types import named_data_type
from ..errors import UserError
from ..settings import DATA_TYPE
from .settings import MergeSettings, Onto


@dataclass(frozen=True)
class TrainedOn:
    """What training saw of the weights.

    Attributes:
        data_type: of the linear layers; None: they were dense, or are in 4 bits in the model's directory.
        skip: modules that stayed dense.
        packed: whether the model's directory holds the 4-bit weights.
        merge_aware: whether it was trained through the quantizer, so that 4 bits lose nothing.
        onto: the weights that the update is added to: "dequantized" or "original".
        said: what training saw, in words.
    """

    data_type: DataType | None
    skip: tuple[str, ...]
    packed: bool
    merge_aware: bool
    onto: Onto
    said: str

    @classmethod
    def of(cls, settings: MergeSettings) -> TrainedOn:
        """From the model's directory, the run's config.json, or the options.

        Raises:
            UserError: an option would be ignored, or there is no such data type.
            FormatError: config.json is not that of a run.
        """
        run = run_of(settings.adapter)
        aware = run.get("merge_aware") is True
        if holds_4bit(settings.model):
            settings.refuse_quantization(f"{settings.model} holds 4-bit weights")
            if settings.onto == "original":
                raise UserError(f"--onto original needs the dense model; {settings.model} holds 4-bit weights")
            return cls(None, (), True, aware, "dequantized", "the 4-bit weights of the model")
        onto = settings.onto or ("original" if settings.into == "4bit" and not aware else "dequantized")
        if settings.activations and onto == "original":
            raise UserError(
                "--activations goes with --onto dequantized, and original is the default here; give --onto dequantized"
            )
        options = settings.data_type, settings.block_size, settings.double_quant
        where = settings.adapter.absolute().parent / "config.json"
        if run.get("data_type") is not None:
            settings.refuse_quantization(f"{where} says how the run quantized")
            try:
                kind = named_data_type(run["data_type"], run["block_size"], run["double_quant"])
                skip = tuple(run["skip"])
            except (KeyError, TypeError) as error:
                raise FormatError("does not say how the run quantized", file=where, field=str(error)) from None
            return cls(kind, skip, False, aware, onto, f"{described(kind)}, says {where}")
        kind = named_data_type(settings.data_type or DATA_TYPE, *options[1:])
        if run.get("method") == "lora":
            if settings.into == "bf16":
                settings.refuse_quantization(f"{where} says that the run trained beside dense weights")
            kept = kind if settings.into == "4bit" else None
            return cls(kept, (), False, aware, onto, f"dense weights, says {where}")
        how = "as the options say" if options != (None, None, None) else "the default: no run's config.json says more"
        return cls(kind, (), False, aware, onto, f"{described(kind)}, {how}")


def described(kind: DataType) -> str:
    """A data type in words."""
    scales = f"{kind.encoding if isinstance(kind.encoding, str) else kind.encoding.decoded.__name__} scales"
    return f"{kind.name} in blocks of {kind.block_size}, {'double quantization' if kind.double_quant else scales}"
