"""What survives of an adapter when the merged weight is quantized again.

An update is small against the steps of a 4-bit codebook. Added to dequantized weights, which lie on values of the
codebook, it moves next to no code. Added to the original weights, which lie anywhere between two values, it moves few
codes by a whole step each: far from what was asked for, weight by weight, and yet all of it in the sum.

With D = scaling * B A, which is wanted, and S = W4' - W', which is left of it (W' the base, W4' the merged weight, both
dequantized):

    codes changed     share of the codes of W4' that are not those of W'
    kept              <D, S> / |D|**2               how much of D there is in S; the rest of S is noise beside it
    cosine            <D, S> / (|D| |S|)             1: the update as it was meant; 0: nothing of it
    norm ratio        |S| / |D|                      above 1 where steps are larger than what was asked for
    output error      |X (S - D)'|**2 / |X (W' + D)'|**2         X: what the layer sees on a text, base and adapter
    update error      |X (S - D)'|**2 / |X D'|**2                the same against the adapter's own output: 1 is as
                                                                 far from it as leaving the adapter out

Sums are in float64. Over all layers the sums are added, then divided.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qloralab.lora.inject import adapters
from qloralab.lora.layer import LoRALinear
from qloralab.lora.merged_weight import merged_quantized
from qloralab.nf4.linear import QuantizedLinear
from qloralab.nf4.tensor import QuantizedTensor

from ..data.encoding import Encoded
from ..inspection.statistics import ratio


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Sums of squares over the outputs of a layer: of the error, of the output, and of the adapter's part of it."""

    error: float
    output: float
    update: float


@dataclasses.dataclass(frozen=True)
class Survival:
    """What survives in one layer, or in all of them.

    Attributes:
        layer: its path.
        weights: how many it has.
        changed: of their codes.
        wanted, surviving, product: |D|**2, |S|**2 and <D, S>.
        outputs: None where no text was read.
    """

    layer: str
    weights: int
    changed: int
    wanted: float
    surviving: float
    product: float
    outputs: Outputs | None = None

    @property
    def cosine(self) -> float:
        """1 where nothing is wanted and nothing is left; 0 where only one of them is."""
        if self.wanted == 0 or self.surviving == 0:
            return float(self.wanted == self.surviving)
        return self.product / math.sqrt(self.wanted * self.surviving)

    @property
    def kept(self) -> float:
        """1 where nothing is wanted."""
        return self.product / self.wanted if self.wanted else 1.0

    @property
    def norm_ratio(self) -> float:
        return math.sqrt(ratio(self.surviving, self.wanted))

    @property
    def codes_changed(self) -> float:
        return self.changed / self.weights

    @property
    def output_error(self) -> float | None:
        return None if self.outputs is None else ratio(self.outputs.error, self.outputs.output)

    @property
    def update_error(self) -> float | None:
        return None if self.outputs is None else ratio(self.outputs.error, self.outputs.update)

    def as_json(self) -> dict[str, Any]:
        """The figures; None for one that is infinite."""
        names = ("codes_changed", "kept", "cosine", "norm_ratio", "output_error", "update_error")
        found = {name: getattr(self, name) for name in names}
        found = {name: value if value is None or math.isfinite(value) else None for name, value in found.items()}
        return {"layer": self.layer, "weights": self.weights, **found}


def survival(layer: str, base: QuantizedTensor, merged: QuantizedTensor, delta: Tensor) -> Survival:
    """What survives in a layer.

    Args:
        layer: its path.
        base, merged: [out, in], in the same data type.
        delta: scaling * B A, float32 [out, in].
    """
    left = merged.dequantize(torch.float32).sub_(base.dequantize(torch.float32))

    def dot(a: Tensor, b: Tensor) -> float:
        return float((a * b).sum(dtype=torch.float64))

    changed = int((merged.codes() != base.codes()).sum())
    return Survival(layer, base.numel(), changed, dot(delta, delta), dot(left, left), dot(delta, left))


def overall(found: Sequence[Survival]) -> Survival:
    """All layers together."""
    outputs = [one.outputs for one in found if one.outputs is not None]
    sums = (sum(getattr(one, name) for one in outputs) for name in ("error", "output", "update"))
    names = ("weights", "changed", "wanted", "surviving", "product")
    fields = {name: sum(getattr(one, name) for one in found) for name in names}
    return Survival("all layers", **fields, outputs=Outputs(*sums) if outputs else None)


@torch.no_grad()
def outputs(
    model: nn.Module, texts: Sequence[Encoded], progress: Callable[[int, int], None] | None = None
) -> dict[str, Outputs]:
    """The sums over the outputs of the layers that have an adapter beside a weight in 4 bits.

    Args:
        model: a causal language model with adapters, on the device that it computes on; base and adapter run as they
            are, so each layer sees what it would see.
        texts: what it reads, one after the other.
        progress: called after each layer of each text.
    """
    layers = {name: layer for name, layer in adapters(model).items() if isinstance(layer.base_layer, QuantizedLinear)}
    found = {name: Outputs(0.0, 0.0, 0.0) for name in layers}
    done = 0

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: LoRALinear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal done
            assert isinstance(layer.base_layer, QuantizedLinear)
            x = inputs[0].flatten(0, -2).float()  # [tokens, in]
            base = layer.base_layer.weight
            merged = merged_quantized(base, layer.lora_A, layer.lora_B, layer.config.scaling)
            update = x @ layer.lora_A.T @ layer.lora_B.T * layer.config.scaling
            exact = x @ base.dequantize(torch.float32).T + update
            error = x @ merged.dequantize(torch.float32).T - exact
            sums = [float(y.square().sum(dtype=torch.float64)) for y in (error, exact, update)]
            before = dataclasses.astuple(found[name])
            found[name] = Outputs(*(a + b for a, b in zip(before, sums, strict=True)))
            done += 1
            if progress:
                progress(done, len(layers) * len(texts))

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    device = next(model.parameters()).device
    try:
        for text in texts:
            model(input_ids=torch.tensor([text.input_ids], device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found
