"""Adapters as files, in the format of PEFT: a directory with two files.

``adapter_model.safetensors`` holds, for a layer at path P of the model,

    base_model.model.P.lora_A.weight    float32 [r, in]
    base_model.model.P.lora_B.weight    float32 [out, r]

``adapter_config.json`` holds the fields of ``peft.LoraConfig``. Reading refuses a file that asks for what this
library does not do (DoRA, a rank per layer, trained embeddings, ...): the layers would compute something else than
the file means.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qloralab.nf4.errors import FormatError

from .config import LoraConfig, ends_with
from .inject import adapters, has_adapters, unwrapped, wrap_
from .layer import LoRALinear
from .quantized_linear import QuantizedLinear

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Fields of PEFT's file that change what the adapter computes, with the values that leave it as it is.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alpha_pattern": (None, {}),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "fan_in_fan_out": (None, False),
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


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapters of a model so that ``peft.PeftModel.from_pretrained(base_model, directory)`` opens them.

    Args:
        model: with adapters, from ``inject_``.
        directory: made if missing. Each of the two files is written beside its place and renamed into it; a failure
            leaves nothing beside it.

    Raises:
        ValueError: the model has no adapters.
    """
    layers = adapters(model)
    if not layers:
        raise ValueError("the model has no adapters; inject_ them before saving")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    config = json.dumps(_peft_config(model, layers), indent=2, sort_keys=True) + "\n"

    weights_file, config_file = directory / WEIGHTS_FILE, directory / CONFIG_FILE
    try:
        save_file(tensors, _beside(weights_file), metadata={"format": "pt"})
        _beside(config_file).write_text(config, encoding="utf-8")
        os.replace(_beside(weights_file), weights_file)
        os.replace(_beside(config_file), config_file)
    finally:
        for file in (weights_file, config_file):
            _beside(file).unlink(missing_ok=True)


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
        FormatError: a file is not what it claims to be, or asks for what this library does not do.
        ValueError: the adapters do not fit the model.
    """
    directory = Path(directory)
    config = _read_config(directory / CONFIG_FILE)
    tensors = _read_weights(directory / WEIGHTS_FILE, config.r)
    names = list(dict.fromkeys(name for name, _ in tensors))
    _check_fit(model, names, tensors, directory / WEIGHTS_FILE)
    if has_adapters(model):
        _check_same(model, names, config, directory)
    else:
        wrap_(model, names, config)
    with torch.no_grad():
        for name, layer in adapters(model).items():
            layer.lora_A.copy_(tensors[name, "lora_A"])
            layer.lora_B.copy_(tensors[name, "lora_B"])
    return model


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _peft_config(model: nn.Module, layers: dict[str, LoRALinear]) -> dict[str, Any]:
    config = next(iter(layers.values())).config
    return {
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "bias": config.bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.r,
        "target_modules": _target_modules(model, list(layers)),
        "task_type": config.task_type,
        "use_rslora": config.use_rslora,
    }


def _target_modules(model: nn.Module, names: list[str]) -> list[str] | str:
    """The shortest list (last components, or paths), else an expression, that means just these modules to PEFT."""
    modules = [name for name, _ in model.named_modules()]
    suffixes = sorted({name.rpartition(".")[2] for name in names})
    for targets in (suffixes, sorted(names)):
        if {name for name in modules if any(ends_with(name, target) for target in targets)} == set(names):
            return targets
    return "|".join(re.escape(name) for name in sorted(names))


def _read_config(path: Path) -> LoraConfig:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {path.parent} is not the directory of an adapter")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"is not JSON: {error}", file=path) from None
    if not isinstance(fields, dict):
        raise FormatError(f"holds a JSON {type(fields).__name__}, not an object", file=path)
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


def _read_weights(path: Path, r: int) -> dict[tuple[str, str], Tensor]:
    """float32 tensors by (path of the layer, "lora_A" or "lora_B"), complete and with the rank of the config."""
    if not path.exists() and path.with_name("adapter_model.bin").exists():
        raise FormatError(
            "is a pickle, which can run code; have PEFT save it as safetensors", file=path.with_suffix(".bin")
        )
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    tensors: dict[tuple[str, str], Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (not a dict)
                name, _, which = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
                if key != f"{_PREFIX}{name}.{which}.weight" or which not in ("lora_A", "lora_B"):
                    raise FormatError("is not the A or B of a LoRA layer", file=path, tensor=key)
                tensors[name, which] = file.get_tensor(key).float()
    except SafetensorError as error:
        raise FormatError(f"is not a safetensors file: {error}", file=path) from None
    if not tensors:
        raise FormatError("holds no adapter", file=path)
    for name in {name for name, _ in tensors}:
        for other, dim in (("lora_A", 0), ("lora_B", 1)):
            key = f"{_PREFIX}{name}.{other}.weight"
            if (name, other) not in tensors:
                raise FormatError("is missing", file=path, tensor=key)
            shape = list(tensors[name, other].shape)
            if len(shape) != 2 or shape[dim] != r:
                raise FormatError(f"is {shape}; the config says r = {r}", file=path, tensor=key)
    return tensors


def _check_fit(model: nn.Module, names: list[str], tensors: dict[tuple[str, str], Tensor], path: Path) -> None:
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise ValueError(f"{path} has an adapter for {name}, which the model does not have; is it the right model?")
        layer = unwrapped(modules[name])
        if not isinstance(layer, nn.Linear | QuantizedLinear):
            raise ValueError(f"{path} has an adapter for {name}, which is no linear layer but a {type(layer).__name__}")
        found = [tensors[name, "lora_B"].shape[0], tensors[name, "lora_A"].shape[1]]
        if found != [layer.out_features, layer.in_features]:
            expected = f"{layer.out_features} x {layer.in_features}"
            raise ValueError(f"{path}: the adapter of {name} is for {found[0]} x {found[1]}, the layer is {expected}")


def _check_same(model: nn.Module, names: list[str], config: LoraConfig, directory: Path) -> None:
    present = adapters(model)
    if set(names) != set(present):
        raise ValueError(
            f"{directory} adapts {len(names)} layers, the model {len(present)} or others; load it into the bare model"
        )
    for name, layer in present.items():
        if (layer.config.r, layer.config.scaling) != (config.r, config.scaling):
            raise ValueError(f"{directory} has r = {config.r}, scaling = {config.scaling:g}; {name} has other ones")
