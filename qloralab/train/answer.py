"""One prompt, one answer: what ``qloralab generate`` does."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from ..checkpoint.limits import Limits
from ..checkpoint.models import (
    DENSE_DTYPE,
    check_adapter,
    check_adapter_fits,
    check_model,
    holds_4bit,
    load_adapter,
    load_model,
    load_tokenizer_and_config,
    model_name,
    quantize_loaded_,
)
from ..compute import precision, prepare_kernels, run_device
from ..data.encoding import prompt_text
from ..data.examples import Example
from ..display import Display
from ..errors import UserError
from ..settings import Dtype
from .generate import generate


def answer(
    model: Path,
    adapter: Path | None,
    prompt: str,
    max_new_tokens: int,
    quantized: bool,
    dtype: Dtype = "auto",
    display: Display | None = None,
) -> str:
    """Load a model and an adapter and answer a prompt, in the model's chat format.

    Args:
        model: a Hugging Face directory or a GGUF file.
        adapter: directory of an adapter, or None.
        prompt: what the user says.
        max_new_tokens: where the answer is cut.
        quantized: hold the weights in 4 bits, as they were when a QLoRA adapter was trained; otherwise dense, in dtype.
        dtype: that is computed in, see ``Settings``.
        display: shows what is going on; by default on standard error.

    Raises:
        UserError, FormatError: the model or the adapter cannot be used.
    """
    display = display or Display(Console(file=sys.stderr))
    chosen = precision(dtype, run_device())
    check_model(model)
    packed = holds_4bit(model)
    if packed and not quantized:
        raise UserError(f"{model} holds 4-bit weights; --dense needs the dense model")
    if adapter is not None:
        check_adapter(adapter)
    if chosen.slow:
        display.fact("dtype", chosen.described())
    to_quantize = quantized and not packed
    with display.busy("reading the tokenizer"):
        tokenizer, config = load_tokenizer_and_config(model)
        limits = Limits.of_directory(model)
    if adapter is not None and (other_model := check_adapter_fits(adapter, config)):
        display.fact("note", other_model)
    example = Example.from_instruction(prompt, "…", source="prompt")  # also has a form for no chat template
    ids = tokenizer(prompt_text(example, tokenizer), add_special_tokens=False).input_ids
    if limits:
        limits.check([("the prompt", ids)], tokenizer)
    with display.busy(f"reading {model_name(model)}"):
        loaded = load_model(model, DENSE_DTYPE if to_quantize else chosen.dtype)
    if quantized:
        prepare_kernels(display)
    if to_quantize:
        with display.busy("quantizing", "weights") as progress:
            quantize_loaded_(loaded, chosen.dtype, progress)
    if adapter is not None:
        load_adapter(loaded, adapter)
    loaded.to(run_device())
    with display.busy("answering", "tokens") as progress:
        return generate(loaded, tokenizer, [ids], max_new_tokens, progress)[0].strip()
