"""Adapters as files, in the format of PEFT: a directory with two files.

``adapter_model.safetensors`` holds, for a layer at path P of the model,

    base_model.model.P.lora_A.weight    float32 [r, in]
    base_model.model.P.lora_B.weight    float32 [out, r]

``adapter_config.json`` holds the fields of ``peft.LoraConfig``. Reading refuses a file that asks for what this
library does not do (DoRA, a rank per layer, trained embeddings, ...): the layers would compute something else than
the file means.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qloralab.nf4.files.errors import FormatError
from qloralab.nf4.files.json_file import read_object
from qloralab.nf4.files.safetensors_reader import SafetensorsFile
from qloralab.nf4.linear import QuantizedLinear

from .config import LoraConfig
from .inject import adapters, has_adapters, unwrapped, wrap_
from .layer import LoRALinear
from .saving import CONFIG_FILE, PREFIX, WEIGHTS_FILE, keys
from .wrappers import bare_name

# Fields of PEFT's file that change what the adapter computes, with the values that leave it as it is.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alpha_pattern": (None, {}),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "fan_in_fan_out": (None, False, True),  # how the weight beside the adapter is stored; A and B are as always
    # the others (PiSSA, OLoRA, CorDA, LoftQ) change the weights beside the adapter
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "rank_pattern": (None, {}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "velora_config": (None,),
}


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
    if has_adapters(model):
        _check_same(model, config, [model.get_submodule(paths[name]) for name in tensors], directory)
    else:
        wrap_(model, [paths[name] for name in tensors], config)
    with torch.no_grad():
        for name, (A, B) in tensors.items():
            layer = model.get_submodule(paths[name])
            assert isinstance(layer, LoRALinear)
            layer.lora_A.copy_(A)
            layer.lora_B.copy_(B)
    return model


def read_adapter(
    model: nn.Module | None, directory: str | os.PathLike[str]
) -> tuple[LoraConfig, dict[str, tuple[Tensor, Tensor]]]:
    """Read adapters, and change nothing.

    Args:
        model: that they have to fit, by its shapes alone (it may be on the meta device); None: any.
        directory: see ``load_adapter_``, whose errors are raised.

    Returns:
        the config; A [r, in] and B [out, r] in float32, by the path of the layer.
    """
    config, path = _read_config(Path(directory, CONFIG_FILE)), Path(directory, WEIGHTS_FILE)
    if not path.exists() and path.with_suffix(".bin").exists():
        raise FormatError(
            "is a pickle, which can run code; have PEFT save it as safetensors", file=path.with_suffix(".bin")
        )
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    file = SafetensorsFile(path)
    shapes = _shapes(file, config.r)
    if model is not None:
        _check_fit(model, shapes, path)
    return config, {name: (_values(file, A), _values(file, B)) for name in shapes for A, B in [keys(name)]}


def _read_config(path: Path) -> LoraConfig:
    if not os.path.lexists(path):
        was = "saving it was interrupted" if (path.parent / WEIGHTS_FILE).exists() else "no adapter is there"
        raise FileNotFoundError(f"{path} does not exist: {was}")
    fields = read_object(path)
    if fields.get("peft_type", "LORA") != "LORA":
        raise FormatError(f"is {fields['peft_type']!r}; only 'LORA' is supported", file=path, field="peft_type")
    for field, neutral in _NEUTRAL.items():
        if fields.get(field) not in neutral:
            raise FormatError(f"is {fields[field]!r:.60}, which is not supported", file=path, field=field)
    chosen = {
        f: fields[f] for f in ("lora_dropout", "target_modules", "bias", "task_type", "use_rslora") if f in fields
    }
    if not isinstance(chosen.get("use_rslora", False), bool):
        raise FormatError(f"is {chosen['use_rslora']!r:.60}, not true or false", file=path, field="use_rslora")
    for field in ("r", "lora_alpha"):
        if field not in fields:
            raise FormatError("is missing", file=path, field=field)
    try:
        return LoraConfig(fields["r"], fields["lora_alpha"], **chosen)
    except (ValueError, TypeError) as error:
        raise FormatError(str(error), file=path) from None


def _check_fit(model: nn.Module, shapes: dict[str, tuple[int, int]], path: Path) -> None:
    modules = {bare_name(model, name): module for name, module in model.named_modules(remove_duplicate=False)}
    for name, found in shapes.items():
        if name not in modules:
            raise ValueError(f"{path} has an adapter for {name}, which the model does not have; is it the right model?")
        layer = unwrapped(modules[name])
        if not isinstance(layer, nn.Linear | QuantizedLinear):
            raise ValueError(f"{path} has an adapter for {name}, which is no linear layer but a {type(layer).__name__}")
        if found != (layer.out_features, layer.in_features):
            expected = f"{layer.out_features} x {layer.in_features}"
            raise ValueError(f"{path}: the adapter of {name} is for {found[0]} x {found[1]}, the layer is {expected}")


def _shapes(file: SafetensorsFile, r: int) -> dict[str, tuple[int, int]]:
    """out and in of each adapter by the path of its layer; all complete, and of the rank of the config."""
    names: dict[str, None] = {}
    for key in file.names():
        name, _, which = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if key not in keys(name) or which not in ("lora_A", "lora_B"):
            raise FormatError("is not the A or B of a LoRA layer", file=file.path, tensor=key)
        if not file.describe(key)[0].is_floating_point:
            raise FormatError(f"is {file.describe(key)[0]}, not floating point", file=file.path, tensor=key)
        names[name] = None
    if not names:
        raise FormatError("holds no adapter", file=file.path)
    shapes = {}
    for name in names:
        for key, dim in zip(keys(name), (0, 1), strict=True):
            if key not in file.names():
                raise FormatError("is missing", file=file.path, tensor=key)
            shape = file.describe(key)[1]
            if len(shape) != 2 or shape[dim] != r:
                raise FormatError(f"is {list(shape)}; the config says r = {r}", file=file.path, tensor=key)
        A, B = (file.describe(key)[1] for key in keys(name))
        shapes[name] = B[0], A[1]
    return shapes


def _values(file: SafetensorsFile, key: str) -> Tensor:
    """float32."""
    tensor = file.tensor(key).float()
    if not tensor.isfinite().all():
        raise FormatError("holds a value that is NaN or infinite", file=file.path, tensor=key)
    return tensor


def _check_same(model: nn.Module, config: LoraConfig, modules: list[nn.Module], directory: Path) -> None:
    present = adapters(model)
    if set(modules) != set(present.values()):
        raise ValueError(
            f"{directory} adapts {len(modules)} layers, the model {len(present)} or others; load it into the bare model"
        )
    for name, layer in present.items():
        if (layer.config.r, layer.config.scaling) != (config.r, config.scaling):
            raise ValueError(f"{directory} has r = {config.r}, scaling = {config.scaling:g}; {name} has other ones")
