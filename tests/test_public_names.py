"""The names that stay, and how they are called. A change here is a line in CHANGELOG.md."""

from __future__ import annotations

import inspect
import types

import pytest

import qloralab

CALLS = {
    "normal_float": "(bits=4)",
    "quantize": "(weight, codebook='nf4', block_size=64, double_quant=True, name='weight')",
    "linear": "(x, weight, bias=None)",
    "linear_names": "(model, skip=None)",
    "quantize_": (
        "(model, codebook='nf4', block_size=64, double_quant=True, compute_dtype=torch.bfloat16, skip=None, "
        "progress=None)"
    ),
    "LoraConfig": (
        "(r, lora_alpha, lora_dropout=0.0, target_modules='all-linear', bias='none', task_type='CAUSAL_LM', "
        "use_rslora=False)"
    ),
    "inject_": "(model, config)",
    "trainable": "(model)",
    "save_adapter": "(model, directory)",
    "load_adapter_": "(model, directory)",
}
CLASSES = {
    "QuantizedTensor": {
        "packed", "absmax", "shape", "dtype", "codebook", "block_size", "double_quant",
        "dequantize", "bits_per_parameter", "to_bitsandbytes", "from_bitsandbytes",
    },
    "FormatError": {"file", "tensor", "field"},
}  # fmt: skip


def call(function: object) -> str:
    """The signature of `function` without its annotations."""
    assert callable(function)
    signature = inspect.signature(function)
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def test_all_lists_the_public_names():
    assert sorted(qloralab.__all__) == sorted([*CALLS, *CLASSES])


def test_nothing_else_looks_public():
    visible = {name for name, value in vars(qloralab).items() if not isinstance(value, types.ModuleType)}
    assert {name for name in visible if not name.startswith("_")} == set(qloralab.__all__)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_keeps_its_arguments(name):
    assert call(getattr(qloralab, name)) == CALLS[name]


def test_a_quantized_tensor_keeps_its_attributes():
    import torch

    tensor = qloralab.quantize(torch.randn(4, 64))
    assert {name for name in CLASSES["QuantizedTensor"] if not hasattr(tensor, name)} == set()


def test_a_format_error_says_where():
    error = qloralab.FormatError("is short", file="a.safetensors", tensor="w", field="shape")
    assert isinstance(error, ValueError)
    assert {name: getattr(error, name) for name in CLASSES["FormatError"]} == {
        "file": "a.safetensors",
        "tensor": "w",
        "field": "shape",
    }
