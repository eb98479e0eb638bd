"""From a model to a QLoRA model: find its linear layers, hold their weights in 4 bits, put an adapter beside each.

Both steps change the model in place and return it. The order is ``quantize_``, then ``inject_``; ``inject_`` alone
gives LoRA.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from qloralab.nf4.codebook import Codebook
from qloralab.nf4.linear import QuantizedLinear
from qloralab.nf4.own_memory import own_memory_
from qloralab.nf4.packed import DTYPES
from qloralab.nf4.tensor import quantize

from .config import LoraConfig, ends_with
from .dense_shares import LOGGER, log_dense, output_heads
from .layer import Linear, LoRALinear
from .pretrained import saves_itself_
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

    ``left_out`` says why a layer is not among them.

    Args:
        model: any module. A layer that has an adapter goes by its own path, without ``base_layer``.
        skip: modules to leave out with all that they contain: full paths, or their last components.

    Raises:
        ValueError: a name in skip matches no module.
    """
    return [name for name, reason in _decided(model, skip).items() if reason is None]


def left_out(model: nn.Module, skip: Sequence[str] | None = None) -> dict[str, str]:
    """Why the modules that hold a matrix of weights are not among ``linear_names(model, skip)``: by full path."""
    return {name: reason for name, reason in _decided(model, skip).items() if reason is not None}


def quantize_(
    model: Model,
    codebook: Codebook = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
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
            on a layer stay in place.
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
    _refuse_adapters(model, "quantize it before injecting them")
    decided = _decided(model, skip)
    if None not in decided.values():
        raise ValueError(f"the model has no linear layer to quantize{_summary(decided)}")
    by_weight: dict[int, list[str]] = {}
    for name in (name for name, reason in decided.items() if reason is None):
        layer = _linear(model, name)
        if isinstance(layer, nn.Linear):
            by_weight.setdefault(id(layer.weight), []).append(name)
    options = codebook, block_size, double_quant
    for name, *_ in by_weight.values():
        _check(model.get_parameter(f"{name}.weight"), *options, name=f"{name}.weight")
    places = _places(model)
    for done, sharing in enumerate(by_weight.values(), 1):
        layers = [_linear(model, name) for name in sharing]
        weight = quantize(model.get_parameter(f"{sharing[0]}.weight"), *options, name=f"{sharing[0]}.weight")
        first = None
        for layer in layers:
            new = QuantizedLinear(weight, layer.bias, compute_dtype).train(layer.training)
            first = first or new
            new._shared = first._shared
            _replace(places.pop(layer), layer, new)
            del layer
        del layers
        if progress:
            progress(done, len(by_weight))
    own_memory_([*model.parameters(), *model.buffers()])
    log_dense(model, [model.get_submodule(name) for name in _skipped(model, skip or ())])
    saves_itself_(model)
    return model


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
    _refuse_adapters(model, "inject them once")
    decided = _decided(model)
    if None not in decided.values():
        raise ValueError(f"the model has no linear layer to adapt{_summary(decided)}")
    names = config.select(
        [n for n, reason in decided.items() if reason is None], {n: r for n, r in decided.items() if r}
    )
    wrap_(model, names, config)
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_children():
        if module is not embeddings and module in output_heads(model):
            LOGGER.warning("%s is frozen like the rest; to train it, set its requires_grad and save it yourself", name)
    return model


def wrap_(model: Model, names: Iterable[str], config: LoraConfig) -> Model:
    """``inject_`` with the layers given by their full paths. The model is unchanged when it raises ValueError."""
    _refuse_adapters(model, "inject them once")
    layers = {name: _linear(model, name) for name in names}
    read = weights_read(model)
    for name, layer in layers.items():
        if layer in read:
            raise ValueError(f"{name} cannot have an adapter: {read[layer]} reads its weight and passes it by")
    model.requires_grad_(False)
    places = _places(model)
    for name, layer in layers.items():
        _replace(places[layer], layer, LoRALinear(layer, config, name).train(layer.training))
    saves_itself_(model)
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train, as an optimizer takes them: after ``inject_``, those of the adapters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers with an adapter, by their full paths."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def untrained(model: nn.Module) -> list[str]:
    """The layers whose adapter is as ``inject_`` made it, B zero: after training, those that never had a gradient."""
    return [name for name, layer in adapters(model).items() if not layer.lora_B.any()]


def has_adapters(model: nn.Module) -> bool:
    """Whether any layer has an adapter."""
    return any(isinstance(module, LoRALinear) for module in model.modules())


def unwrapped(module: nn.Module) -> nn.Module:
    """The layer without its adapter."""
    return module.base_layer if isinstance(module, LoRALinear) else module


def outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` without what is inside a layer with an adapter."""
    inner = tuple(f"{name}." for name in adapters(model))
    return ((name, module) for name, module in model.named_modules() if not name.startswith(inner or ("\0",)))


def _decided(model: nn.Module, skip: Sequence[str] | None = None) -> dict[str, str | None]:
    """Why each module that holds a matrix is left out, by full path; None where it is one of ``linear_names``."""
    skipped, read, heads = _skipped(model, skip or ()), weights_read(model), output_heads(model)
    reasons: dict[str, str | None] = {}
    chosen: dict[str, Linear] = {}
    for name, module in outer_modules(model):
        layer = unwrapped(module)
        if isinstance(layer, Linear):
            reasons[name] = (
                "the model itself, which cannot be replaced in place" if not name
                else "the output head" if module in heads
                else "named in skip" if name in skipped
                else f"its weight is read by {read[module]}" if module in read
                else None if isinstance(layer, QuantizedLinear)
                else _unlike_linear(layer)
            )  # fmt: skip
            if reasons[name] is None:
                chosen[name] = layer
        elif any(is_lazy(one) or one.dim() > 1 for one in layer.parameters(recurse=False)):
            reasons[name] = f"{type(layer).__name__}, not an nn.Linear"
    inside = {id(layer) for layer in chosen.values()}
    elsewhere = {id(p) for m in model.modules() if id(m) not in inside for p in m.parameters(recurse=False)}
    tied = {
        name: "its weight is that of a module that is left out"
        for name, layer in chosen.items()
        if id(layer.weight) in elsewhere
    }
    return reasons | tied


def _unlike_linear(layer: nn.Linear) -> str | None:
    """Why a subclass or an instance of nn.Linear cannot be taken for one."""
    if type(layer).forward is not nn.Linear.forward or "forward" in vars(layer):
        return f"{type(layer).__name__}, with a forward of its own"
    extra = {*layer._parameters, *layer._buffers, *layer._modules} - {"weight", "bias"}
    if extra:
        return f"it holds {', '.join(sorted(extra))} beside or instead of its weight"
    weight = layer._parameters.get("weight")
    return None if type(weight) is nn.Parameter else f"its weight is a {type(weight).__name__}"


def _summary(reasons: dict[str, str | None]) -> str:
    counts = Counter(reasons.values()).most_common()
    return "; left out: " + (", ".join(f"{count} ({reason})" for reason, count in counts) or "nothing")


def _refuse_adapters(model: nn.Module, advice: str) -> None:
    if has_adapters(model):
        raise ValueError(f"the model has adapters already; {advice}")
    for name, module in model.named_modules():
        if any(c.__name__ == "BaseTunerLayer" and c.__module__.startswith("peft.") for c in type(module).__mro__):
            raise ValueError(
                f"{name} is a {type(module).__name__} of PEFT and has adapters of its own; merge_and_unload() them"
            )


def _check(weight: nn.Parameter, *options, name: str) -> None:
    """Raise what ``quantize`` would raise. Reading a weight once tells in nearly all cases that it would not."""
    if weight.dtype in DTYPES:
        if weight.is_meta or not weight.numel():
            return
        low, high = weight.detach().aminmax()
        if max(-low, high) < 0.9 * torch.finfo(weight.dtype).max:  # nor is NaN; double quantization adds 1 % at most
            return
    quantize(weight, *options, name=name)


def _linear(model: nn.Module, name: str) -> Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, Linear)
    return layer


def _skipped(model: nn.Module, skip: Sequence[str]) -> set[str]:
    if isinstance(skip, str):
        skip = [skip]
    names = [name for name, _ in model.named_modules()]
    roots = set()
    for entry in skip:
        matches = [name for name in names if ends_with(name, entry)]
        if not matches:
            raise ValueError(f"skip: no module is called {entry!r}")
        roots.update(matches)
    return {name for name in names if any(name == root or name.startswith(f"{root}.") for root in roots)}


Places = list[tuple[nn.Module, str]]


def _places(model: nn.Module) -> dict[nn.Module, Places]:
    """Where each module stands: its parents and its name in them (several, when it is used twice)."""
    places: dict[nn.Module, Places] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, name))
    return places


def _replace(places: Places, old: nn.Module, new: nn.Module) -> None:
    """Put a module where another stands. Hooks stay there, and their handles go on removing them."""
    for name in vars(old).keys() & vars(new).keys():
        if "_hook" in name:
            vars(old)[name], vars(new)[name] = vars(new)[name], vars(old)[name]
    for parent, name in places:
        setattr(parent, name, new)
