"""A whole language model with 4-bit weights, to a directory and back.

The directory is the one that transformers writes and opens with bitsandbytes: ``config.json`` with a
``quantization_config``, and safetensors files in which a 4-bit weight is several tensors (see
``nf4/files/bitsandbytes_layout.py``). Here it is opened without bitsandbytes. A *skeleton* is made from config.json
first, the model of transformers with parameters that have a shape and no memory; then each tensor of the checkpoint is
put into it, the 4-bit weights in a ``QuantizedLinear``.
"""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qloralab.nf4.files import quantization_config
from qloralab.nf4.files.bitsandbytes_layout import dtype_name
from qloralab.nf4.files.checkpoint import WEIGHTS_FILE, Checkpoint
from qloralab.nf4.files.errors import FormatError
from qloralab.nf4.files.json_file import read_object, write_object
from qloralab.nf4.files.module_names import bare_name, is_part_of, without_wrappers
from qloralab.nf4.files.pretrained import COMPUTE_DTYPE, describe, saves_itself_
from qloralab.nf4.files.quantization_config import FIELD, QuantizationConfig
from qloralab.nf4.files.safetensors_writer import SafetensorsWriter
from qloralab.nf4.linear import Adapted, QuantizedLinear
from qloralab.nf4.model import linear_names

CONFIG_FILE = "config.json"


def save_quantized(model: Any, directory: str | os.PathLike[str]) -> None:
    """Write a quantized model so that ``load_quantized`` opens it, and ``from_pretrained`` of transformers with
    bitsandbytes.

    The file does not depend on the machine: where ``quantize_`` was given no compute dtype, it says bfloat16.

    Args:
        model: of transformers, after ``quantize_`` with the codebook "nf4" or "fp4". What wraps it or its parts
            (``torch.compile``, DDP, activation checkpointing) leaves no trace.
        directory: made if missing. It gets model.safetensors, config.json and generation_config.json. A tokenizer is
            saved by its own ``save_pretrained``.

    Raises:
        ValueError: the model is none of transformers, has adapters or no quantized layer; its layers differ in what
            config.json says once; or bitsandbytes does not know the codebook.
        FileExistsError: the directory holds weights already.
    """
    from transformers import PreTrainedModel

    model = without_wrappers(model)
    if not isinstance(model, PreTrainedModel):
        kind = f"a {type(model).__name__}, not one of transformers"
        raise ValueError(f"the model is {kind}, whose files these are; save its state_dict()")
    if any(isinstance(module, Adapted) for module in model.modules()):
        raise ValueError("the model has adapters; save_adapter saves them, save_quantized the model before inject_")
    if not any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError("the model has no quantized layer; quantize_ it first")
    config = describe(model)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for file in sorted(directory.iterdir()):
        if file.name.endswith((".safetensors", ".safetensors.index.json")):
            raise FileExistsError(f"{file} exists; save_quantized writes over no weights")
    (directory / CONFIG_FILE).unlink(missing_ok=True)  # that of another model is never beside these weights
    write_model(model, directory, config)


def write_model(model: Any, directory: Path, config: QuantizationConfig | None) -> None:
    """Write model.safetensors, generation_config.json and config.json of a model of transformers.

    Args:
        model: dense, or with layers in 4 bits.
        directory: is there.
        config: what config.json says of the layers in 4 bits; None where there are none.
    """
    state = saved_tensors(model)
    layout = {name: (t.dtype, tuple(t.shape)) for name, t in state.items()}
    with SafetensorsWriter(directory / WEIGHTS_FILE, layout) as file:
        for name, tensor in state.items():
            file.write(name, tensor)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    fields = copy.deepcopy(model.config)
    fields.architectures = [type(model).__name__]
    write_config(directory, json.loads(fields.to_json_string()) | {"dtype": dtype_name(model.dtype)}, config)


def load_quantized(directory: str | os.PathLike[str], compute_dtype: torch.dtype | None = None) -> Any:
    """Open a 4-bit model that ``save_quantized``, ``qloralab quantize`` or transformers with bitsandbytes wrote.

    Args:
        directory: holds config.json with a ``quantization_config``, and the weights as safetensors.
        compute_dtype: of the products with 4-bit weights; by default what config.json says.

    Returns:
        the model of transformers that config.json names, in evaluation mode, on the CPU. Its 4-bit weights are
        ``QuantizedLinear`` layers, frozen; everything else has the dtype that config.json names.

    Raises:
        FileNotFoundError: there is no such directory, or no config.json.
        FormatError: a file is not what it claims to be, or the tensors are not those of the model.
        OSError, ValueError: from transformers, which does not know such a model.
    """
    return read_model(Path(directory), compute_dtype)


def read_model(directory: Path, compute_dtype: torch.dtype | None = None, dtype: torch.dtype | None = None) -> Any:
    """``load_quantized``, with a dtype for everything that is not in 4 bits."""
    fields = read_config(directory)
    if FIELD not in fields:
        raise FormatError("is missing: the weights are not quantized", file=directory / CONFIG_FILE, field=FIELD)
    config = quantization_config.from_dict(fields[FIELD], directory / CONFIG_FILE)
    checkpoint = Checkpoint(directory)
    model = skeleton(directory, dtype or _stated_dtype(fields) or floating_dtype(checkpoint))
    _fill(model, checkpoint, compute_dtype or config.compute_dtype)
    saves_itself_(model)
    if (directory / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(str(directory), local_files_only=True)
    return model.eval()


def read_config(directory: Path) -> dict[str, Any]:
    """The fields of config.json.

    Raises:
        FileNotFoundError: there is none.
        FormatError: it is not a JSON object.
    """
    return read_object(directory / CONFIG_FILE)


def write_config(directory: Path, fields: dict[str, Any], config: QuantizationConfig | None) -> None:
    """Write config.json as transformers does, with a ``quantization_config`` where weights are quantized."""
    fields = {name: value for name, value in fields.items() if name != FIELD}
    write_object(directory / CONFIG_FILE, fields | ({FIELD: quantization_config.to_dict(config)} if config else {}))


def skeleton(directory: Path, dtype: torch.dtype | None = None) -> Any:
    """The model of a config.json: parameters on the meta device, tied where they will be.

    Args:
        directory: holds config.json. Its ``architectures`` name the class; without, it is a causal language model.
        dtype: of the parameters; by default the one that config.json names, else float32.
    """
    import transformers
    from accelerate import init_empty_weights
    from huggingface_hub.errors import StrictDataclassError

    try:
        config = transformers.AutoConfig.from_pretrained(str(directory), local_files_only=True)
    except StrictDataclassError as error:
        message = f"is none that transformers takes: {' '.join(str(error).split()):.200}"
        raise FormatError(message, file=directory / CONFIG_FILE) from error
    vars(config).pop(FIELD, None)
    named: list[Any] = [getattr(transformers, str(name), None) for name in config.architectures or ()]
    fits = [made for made in named if isinstance(config, getattr(made, "config_class", None) or ())]
    make = fits[0]._from_config if fits else transformers.AutoModelForCausalLM.from_config
    # What transformers computes and does not save (the frequencies of rotary embeddings) is in buffers: those are real.
    with init_empty_weights(include_buffers=False):
        model = make(config, dtype=dtype or config.dtype or torch.float32)
    model.tie_weights()
    return model


def quantizable(model: Any) -> list[str]:
    """The linear layers of a model of transformers that are held in 4 bits: ``linear_names``, without those that
    transformers never quantizes: tied ones, and those it keeps in float32."""
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    kept = model._keep_in_fp32_modules or ()
    return [name for name in linear_names(model) if f"{name}.weight" not in tied and not is_part_of(name, kept)]


def saved_tensors(model: Any) -> dict[str, Tensor]:
    """``model.state_dict()`` without the second name of what is tied, and biases in the dtype that a file states."""
    state = {bare_name(model, name): tensor for name, tensor in model.state_dict().items()}
    for target, source in model.all_tied_weights_keys.items():
        if target in state and source in state and state[target].data_ptr() == state[source].data_ptr():
            del state[target]
    for name, module in model.named_modules(remove_duplicate=False):
        bias = f"{bare_name(model, name)}.bias"
        if isinstance(module, QuantizedLinear) and module.follows_device and bias in state:
            state[bias] = state[bias].to(COMPUTE_DTYPE)
    return state


def parameter_count(model: nn.Module) -> int:
    """How many parameters a model has, those in 4 bits included."""
    packed = {id(m.weight): m.weight for m in model.modules() if isinstance(m, QuantizedLinear)}
    return sum(p.numel() for p in (*model.parameters(), *packed.values()))


def floating_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the first floating-point tensor that is part of no 4-bit weight; float32 when there is none."""
    dtypes = (checkpoint.describe(name)[0] for name in checkpoint.plain_names())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def _fill(model: Any, checkpoint: Checkpoint, compute_dtype: torch.dtype) -> None:
    """Put each tensor of a checkpoint in its slot (its name in the model), in memory of its own."""
    slots = model.state_dict()
    missing = set(slots)
    kept = kept_in_float32(model)
    renamed = _Renamed(model, slots)
    for name in checkpoint.quantized_names():
        slot, _ = renamed(name)
        path = slot.removesuffix(".weight")
        model.set_submodule(path, _quantized_layer(model, path, name, checkpoint, compute_dtype))
        missing.discard(slot)

    def refuse(name: str, message: str) -> FormatError:
        return FormatError(message, file=checkpoint.file_of(name), tensor=name)

    def put(slot: str, tensor: Tensor, name: str) -> None:
        if slot not in slots:
            if not _is_ignored(model, slot):
                raise refuse(name, "is no tensor of the model")
            return
        if slot not in missing:
            raise refuse(name, f"has the place of another tensor, {slot}")
        check_shape(name, tuple(tensor.shape), tuple(slots[slot].shape), checkpoint)
        _assign(model, slot, tensor, torch.float32 if kept and kept.search(slot) else slots[slot].dtype)
        missing.discard(slot)

    merged: dict[str, Any] = {}
    for name in sorted(checkpoint.plain_names(), key=renamed.order):
        slot, pattern = renamed(name)
        if pattern is None:
            put(slot, checkpoint.tensor(name), name)
        else:
            converter = merged.setdefault(slot, renamed.converter(pattern))
            converter.add_tensor(slot, name, pattern, checkpoint.tensor(name))
    for slot, converter in merged.items():
        name = min(converter.layer_targets[slot])
        try:
            parts = converter.convert(slot, model=model, config=model.config)
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            raise refuse(name, f"and others do not make {slot}: {' '.join(str(error).split()):.100}") from error
        for part, tensor in parts.items():
            put(part, tensor[0] if isinstance(tensor, list) else tensor, name)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    if missing:
        first, *others = (name for name in slots if name in missing)
        more = f", and so are {len(others)} others" if others else ""
        raise FormatError(f"is missing: config.json asks for it{more}", file=checkpoint.files[0], tensor=first)


class _Renamed:
    """Where a tensor of a checkpoint goes: transformers (5) has names in memory that files of some models do not have,
    and holds the experts of a layer, which lie there one by one, as one parameter.

    Called with a name it gives the slot, and the pattern of the converter where several tensors make one.
    """

    def __init__(self, model: Any, slots: dict[str, Tensor]):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

        self.order = dot_natural_key  # expert 2 comes before expert 10
        self._rename, self._slots, self._prefix = rename_source_key, slots, model.base_model_prefix
        mapping: list[Any] = get_model_conversion_mapping(model)
        self._renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        self._converters = [one for one in mapping if not isinstance(one, WeightRenaming)]

    def __call__(self, name: str) -> tuple[str, str | None]:
        if name in self._slots:
            return name, None
        return self._rename(name, self._renamings, self._converters, self._prefix, self._slots)

    def converter(self, pattern: str) -> Any:
        return copy.deepcopy(next(one for one in self._converters if pattern in one.source_patterns))


def _quantized_layer(
    model: Any, path: str, name: str, checkpoint: Checkpoint, compute_dtype: torch.dtype
) -> QuantizedLinear:
    from transformers.pytorch_utils import Conv1D

    layer = dict(model.named_modules()).get(path)
    if not isinstance(layer, nn.Linear | Conv1D):
        raise FormatError("is in 4 bits, but no weight of a linear layer", file=checkpoint.file_of(name), tensor=name)
    weight = checkpoint.quantized(name)
    # Conv1D, which GPT-2 is made of, is a linear layer that keeps its weight transposed; in 4 bits it is not.
    shape = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.shape[::-1]
    check_shape(name, tuple(weight.shape), tuple(shape), checkpoint)
    return QuantizedLinear(weight, layer.bias, compute_dtype)


def check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...], checkpoint: Checkpoint) -> None:
    """Refuse a tensor of another shape than the model's, by a ``FormatError``."""
    if found != expected:
        message = f"is {list(found)}; config.json makes it {list(expected)}"
        raise FormatError(message, file=checkpoint.file_of(name), tensor=name)


def _assign(model: Any, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    tensor = tensor.to(dtype if tensor.is_floating_point() else None, copy=True)
    if last in module._buffers:
        module._buffers[last] = tensor
        return
    if isinstance(module, QuantizedLinear):  # its bias; transformers rounds it twice as well
        tensor = tensor.to(module.compute_dtype)
    setattr(module, last, nn.Parameter(tensor, requires_grad=module.get_parameter(last).requires_grad))


def kept_in_float32(model: Any) -> re.Pattern[str] | None:
    """What transformers never holds in 16 bits: a pattern that is found in the names."""
    kept: list[str] = []
    if model.config.dtype in (torch.float16, torch.bfloat16):
        kept += model._keep_in_fp32_modules_strict or ()
    if model.config.dtype == torch.float16:
        kept += model._keep_in_fp32_modules or ()
    return re.compile("|".join(pattern.replace("*", ".*") for pattern in kept)) if kept else None


def _is_ignored(model: Any, name: str) -> bool:
    """Whether a tensor without a slot is none that matters: one that older versions of transformers saved."""
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    return name in dict(model.named_buffers()) or any(re.search(pattern, name) for pattern in patterns)


def _stated_dtype(fields: dict[str, Any]) -> torch.dtype | None:
    name = fields.get("dtype") or fields.get("torch_dtype")
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    return dtype if isinstance(dtype, torch.dtype) else None
