"""Answering prompts with a language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .models import pad_id


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Continue each prompt with the most likely words, all prompts at once.

    Args:
        model: a Hugging Face causal language model, with or without adapters.
        tokenizer: of the model.
        prompts: token ids, at least one each.
        max_new_tokens: where an answer is cut.
        progress: called after each token with how many each answer has, and max_new_tokens.

    Returns:
        the answers, without the prompts and without special tokens.
    """
    pad = pad_id(tokenizer)
    length = max(map(len, prompts))
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (length - len(prompt)) + [*prompt] for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    counter = None if progress is None else _Counter(progress, max_new_tokens)
    was_training = model.training
    model.eval()
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        streamer=counter,
    )
    model.train(was_training)
    return tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)


class _Counter:
    """What transformers calls a streamer: it is given the prompts, then each column of tokens as it is known."""

    def __init__(self, progress: Callable[[int, int], None], total: int):
        self._progress, self._total = progress, total
        self._columns = -1

    def put(self, value: torch.Tensor) -> None:
        self._columns += 1
        if self._columns:
            self._progress(self._columns, self._total)

    def end(self) -> None:
        pass
