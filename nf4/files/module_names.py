"""Names of modules: parts of a dotted path, and paths without the wrappers that torch puts around a module.

``torch.compile``, DDP, FSDP and activation checkpointing hold the module they wrap as a child, whose name then stands
in every path below it: ``_orig_mod.layers.0.up`` is the layer ``layers.0.up``, as a file has it and PEFT looks for it.
That is told by the wrapper itself, not by the text: a model may have a child called "module".
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

_AROUND_MODULE = (DataParallel, DistributedDataParallel, AveragedModel)
# torch.compile; FullyShardedDataParallel; checkpoint_wrapper and offload_wrapper: nobody else has such a child.
_CHILDREN = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def ends_with(name: str, suffix: str) -> bool:
    """Whether a path equals a suffix or ends with its components."""
    return f".{name}".endswith(f".{suffix}")


def is_part_of(name: str, modules: Iterable[str]) -> bool:
    """Whether one of some names, of one or more components, stands in a path."""
    return any(f".{module}." in f".{name}." for module in modules)


def bare_name(model: nn.Module, name: str) -> str:
    """The name of a module, a parameter or a tensor of the state dict, without what wraps it or what it is in.

    Args:
        model: maybe wrapped.
        name: full path below it, with the wrappers or without those that hide themselves in state dicts.
    """
    kept: list[str] = []
    module: nn.Module | None = model
    for part in name.split("."):
        while module is not None and (wrapped := _wrapped(module)) not in (None, part):
            module = module._modules[wrapped]
        if module is None or _wrapped(module) is None:
            kept.append(part)
        module = None if module is None else module._modules.get(part)
    return ".".join(kept)


def without_wrappers(model: nn.Module) -> nn.Module:
    """The module inside of all wrappers around it."""
    while (wrapped := _wrapped(model)) is not None:
        model = model.get_submodule(wrapped)
    return model


def _wrapped(module: nn.Module) -> str | None:
    """The name of the child that a module does nothing but wrap; None when it is no wrapper."""
    if isinstance(module, _AROUND_MODULE):
        return "module"
    return next((name for name in _CHILDREN if module._modules.get(name) is not None), None)
