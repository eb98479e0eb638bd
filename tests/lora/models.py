"""A small model of transformers, and adapters that do something."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qloralab.lora.config import LoraConfig
from qloralab.lora.inject import adapters, inject_

IDS = torch.arange(24).view(2, 12)
LLAMA_LINEAR = [
    f"model.layers.{i}.{name}"
    for i in range(2)
    for name in (
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    )
]


def llama(tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.15, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def adapted(model: Any = None, **fields: Any) -> Any:
    """A model whose adapters do something."""
    model = inject_(model or llama(), LoraConfig(**{"r": 4, "lora_alpha": 8, **fields}))
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.normal_(std=0.1)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits
