"""A tiny model with a tokenizer that merges, as those that are exported do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

TEXT = "It is red. It is blue! It's 1234 of them,  and   more:\n\n\tthe end of it, the last one.\r\n"


def _bpe(splitting: Any = None, words: int = 280, decoder: Any = None) -> Any:
    """Byte-level BPE of so many words, learned from TEXT, and four more: three of them special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitting or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoder or decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=words, initial_alphabet=alphabet, show_progress=False)  # pyright: ignore[reportCallIssue]
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<|bos|>", "<|end|>", "<|pad|>")])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    names = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = "{% for message in messages %}{{ message.content }}<|end|>{% endfor %}"
    return fast


@pytest.fixture(scope="session")
def bpe() -> Callable[..., Any]:
    """A tokenizer: ``bpe(splitting, words, decoder)``."""
    return _bpe


@pytest.fixture(scope="session")
def exportable(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a random model and the tokenizer: ``exportable("qwen2", tie_word_embeddings=True)``; returns the path."""

    def write(kind: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        path = tmp_path_factory.mktemp("exportable") / f"tiny-{kind}"
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        fields = {**sizes, "num_key_value_heads": 2, "vocab_size": 300, "initializer_range": 0.1, "rope_theta": 1e5}
        config = AutoConfig.for_model(kind, **{**fields, "max_position_embeddings": 512, **changes})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    torch.nn.init.normal_(parameter, 1.0, 0.1)  # as they start, they tell nothing
        model.save_pretrained(path)
        _bpe().save_pretrained(path)
        return path

    return write
