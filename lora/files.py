"""Adapters as files, in the format of PEFT: a directory with two files.

``adapter_model.safetensors`` holds, for a layer at path P of the model,

    base_model.model.P.lora_A.weight    float32 [r, in]
    base_model.model.P.lora_B.weight    float32 [out, r]

``adapter_config.json`` holds the fields of ``peft.LoraConfig``. Reading refuses a file that asks for what this
library does not do (DoRA, a rank per layer, trained embeddings, ...): the layers would compute something else than
the file means. Writing warns of what the file does not hold, and of what PEFT takes from it differently.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qloralab.nf4.errors import FormatError
from qloralab.nf4.json_file import read_object, to_text
from qloralab.nf4.replacing import replacing
from qloralab.nf4.safetensors_reader import SafetensorsFile
from qloralab.nf4.safetensors_writer import SafetensorsWriter

from .config import LoraConfig, ends_with
from .inject import adapters, has_adapters, unwrapped, wrap_
from .layer import LoRALinear
from .quantized_linear import QuantizedLinear
from .wrappers import bare_name, without_wrappers

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."

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
            _keys(name), (layer.lora_A, layer.lora_B), ((r, shape[1]), (shape[0], r)), strict=True
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
    return config, {name: (_values(file, A), _values(file, B)) for name in shapes for A, B in [_keys(name)]}


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


def _keys(name: str) -> tuple[str, str]:
    return f"{_PREFIX}{name}.lora_A.weight", f"{_PREFIX}{name}.lora_B.weight"


def _shapes(file: SafetensorsFile, r: int) -> dict[str, tuple[int, int]]:
    """out and in of each adapter by the path of its layer; all complete, and of the rank of the config."""
    names: dict[str, None] = {}
    for key in file.names():
        name, _, which = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if key not in _keys(name) or which not in ("lora_A", "lora_B"):
            raise FormatError("is not the A or B of a LoRA layer", file=file.path, tensor=key)
        if not file.describe(key)[0].is_floating_point:
            raise FormatError(f"is {file.describe(key)[0]}, not floating point", file=file.path, tensor=key)
        names[name] = None
    if not names:
        raise FormatError("holds no adapter", file=file.path)
    shapes = {}
    for name in names:
        for key, dim in zip(_keys(name), (0, 1), strict=True):
            if key not in file.names():
                raise FormatError("is missing", file=file.path, tensor=key)
            shape = file.describe(key)[1]
            if len(shape) != 2 or shape[dim] != r:
                raise FormatError(f"is {list(shape)}; the config says r = {r}", file=file.path, tensor=key)
        A, B = (file.describe(key)[1] for key in _keys(name))
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
