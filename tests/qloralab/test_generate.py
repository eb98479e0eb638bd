"""Greedy answers, the same for a prompt alone and among others."""

from __future__ import annotations

import pytest
import torch

from qloralab.generate import generate
from qloralab.models import load_model, load_tokenizer

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
    assert generate(model, tokenizer, prompts, 12) == texts
    assert [generate(model, tokenizer, [ids], 12)[0] for ids in prompts] == texts


def test_an_answer_ends_with_eos_and_does_not_show_it(model, tokenizer, monkeypatch):
    ids = tokenizer(PROMPTS[1]).input_ids
    third = most_likely(model, ids, 3, -1)[2]
    monkeypatch.setattr(model.generation_config, "eos_token_id", third)
    monkeypatch.setattr(type(tokenizer), "all_special_ids", [third])
    expected = tokenizer.decode(most_likely(model, ids, 12, third)[:-1])
    found = generate(model, tokenizer, [ids], 12)[0]
    assert found.startswith(expected)
    assert len(found) <= len(expected) + 1


def test_progress_counts_the_tokens_of_an_answer(model, tokenizer):
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    plain, seen = generate(model, tokenizer, prompts, 7), []
    assert generate(model, tokenizer, prompts, 7, lambda done, total: seen.append((done, total))) == plain
    assert seen == [(done, 7) for done in range(1, 8)]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_comes_back(model, tokenizer, training):
    model.train(training)
    generate(model, tokenizer, [[1, 2]], 2)
    assert model.training == training
    model.eval()


def test_dropout_is_off(model, tokenizer, monkeypatch):
    modes = []
    monkeypatch.setattr(
        type(model), "generate", lambda self, **options: modes.append(self.training) or options["input_ids"]
    )
    model.train()
    assert generate(model, tokenizer, [[1, 2], [3]]) == ["", ""]
    assert modes == [False]
    model.eval()
