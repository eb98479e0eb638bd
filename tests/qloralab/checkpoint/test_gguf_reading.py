"""What is read quickly is what the gguf package and transformers read by themselves."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from qloralab.checkpoint.gguf_reading import fast_gguf

HIDDEN, LAYERS, VOCABULARY = 64, 3, 32


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A llama with a tokenizer, some of its weights in Q8_0; no two tensors are alike."""
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(HIDDEN)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"word{i}" for i in range(VOCABULARY)])
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges(["a b", "c d"])
    random = np.random.default_rng(1)
    shapes = {"token_embd": (VOCABULARY, HIDDEN), "output_norm": (HIDDEN,)}
    shapes |= {f"blk.{i}.attn_q": (HIDDEN, HIDDEN) for i in range(LAYERS)}
    shapes |= {f"blk.{i}.attn_norm": (HIDDEN,) for i in range(LAYERS)}
    for name, shape in shapes.items():
        weight = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            packed = gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{name}.weight", weight)
    for write in writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close:
        write()
    return tmp_path / "tiny.gguf"


def test_the_reader_finds_the_same(file):
    slow = gguf.GGUFReader(file)
    with fast_gguf():
        fast = gguf.GGUFReader(file)
    assert type(fast.data) is np.ndarray
    assert list(fast.fields) == list(slow.fields)
    for name, field in slow.fields.items():
        assert fast.fields[name].types == field.types
        assert fast.fields[name].contents() == field.contents()
    assert [tensor.name for tensor in fast.tensors] == [tensor.name for tensor in slow.tensors]
    for mine, theirs in zip(fast.tensors, slow.tensors, strict=True):
        assert mine.tensor_type == theirs.tensor_type
        np.testing.assert_array_equal(mine.data, theirs.data)


def test_transformers_reads_the_same(file):
    slow = load_gguf_checkpoint(file)
    with fast_gguf():
        assert load_gguf_checkpoint(file) == slow
        assert load_gguf_checkpoint(file) == slow  # the second time, from the same reader
    assert slow["tokenizer"]["tokens"][-1] == f"word{VOCABULARY - 1}"
    assert slow["config"]["num_hidden_layers"] == LAYERS


def test_the_weights_are_the_same(file):
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    slow = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
    with fast_gguf():
        fast = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
    assert list(fast) == list(slow)
    assert len({name for name in fast if name.endswith("q_proj.weight")}) == LAYERS
    for name, tensor in slow.items():
        assert torch.equal(fast[name], tensor)


def test_a_header_is_read_once_and_nothing_stays(file):
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    with fast_gguf():
        assert gguf.GGUFReader(file) is gguf.GGUFReader(file)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
    with pytest.raises(FileNotFoundError), fast_gguf():
        gguf.GGUFReader(file.with_name("other.gguf"))
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
