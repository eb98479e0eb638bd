"""The figures of every layer: what lies in the file, how normal it is, what each data type makes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qloralab.nf4.data_type import DataType
from qloralab.nf4.tensor import QuantizedTensor, quantize

from ..errors import UserError
from .run_model import Runner
from .statistics import (
    Block,
    Codes,
    Distribution,
    blocks_absmax,
    codes_of,
    distribution,
    largest_blocks,
    relative_error,
)
from .weights import Weight, Weights

BLOCKS = 5  # that are listed for a layer
_BLOCK_SIZE = 64  # of the blocks that are listed for a dense weight


@dataclass(frozen=True)
class Quantized:
    """A weight in a data type.

    Attributes:
        bits: per parameter, as they would be stored: codes without gaps, scales in their encoding.
        codes: their histogram and entropy.
        error: relative squared error of the weight; None where the dense weight is not at hand.
        output_error: relative squared error of the layer's output on the text; None where it was not asked for.
    """

    bits: float
    codes: Codes
    error: float | None
    output_error: float | None = None


@dataclass(frozen=True)
class Layer:
    """The figures of a layer.

    Attributes:
        name: its path.
        shape: of its weight, [out, in].
        stored: what the file holds it in.
        bits: per parameter, in the file; None where that is unknown.
        distribution: of the dense weight; None where that is not at hand.
        block_size: of the blocks.
        largest_blocks: whose largest magnitude stands out.
        quantized: by data type; of a weight that lies in 4 bits, that alone.
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    bits: float | None
    distribution: Distribution | None
    block_size: int
    largest_blocks: list[Block]
    quantized: dict[str, Quantized] = field(default_factory=dict)


def inspect_layers(
    weights: Weights,
    data_types: Sequence[DataType],
    base: Weights | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Layer]:
    """The figures of every layer, one weight in memory at a time.

    Args:
        weights: of a model.
        data_types: that dense weights are quantized to.
        base: the dense model of weights in 4 bits, that errors are taken from.
        progress: called after each weight.

    Raises:
        UserError: a weight cannot be quantized, or is not that of the base.
    """
    found = []
    for done, weight in enumerate(weights, 1):
        found.append(_layer(weight, data_types, base))
        if progress:
            progress(done, len(weights))
    return found


def _layer(weight: Weight, data_types: Sequence[DataType], base: Weights | None) -> Layer:
    tensor, shape = weight.tensor, tuple(weight.tensor.shape)
    if isinstance(tensor, QuantizedTensor):
        dense = None if base is None else dense_of(base, weight.layer, shape)
        error = None if dense is None else relative_error(tensor.dequantize(torch.float32), dense)
        quantized = {tensor.codebook: Quantized(tensor.ideal_bits_per_parameter, codes_of(tensor), error)}
        absmax, block_size = tensor.absmax(), tensor.block_size
    else:
        dense = tensor.float()
        quantized = {kind.name: _quantized(tensor, dense, kind, weight.layer) for kind in data_types}
        absmax, block_size = blocks_absmax(dense, _BLOCK_SIZE), _BLOCK_SIZE
    return Layer(
        weight.layer,
        shape,
        weight.stored,
        weight.bits,
        None if dense is None else distribution(dense),
        block_size,
        largest_blocks(absmax, BLOCKS),
        quantized,
    )


def dense_of(base: Weights, layer: str, shape: tuple[int, ...]) -> Tensor:
    """The dense weight that a weight in 4 bits was made of, float32.

    Raises:
        UserError: the base has no such layer, or not of that shape.
    """
    if layer not in base.layers:
        raise UserError(f"--base {base.path} has no linear layer {layer}")
    dense = base[layer].dense()
    if tuple(dense.shape) != shape:
        raise UserError(f"--base {base.path}: {layer} is {list(dense.shape)}; in 4 bits it is {list(shape)}")
    return dense


def _quantized(tensor: Tensor, dense: Tensor, kind: DataType, layer: str) -> Quantized:
    try:
        made = quantize(tensor, kind, name=f"{layer}.weight")
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    return Quantized(
        made.ideal_bits_per_parameter, codes_of(made), relative_error(made.dequantize(torch.float32), dense)
    )


def with_output_errors(
    found: Sequence[Layer],
    runner: Runner,
    layers: Mapping[str, nn.Linear],
    low: Mapping[str, Callable[[str, Tensor], Tensor]],
    progress: Callable[[int, int], None] | None = None,
) -> list[Layer]:
    """The figures with ``|X W' - X W|**2 / |X W|**2``, in float32, X what the layers of a dense model see.

    Args:
        found: the figures so far.
        runner: the dense model and the text.
        layers: of the model, by path.
        low: by data type, ``low(path, dense weight)`` gives the 4-bit weight back as float32.
        progress: called after each layer.
    """

    def products(path: str, weight: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
        made = {name: of(path, weight) for name, of in low.items()}
        return {name: lambda x, w=w: F.linear(x, w) for name, w in made.items()}

    errors = runner.output_errors(layers, F.linear, products, progress)

    def with_error(layer: Layer) -> Layer:
        quantized = {
            name: dataclasses.replace(one, output_error=errors.get(name, {}).get(layer.name))
            for name, one in layer.quantized.items()
        }
        return dataclasses.replace(layer, quantized=quantized)

    return [with_error(layer) for layer in found]
