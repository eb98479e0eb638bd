"""A tokenizer in a GGUF file gives the tokens that it gave, and what cannot be said in one is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.integrations.gguf import gguf_tokenizer_mapping

from qloralab.checkpoint.models import quiet
from qloralab.display import Display
from qloralab.export.run import export
from qloralab.export.settings import ExportSettings
from qloralab.export.tokenizer import _SPLITS

from .conftest import TEXT, bpe

Exported = Callable[..., Path]


@pytest.fixture
def exported(exportable: Callable[..., Path], tmp_path: Path, silent: Display) -> Exported:
    """``exported(tokenizer)``: the GGUF file of a tiny model with it."""

    def write(tokenizer: Any, pre_tokenizer: str | None = None, **changes: Any) -> Path:
        model = exportable("llama", **changes)
        tokenizer.save_pretrained(model)
        path = tmp_path / "out.gguf"
        export(ExportSettings(model=model, gguf=path, pre_tokenizer=pre_tokenizer), silent)
        return path

    return write


def fields_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
