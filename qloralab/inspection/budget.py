"""The error budget: which layers cause how much of the KL divergence, and which roundings.

**Layers.** A group of layers is quantized alone, and everything but it::

    alone      KL(dense, only this group quantized)
    saved      KL(dense, all quantized) - KL(dense, all but this group)

Were errors small and independent, KL would be quadratic in them and additive over groups: the sum of ``alone``, and
that of ``saved``, would be the whole. How far they are from it is stated. A sum of ``alone`` below the whole says that
errors reinforce each other on the way through the model; one above, that they saturate.

**Roundings.** Against float64 products of the dense weights (the sums of the linear layers; norms and attention are in
float32 throughout):

    codes        w' = value[code] * exact scale              the codebook alone
    scales       w' = w * (decoded scale / exact scale)      the encoding of the scales alone
    both         w' = value[code] * decoded scale            the data type
    float32      products in float32, of the weights of "both", against float64 products of the same
    bfloat16     the same, with x, w' and the result rounded to bfloat16 and the sum in float32, as tensor cores do
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qloralab.nf4.blockwise import divide, in_blocks
from qloralab.nf4.data_type import ENCODINGS, DataType
from qloralab.nf4.tensor import QuantizedTensor, quantize

from .run_model import Runner, Swapped, products
from .settings import By

Progress = Callable[[int, int], None]
ROUNDINGS = {
    "codes": "codes, exact scales",
    "scales": "scales, exact codes",
    "both": "codes and scales",
    "float32": "float32 products",
    "bfloat16": "bfloat16 products",
}


@dataclass(frozen=True)
class Part:
    """A group of layers.

    Attributes:
        group: what it is called.
        layers: that it has.
        weights: that they have.
        alone: KL with it quantized and nothing else, in nats a token.
        rest: KL with all quantized but it.
    """

    group: str
    layers: int
    weights: int
    alone: float
    rest: float


@dataclass(frozen=True)
class Budget:
    """Of which layers the KL divergence comes.

    Attributes:
        by: what the groups are.
        whole: KL with all layers quantized, in nats a token.
        parts: the groups.
    """

    by: By
    whole: float
    parts: list[Part]

    @property
    def sum_alone(self) -> float:
        return sum(part.alone for part in self.parts)

    @property
    def sum_saved(self) -> float:
        return sum(self.whole - part.rest for part in self.parts)


@dataclass(frozen=True)
class Rounding:
    """What one rounding causes.

    Attributes:
        name: one of ``ROUNDINGS``.
        kl: in nats a token.
        output_error: relative squared error of a layer's output, the mean over the layers.
        against: what both are taken from.
    """

    name: str
    kl: float
    output_error: float
    against: str


def groups(layers: Sequence[str], by: By) -> dict[str, list[str]]:
    """Layers that are quantized together.

    Args:
        layers: their paths.
        by: "module", each for itself; "block", those up to the first number in the path (``model.layers.3``); "kind",
            those with the same path behind it (``self_attn.q_proj``). A path without a number is a group.
    """
    found: dict[str, list[str]] = {}
    for path in layers:
        match = re.match(r"(.*?\.?\d+)\.(.*)", path)
        name = path if by == "module" or not match else match[1] if by == "block" else match[2]
        found.setdefault(name, []).append(path)
    return found


def error_budget(
    runner: Runner,
    layers: Mapping[str, nn.Linear],
    data_type: DataType,
    by: By = "block",
    progress: Progress | None = None,
) -> Budget:
    """The budget of the layers. The model is as it was afterwards, bit for bit.

    Args:
        runner: a dense model and a text.
        layers: to quantize, by path.
        data_type: to quantize to.
        by: see ``groups``.
        progress: called after each run of the model.

    Raises:
        ValueError: a weight cannot be quantized.
    """
    packed = _quantized(layers, data_type)

    def low(path: str, dense: Tensor) -> Tensor:
        return packed[path].dequantize(dense.dtype)

    grouped = groups(list(layers), by)
    total, done = 2 + 2 * len(grouped), 0

    def kl() -> float:
        nonlocal done
        found = runner.kl(runner.states(), reference)
        done += 1
        if progress:
            progress(done, total)
        return found

    reference = runner.states()
    alone: dict[str, float] = {}
    rest: dict[str, float] = {}
    with Swapped(layers) as swapped:
        for name, paths in grouped.items():
            swapped.put(low, paths)
            alone[name] = kl()
            swapped.restore(paths)
        swapped.put(low, layers)
        whole = kl()
        for name, paths in grouped.items():
            swapped.restore(paths)
            rest[name] = kl()
            swapped.put(low, paths)
    sizes = {name: sum(layers[path].weight.numel() for path in paths) for name, paths in grouped.items()}
    return Budget(by, whole, [Part(g, len(grouped[g]), sizes[g], alone[g], rest[g]) for g in grouped])


def rounding_budget(
    runner: Runner, layers: Mapping[str, nn.Linear], data_type: DataType, progress: Progress | None = None
) -> list[Rounding]:
    """The budget of the roundings, in the order of ``ROUNDINGS``. The model is as it was afterwards, bit for bit.

    Args:
        runner, layers, data_type: see ``error_budget``.
        progress: called after each run of the model.
    """
    weights = {name: _rounded(name, data_type) for name in ("codes", "scales", "both")}
    total, done = 8, 0  # runs: six for what the model says, two for what its layers say

    def told() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    def run(product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        with products(layers.values(), product):
            found = runner.states()
        told()
        return found

    dense, states = run(float64), dict[str, Tensor]()
    with Swapped(layers) as swapped:
        for name in weights:
            swapped.put(weights[name], layers)
            states[name] = run(float64)
        states["float32"], states["bfloat16"] = run(F.linear), run(bfloat16)
    outputs = _output_errors(runner, layers, weights, told)
    found = []
    for name in ROUNDINGS:
        is_product = name not in weights
        kl = runner.kl(states[name], states["both"] if is_product else dense, exact=True)
        error = sum(outputs[name].values()) / len(outputs[name])
        found.append(Rounding(name, kl, error, "float64 products of the same" if is_product else "the dense weights"))
    return found


def float64(x: Tensor, weight: Tensor) -> Tensor:
    """The product in float64."""
    return F.linear(x.double(), weight.double())


def bfloat16(x: Tensor, weight: Tensor) -> Tensor:
    """The product as hardware makes it in bfloat16: both sides and the result are rounded, the sum is float32."""
    return F.linear(x.bfloat16().float(), weight.bfloat16().float()).bfloat16().float()


Weights = Callable[[str, Tensor], Tensor]


def _rounded(name: str, data_type: DataType) -> Weights:
    """The weights of a row of the table, as a function of path and dense weight."""
    exact = dataclasses.replace(data_type, encoding="float32")
    kind = exact if name == "codes" else data_type

    def low(path: str, dense: Tensor) -> Tensor:
        if name == "scales":
            return scales_alone(dense, exact, data_type)
        return quantize(dense, kind, name=path).dequantize(torch.float32)

    return low


def scales_alone(weight: Tensor, exact: DataType, data_type: DataType) -> Tensor:
    """The weight with nothing rounded but its scales: ``w * (decoded scale / exact scale)``, float32.

    Args:
        weight: [N, K].
        exact: the data type with scales in float32.
        data_type: whose encoding of the scales it is.
    """
    encoding = ENCODINGS[data_type.encoding] if isinstance(data_type.encoding, str) else data_type.encoding
    scales = quantize(weight, exact).absmax()
    values = torch.ones(1) if data_type.values is None else data_type.values
    decoded = encoding.decoded(scales[None], values)[0]
    blocks = in_blocks(weight.float().flatten(), data_type.block_size)
    return (blocks * divide(decoded, scales)[:, None]).flatten()[: weight.numel()].view(weight.shape)


def _output_errors(
    runner: Runner, layers: Mapping[str, nn.Linear], weights: Mapping[str, Weights], told: Callable[[], None]
) -> dict[str, dict[str, float]]:
    """By rounding and layer. Products are compared with float64 products of the same 4-bit weights."""

    def of_weights(path: str, dense: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
        made = {name: low(path, dense) for name, low in weights.items()}
        return {name: lambda x, w=w: float64(x, w) for name, w in made.items()}

    def of_products(path: str, weight: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
        return {"float32": lambda x: F.linear(x, weight), "bfloat16": lambda x: bfloat16(x, weight)}

    found = runner.output_errors(layers, float64, of_weights)
    told()
    with Swapped(layers) as swapped:
        swapped.put(weights["both"], layers)
        found |= runner.output_errors(layers, float64, of_products)
    told()
    return found


def _quantized(layers: Mapping[str, nn.Linear], data_type: DataType) -> dict[str, QuantizedTensor]:
    return {path: quantize(layer.weight, data_type, name=path) for path, layer in layers.items()}
