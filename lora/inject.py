"""Adapters beside the linear layers of a model, in place: ``inject_`` makes new ones, ``load_adapter_`` reads a file.

A model that ``quantize_`` has held in 4 bits before becomes a QLoRA model, a dense one a LoRA model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from qloralab.nf4.dense_shares import LOGGER, output_heads
from qloralab.nf4.files.bitsandbytes_layout import KNOWN
from qloralab.nf4.files.module_names import bare_name
from qloralab.nf4.files.pretrained import saves_itself_
from qloralab.nf4.linear import Linear, QuantizedLinear
from qloralab.nf4.model import Model, choose, parents_of, refuse_adapters, replace, summary, unwrapped
from qloralab.nf4.weight_reads import weights_read

from .config import LoraConfig
from .files import read_adapter, save_pretrained
from .layer import LoRALinear


def inject_(model: Model, config: LoraConfig) -> Model:
    """Put an adapter beside each linear layer that the config targets, in place, and freeze everything else.

    That a classifier's head is frozen with the rest is logged as a warning, by the logger "qloralab".

    Args:
        model: dense, or quantized by ``quantize_``. Hooks on a layer see it with its adapter.
        config: ``target_modules`` chooses among ``linear_names(model)``.

    Returns:
        the model.

    Raises:
        ValueError: the model has adapters already, ours or PEFT's; or a target matches nothing. The model is unchanged
            then.
    """
    refuse_adapters(model, "inject them once")
    names, left = choose(model)
    if not names:
        raise ValueError(f"the model has no linear layer to adapt{summary(left)}")
    wrap_(model, config.select(names, left), config)
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_children():
        if module is not embeddings and module in output_heads(model):
            LOGGER.warning("%s is frozen like the rest; to train it, set its requires_grad and save it yourself", name)
    return model


def wrap_(model: Model, names: Iterable[str], config: LoraConfig) -> Model:
    """``inject_`` with the layers given by their full paths. The model is unchanged when it raises ValueError."""
    refuse_adapters(model, "inject them once")
    layers = {name: model.get_submodule(name) for name in names}
    read = weights_read(model)
    for name, layer in layers.items():
        if layer in read:
            raise ValueError(f"{name} cannot have an adapter: {read[layer]} reads its weight and passes it by")
    model.requires_grad_(False)
    parents = parents_of(model)
    for name, layer in layers.items():
        assert isinstance(layer, Linear)
        replace(parents[layer], layer, LoRALinear(layer, config, name).train(layer.training))
    saves_itself_(model, save_pretrained)
    return model


def load_adapter_(model: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
    """Read adapters that ``save_adapter`` or PEFT wrote, in place.

    Args:
        model: without adapters: they are injected at the layers that the file has, and everything else is frozen. With
            adapters of the same layers, rank and scaling: their values are replaced.
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        the model.

    Raises:
        FileNotFoundError: a file is missing.
        FormatError: a file is not what it claims to be, asks for what this library does not do, or holds a value that
            is NaN or infinite.
        ValueError: the adapters do not fit the model, or it is on the meta device.
    """
    directory = Path(directory)
    config, tensors = read_adapter(model, directory)
    paths = {bare_name(model, path): path for path, _ in model.named_modules(remove_duplicate=False)}
    for name in tensors:
        if unwrapped(model.get_submodule(paths[name])).weight.device.type == "meta":
            raise ValueError(f"{name} is on the meta device, where an adapter has no values; load the weights first")
    present = adapters(model)
    if not present:
        wrap_(model, [paths[name] for name in tensors], config)
    elif {model.get_submodule(paths[name]) for name in tensors} != set(present.values()):
        raise ValueError(
            f"{directory} adapts {len(tensors)} layers, the model {len(present)} or others; load it into the bare model"
        )
    for name, layer in present.items():
        if (layer.config.r, layer.config.scaling) != (config.r, config.scaling):
            raise ValueError(f"{directory} has r = {config.r}, scaling = {config.scaling:g}; {name} has other ones")
    with torch.no_grad():
        for name, (A, B) in tensors.items():
            layer = model.get_submodule(paths[name])
            assert isinstance(layer, LoRALinear)
            layer.lora_A.copy_(A)
            layer.lora_B.copy_(B)
    return model


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model as it was before ``inject_``; at the end its adapters are beside the layers again."""
    found, parents = adapters(model).values(), parents_of(model)
    for layer in found:
        replace(parents[layer], layer, layer.base_layer)
    try:
        yield
    finally:
        for layer in found:
            replace(parents[layer], layer.base_layer, layer)


def train_merge_aware_(model: nn.Module) -> None:
    """Have all layers with an adapter compute with the merged weight in 4 bits (``merge_aware.py``), in place.

    Raises:
        ValueError: a base is dense or in another data type than bitsandbytes has, or an adapter has dropout. The model
            is unchanged then.
    """
    layers = adapters(model)
    for name, layer in layers.items():
        base = layer.base_layer
        if not isinstance(base, QuantizedLinear) or base.weight.kind not in KNOWN:
            held = base.weight.kind if isinstance(base, QuantizedLinear) else "dense"
            raise ValueError(f"{name} is {held}; merge-aware training takes weights in {' or '.join(KNOWN)}")
        if layer.config.lora_dropout:
            raise ValueError(f"the adapter of {name} has dropout; merge-aware training has none")
    for layer in layers.values():
        layer.merge_aware = True


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train, as an optimizer takes them: after ``inject_``, those of the adapters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers with an adapter, by their full paths."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def untrained(model: nn.Module) -> list[str]:
    """The layers whose adapter is as ``inject_`` made it, B zero: after training, those that never had a gradient."""
    return [name for name, layer in adapters(model).items() if not layer.lora_B.any()]
