"""The adapter beside one linear layer (LoRA, arXiv 2106.09685; QLoRA, equation 5).

    y = base(x) + scaling * B A dropout(x)          A [r, in], B [out, r]

A starts Kaiming-uniform or Gaussian and B at zero, so that training starts from the base model. A and B are float32,
because their updates are small against their values; the products are taken in the dtype of the layer's output, usually
bfloat16. PEFT takes them in float32 instead and so copies each input to float32.

On a quantized base, all of it is one operator, ``adapted_linear`` of ``ops.py``; the base's own ``forward`` does
not run. On a dense base the gradients are written out here in the same way: backward keeps the input itself, which
others keep too, and not a second, dropped-out one.

Dropout is a function of a seed (see ``dropout.py``). The seed is drawn for each call from torch's default
generator, so that gradient checkpointing draws it again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qloralab.nf4.linear import Adapted, Linear, QuantizedLinear
from qloralab.nf4.product import addmm, matmul, reshaped, rows
from qloralab.nf4.tensor import converted

from . import ops
from .config import LoraConfig
from .merge_aware import MergeAware


class LoRALinear(Adapted):
    """A frozen linear layer and its trainable adapter.

    Attributes:
        base_layer: the wrapped layer, dense or quantized.
        lora_A: float32 [r, in_features], trainable.
        lora_B: float32 [out_features, r], trainable.
        config: the config it was made from.
        name: of the layer, for error messages.
        merge_aware: compute with the merged weight in 4 bits (``merge_aware.py``); on a quantized base alone.
    """

    merge_aware: bool = False

    def __init__(self, base_layer: Linear, config: LoraConfig, name: str = "layer"):
        super().__init__()
        self.base_layer = base_layer
        self.config = config
        self.name = name
        self.in_features = base_layer.in_features
        self.out_features = base_layer.out_features
        device = base_layer.weight.device
        self.lora_A = nn.Parameter(torch.empty(config.r, self.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, config.r, dtype=torch.float32, device=device))
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / config.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def weight(self):
        """The dtype, device and shape of the base layer's weight, which some models look at.

        To multiply by it would pass by the adapter, so that raises RuntimeError. ``base_layer.weight`` has the values.
        """
        weight = self.base_layer.weight
        if not isinstance(weight, Tensor) or torch.compiler.is_compiling():
            return weight
        return _Description(weight, self.name)

    @property
    def bias(self):
        """The bias of the base layer."""
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in the dtype of the base layer's output.

        Raises:
            ValueError: x has another width (a quantized base; a dense one raises RuntimeError).
        """
        p = self.config.lora_dropout if self.training else 0.0
        seed = _draw_seed(x.device) if p else None
        base = self.base_layer
        if isinstance(base, QuantizedLinear):
            return self._on_quantized(base, x, p, seed)
        y = base(x)
        A, B = self.lora_A.to(y.dtype), self.lora_B.to(y.dtype)
        return _AddLowRank.apply(y, x.to(y.dtype), A, B, self.config.scaling, p, seed)

    def _on_quantized(self, base: QuantizedLinear, x: Tensor, p: float, seed: Tensor | None) -> Tensor:
        A, B, bias, dtype = self.lora_A, self.lora_B, base.bias, base.compute_dtype
        if x.shape[-1:] != A.shape[1:]:
            raise ValueError(f"x is {list(x.shape)}; the layer takes [..., {self.in_features}]")
        bias = None if bias is None else bias.to(dtype)  # the model may have been cast since
        like, x, scaling = x.dtype, converted(x, dtype), self.config.scaling
        if self.merge_aware:
            y: Tensor = MergeAware.apply(x, A, B, bias, base.weight, scaling)  # pyright: ignore[reportAssignmentType]
        else:
            y, _ = ops.adapted_linear(x, *base.weight.operands(), bias, A, B, scaling, p, seed)
        return y if dtype == like else y.to(like)

    def extra_repr(self) -> str:
        aware = ", merge-aware" if self.merge_aware else ""
        return f"r={self.config.r}, scaling={self.config.scaling:g}, dropout={self.config.lora_dropout:g}{aware}"


class _Description(Tensor):
    """A tensor with the dtype, device and shape of another, and no values."""

    path: str

    @staticmethod
    def __new__(cls, like: Tensor, name: str):
        made = Tensor._make_wrapper_subclass(cls, like.shape, like.stride(), dtype=like.dtype, device=like.device)
        made.path = name
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        name = next(leaf.path for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))
        raise RuntimeError(
            f"{name} has an adapter, and its weight is used without it ({func}); call the layer, leave it out of "
            "target_modules, or read base_layer.weight"
        )


def _draw_seed(device: torch.device) -> Tensor:
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


class _AddLowRank(torch.autograd.Function):
    """y + scaling * dropout(x) A' B'. y [..., N], x [..., K], A [r, K], B [N, r] -> [..., N]; all of one dtype."""

    @staticmethod
    def forward(
        ctx, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float, p: float, seed: Tensor | None
    ) -> Tensor:
        h = matmul(rows(_dropped(x, seed, p)), A.T)  # [tokens, r]
        ctx.save_for_backward(x, A, B, h, seed)
        ctx.scaling, ctx.p = scaling, p
        return reshaped(addmm(rows(y), h, B.T, alpha=scaling), y.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy,) = grads
        x, A, B, h, seed = ctx.saved_tensors
        grad = rows(dy)
        G = matmul(grad, B).mul_(ctx.scaling)
        dB = matmul(grad.T, h).mul_(ctx.scaling)
        dA = matmul(G.T, rows(_dropped(x, seed, ctx.p)))
        dx = _dropped(matmul(G, A).view(x.shape), seed, ctx.p) if ctx.needs_input_grad[1] else None
        return dy, dx, dA, dB, None, None, None


def _dropped(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    return x if seed is None else ops.dropout(x, seed, p)
