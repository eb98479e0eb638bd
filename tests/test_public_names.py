"""The names that stay, and how they are called. A change here is a line in CHANGELOG.md."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest

import qloralab

CALLS = {
    "normal_float": "(bits=4)",
    "quantize": "(weight, codebook='nf4', block_size=None, double_quant=None, name='weight')",
    "linear": "(x, weight, bias=None)",
    "linear_names": "(model, skip=None)",
    "quantize_": (
        "(model, codebook='nf4', block_size=None, double_quant=None, compute_dtype=None, skip=None, progress=None)"
    ),
    "LoraConfig": (
        "(r, lora_alpha, lora_dropout=0.0, target_modules='all-linear', bias='none', task_type='CAUSAL_LM', "
        "use_rslora=False, init_lora_weights=True)"
    ),
    "DataType": "(name, codebook, block_size=64, scale='absmax', encoding='float32')",
    "inject_": "(model, config)",
    "trainable": "(model)",
    "merge_": "(model)",
    "unmerge_": "(model)",
    "save_adapter": "(model, directory)",
    "load_adapter_": "(model, directory)",
    "save_quantized": "(model, directory)",
    "load_quantized": "(directory, compute_dtype=None)",
    "save_checkpoint": "(path, model, optimizer, progress=None)",
    "load_checkpoint_": "(path, model, optimizer)",
    "PagedAdamW": (
        "(params, lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01, state_bits=32, budget=None, *, "
        "nonfinite='update', update_in_backward=False, state_dir=None, oversubscribe=False)"
    ),
}
CLASSES = {
    "QuantizedTensor": {
        "packed", "absmax", "shape", "dtype", "codebook", "block_size", "double_quant",
        "dequantize", "codes", "bits_per_parameter", "ideal_bits_per_parameter", "to_bitsandbytes", "from_bitsandbytes",
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
    assert sorted(qloralab.__all__) == sorted([*CALLS, *CLASSES, "DATA_TYPES"])


def test_nothing_else_looks_public():
    visible = {name for name in dir(qloralab) if not isinstance(getattr(qloralab, name), types.ModuleType)}
    assert {name for name in visible if not name.startswith("_")} == set(qloralab.__all__)


def test_a_name_is_imported_when_it_is_used():
    code = """
import sys, qloralab
assert {*qloralab.__all__} <= {*dir(qloralab)}
assert "torch" not in sys.modules
qloralab.linear
assert "torch" in sys.modules and "linear" in vars(qloralab)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_module_hides_a_name():
    """Importing ``qloralab.X`` makes X an attribute of the package, in place of a function of that name."""
    modules = {path.stem for path in Path(qloralab.__file__).parent.glob("*.py")}
    assert not modules & set(qloralab.__all__)


def test_star_brings_all_names():
    names: dict[str, object] = {}
    exec("from qloralab import *", names)
    assert {name: names.get(name) for name in qloralab.__all__} == {
        name: getattr(qloralab, name) for name in qloralab.__all__
    }


def test_type_checkers_see_the_same_names_in_the_same_places():
    tree = ast.parse(inspect.getsource(qloralab))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {
        name.asname: f"qloralab.{node.module}" if node.level else node.module for node in imports for name in node.names
    }
    assert seen == {name: f"qloralab.{module}" for name, module in qloralab._MODULES.items()}


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"^module 'qloralab' has no attribute 'quantise'$"):
        qloralab.quantise  # type: ignore[attr-defined]  # noqa: B018


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
