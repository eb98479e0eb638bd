"""The adapter beside one linear layer (LoRA, arXiv 2106.09685; QLoRA, equation 5).

    y = base(x) + scaling * B A dropout(x)          A [r, in], B [out, r]

A starts Kaiming-uniform and B at zero, so that training starts from the base model. A and B are float32, because
their updates are small against their values; the products are taken in the dtype of the layer's output, usually
bfloat16. PEFT takes them in float32 instead and so copies each input to float32.

The gradients are written out, so that backward keeps the input itself, which others keep too, and not a second,
dropped-out one::

    h  = dropout(x) A'                              [tokens, r]       kept
    dB = scaling * dy' h
    dh = scaling * dy B
    dA = dh' dropout(x)                             dropped again, at the same positions
    dx = dropout'(dh A)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import LoraConfig
from .dropout import draw_positions, drop
from .quantized_linear import QuantizedLinear

Linear = nn.Linear | QuantizedLinear


class LoRALinear(nn.Module):
    """A frozen linear layer and its trainable adapter.

    Attributes:
        base_layer: the wrapped layer, dense or quantized.
        lora_A: float32 [r, in_features], trainable.
        lora_B: float32 [out_features, r], trainable.
        config: the config it was made from.
    """

    def __init__(self, base_layer: Linear, config: LoraConfig):
        super().__init__()
        self.base_layer = base_layer
        self.config = config
        self.in_features = base_layer.in_features
        self.out_features = base_layer.out_features
        device = base_layer.weight.device
        self.lora_A = nn.Parameter(torch.empty(config.r, self.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, config.r, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @classmethod
    def from_base(cls, base_layer: Linear, config: LoraConfig, name: str = "layer") -> LoRALinear:
        """Wrap a layer and freeze it.

        Raises:
            ValueError: r is larger than the layer; the message has its name.
        """
        check_rank(base_layer, config, name)
        base_layer.requires_grad_(False)
        return cls(base_layer, config)

    @property
    def weight(self):
        """The weight of the base layer: some models look at its dtype or device."""
        return self.base_layer.weight

    @property
    def bias(self):
        """The bias of the base layer."""
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in the dtype of the base layer's output."""
        y = self.base_layer(x)
        p = self.config.lora_dropout if self.training else 0.0
        dtype = getattr(self.base_layer, "compute_dtype", y.dtype)
        A, B = self.lora_A.to(dtype), self.lora_B.to(dtype)
        return _AddLowRank.apply(y, x.to(dtype), A, B, self.config.scaling, p)

    def extra_repr(self) -> str:
        return f"r={self.config.r}, scaling={self.config.scaling:g}, dropout={self.config.lora_dropout:g}"


def check_rank(layer: Linear, config: LoraConfig, name: str) -> None:
    """Raise ValueError when the rank of a config is larger than a layer."""
    smallest = min(layer.in_features, layer.out_features)
    if config.r > smallest:
        shape = f"{layer.out_features} x {layer.in_features}"
        raise ValueError(f"r is {config.r}, larger than {name} ({shape}); its adapter can have at most r = {smallest}")


class _AddLowRank(torch.autograd.Function):
    """y + scaling * dropout(x) A' B'. y [..., N], x [..., K], A [r, K], B [N, r] -> [..., N] in the dtype of y."""

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float, p: float) -> Tensor:
        positions = draw_positions(x.numel(), p, x.device) if p else None
        h = _rows(_dropped(x, positions, p)) @ A.T  # [tokens, r]
        if positions is not None and x.numel() < 2**31:
            positions = positions.int()  # half the memory until backward
        ctx.save_for_backward(x, A, B, h, positions)
        ctx.scaling, ctx.p = scaling, p
        return torch.addmm(_rows(y), h.to(y.dtype), B.T.to(y.dtype), alpha=scaling).view(y.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy,) = grads
        x, A, B, h, positions = ctx.saved_tensors
        positions = None if positions is None else positions.long()
        grad = _rows(dy).to(x.dtype)
        dh = (grad @ B).mul_(ctx.scaling)
        dB = (grad.T @ h).mul_(ctx.scaling)
        dA = dh.T @ _rows(_dropped(x, positions, ctx.p))
        dx = _dropped((dh @ A).view(x.shape), positions, ctx.p) if ctx.needs_input_grad[1] else None
        return dy, dx, dA, dB, None, None


def _dropped(x: Tensor, positions: Tensor | None, p: float) -> Tensor:
    return x if positions is None else drop(x, positions, p)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
