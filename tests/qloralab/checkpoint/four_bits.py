"""What the tests of 4-bit models share: a small llama, the same model in bitsandbytes, and the comparison of both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from qloralab.checkpoint.models import quiet
from qloralab.nf4.linear import QuantizedLinear

IDS = torch.arange(40)[None]
PROJECTIONS = 7  # linear layers of a Llama block


def llama(tied: bool = False, bias: bool = False, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """Two layers, hidden size 64, random."""
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1, "eos_token_id": 5}
    biases = {"tie_word_embeddings": tied, "attention_bias": bias, "mlp_bias": bias, "bos_token_id": None}
    config = LlamaConfig(**{**sizes, **heads, **biases, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()  # the rotary embedding's buffers are float32
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def write_llama(path: Path, shards: str = "5GB", **options: Any) -> Any:
    """A llama as a directory."""
    model = llama(**options)
    with quiet():
        model.save_pretrained(path, max_shard_size=shards)
    return model


def open_with_bitsandbytes(path: Path, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    with quiet():
        return kind.from_pretrained(path, **options)


def quantized_layers(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def assert_same(ours: Any, theirs: Any, layers: int | None = 2 * PROJECTIONS) -> None:
    """That a model here and one of bitsandbytes are of one class and hold the same numbers."""
    assert type(ours) is type(theirs)
    modules = {name: m for name, m in theirs.named_modules() if isinstance(m, Linear4bit)}
    assert len(modules) == layers if layers is not None else modules
    assert set(modules) == quantized_layers(ours)
    for name, module in modules.items():
        weight, packed = ours.get_submodule(name).weight, cast("Params4bit", module.weight)
        expected = dequantize_4bit(packed.data, packed.quant_state)
        assert torch.equal(weight.dequantize(), expected), name
        assert weight.dtype == expected.dtype
    rest = {name: p for name, p in theirs.named_parameters() if not isinstance(p, Params4bit)}
    mine = dict(ours.named_parameters())
    assert mine.keys() == rest.keys()
    for name, parameter in rest.items():
        assert torch.equal(mine[name], parameter.to(mine[name].dtype)), name


def assert_same_state(ours: Any, expected: Any, dtypes: bool = True) -> None:
    after, before = ours.state_dict(), expected.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype or not dtypes
        assert torch.equal(after[name], tensor), name


def assert_same_logits(ours: Any, theirs: Any) -> None:
    """Within the roundings of a bfloat16 model, of which a few differ. In evaluation bitsandbytes may repack."""
    theirs.train()
    with torch.no_grad():
        found, expected = ours(IDS).logits.double(), theirs(IDS).logits.double()
    assert (found - expected).norm() < 0.02 * expected.norm()


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a file of JSON; None removes one."""
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the dictionary of the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, {"format": "pt"})
