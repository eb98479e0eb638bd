"""Adapters merged into the weights beside them, in place and back: ``merge_`` and ``unmerge_``.

    W_merged = W' + scaling * B A           [out, in]

W' is what training saw: of a base in 4 bits the dequantized weight, not the one that was quantized. The sum is formed
in float32 and rounded once, to the dtype that the layer multiplies in. A merged layer is one product instead of three,
and takes 16 or 32 bits a weight instead of 4.

Merging cannot be undone by subtraction: the rounding is lost. So a merged layer keeps the layer that it stands for,
out of sight of ``parameters()`` and ``state_dict()``, and ``unmerge_`` puts that back: the same objects, bit for bit.

A merged layer has no dropout, also in training mode: what dropped inputs of the adapter is gone with it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qloralab.nf4.linear import Adapted, QuantizedLinear
from qloralab.nf4.model import Model, parents_of, replace
from qloralab.nf4.product import linear
from qloralab.nf4.tensor import converted

from .layer import LoRALinear
from .merged_weight import merged_quantized, merged_weight


class MergedLinear(Adapted):
    """A linear layer whose weight has the adapter in it.

    Attributes:
        weight: [out_features, in_features], frozen, in the dtype that the layer multiplied in: ``compute_dtype`` of a
            quantized base, the weight's own of a dense one.
        bias: that of the base layer, or None.
        adapted: the layer that it stands for; no submodule.
    """

    bias: Tensor | None
    adapted: LoRALinear

    @torch.no_grad()
    def __init__(self, layer: LoRALinear):
        super().__init__()
        base = layer.base_layer
        vars(self).update(adapted=layer, base_layer=base)  # past nn.Module, which would make them submodules
        self.in_features, self.out_features = layer.in_features, layer.out_features
        adapter = layer.lora_A, layer.lora_B, layer.config.scaling
        if not isinstance(base, QuantizedLinear):
            merged, dtype = merged_weight(base.weight, *adapter), base.weight.dtype
        elif layer.merge_aware:
            merged, dtype = merged_quantized(base.weight, *adapter).dequantize(base.compute_dtype), base.compute_dtype
        else:
            merged, dtype = merged_weight(base.weight.dequantize(torch.float32), *adapter), base.compute_dtype
        self.weight = nn.Parameter(merged.to(dtype), requires_grad=False)
        self.register_parameter("bias", base.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in the dtypes of the layer before it was merged.

        Raises:
            RuntimeError: the weight was made to train, or x has another width.
        """
        if self.weight.requires_grad:
            raise RuntimeError(f"{self.adapted.name} is merged and does not train; unmerge_ the model first")
        if not isinstance(self.base_layer, QuantizedLinear):
            return F.linear(x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return linear(converted(x, self.weight.dtype), self.weight, bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, merged, r={self.adapted.config.r}"


def merge_(model: Model) -> Model:
    """Merge the adapters of a model into the weights beside them, in place; ``unmerge_`` undoes it.

    ``save_pretrained`` of a merged model of transformers writes a plain dense model, where no layer is left in 4 bits.

    Args:
        model: with adapters, from ``inject_`` or ``load_adapter_``. A layer at several paths is merged once.

    Returns:
        the model. Its state dict is that of a dense model without adapters; nothing of what was merged trains.

    Raises:
        ValueError: the model has no adapters, is merged already, is itself a layer with an adapter, or an adapter is on
            the meta device or sharded. The model is unchanged then.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    if is_merged(model):
        raise ValueError("the model is merged already; unmerge_ it first")
    if not layers:
        raise ValueError("the model has no adapters to merge; inject_ or load_adapter_ them first")
    for layer in layers:
        if layer is model:
            raise ValueError("the model is itself a layer with an adapter, which cannot be replaced in place")
        if layer.lora_A.is_meta or layer.base_layer.weight.device.type == "meta":
            raise ValueError(f"{layer.name} is on the meta device: there are no values to merge")
        if hasattr(layer.lora_A, "full_tensor") or layer.lora_A.dim() != 2:
            raise ValueError(f"{layer.name}: its adapter is sharded; gather it before merging")
    parents = parents_of(model)
    for layer in layers:
        replace(parents[layer], layer, MergedLinear(layer).train(layer.training))
    return model


def unmerge_(model: Model) -> Model:
    """Put the layers back that ``merge_`` has replaced, in place: base weights and adapters with the bits that they
    had, on the device that the model is on now. What was done to the merged weights is dropped.

    Returns:
        the model. Parameters are the objects that they were before ``merge_``, so an optimizer of them goes on.

    Raises:
        ValueError: the model is not merged.
    """
    merged = [module for module in model.modules() if isinstance(module, MergedLinear)]
    if not merged:
        raise ValueError("the model is not merged")
    parents = parents_of(model)
    for layer in merged:
        adapted = layer.adapted.train(layer.training)
        if adapted.lora_A.device != layer.weight.device:
            adapted.to(layer.weight.device)
        replace(parents[layer], layer, adapted)
    return model


def is_merged(model: nn.Module) -> bool:
    """Whether ``merge_`` has replaced layers of a model."""
    return any(isinstance(module, MergedLinear) for module in model.modules())
