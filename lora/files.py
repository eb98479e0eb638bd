"""Adapters as files, in the format of PEFT: a directory with two files.

``adapter_model.safetensors`` holds, for a layer at path P of the model,

    base_model.model.P.lora_A.weight    float32 [r, in]
    base_model.model.P.lora_B.weight    float32 [out, r]

``adapter_config.json`` holds the fields of ``peft.LoraConfig``. Writing warns of what the file does not hold, and of
what PEFT takes from it differently. Reading refuses a file that asks for what this library does not do (DoRA, a rank
per layer, trained embeddings, ...): the layers would compute something else than the file means.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qloralab.nf4.distributed import whole, writes
from qloralab.nf4.files import pretrained
from qloralab.nf4.files.atomic import replacing
from qloralab.nf4.files.errors import FormatError
from qloralab.nf4.files.json_file import read_object, to_text
from qloralab.nf4.files.module_names import bare_name, ends_with, without_wrappers
from qloralab.nf4.files.safetensors_reader import SafetensorsFile
from qloralab.nf4.files.safetensors_writer import SafetensorsWriter
from qloralab.nf4.linear import Linear, QuantizedLinear
from qloralab.nf4.model import unwrapped

from .config import LoraConfig
from .layer import LoRALinear
from .merge import is_merged

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Fields of PEFT's file that change what the adapter computes, with the values that leave it as it is.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication"), (None,)),
    **dict.fromkeys(("monteclora_config", "velora_config"), (None,)),
    **dict.fromkeys(("lora_bias", "use_bdlora", "use_dora", "use_qalora"), (None, False)),
    **dict.fromkeys(("alpha_pattern", "rank_pattern"), (None, {})),
    **dict.fromkeys(("modules_to_save", "target_parameters"), (None, [])),
    "trainable_token_indices": (None, [], {}),
    "fan_in_fan_out": (None, False, True),  # how the weight beside the adapter is stored; A and B are as always
    # The others (PiSSA, OLoRA, CorDA, LoftQ) change the weights beside the adapter.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
}
# PEFT (0.21) turns these targets into parameters in a model whose experts transformers 5 holds as one parameter.
_EXPERTS = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapters of a model so that ``peft.PeftModel.from_pretrained(base_model, directory)`` opens them.

    The names are those of the model without what wraps it or its parts (``torch.compile``, DDP, FSDP, activation
    checkpointing).

    Args:
        model: with adapters, from ``inject_``.
            Where several processes share them (``fully_shard``), all have to call this, and the first one writes.
        directory: made if missing. What an earlier call has written there is replaced by all of this one or none of it;
            killed between the two files, this leaves a directory without a config, which nothing opens.

    Raises:
        ValueError: the model has no adapters, is merged, or has some that are on the meta device or in parts of no
            known shape (FSDP1).

    Warns:
        UserWarning: parameters outside of the adapters train, and are not saved; or PEFT will leave adapters out.
    """
    found: dict[LoRALinear, dict[str, None]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoRALinear):
            found.setdefault(module, {})[bare_name(model, path)] = None
    if is_merged(model):
        raise ValueError("the model is merged, so its adapters are out of sight; unmerge_ it, then save them")
    if not found:
        raise ValueError("the model has no adapters; inject_ them before saving")
    paths = {layer: list(names) for layer, names in found.items()}
    tensors: dict[str, Tensor] = {}
    for layer, (name, *_) in paths.items():
        shapes = (layer.config.r, layer.in_features), (layer.out_features, layer.config.r)
        for key, tensor, shape in zip(_keys(name), (layer.lora_A, layer.lora_B), shapes, strict=True):
            if tensor.is_meta:
                raise ValueError(f"{name} is on the meta device: its adapter has no values to save")
            if tensor.shape != shape:
                raise ValueError(f"{name}: its adapter is sharded; gather it before saving")
            tensors[key] = tensor.detach()
    first = writes(tensors.values())
    tensors = {key: whole(tensor) for key, tensor in tensors.items()}
    if not first:
        return
    for what, names in _what_is_left_out(model, paths, tensors).items():
        if names:
            more = f" and {len(names) - 3} others" if len(names) > 3 else ""
            warnings.warn(f"save_adapter: {what}: {', '.join(names[:3])}{more}", UserWarning, stacklevel=2)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / WEIGHTS_FILE, directory / CONFIG_FILE) as (weights, config):
        with SafetensorsWriter(weights, {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}) as file:
            for key, tensor in tensors.items():
                file.write(key, tensor)
        config.write_text(to_text(_peft_config(model, paths)), encoding="utf-8")


def save_pretrained(model: Any, directory: str | os.PathLike[str], *arguments: Any, **options: Any) -> None:
    """``save_pretrained`` of a model of transformers after ``inject_``: it writes the adapters alone, as with PEFT;
    after ``merge_``, the dense model."""
    if is_merged(model):
        if any(isinstance(module, QuantizedLinear) for module in model.modules()):
            raise ValueError("layers without an adapter are still in 4 bits; `qloralab merge` writes such a model")
        type(model).save_pretrained(model, directory, *arguments, **options)
    elif not any(isinstance(module, LoRALinear) for module in model.modules()):
        pretrained.save_pretrained(model, directory, *arguments, **options)
    elif options.get("push_to_hub"):
        raise ValueError("a model with adapters is not pushed to the hub; save_adapter writes a directory to upload")
    elif options.get("is_main_process", True):
        save_adapter(model, directory)


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
    if not path.exists():
        if (pickle := path.with_suffix(".bin")).exists():
            raise FormatError("is a pickle, which can run code; have PEFT save it as safetensors", file=pickle)
        raise FileNotFoundError(f"{path} does not exist")
    file = SafetensorsFile(path)
    shapes = _shapes(file, config.r)
    if model is not None:
        _check_fit(model, shapes, path)
    return config, {name: (_values(file, A), _values(file, B)) for name in shapes for A, B in [_keys(name)]}


def _keys(name: str) -> tuple[str, str]:
    """The names of A and B in the file, by the path of the layer."""
    return f"{_PREFIX}{name}.lora_A.weight", f"{_PREFIX}{name}.lora_B.weight"


def _what_is_left_out(
    model: nn.Module, paths: dict[LoRALinear, list[str]], tensors: dict[str, Tensor]
) -> dict[str, list[str]]:
    """What the file does not hold or PEFT does not take: the names, by what to say of them."""
    inside = {id(p) for layer in paths for p in (layer.lora_A, layer.lora_B)}
    idle = [name for name, *_ in paths.values() if not tensors[_keys(name)[1]].any()]
    # The last components of names by which PEFT means the experts of such a model, and no layer of that name.
    kinds = getattr(sys.modules.get("transformers.conversion_mapping"), "_MODEL_TO_CONVERSION_PATTERN", {})
    kind = getattr(getattr(without_wrappers(model), "config", None), "model_type", None)
    experts = _EXPERTS.get(kinds.get(kind, "mixtral" if kind == "mixtral" else ""), ())
    return {
        "only adapters are saved; this trains as well, and is not in the file": [
            bare_name(model, name) for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside
        ],
        "a layer stands at several paths, of which PEFT adapts the first alone": [
            " = ".join(names) for names in paths.values() if len(names) > 1
        ],
        "these adapters never had a gradient": idle if len(idle) < len(paths) else [],
        "PEFT takes these names for those of experts, and leaves their adapters out": [
            name for name, *_ in paths.values() if name.rpartition(".")[2] in experts
        ],
    }


def _peft_config(model: nn.Module, paths: dict[LoRALinear, list[str]]) -> dict[str, Any]:
    config = next(iter(paths)).config
    bare = without_wrappers(model)
    base = getattr(bare, "config", None)
    # As a causal language model, PEFT wraps what has this method.
    causal = hasattr(bare, "prepare_inputs_for_generation") and not getattr(base, "is_encoder_decoder", False)
    modules = [bare_name(model, path) for path, _ in model.named_modules()]
    return dataclasses.asdict(config) | {
        "base_model_name_or_path": getattr(base, "_name_or_path", None) or None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "peft_type": "LORA",
        "target_modules": _target_modules(modules, {name for name, *_ in paths.values()}),
        "task_type": config.task_type if config.task_type != "CAUSAL_LM" or causal else None,
    }


def _target_modules(modules: Collection[str], names: set[str]) -> list[str] | str:
    """The shortest list (last components, or paths), else an expression, that means just these modules to PEFT."""
    for targets in (sorted({name.rpartition(".")[2] for name in names}), sorted(names)):
        if {name for name in modules if any(ends_with(name, target) for target in targets)} == names:
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
    if not isinstance(fields.get("use_rslora", False), bool):
        raise FormatError(f"is {fields['use_rslora']!r:.60}, not true or false", file=path, field="use_rslora")
    for field in ("r", "lora_alpha"):
        if field not in fields:
            raise FormatError("is missing", file=path, field=field)
    # How the values of a file once started makes no difference to them.
    known = {field.name for field in dataclasses.fields(LoraConfig)} - {"init_lora_weights"}
    try:
        return LoraConfig(**{name: value for name, value in fields.items() if name in known})
    except (ValueError, TypeError) as error:
        raise FormatError(str(error), file=path) from None


def _check_fit(model: nn.Module, shapes: dict[str, tuple[int, int]], path: Path) -> None:
    modules = {bare_name(model, name): module for name, module in model.named_modules(remove_duplicate=False)}
    for name, (rows, columns) in shapes.items():
        if name not in modules:
            raise ValueError(f"{path} has an adapter for {name}, which the model does not have; is it the right model?")
        layer = unwrapped(modules[name])
        if not isinstance(layer, Linear):
            raise ValueError(f"{path} has an adapter for {name}, which is no linear layer but a {type(layer).__name__}")
        if (rows, columns) != (layer.out_features, layer.in_features):
            expected = f"{layer.out_features} x {layer.in_features}"
            raise ValueError(f"{path}: the adapter of {name} is for {rows} x {columns}, the layer is {expected}")


def _shapes(file: SafetensorsFile, r: int) -> dict[str, tuple[int, int]]:
    """out and in of each adapter by the path of its layer; all complete, and of the rank of the config."""
    names = dict.fromkeys(key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")[0] for key in file.names())
    where = {key: dim for name in names for dim, key in enumerate(_keys(name))}  # the dimension that has the rank
    for key in file.names():
        if key not in where:
            raise FormatError("is not the A or B of a LoRA layer", file=file.path, tensor=key)
        if not file.describe(key)[0].is_floating_point:
            raise FormatError(f"is {file.describe(key)[0]}, not floating point", file=file.path, tensor=key)
    if not names:
        raise FormatError("holds no adapter", file=file.path)
    for key, dim in where.items():
        if key not in file.names():
            raise FormatError("is missing", file=file.path, tensor=key)
        shape = file.describe(key)[1]
        if len(shape) != 2 or shape[dim] != r:
            raise FormatError(f"is {list(shape)}; the config says r = {r}", file=file.path, tensor=key)
    return {name: (file.describe(B)[1][0], file.describe(A)[1][1]) for name in names for A, B in [_keys(name)]}


def _values(file: SafetensorsFile, key: str) -> Tensor:
    tensor = file.tensor(key).float()
    if not tensor.isfinite().all():
        raise FormatError("holds a value that is NaN or infinite", file=file.path, tensor=key)
    return tensor
