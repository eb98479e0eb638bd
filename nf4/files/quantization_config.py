"""``quantization_config``: what the config.json of a 4-bit model says about its weights, for transformers to read.

The object has the attributes of transformers' ``BitsAndBytesConfig`` (5.23), those for 8 bits included::

    {"quant_method": "bitsandbytes",
     "load_in_4bit": true, "_load_in_4bit": true,
     "load_in_8bit": false, "_load_in_8bit": false,
     "bnb_4bit_quant_type": "nf4",                 # or "fp4", which is the default
     "bnb_4bit_use_double_quant": true,            # default false
     "bnb_4bit_compute_dtype": "bfloat16",         # of the products; default "float32"
     "bnb_4bit_quant_storage": "uint8",            # the dtype that the packed codes are labelled with
     "llm_int8_skip_modules": null,                # layers left dense; null: those that transformers leaves
     "llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": false, "llm_int8_enable_fp32_cpu_offload": false}

It has no block size: that stands beside each weight (see ``bitsandbytes_layout.py``), and so do the codebook and
whether the scales are quantized. Where the two differ, the weight is believed, by bitsandbytes and here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from .bitsandbytes_layout import KNOWN, STORAGE, dtype_name
from .errors import FormatError

METHOD = "bitsandbytes"
FIELD = "quantization_config"
STORAGES = {dtype_name(dtype): dtype for dtype in STORAGE}
_COMPUTE = {dtype_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """What a ``quantization_config`` for 4 bits says. The defaults are those of ``BitsAndBytesConfig``.

    Attributes:
        codebook: "nf4" or "fp4".
        double_quant: the scales are quantized too.
        compute_dtype: of the products: float32, bfloat16 or float16.
        storage: the dtype that the packed codes are labelled with; see ``STORAGES``.
        skip_modules: the linear layers that are dense; None: those that transformers leaves dense by itself.
    """

    codebook: str = "fp4"
    double_quant: bool = False
    compute_dtype: torch.dtype = torch.float32
    storage: torch.dtype = torch.uint8
    skip_modules: tuple[str, ...] | None = None


def is_bitsandbytes(config: Mapping[str, Any]) -> bool:
    """Whether a config.json claims weights that bitsandbytes quantized, in 4 bits or in 8.

    Configurations of old versions of transformers name no method.
    """
    fields = config.get(FIELD)
    return isinstance(fields, dict) and fields.get("quant_method", METHOD) == METHOD


def to_dict(config: QuantizationConfig) -> dict[str, Any]:
    """The object as transformers writes it."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype_name(config.compute_dtype),
        "bnb_4bit_quant_storage": dtype_name(config.storage),
        "bnb_4bit_quant_type": config.codebook,
        "bnb_4bit_use_double_quant": config.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None if config.skip_modules is None else list(config.skip_modules),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": METHOD,
    }


def from_dict(fields: object, file: object = None) -> QuantizationConfig:
    """Read the object. Fields that are not there have their defaults; those that mean nothing for 4 bits are ignored.

    Args:
        fields: the value of ``quantization_config``, as JSON has it.
        file: the config.json, for the messages.

    Raises:
        FormatError: it is not about 4-bit weights of bitsandbytes, or a field has a value that has no meaning.
    """
    if not isinstance(fields, dict):
        raise FormatError(f"is {fields!r:.60}, not an object", file=file, field=FIELD)

    def field(name: str, default: Any, valid: Any, expected: str) -> Any:
        value = fields.get(name)
        if value is None:
            return default
        if not valid(value):
            raise FormatError(f"is {value!r:.60}; expected {expected}", file=file, field=f"{FIELD}.{name}")
        return value

    def flag(name: str) -> bool:
        return field(name, False, lambda value: isinstance(value, bool), "true or false")

    def one_of(name: str, default: str, choices: Any) -> str:
        expected = f"one of {', '.join(choices)}"
        return field(name, default, lambda value: isinstance(value, str) and value in choices, expected)

    def are_names(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(name, str) for name in value)

    one_of("quant_method", METHOD, (METHOD,))
    for name, wanted, found in (("load_in_8bit", False, "true"), ("load_in_4bit", True, "not true")):
        if flag(name) != wanted:
            raise FormatError(f"is {found}; only 4-bit weights are read", file=file, field=f"{FIELD}.{name}")
    skip = field("llm_int8_skip_modules", None, are_names, "a list of names")
    return QuantizationConfig(
        codebook=one_of("bnb_4bit_quant_type", "fp4", KNOWN),
        double_quant=flag("bnb_4bit_use_double_quant"),
        compute_dtype=_COMPUTE[one_of("bnb_4bit_compute_dtype", "float32", _COMPUTE)],
        storage=STORAGES[one_of("bnb_4bit_quant_storage", "uint8", STORAGES)],
        skip_modules=None if skip is None else tuple(skip),
    )
