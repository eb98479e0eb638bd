"""From a model to a QLoRA model: find its linear layers, hold their weights in 4 bits, put an adapter beside each.

Both steps change the model in place and return it. The order is ``quantize_``, then ``inject_``; ``inject_`` alone
gives LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from qloralab.nf4.tensor import quantize

from .config import LoraConfig, ends_with
from .layer import Linear, LoRALinear, check_rank
from .quantized_linear import QuantizedLinear


def linear_names(model: nn.Module, skip: Sequence[str] | None = None) -> list[str]:
    """Full paths of the linear layers that QLoRA quantizes and adapts.

    Those are the modules, below the model itself, of the very type ``nn.Linear`` (a subclass may be used in other
    ways than by calling it) or ``QuantizedLinear``, except

    * the output head, where the model can tell it by ``get_output_embeddings()``, as Hugging Face models can;
    * layers that share their weight with a module that is left out, such as an embedding;
    * layers named in ``skip``.

    Args:
        model: any module. A layer that has an adapter goes by its own path, without ``base_layer``.
        skip: modules to leave out with all that they contain: full paths, or their last components.

    Raises:
        ValueError: a name in skip matches no module.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    skipped = _skipped(model, skip or ())
    chosen = {
        name: layer
        for name, module in outer_modules(model)
        if name
        and type(layer := unwrapped(module)) in (nn.Linear, QuantizedLinear)
        and module is not head
        and name not in skipped
    }
    inside = {id(layer) for layer in chosen.values()}
    elsewhere = {id(p) for m in model.modules() if id(m) not in inside for p in m.parameters(recurse=False)}
    return [name for name, layer in chosen.items() if id(layer.weight) not in elsewhere]


def quantize_(
    model: nn.Module,
    codebook: str | torch.Tensor = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    skip: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Hold the weights of a model's linear layers in 4 bits, in place. One weight is freed before the next is
    quantized.

    Args:
        model: its layers as ``linear_names(model, skip)`` gives them; those already quantized stay as they are.
        codebook, block_size, double_quant: see ``quantize``.
        compute_dtype: dtype of the products; by default what the device multiplies in hardware, bfloat16 or float32
            (``nf4/processor.py``).
        skip: see ``linear_names``.
        progress: called after each weight with how many are done and how many there are.

    Returns:
        the model. Layers that shared a weight share the packed one.

    Raises:
        ValueError: the model has no linear layer, or has adapters; or a weight holds NaN or infinity (the message has
            its full name).
        TypeError: a weight is float64 or an integer.
    """
    if has_adapters(model):
        raise ValueError("the model has adapters; quantize it before injecting them")
    names = linear_names(model, skip)
    if not names:
        raise ValueError("the model has no linear layer to quantize")
    by_weight: dict[int, list[str]] = {}
    for name in names:
        layer = _linear(model, name)
        if isinstance(layer, nn.Linear):
            by_weight.setdefault(id(layer.weight), []).append(name)
    places = _places(model)
    for done, sharing in enumerate(by_weight.values(), 1):
        layers = [_linear(model, name) for name in sharing]
        weight = quantize(
            model.get_parameter(f"{sharing[0]}.weight"), codebook, block_size, double_quant, name=f"{sharing[0]}.weight"
        )
        for layer in layers:
            _replace(places[layer], QuantizedLinear(weight, layer.bias, compute_dtype).train(layer.training))
            del places[layer], layer
        del layers
        if progress:
            progress(done, len(by_weight))
    _own_the_rest(model)
    return model


def inject_(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Put an adapter beside each linear layer that the config targets, in place, and freeze everything else.

    Args:
        model: dense, or quantized by ``quantize_``.
        config: ``target_modules`` chooses among ``linear_names(model)``.

    Returns:
        the model.

    Raises:
        ValueError: the model has adapters already; a target matches nothing; r is larger than a layer.
    """
    return wrap_(model, config.select(linear_names(model)), config)


def wrap_(model: nn.Module, names: Iterable[str], config: LoraConfig) -> nn.Module:
    """``inject_`` with the layers given by their full paths. The model is unchanged when it raises ValueError."""
    if has_adapters(model):
        raise ValueError("the model has adapters already; inject them once")
    layers = {name: _linear(model, name) for name in names}
    for name, layer in layers.items():
        check_rank(layer, config, name)
    model.requires_grad_(False)
    places = _places(model)
    for layer in layers.values():
        _replace(places[layer], LoRALinear(layer, config).train(layer.training))
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train, as an optimizer takes them: after ``inject_``, those of the adapters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers with an adapter, by their full paths."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


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


def _own_the_rest(model: nn.Module) -> None:
    """Copy what was not quantized, one tensor after the other.

    A checkpoint is often mapped into memory, and one tensor that still lies in it keeps all of it there: the weights
    that were quantized would be freed in name only.
    """
    copies: dict[tuple, torch.Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.layout == torch.strided:
            view = tensor.dtype, tensor.data_ptr(), tensor.shape, tensor.stride()
            if view not in copies:
                copies[view] = tensor.data.clone()
            tensor.data = copies[view]


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


def _replace(places: Places, new: nn.Module) -> None:
    for parent, name in places:
        setattr(parent, name, new)
