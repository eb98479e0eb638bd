"""Answering prompts with a language model, loaded (``generate``) or on the disk (``answer``: ``qloralab generate``).

An answer is over at any of the tokens that the model (its generation_config.json), the tokenizer and the chat template
end one with. They are not always the same, and each may be the one that was trained.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qloralab.kernels.gpu import dense_cache

from ..checkpoint.limits import Limits
from ..checkpoint.models import check_model, holds_4bit
from ..checkpoint.opened import Source
from ..compute import precision, run_device
from ..data.chat_template import ChatTemplate
from ..data.encoding import prompt_text
from ..data_types import named_data_type
from ..display import Display
from ..errors import UserError
from ..settings import DATA_TYPE, Dtype
from .decoding import can_decode, decode, is_plain


def answer(
    model: Path,
    adapter: Path | None,
    prompt: str,
    max_new_tokens: int,
    quantized: bool,
    dtype: Dtype = "auto",
    display: Display | None = None,
    data_type: str | None = None,
) -> str:
    """Load a model and an adapter and answer a prompt, in the model's chat format.

    Args:
        model: a Hugging Face directory or a GGUF file.
        adapter: directory of an adapter, or None.
        prompt: what the user says.
        max_new_tokens: where the answer is cut.
        quantized: hold the weights in 4 bits, as they were when a QLoRA adapter was trained; otherwise dense, in dtype.
        dtype: that is computed in.
        display: shows what is going on; by default on standard error.
        data_type: of the weights, by name (``named_data_type``); None: nf4, or what the model holds.

    Raises:
        UserError, FormatError: the model or the adapter cannot be used.
    """
    display = display or Display(Console(file=sys.stderr))
    chosen = precision(dtype, run_device())
    check_model(model)
    packed = holds_4bit(model)
    if packed and not quantized:
        raise UserError(f"{model} holds 4-bit weights; --dense needs the dense model")
    if data_type is not None and (packed or not quantized):
        why = f"{model} holds 4-bit weights" if packed else "--dense quantizes no weights"
        raise UserError(f"--data-type would be ignored: {why}; leave it out")
    kind = None if packed or not quantized else named_data_type(data_type or DATA_TYPE)
    if chosen.slow:
        display.fact("dtype", chosen.described())
    source = Source.of(model, kind, adapter, display)
    ids = source.tokenizer(prompt_text(prompt, source.tokenizer), add_special_tokens=False).input_ids
    if source.limits:
        source.limits.check([("the prompt", ids)], source.tokenizer)
    loaded = source.open(chosen, display)
    with display.busy("answering", "tokens") as progress:
        return generate(loaded, source.tokenizer, [ids], max_new_tokens, progress)[0].strip()


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
        max_new_tokens: where an answer is cut; earlier where the model has no more positions.
        progress: called after each token with how many each answer has, and max_new_tokens.

    Returns:
        the answers, without the prompts and without special tokens.

    Raises:
        UserError: a prompt is longer than the positions of the model, or has a token without embedding.
    """
    length, ends, limits = max(map(len, prompts)), end_ids(model, tokenizer), Limits.of(model)
    limits.check([("the prompt", prompt) for prompt in prompts], tokenizer)
    if limits.positions is not None:
        max_new_tokens = min(max_new_tokens, limits.positions - length + 1)  # nothing is predicted from the last one
    device = next(model.parameters()).device
    ids = torch.tensor([[0] * (length - len(prompt)) + [*prompt] for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    was_training = model.training
    model.eval()
    with dense_cache.while_generating(device):
        if ids.is_cuda and can_decode(model) and is_plain(model):
            rows = decode(model, ids, mask, max_new_tokens, ends, progress)
        else:
            rows = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=ends or None,
                pad_token_id=0,
                streamer=None if progress is None else _Counter(progress, max_new_tokens),
            )[:, length:].tolist()
    model.train(was_training)
    answers = [[*takewhile(lambda token: token not in ends, row)] for row in rows]
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer, see the module."""
    of_model = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(of_model if isinstance(of_model, list | tuple) else [of_model])}
    if tokenizer.chat_template:
        ends.update(map(tokenizer.convert_tokens_to_ids, ChatTemplate(tokenizer).ends()))
    return sorted(ends - {None})


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
