"""What ``benchmarks/cpu.py`` asks of every provider: an operation, a weight in each form, the right answer.

All operations but quantize start from the same codes and scales, those of the definition in plain PyTorch:
bitsandbytes loads them, and the bfloat16 weight is the dequantized one. So all have one right answer, computed in
float64, and providers differ in time only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import qloralab as ql
from benchmarks import peer
from benchmarks.timing import copies
from qloralab.nf4 import blockwise, double
from qloralab.nf4.codebook import codebook_values

OPERATIONS = ("dequantize", "quantize", "linear", "input gradient")
BLOCK_SIZE = 64
SCALE = 0.02  # of the weights, about that of a trained model's


class Weight:
    """One weight, bfloat16 [N, K], in every form that a provider works on, each in copies to rotate over.

    Args:
        shape: (N, K).
    """

    def __init__(self, shape: tuple[int, int]):
        generator = torch.Generator().manual_seed(0)
        self.shape = shape
        self.original = (torch.randn(shape, generator=generator) * SCALE).bfloat16()
        self.quantized = definition_of_quantize(self.original)
        self.dequantized = definition_of_dequantize(self.quantized)

    @cached_property
    def originals(self) -> list[Tensor]:
        """What quantize takes."""
        return [self.original.clone() for _ in range(copies(self.original.nbytes))]

    @cached_property
    def dense(self) -> list[Tensor]:
        """The dequantized weight, bfloat16."""
        return [self.dequantized.clone() for _ in range(copies(self.dequantized.nbytes))]

    @cached_property
    def packed(self) -> list[ql.QuantizedTensor]:
        """The quantized weight as this library holds it."""
        return [self.quantized.map(torch.clone) for _ in range(copies(self.quantized.nbytes))]

    @cached_property
    def training_layers(self) -> list[peer.Linear4bit]:
        """The quantized weight as bitsandbytes holds it."""
        return [peer.layer(self.quantized).train() for _ in range(copies(self.quantized.nbytes))]

    @cached_property
    def evaluation_layers(self) -> list[peer.Linear4bit]:
        """The same; the first forward rearranges it."""
        return [peer.layer(self.quantized).eval() for _ in range(copies(self.quantized.nbytes))]


@dataclass(frozen=True)
class Problem:
    """One operation on one weight.

    Attributes:
        operation: one of OPERATIONS.
        weight: [N, K].
        M: rows of the input (of the gradient), or None where there is none.
    """

    operation: str
    weight: Weight
    M: int | None = None

    @cached_property
    def input(self) -> Tensor:
        """bfloat16, N(0, 1): x [M, K], or the gradient of the output [M, N]."""
        N, K = self.weight.shape
        generator = torch.Generator().manual_seed(1)
        width = N if self.operation == "input gradient" else K
        return torch.randn(self.M or 0, width, generator=generator).bfloat16()

    @cached_property
    def expected(self) -> Tensor:
        """The right answer, float64. Of quantize it is the original weight, which codes and scales are to stand for."""
        if self.operation == "quantize":
            return self.weight.original.double()
        weight = self.weight.dequantized.double()
        if self.operation == "dequantize":
            return weight
        return self.input.double() @ (weight if self.operation == "input gradient" else weight.T)

    def work(self, dense: bool) -> tuple[int, int]:
        """The least that a provider with a dense or a packed weight has to do: bytes moved, floating-point operations.

        A multiplication and an addition count as two. Dequantization's arithmetic is not counted.
        """
        N, K = self.weight.shape
        full, packed = self.weight.original.nbytes, self.weight.quantized.nbytes
        if self.M is None:
            return full + (full if dense else packed), 0
        return (full if dense else packed) + 2 * self.M * (N + K), 2 * self.M * N * K


def definition_of_quantize(weight: Tensor) -> ql.QuantizedTensor:
    """``ql.quantize`` by the functions that define it, whatever serves the operators."""
    values = codebook_values("nf4")
    packed, absmax = blockwise.quantize_blockwise(weight, values, BLOCK_SIZE)
    scales, absmax2, offset = double.quantize_scales(absmax)
    return ql.QuantizedTensor(
        packed, scales, absmax2, offset, values, weight.shape, weight.dtype, codebook="nf4", block_size=BLOCK_SIZE
    )


def definition_of_dequantize(weight: ql.QuantizedTensor) -> Tensor:
    """``QuantizedTensor.dequantize`` of double-quantized weights by the functions that define it."""
    assert weight.absmax2 is not None
    assert weight.offset is not None
    absmax = double.dequantize_scales(weight.scales, weight.absmax2, weight.offset)
    flat = blockwise.dequantize_blockwise(weight.packed, absmax, weight.values, weight.block_size, weight.numel())
    return flat.to(weight.dtype).view(weight.shape)
