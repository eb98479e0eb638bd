"""A linear layer whose frozen weight is held in 4 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .files import bitsandbytes_layout
from .files.errors import FormatError
from .processor import compute_dtype as dtype_of
from .tensor import QuantizedTensor, converted, linear


class QuantizedLinear(nn.Module):
    """``nn.Linear`` with a ``QuantizedTensor`` as its weight. The weight does not train; gradients flow to the input.

    Its state dict holds the weight as bitsandbytes' ``Linear4bit`` does (``files/bitsandbytes_layout.py``). Moves
    between devices carry the weight along; conversions of the dtype (``module.half()``) leave it as it is.

    PEFT adapts it when its config is told how, ``config._register_custom_module({QuantizedLinear: lora.Linear})`` with
    ``peft.tuners.lora``, but cannot merge.

    Attributes:
        weight: [out_features, in_features]. Layers for which ``quantize_`` made one weight go on sharing it when they
            are moved, copied or loaded, as layers that share an ``nn.Parameter`` do.
        bias: in compute_dtype, or None.
        compute_dtype: the dtype of the product. The input is converted to it, the output back.
        follows_device: whether compute_dtype was left open. Then it is what the weight's device multiplies in hardware
            (``nf4/processor.py``), also after the layer has moved to another one.
    """

    bias: Tensor | None

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None = None, compute_dtype: torch.dtype | None = None):
        super().__init__()
        self._shared = [weight]  # one list for all layers that share the weight
        self.follows_device = compute_dtype is None
        self.compute_dtype = compute_dtype or dtype_of(weight.device).dtype
        self.out_features, self.in_features = weight.shape
        frozen = None if bias is None else nn.Parameter(bias.detach().to(self.compute_dtype), requires_grad=False)
        self.register_parameter("bias", frozen)

    @property
    def weight(self) -> QuantizedTensor:
        return self._shared[0]

    @weight.setter
    def weight(self, weight: QuantizedTensor) -> None:
        self._shared = [weight]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in the dtype of x."""
        bias, dtype = self.bias, self.compute_dtype
        bias = None if bias is None else bias.to(dtype)  # the model may have been cast since
        y = linear(converted(x, dtype), self.weight, bias)
        return y if x.dtype == dtype else y.to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.weight.codebook}, block_size={self.weight.block_size}, double_quant={self.weight.double_quant}"
        )

    def _apply(self, fn, recurse: bool = True):
        self._set_weight(self.weight.map(fn))
        return super()._apply(fn, recurse)

    def _set_weight(self, weight: QuantizedTensor) -> None:
        self._shared[0] = weight
        if self.follows_device:
            self.compute_dtype = dtype_of(weight.device).dtype

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(self.weight.stored(f"{prefix}weight"))

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        name = f"{prefix}weight"
        ours = set(bitsandbytes_layout.names(state_dict, name))
        rest = {key: value for key, value in state_dict.items() if key not in ours}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if not ours:
            missing_keys.append(name)
            return
        try:
            weight = QuantizedTensor.from_bitsandbytes(state_dict, name)
        except FormatError as error:
            error_msgs.append(str(error))
            return
        found, expected = list(weight.shape), list(self.weight.shape)
        if found != expected:
            error_msgs.append(f"{name} is {found} in the checkpoint; the layer is {expected}")
            return
        if not local_metadata.get("assign_to_params_buffers", False):
            weight = weight.to(self.weight.device).clone()  # as copy_ does, which parameters are loaded by
        self._set_weight(weight)


Linear = nn.Linear | QuantizedLinear


class Adapted(nn.Module):
    """A module that a model calls instead of a linear layer, which it holds and adds to, as ``lora/layer.py`` does."""

    base_layer: Linear
