"""A layer in 4 bits whose bytes several processes share: each holds a part, and all of it while it computes.

PyTorch's ``fully_shard`` (FSDP2) splits the parameters of a module over processes, along the first dimension, and
gathers them for the time of its forward and backward. A ``QuantizedTensor`` is no parameter, so it would stay whole in
each process. Here its tensors are parameters, frozen: packed codes and scales are split and gathered as the bytes that
they are, of whatever dtype, and never converted. The codebook and the offset are a few numbers, and stay whole.

What a layer computes with is then the same bits as in one process.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from .linear import QuantizedLinear
from .model import parents_of, replace
from .tensor import QuantizedTensor

_PARTS = ("packed", "scales", "absmax2")


class ShardableLinear(QuantizedLinear):
    """A ``QuantizedLinear`` whose codes and scales are parameters of its own, for ``fully_shard`` to find.

    Its weight is made of what they are at the moment: whole within the forward and backward of the module that was
    sharded; elsewhere DTensors, which no operator takes. It has no state dict.

    Attributes:
        packed, scales: see ``Packed``; parameters that do not train, as absmax2 is where there is one.
    """

    packed: Tensor
    scales: Tensor

    def __init__(self, layer: QuantizedLinear, parts: dict[str, nn.Parameter]):
        super().__init__(layer.weight, layer.bias, layer.compute_dtype)
        self.follows_device = layer.follows_device
        self._held = tuple(parts)
        self._shared = [dataclasses.replace(layer.weight, **{name: parts[name].data.to("meta") for name in parts})]
        for name, part in parts.items():
            self.register_parameter(name, part)

    @property
    def weight(self) -> QuantizedTensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        made = dataclasses.replace(self._shared[0], **{name: getattr(self, name) for name in self._held})
        made.packed.is_fleeting = True  # pyright: ignore[reportAttributeAccessIssue]
        return made

    def _set_weight(self, weight: QuantizedTensor) -> None:
        raise RuntimeError("the weight of a layer that is sharded cannot be moved or replaced")

    def _apply(self, fn, recurse: bool = True):
        nn.Module._apply(self, fn, recurse)
        return self

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        raise RuntimeError(f"{prefix.rstrip('.')} is sharded: save its adapters, or the model before it was sharded")


def shardable_(model: nn.Module) -> None:
    """Put a ``ShardableLinear`` in the place of each ``QuantizedLinear`` below a module.

    Args:
        model: in place. Layers that shared a weight share its parameters. The packed bytes are not copied.
    """
    parents, known = parents_of(model), dict[int, dict[str, nn.Parameter]]()
    weights: list[QuantizedTensor] = []  # kept, so that no id comes again
    for layer in [module for module in model.modules() if type(module) is QuantizedLinear]:
        weight = layer.weight
        weights.append(weight)
        if id(weight) not in known:
            tensors = ((name, getattr(weight, name)) for name in _PARTS)
            known[id(weight)] = {name: _frozen(tensor) for name, tensor in tensors if tensor is not None}
        replace(parents[layer], layer, ShardableLinear(layer, known[id(weight)]).train(layer.training))


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
