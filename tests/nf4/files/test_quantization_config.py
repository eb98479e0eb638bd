"""The object in config.json is the one that transformers writes, and means here what it means there."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from transformers import BitsAndBytesConfig

from qloralab.nf4.files.errors import FormatError
from qloralab.nf4.files.quantization_config import STORAGES, QuantizationConfig, from_dict, is_bitsandbytes, to_dict

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = [
    QuantizationConfig(codebook, double_quant, compute_dtype, storage, skip)
    for codebook, double_quant, (compute_dtype, storage, skip) in itertools.product(
        ("nf4", "fp4"),
        (True, False),
        [*zip(itertools.cycle(DTYPES), STORAGES.values(), itertools.cycle([None, ("lm_head", "a.0.b"), ()]))],
    )
]


def as_transformers(config: QuantizationConfig) -> BitsAndBytesConfig:
    """The same options in transformers' own class."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.codebook,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=config.compute_dtype,
        bnb_4bit_quant_storage=config.storage,
        llm_int8_skip_modules=None if config.skip_modules is None else list(config.skip_modules),
    )


def refused(fields: object) -> FormatError:
    with pytest.raises(FormatError) as caught:
        from_dict(fields, "dir/config.json")
    assert caught.value.file == "dir/config.json"
    return caught.value


@pytest.mark.parametrize("config", OPTIONS, ids=str)
def test_what_is_written_is_what_transformers_writes_and_is_read(config):
    fields = json.loads(json.dumps(as_transformers(config).to_dict()))
    assert to_dict(config) == fields
    assert from_dict(fields) == from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_the_defaults_are_those_of_transformers():
    assert to_dict(QuantizationConfig()) == BitsAndBytesConfig(load_in_4bit=True).to_dict()
    assert from_dict({"load_in_4bit": True}) == QuantizationConfig()
    nulls = {"load_in_4bit": True, "bnb_4bit_compute_dtype": None, "bnb_4bit_quant_storage": None}
    assert from_dict(nulls) == QuantizationConfig()


def test_fields_of_other_versions_are_ignored():
    assert from_dict({"load_in_4bit": True, "bnb_4bit_of_tomorrow": 1, "llm_int8_threshold": "x"}).codebook == "fp4"


MEANINGLESS = {
    "quant_method": ("gptq", 4),
    "load_in_8bit": (True, "yes"),
    "load_in_4bit": (False, 1, None),
    "bnb_4bit_quant_type": ("int4", ["nf4"]),
    "bnb_4bit_use_double_quant": ("true",),
    "bnb_4bit_compute_dtype": ("float64", 16),
    "bnb_4bit_quant_storage": ("int4", {}),
    "llm_int8_skip_modules": ("lm_head", ["lm_head", 3]),
}


@pytest.mark.parametrize(("field", "value"), [(field, v) for field, values in MEANINGLESS.items() for v in values])
def test_a_value_without_a_meaning_is_refused(field, value):
    error = refused({**to_dict(QuantizationConfig("nf4")), field: value})
    assert error.field == f"quantization_config.{field}"
    assert repr(value) in error.message or value in (True, False, None)


@pytest.mark.parametrize("fields", [None, [], "nf4", 4])
def test_what_is_no_object_is_refused(fields):
    assert refused(fields).field == "quantization_config"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, False),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, True),
        ({"quantization_config": {"load_in_4bit": True}}, True),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, False),
        ({"quantization_config": None}, False),
        ({"quantization_config": ["bitsandbytes"]}, False),
    ],
)
def test_whose_weights_they_are(config, expected):
    assert is_bitsandbytes(config) is expected
