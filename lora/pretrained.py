"""``save_pretrained`` of a model of transformers whose layers are ours.

Its own would write what it opens as another model, without a word: weights in 4 bits under a config that does not say
so, layers with adapters under names that it does not look for. From ``quantize_`` and ``inject_`` on it writes what
opens: where there are adapters those alone, as with PEFT; else the model with a ``quantization_config``. The
checkpoints of transformers' ``Trainer`` are written by it, too.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from qloralab.nf4.files import quantization_config
from qloralab.nf4.files.quantization_config import FIELD, QuantizationConfig
from qloralab.nf4.linear import QuantizedLinear

from .layer import LoRALinear
from .saving import save_adapter
from .wrappers import bare_name, without_wrappers

# Of a layer whose compute dtype was left open, in a file: the paper's, on whatever machine it is written.
COMPUTE_DTYPE = torch.bfloat16


def saves_itself_(model: nn.Module) -> None:
    """Give a model of transformers the ``save_pretrained`` above; leave any other as it is."""
    model = without_wrappers(model)
    if hasattr(model, "save_pretrained") and hasattr(model, "all_tied_weights_keys"):
        vars(model)["save_pretrained"] = functools.partial(_save_pretrained, model)


def _save_pretrained(model: Any, save_directory: str | os.PathLike[str], *arguments: Any, **options: Any) -> None:
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        if options.get("push_to_hub"):
            raise ValueError(
                "a model with adapters is not pushed to the hub; save_adapter writes a directory to upload"
            )
        if options.get("is_main_process", True):
            save_adapter(model, save_directory)
        return
    vars(model.config)[FIELD] = quantization_config.to_dict(describe(model))
    try:
        type(model).save_pretrained(model, save_directory, *arguments, **options)
    finally:
        del vars(model.config)[FIELD]


def describe(model: Any) -> QuantizationConfig:
    """The ``quantization_config`` that holds for all layers of a model of transformers.

    Raises:
        ValueError: the layers differ in what it says once, bitsandbytes does not know the codebook, or transformers
            would not quantize a layer.
    """
    layers = {bare_name(model, name): m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    kinds = {
        (layer.weight.codebook, layer.weight.double_quant, _stated_compute_dtype(layer)): name
        for name, layer in layers.items()
    }
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
    convertible = [name for name, m in modules.items() if isinstance(m, QuantizedLinear) or _converts(m)]
    dense = [name for name in convertible if name not in quantized]
    head = model.get_output_embeddings()
    left = {name for name, module in modules.items() if module is head}
    left |= {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
    left.add(_last_parameter(modules).removesuffix(".weight"))
    expected = [name for name in convertible if any(name == other or name.startswith(f"{other}.") for other in left)]
    return None if dense == expected else tuple(dense)


def is_part_of(name: str, modules: Iterable[str]) -> bool:
    """Whether one of some names, of one or more components, stands in a path."""
    return any(f".{module}." in f".{name}." for module in modules)


def _converts(module: nn.Module) -> bool:
    """Whether transformers puts a layer of bitsandbytes in the place of a module."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def _last_parameter(modules: dict[str, nn.Module]) -> str:
    """The name of the last parameter, those in 4 bits included; what is shared counts where it comes first."""
    last, seen = "", set[int]()
    for name, module in modules.items():
        own = dict(module._parameters)
        if isinstance(module, QuantizedLinear):
            own = {"weight": module.weight, "bias": module.bias}
        for key, parameter in own.items():
            if parameter is not None and id(parameter) not in seen:
                last = f"{name}.{key}"
                seen.add(id(parameter))
    return last


def _stated_compute_dtype(layer: QuantizedLinear) -> torch.dtype:
    return COMPUTE_DTYPE if layer.follows_device else layer.compute_dtype


def _kind(codebook: str, double_quant: bool, compute_dtype: torch.dtype) -> str:
    dtype = str(compute_dtype).removeprefix("torch.")
    return f"{codebook} {'with' if double_quant else 'without'} double quantization, computed in {dtype}"
