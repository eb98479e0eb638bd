"""One prompt, one answer: what ``qloralab generate`` does."""

from __future__ import annotations

from pathlib import Path

import torch

from qloralab.lora.inject import quantize_

from .encoding import prompt_text
from .errors import UserError
from .examples import Example
from .generate import generate
from .models import check_adapter, check_model, holds_4bit, load_adapter, load_model, load_tokenizer


def answer(model: Path, adapter: Path | None, prompt: str, max_new_tokens: int, quantized: bool) -> str:
    """Load a model and an adapter and answer a prompt, in the model's chat format.

    Args:
        model: a Hugging Face directory or a GGUF file.
        adapter: directory of an adapter, or None.
        prompt: what the user says.
        max_new_tokens: where the answer is cut.
        quantized: hold the weights in 4 bits, as they were when a QLoRA adapter was trained; otherwise in bfloat16.

    Raises:
        UserError, FormatError: the model or the adapter cannot be used.
    """
    check_model(model)
    packed = holds_4bit(model)
    if packed and not quantized:
        raise UserError(f"{model} holds 4-bit weights; --dense needs the dense model")
    if adapter is not None:
        check_adapter(adapter)
    tokenizer = load_tokenizer(model)
    loaded = load_model(model)
    if quantized and not packed:
        quantize_(loaded)
    if adapter is not None:
        load_adapter(loaded, adapter)
    if torch.cuda.is_available():
        loaded.to("cuda")
    example = Example.from_instruction(prompt, "…", source="prompt")  # also has a form for no chat template
    ids = tokenizer(prompt_text(example, tokenizer), add_special_tokens=False).input_ids
    return generate(loaded, tokenizer, [ids], max_new_tokens)[0].strip()
