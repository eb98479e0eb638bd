"""What a model has room for: the rows of its embedding, and the positions of its table.

A token or a position beyond them is an index out of range in the middle of a forward pass. Both are known before any
weight is read, from the skeleton that config.json describes. A model whose positions are computed as they come (rotary
embeddings, most of today's) has no such table, and takes longer texts than it was trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import UserError
from .models import reading
from .quantized_model import skeleton


@dataclass(frozen=True)
class Limits:
    """Of a causal language model.

    Attributes:
        vocabulary: rows of the embedding.
        positions: tokens that a text may have, or None where nothing ends.
        context: tokens that the model was made for, or None where config.json does not say.
    """

    vocabulary: int
    positions: int | None
    context: int | None

    @classmethod
    def of(cls, model: Any) -> Limits:
        """Those of a model of transformers, or of its skeleton."""
        embedding = model.get_input_embeddings()
        context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        most = context if isinstance(context, int) and context > 0 else -1  # XLNet says -1
        tables = [
            module.num_embeddings - _first_row(module)
            for module in model.modules()
            if isinstance(module, nn.Embedding) and module is not embedding and 0 <= module.num_embeddings - most <= 2
        ]
        tables += [most for buffer in model.buffers() if buffer.ndim == 2 and len(buffer) == most]  # GPT-J's sines
        return cls(len(embedding.weight), min(tables, default=None), None if most < 0 else most)

    @classmethod
    def of_directory(cls, path: Path) -> Limits | None:
        """Those of a Hugging Face directory. None for a GGUF file: to describe it takes as long as to read it.

        Raises:
            UserError: config.json is not that of a causal language model.
        """
        if not path.is_dir():
            return None
        with reading(path):
            return cls.of(skeleton(path))

    def check(self, texts: Iterable[tuple[str, Sequence[int]]], tokenizer: Any) -> None:
        """Whether there is a position and a row of the embedding for every token.

        Args:
            texts: where a text comes from, and its tokens.
            tokenizer: that made them.

        Raises:
            UserError: there is not; the error names the text.
        """
        for source, ids in texts:
            if self.positions is not None and len(ids) > self.positions:
                raise UserError(f"{source}: {len(ids)} tokens, and the model has {self.positions} positions")
            if max(ids, default=0) >= self.vocabulary:
                token = tokenizer.convert_ids_to_tokens(max(ids))
                raise UserError(
                    f"{source}: token {max(ids)} ({token!r}) of the tokenizer is beyond the {self.vocabulary} rows of "
                    "the model's embedding; give --model a directory whose tokenizer belongs to its weights"
                )


def _first_row(table: nn.Embedding) -> int:
    """Of the first position: OPT and its kin leave two rows free, RoBERTa those up to the padding's."""
    return getattr(table, "offset", 0 if table.padding_idx is None else table.padding_idx + 1)
