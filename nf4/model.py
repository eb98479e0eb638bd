"""A model whose linear layers are held in 4 bits: which layers those are, and ``quantize_``, which replaces them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .codebook import Codebook
from .data_type import DataType
from .dense_shares import log_dense, output_heads
from .files.module_names import ends_with
from .files.pretrained import saves_itself_
from .linear import Adapted, Linear, QuantizedLinear
from .own_memory import own_memory_
from .packed import DTYPES
from .tensor import quantize
from .weight_reads import weights_read

Model = TypeVar("Model", bound=nn.Module)


def linear_names(model: nn.Module, skip: Sequence[str] | None = None) -> list[str]:
    """Full paths of the linear layers that QLoRA quantizes and adapts: each ``nn.Linear`` or ``QuantizedLinear`` below
    the model itself, except

    * the output head of Hugging Face models: ``get_output_embeddings()``, and linear layers beside the base model, as
      classifiers have;
    * layers whose weight another module reads, or shares and is left out, such as an embedding;
    * subclasses with a ``forward`` of their own, and layers whose weight is made from others (weight_norm, pruning,
      parametrizations) or is no plain parameter;
    * layers named in ``skip``.

    Args:
        model: any module. A layer that has an adapter goes by its own path, without ``base_layer``.
        skip: modules to leave out with all that they contain: full paths, or their last components.

    Raises:
        ValueError: a name in skip matches no module.
    """
    return choose(model, skip)[0]


def left_out(model: nn.Module, skip: Sequence[str] | None = None) -> dict[str, str]:
    """Why the modules that hold a matrix of weights are not among ``linear_names(model, skip)``: by full path."""
    return choose(model, skip)[1]


def quantize_(
    model: Model,
    codebook: Codebook | DataType = "nf4",
    block_size: int | None = None,
    double_quant: bool | None = None,
    compute_dtype: torch.dtype | None = None,
    skip: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Hold the weights of a model's linear layers in 4 bits, in place. One weight is freed before the next is
    quantized.

    What stays dense is logged, by the logger "qloralab": as a warning where more than a tenth of the weights are
    neither named in skip nor those of embeddings or the head. Weights in 4 bits are no parameters of the model:
    ``model.num_parameters()`` does not count them, ``qloralab.checkpoint.quantized_model.parameter_count(model)`` does.

    Args:
        model: its layers as ``linear_names(model, skip)`` gives them; those already quantized stay as they are. Hooks
            on a layer stay on it.
        codebook, block_size, double_quant: see ``quantize``.
        compute_dtype: dtype of the products; by default what the device multiplies in hardware, bfloat16 or float32
            (``nf4/processor.py``).
        skip: see ``linear_names``.
        progress: called after each weight with how many are done and how many there are.

    Returns:
        the model. Layers that shared a weight share the packed one.

    Raises:
        ValueError: the model has no linear layer, or has adapters, ours or PEFT's; or a weight holds NaN or infinity
            (the message has its full name).
        TypeError: a weight is float64 or an integer.
        The model is unchanged then.
    """
    refuse_adapters(model, "quantize it before injecting them")
    names, left = choose(model, skip)
    if not names:
        raise ValueError(f"the model has no linear layer to quantize{summary(left)}")
    sharing: dict[int, list[str]] = {}
    for name in names:
        if isinstance(model.get_submodule(name), nn.Linear):
            sharing.setdefault(id(model.get_parameter(f"{name}.weight")), []).append(name)
    options = codebook, block_size, double_quant
    for name, *_ in sharing.values():
        _check(model.get_parameter(f"{name}.weight"), *options, name=f"{name}.weight")
    skipped, parents = _skipped(model, skip), parents_of(model)
    for done, (first, *others) in enumerate(sharing.values(), 1):
        weight = quantize(model.get_parameter(f"{first}.weight"), *options, name=f"{first}.weight")
        shared = None
        for name in (first, *others):
            layer: Any = model.get_submodule(name)
            new = QuantizedLinear(weight, layer.bias, compute_dtype).train(layer.training)
            new._shared = shared = shared or new._shared
            replace(parents.pop(layer), layer, new)
            del layer
        if progress:
            progress(done, len(sharing))
    own_memory_([*model.parameters(), *model.buffers()])
    log_dense(model, skipped)
    saves_itself_(model)
    return model


def choose(model: nn.Module, skip: Sequence[str] | None = None) -> tuple[list[str], dict[str, str]]:
    """``linear_names`` and ``left_out``."""
    skipped, read, heads = _skipped(model, skip), weights_read(model), output_heads(model)
    inner = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Adapted))
    reasons: dict[str, str | None] = {}
    chosen: dict[str, Linear] = {}
    for name, module in model.named_modules():
        layer = unwrapped(module)
        if name.startswith(inner):
            continue
        if isinstance(layer, Linear):
            reasons[name] = (
                "the model itself, which cannot be replaced in place" if not name
                else "the output head" if module in heads
                else "named in skip" if module in skipped
                else f"its weight is read by {read[module]}" if module in read
                else None if isinstance(layer, QuantizedLinear)
                else _unlike_linear(layer)
            )  # fmt: skip
            if reasons[name] is None:
                chosen[name] = layer
        elif any(is_lazy(one) or one.dim() > 1 for one in layer.parameters(recurse=False)):
            reasons[name] = f"{type(layer).__name__}, not an nn.Linear"
    others = set(model.modules()).difference(chosen.values())
    elsewhere = {id(parameter) for module in others for parameter in module.parameters(recurse=False)}
    for name, layer in chosen.items():
        if id(layer.weight) in elsewhere:
            reasons[name] = "its weight is that of a module that is left out"
    return [name for name, reason in reasons.items() if not reason], {n: why for n, why in reasons.items() if why}


def unwrapped(module: nn.Module) -> nn.Module:
    """The layer without its adapter."""
    return module.base_layer if isinstance(module, Adapted) else module


def summary(left: Mapping[str, str]) -> str:
    """How many modules are left out and why, as the end of a message."""
    counts = Counter(left.values()).most_common()
    return "; left out: " + (", ".join(f"{count} ({reason})" for reason, count in counts) or "nothing")


def refuse_adapters(model: nn.Module, advice: str) -> None:
    """Raise ValueError where a model has adapters, ours or PEFT's."""
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            raise ValueError(f"the model has adapters already; {advice}")
        if hasattr(module, "adapter_layer_names"):
            raise ValueError(
                f"{name} is a {type(module).__name__} of PEFT and has adapters of its own; merge_and_unload() them"
            )


def parents_of(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """The parents of each module, and its name in each of them."""
    parents: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                parents.setdefault(child, []).append((parent, name))
    return parents


def replace(parents: Iterable[tuple[nn.Module, str]], old: nn.Module, new: nn.Module) -> None:
    """Give the parents of a module another one. Hooks go over to it, and their handles go on removing them."""
    for name in vars(old).keys() & vars(new).keys():
        if "_hook" in name:
            vars(old)[name], vars(new)[name] = vars(new)[name], vars(old)[name]
    for parent, name in parents:
        setattr(parent, name, new)


def _unlike_linear(layer: nn.Linear) -> str | None:
    """Why a subclass or an instance of nn.Linear cannot be taken for one."""
    if type(layer).forward is not nn.Linear.forward or "forward" in vars(layer):
        return f"{type(layer).__name__}, with a forward of its own"
    extra = {*layer._parameters, *layer._buffers, *layer._modules} - {"weight", "bias"}
    if extra:
        return f"it holds {', '.join(sorted(extra))} beside or instead of its weight"
    weight = layer._parameters.get("weight")
    return None if type(weight) is nn.Parameter else f"its weight is a {type(weight).__name__}"


def _check(weight: nn.Parameter, *options, name: str) -> None:
    """Raise what ``quantize`` would raise. Reading a weight once tells in nearly all cases that it would not."""
    if weight.dtype in DTYPES:
        if weight.is_meta or not weight.numel():
            return
        low, high = weight.detach().aminmax()
        if max(-low, high) < 0.4 * torch.finfo(weight.dtype).max:  # nor is NaN; no scale is over twice the largest
            return
    quantize(weight, *options, name=name)


def _skipped(model: nn.Module, skip: Sequence[str] | None) -> set[nn.Module]:
    modules, found = dict(model.named_modules()), set[nn.Module]()
    for entry in [skip] if isinstance(skip, str) else skip or ():
        roots = [module for name, module in modules.items() if ends_with(name, entry)]
        if not roots:
            raise ValueError(f"skip: no module is called {entry!r}")
        found.update(*(root.modules() for root in roots))
    return found
