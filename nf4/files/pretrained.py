"""``save_pretrained`` of a model of transformers whose layers are ours, and the ``quantization_config`` it needs.

Its own would write what it opens as another model, without a word: weights in 4 bits under a config that does not say
so. From ``quantize_`` on it writes the model with a ``quantization_config``, and from ``inject_`` on the adapters alone
(``lora/files.py``). The checkpoints of transformers' ``Trainer`` are written by it, too.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from ..linear import QuantizedLinear
from . import quantization_config
from .module_names import bare_name, is_part_of, without_wrappers
from .quantization_config import FIELD, QuantizationConfig

# A file states the paper's dtype where that of a layer was left open, on whatever machine it is written.
COMPUTE_DTYPE = torch.bfloat16


def save_pretrained(model: Any, directory: str | os.PathLike[str], *arguments: Any, **options: Any) -> None:
    """``model.save_pretrained`` of transformers, with a ``quantization_config`` in config.json."""
    vars(model.config)[FIELD] = quantization_config.to_dict(describe(model))
    try:
        type(model).save_pretrained(model, directory, *arguments, **options)
    finally:
        del vars(model.config)[FIELD]


def saves_itself_(model: nn.Module, save: Callable[..., None] = save_pretrained) -> None:
    """Give a model of transformers another ``save_pretrained``; leave any other model as it is."""
    model = without_wrappers(model)
    if hasattr(model, "save_pretrained") and hasattr(model, "all_tied_weights_keys"):
        vars(model)["save_pretrained"] = functools.partial(save, model)


def describe(model: Any) -> QuantizationConfig:
    """The ``quantization_config`` that holds for all layers of a model of transformers.

    Raises:
        ValueError: the layers differ in what it says once, bitsandbytes does not know the codebook, or transformers
            would not quantize a layer.
    """
    layers = {bare_name(model, name): m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    kinds: dict[tuple[str, bool, torch.dtype], str] = {}
    for name, layer in layers.items():
        compute_dtype = COMPUTE_DTYPE if layer.follows_device else layer.compute_dtype
        kinds[layer.weight.kind, layer.weight.double_quant, compute_dtype] = name
    if len(kinds) > 1:
        (a, first), (b, second), *_ = kinds.items()
        raise ValueError(
            f"{first} is in {_kind(*a)}, {second} in {_kind(*b)}; config.json has one for all: quantize_ them alike"
        )
    for name in layers:
        for kept in model._keep_in_fp32_modules or ():
            if is_part_of(name, [kept]):
                raise ValueError(f"{name}: transformers keeps this layer in float32; give quantize_ skip=[{kept!r}]")
    ((codebook, double_quant, compute_dtype),) = kinds
    if codebook not in quantization_config.KNOWN:
        known = " and ".join(quantization_config.KNOWN)
        raise ValueError(f"the layers are in {codebook}; bitsandbytes knows {known} only")
    skipped = skip_modules(model, layers.keys())
    return QuantizationConfig(codebook, double_quant, compute_dtype, skip_modules=skipped)


def skip_modules(model: Any, quantized: Collection[str]) -> tuple[str, ...] | None:
    """What ``llm_int8_skip_modules`` has to be, so that bitsandbytes expects 4 bits in the right layers.

    Args:
        model: dense, quantized or a skeleton.
        quantized: the layers in 4 bits, by their full paths.

    Returns:
        None when transformers leaves the others dense by itself: the output head, tied layers, the last parameter's.
        Otherwise the full paths of all dense layers.
    """
    modules = {bare_name(model, name): module for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    left = {name for name, module in modules.items() if module is head}
    left |= {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
    left.add(_last_parameter(modules).removesuffix(".weight"))
    dense, expected = [], []
    for name, module in modules.items():
        # In transformers, layers of bitsandbytes replace these two.
        if isinstance(module, QuantizedLinear) or type(module) is nn.Linear or type(module).__name__ == "Conv1D":
            if name not in quantized:
                dense.append(name)
            if any(f"{name}.".startswith(f"{other}.") for other in left):
                expected.append(name)
    return None if dense == expected else tuple(dense)


def _last_parameter(modules: dict[str, nn.Module]) -> str:
    """The name of the last parameter, those in 4 bits included; what is shared counts where it comes first."""
    last, seen = "", set[int]()
    for name, module in modules.items():
        in_4_bits = {"weight": module.weight} if isinstance(module, QuantizedLinear) else {}
        for key, parameter in (in_4_bits | module._parameters).items():
            if parameter is not None and id(parameter) not in seen:
                last = f"{name}.{key}"
                seen.add(id(parameter))
    return last


def _kind(codebook: str, double_quant: bool, compute_dtype: torch.dtype) -> str:
    dtype = str(compute_dtype).removeprefix("torch.")
    return f"{codebook} {'with' if double_quant else 'without'} double quantization, computed in {dtype}"
