"""Weights from every kind of file, one at a time."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from qloralab.checkpoint import models
from qloralab.inspection.weights import Weights


def test_a_directory_is_read_tensor_by_tensor(model_dir, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda *arguments: pytest.fail("the model is read whole"))
    monkeypatch.setattr("qloralab.inspection.weights.load_model", models.load_model)
    weights = Weights(model_dir)
    there = load_file(model_dir / "model.safetensors")
    found = list(weights)
    assert len(found) == len(weights) == 14
    assert all(torch.equal(one.dense(), there[f"{one.layer}.weight"]) for one in found)
    assert weights.notes == []


def test_files_with_other_names_are_read_by_transformers(write_model):
    path = write_model("renamed")
    file = path / "model.safetensors"
    tensors = load_file(file)
    save_file({name.removeprefix("model."): one for name, one in tensors.items()}, file, {"format": "pt"})
    found = Weights(path)["model.layers.1.mlp.up_proj"]
    assert torch.equal(found.dense(), tensors["model.layers.1.mlp.up_proj.weight"])
    assert found.bits is None


@pytest.mark.slow
def test_a_gguf_file_says_what_its_weights_have_been_through(default_gguf):
    weights = Weights(default_gguf)
    assert len(weights) == 210
    (note,) = weights.notes
    assert note.startswith("210 Q4_1 of 210 weights were quantized in the GGUF file before")
    one = weights["model.layers.3.self_attn.k_proj"]
    assert (one.stored, one.bits) == ("Q4_1", 5.0)
    # At most 16 values in each 32 weights: that is what Q4_1 is.
    assert all(len(block.unique()) <= 16 for block in one.dense().reshape(-1, 32)[:50])
