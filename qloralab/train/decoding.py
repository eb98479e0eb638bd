"""The likeliest token, one after the other, from memory that stays where it is: on a GPU, one captured step.

A step of decoding is hundreds of small kernels, each launched by the host, which takes longer than the GPU does: 224
linear layers at a few hundred microseconds each are 50 ms and more a token, for 8 billion weights whose 4 bits can be
read in two. A CUDA graph launches all of them at once. It replays addresses, so everything that a step reads and writes
stays where it is: the keys and values (transformers' ``StaticCache``, of the full length from the start), the mask, the
positions and the token itself, which the step replaces by the next one.

The first steps run without a graph: kernels are compiled and checked then. The captured step is compared once with the
step itself; where it cannot be captured, or another token comes out, the rest is decoded without it, with a warning.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .capture import captured

_log = logging.getLogger("qloralab")


class Decoder:
    """A model with its prompts, and the token that follows each.

    Attributes:
        token: int64 [prompts, 1], the last one of each.
    """

    def __init__(self, model: Any, ids: Tensor, mask: Tensor, max_new_tokens: int):
        """Read the prompts.

        Args:
            model: a Hugging Face causal language model that ``can_decode``.
            ids: int64 [prompts, tokens], padded on the left.
            mask: int64, likewise, 0 where it is padding.
            max_new_tokens: that are decoded at most.
        """
        from transformers import StaticCache

        rows, length = ids.shape
        total = length + max_new_tokens
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._model, self._options = model, {"use_cache": True} | ({"logits_to_keep": 1} if keeps else {})
        self._cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=total)
        self._mask = torch.cat([mask, mask.new_ones(rows, max_new_tokens)], dim=1)  # what comes later, no token sees
        self._positions = (mask.cumsum(1) - 1).clamp(min=0)
        self.token = ids
        self._advance()
        self._positions = self._positions[:, -1:].clone()

    def step(self) -> None:
        """Replace each token by the next one, in place."""
        self.token.copy_(self._next())
        self._positions.add_(1)

    def captured(self) -> Callable[[], None]:
        """The same step as a CUDA graph.

        Raises:
            RuntimeError: it cannot be captured, or the graph gives another token.
        """
        replay = captured(self.step)
        layers: Any = self._cache.layers
        state = self.token, self._positions, *(layer.cumulative_length for layer in layers)
        before, tokens = [part.clone() for part in state], list[Tensor]()
        for run in (self.step, replay):
            run()
            tokens.append(self.token.clone())
            for part, value in zip(state, before, strict=True):
                part.copy_(value)
        if not torch.equal(*tokens):
            raise RuntimeError("the captured step gives another token")
        return replay

    def _advance(self) -> None:
        self.token = self._next()
        self._positions += 1

    def _next(self) -> Tensor:
        logits = self._model(
            input_ids=self.token,
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=self._cache,
            **self._options,
        ).logits
        return logits[:, -1:].argmax(-1)


# What a generation_config.json may say beside, of no effect where the likeliest token is taken.
_HARMLESS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "do_sample", "temperature", "top_p",
    "top_k", "max_length", "max_new_tokens", "use_cache", "transformers_version", "_from_model_config",
    "output_attentions", "output_hidden_states", "return_dict_in_generate",
}  # fmt: skip


def is_plain(model: Any) -> bool:
    """Whether a model's generation_config leaves the likeliest token as it is: no penalty, no forbidden word."""
    return model.generation_config.to_diff_dict().keys() <= _HARMLESS


def can_decode(model: Any) -> bool:
    """Whether a model's cache can stay where it is: keys and values alone, all of them kept, by each layer."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    if not getattr(model, "_can_compile_fullgraph", False) or model.config.is_encoder_decoder:
        return False
    config = model.config.get_text_config(decoder=True)
    return all(type(layer) is StaticLayer for layer in StaticCache(config=config, max_cache_len=1).layers)


@torch.no_grad()
def decode(
    model: Any, ids: Tensor, mask: Tensor, max_new_tokens: int, ends: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:  # fmt: skip
    """The likeliest tokens after each prompt, until each has had one of ``ends``, or max_new_tokens.

    Args:
        model, ids, mask, max_new_tokens: see ``Decoder``.
        ends: tokens that end an answer.
        progress: called after each token with how many each answer has, and max_new_tokens.

    Returns:
        the tokens after each prompt, as many for all; what follows an end has no meaning.
    """
    decoder, columns = Decoder(model, ids, mask, max_new_tokens), list[list[int]]()
    open_rows = set(range(len(ids)))
    for step in _steps(decoder, max_new_tokens):
        columns.append(decoder.token[:, 0].tolist())
        open_rows -= {row for row in open_rows if columns[-1][row] in ends}
        if progress is not None:
            progress(len(columns), max_new_tokens)
        if not open_rows:
            break
        step()
    return [list(row) for row in zip(*columns, strict=True)]


def _steps(decoder: Decoder, count: int) -> Iterator[Callable[[], None]]:
    """What makes the next token, for each of so many: the step, twice, then the graph where there is one."""
    step = decoder.step
    for number in range(count):
        if number == 2 and _has_graphs(decoder):
            step = _graph(decoder) or step
        yield step if number < count - 1 else _nothing


def _graph(decoder: Decoder) -> Callable[[], None] | None:
    try:
        return decoder.captured()
    except RuntimeError as error:
        _log.warning("answers are decoded without a CUDA graph: %s", " ".join(str(error).split())[:300])
        return None


def _has_graphs(decoder: Decoder) -> bool:
    return decoder.token.is_cuda and not torch.version.hip


def _nothing() -> None:
    pass
