"""Greedy answers, the same for a prompt alone and among others."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig

from qloralab.checkpoint.models import load_model, load_tokenizer
from qloralab.kernels.gpu import dense_cache
from qloralab.train.generate import end_ids, generate

PROMPTS = ["a", "A longer prompt than the others?", "two words"]


@pytest.fixture(scope="module")
def model(model_dir):
    return load_model(model_dir, torch.float32)


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return load_tokenizer(model_dir)


def most_likely(model, ids: list[int], count: int, end: int) -> list[int]:
    """One word after the other, each from a forward pass over all before it."""
    answer: list[int] = []
    while len(answer) < count and end not in answer:
        with torch.no_grad():
            answer.append(int(model(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax()))
    return answer


def test_the_most_likely_words(model, tokenizer):
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    expected = [most_likely(model, ids, 12, tokenizer.eos_token_id) for ids in prompts]
    assert len({tuple(answer) for answer in expected}) == len(PROMPTS)
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in expected]
    seen: list[tuple[int, int]] = []
    assert generate(model, tokenizer, prompts, 12, lambda done, total: seen.append((done, total))) == texts
    assert seen == [(done, 12) for done in range(1, 13)]
    assert [generate(model, tokenizer, [ids], 12)[0] for ids in prompts] == texts


def test_dense_weights_may_be_kept_while_tokens_are_made(model, tokenizer, monkeypatch):
    kept: list[torch.device] = []
    monkeypatch.setattr(dense_cache, "while_generating", lambda device: kept.append(device) or nullcontext())
    generate(model, tokenizer, [tokenizer(PROMPTS[0]).input_ids], 2)
    assert kept == [model.device]


def test_an_answer_ends_with_eos_and_does_not_show_it(model, tokenizer, monkeypatch):
    ids = tokenizer(PROMPTS[1]).input_ids
    third = most_likely(model, ids, 3, -1)[2]
    monkeypatch.setattr(model.generation_config, "eos_token_id", third)
    monkeypatch.setattr(type(tokenizer), "all_special_ids", [third])
    expected = tokenizer.decode(most_likely(model, ids, 12, third)[:-1])
    found = generate(model, tokenizer, [ids], 12)[0]
    assert found.startswith(expected)
    assert len(found) <= len(expected) + 1


@pytest.mark.parametrize("whose", ["model", "tokenizer", "template"])
def test_an_answer_is_over_at_any_of_the_ends(model, byte_tokenizer, monkeypatch, whose):
    """Each has another one; the third token of the answer is that of one of them."""
    ids = byte_tokenizer()(PROMPTS[1]).input_ids
    words = most_likely(model, ids, 8, -1)
    ends = dict.fromkeys(("model", "tokenizer", "template"), "<|start|>") | {whose: chr(words[2] + 33)}
    assert words[2] not in words[:2]
    template = "{% for m in messages %}{{ m.content }}" + ends["template"] + "{% endfor %}"
    tokenizer = byte_tokenizer(template, [*ends.values()], ends["tokenizer"])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [words[2] if whose == "model" else 256])
    assert words[2] in end_ids(model, tokenizer)
    assert generate(model, tokenizer, [ids], 8) == [tokenizer.decode(words[:2])]


@pytest.mark.parametrize("family", [GPT2Config, OPTConfig])
def test_an_answer_ends_with_the_positions_of_the_model(byte_tokenizer, refusal, family):
    config = family(
        vocab_size=260, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32,
        max_position_embeddings=24, eos_token_id=257, bos_token_id=None,
    )  # fmt: skip
    model, tokenizer, seen = AutoModelForCausalLM.from_config(config), byte_tokenizer(), []
    generate(model, tokenizer, [[65] * 20, [66] * 3], 32, lambda done, total: seen.append(done))
    assert seen == [1, 2, 3, 4, 5]  # the last one has no successor
    generate(model, tokenizer, [[65] * 24], 32)
    assert refusal(generate, model, tokenizer, [[65] * 25]) == "the prompt: 25 tokens, and the model has 24 positions"
    assert refusal(generate, model, tokenizer, [[300]]).startswith(
        "the prompt: token 300 (None) of the tokenizer is beyond"
    )


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_comes_back(model, tokenizer, monkeypatch, training):
    modes = []
    monkeypatch.setattr(
        type(model), "generate", lambda self, **options: modes.append(self.training) or options["input_ids"]
    )
    model.train(training)
    assert generate(model, tokenizer, [[1, 2], [3]]) == ["", ""]
    assert (modes, model.training) == ([False], training)
    model.eval()
