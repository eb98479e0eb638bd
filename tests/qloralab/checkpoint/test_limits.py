"""What a model has room for is what its forward pass takes, of models and of their skeletons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qloralab.checkpoint.limits import Limits

SIZES = {
    "vocab_size": 90, "hidden_size": 32, "word_embed_proj_dim": 32, "intermediate_size": 48, "ffn_dim": 48,
    "decoder_ffn_dim": 48, "num_hidden_layers": 1, "decoder_layers": 1, "encoder_layers": 1, "num_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4, "dff": 48,
    "max_position_embeddings": 24, "pad_token_id": 1, "is_decoder": True,
}  # fmt: skip


def build(family: str) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES)).eval()


@pytest.mark.parametrize(
    ("family", "positions"),
    [(family, 24) for family in ("gpt2", "gpt_bigcode", "opt", "bart", "bert", "gptj", "codegen", "ctrl")]
    + [("roberta", 22)]
    + [(family, None) for family in ("llama", "gpt_neox", "bloom", "mamba")],
)
def test_the_longest_text(family, positions):
    model = build(family)
    with torch.device("meta"):
        assert Limits.of(build(family)) == Limits.of(model) == Limits(90, positions, 24)

    @torch.no_grad()
    def run(length: int) -> Any:
        return model(input_ids=torch.full((1, length), 5), use_cache=False)

    run(positions or 40)
    if positions:
        with pytest.raises((IndexError, RuntimeError)):
            run(positions + 1)


def test_texts_are_checked(byte_tokenizer, refusal):
    limits, tokenizer = Limits(257, 4, 4), byte_tokenizer()
    limits.check([("a:1", [256, 0]), ("a:2", [1] * 4), ("a:3", [])], tokenizer)
    assert refusal(limits.check, [("a:1", [1] * 5)], tokenizer) == "a:1: 5 tokens, and the model has 4 positions"
    assert refusal(limits.check, [("a:1", [0]), ("a:2", [1, 257, 0])], tokenizer) == (
        "a:2: token 257 ('<|end|>') of the tokenizer is beyond the 257 rows of the model's embedding; "
        "give --model a directory whose tokenizer belongs to its weights"
    )
