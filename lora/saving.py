"""Writing adapters as files, in the format of PEFT; ``files.py`` says which, and reads them.

Writing warns of what the file does not hold, and of what PEFT takes from it differently.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from qloralab.nf4.files.atomic import replacing
from qloralab.nf4.files.json_file import to_text
from qloralab.nf4.files.safetensors_writer import SafetensorsWriter

from .config import ends_with
from .layer import LoRALinear
from .wrappers import bare_name, without_wrappers

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapters of a model so that ``peft.PeftModel.from_pretrained(base_model, directory)`` opens them.

    The names are those of the model without what wraps it or its parts (``torch.compile``, DDP, FSDP, activation
    checkpointing).

    Args:
        model: with adapters, from ``inject_``.
        directory: made if missing. What an earlier call has written there is replaced by all of this one or none of it;
            killed between the two files, this leaves a directory without a config, which nothing opens.

    Raises:
        ValueError: the model has no adapters, or some that are on the meta device or sharded.

    Warns:
        UserWarning: parameters outside of the adapters train, and are not saved; or PEFT will leave adapters out.
    """
    paths = _paths(model)
    if not paths:
        raise ValueError("the model has no adapters; inject_ them before saving")
    layers = {names[0]: layer for layer, names in paths.items()}
    tensors = {}
    for name, layer in layers.items():
        r, shape = layer.config.r, (layer.out_features, layer.in_features)
        for key, tensor, whole in zip(
            keys(name), (layer.lora_A, layer.lora_B), ((r, shape[1]), (shape[0], r)), strict=True
        ):
            if tensor.is_meta:
                raise ValueError(f"{name} is on the meta device: its adapter has no values to save")
            if hasattr(tensor, "full_tensor") or tuple(tensor.shape) != whole:
                raise ValueError(f"{name}: its adapter is sharded; gather it before saving")
            tensors[key] = tensor.detach()
    _warn_of_what_is_left_out(model, paths)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / WEIGHTS_FILE, directory / CONFIG_FILE) as (weights, config):
        with SafetensorsWriter(weights, {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}) as file:
            for key, tensor in tensors.items():
                file.write(key, tensor)
        config.write_text(to_text(_peft_config(model, layers)), encoding="utf-8")


def keys(name: str) -> tuple[str, str]:
    """The names of A and B in the file, by the path of the layer."""
    return f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"


def _paths(model: nn.Module) -> dict[LoRALinear, list[str]]:
    """The layers with an adapter, and the bare paths at which each one stands."""
    paths: dict[LoRALinear, dict[str, None]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoRALinear):
            paths.setdefault(module, {})[bare_name(model, path)] = None
    return {layer: list(names) for layer, names in paths.items()}


def _warn_of_what_is_left_out(model: nn.Module, paths: dict[LoRALinear, list[str]]) -> None:
    inside = {id(p) for layer in paths for p in (layer.lora_A, layer.lora_B)}
    trained = [bare_name(model, n) for n, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
    if trained:
        _warn(f"only adapters are saved; this trains as well, and is not in the file: {_some(trained)}")
    shared = [" = ".join(names) for names in paths.values() if len(names) > 1]
    if shared:
        _warn(f"a layer stands at several paths, of which PEFT adapts the first alone: {_some(shared)}")
    idle = [names[0] for layer, names in paths.items() if not layer.lora_B.any()]
    if 0 < len(idle) < len(paths):
        _warn(f"these adapters never had a gradient: {_some(idle)}")
    dropped = [names[0] for names in paths.values() if names[0].rpartition(".")[2] in _taken_for_experts(model)]
    if dropped:
        _warn(f"PEFT takes these names for those of experts, and leaves their adapters out: {_some(dropped)}")


def _warn(message: str) -> None:
    warnings.warn(f"save_adapter: {message}", UserWarning, stacklevel=4)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")


# Of a model whose experts transformers 5 holds as one parameter, PEFT (0.21) turns these targets into parameters.
_EXPERTS = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}


def _taken_for_experts(model: nn.Module) -> tuple[str, ...]:
    """The last components of names by which PEFT means the experts of such a model, and no layer of that name."""
    kinds = getattr(sys.modules.get("transformers.conversion_mapping"), "_MODEL_TO_CONVERSION_PATTERN", {})
    kind = getattr(getattr(without_wrappers(model), "config", None), "model_type", None)
    return _EXPERTS.get(kinds.get(kind, "mixtral" if kind == "mixtral" else ""), ())


def _peft_config(model: nn.Module, layers: dict[str, LoRALinear]) -> dict[str, Any]:
    config = next(iter(layers.values())).config
    bare = without_wrappers(model)
    return {
        "base_model_name_or_path": getattr(getattr(bare, "config", None), "_name_or_path", None) or None,
        "bias": config.bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.r,
        "target_modules": _target_modules([bare_name(model, path) for path, _ in model.named_modules()], list(layers)),
        "task_type": config.task_type if config.task_type != "CAUSAL_LM" or _is_causal_lm(bare) else None,
        "use_rslora": config.use_rslora,
    }


def _is_causal_lm(model: nn.Module) -> bool:
    """Whether PEFT can wrap it as a causal language model: it calls ``prepare_inputs_for_generation``."""
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return hasattr(model, "prepare_inputs_for_generation") and not is_encoder_decoder


def _target_modules(modules: Iterable[str], names: list[str]) -> list[str] | str:
    """The shortest list (last components, or paths), else an expression, that means just these modules to PEFT."""
    suffixes = sorted({name.rpartition(".")[2] for name in names})
    for targets in (suffixes, sorted(names)):
        if {name for name in modules if any(ends_with(name, target) for target in targets)} == set(names):
            return targets
    return "|".join(re.escape(name) for name in sorted(names))
