"""Answering prompts with a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .models import pad_id


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int = 64) -> list[str]:
    """Continue each prompt with the most likely words, all prompts at once.

    Args:
        model: a Hugging Face causal language model, with or without adapters.
        tokenizer: of the model.
        prompts: token ids, at least one each.
        max_new_tokens: where an answer is cut.

    Returns:
        the answers, without the prompts and without special tokens.
    """
    pad = pad_id(tokenizer)
    length = max(map(len, prompts))
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (length - len(prompt)) + [*prompt] for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    was_training = model.training
    model.eval()
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad
    )
    model.train(was_training)
    return tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
