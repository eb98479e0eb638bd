"""What ``benchmarks/cpu.py`` asks of every provider: an operation, a weight in each form, the right answer.

All operations but quantize start from the same codes and scales, those of the definition in plain PyTorch:
bitsandbytes loads them, and a dense weight is the dequantized one, rounded to the dtype of the product. So all have one
right answer, computed in float64, and providers differ in time only.

The adapted layer is a layer in training, both ways: forward, then the gradients of x, A and B, with dropout. A dense
layer beside it has no adapter: forward and the gradient of x.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import qloralab as ql
from benchmarks import peer
from benchmarks.timing import copies
from qloralab.lora.dropout import keep_mask, rate
from qloralab.nf4 import blockwise, processor
from qloralab.nf4.codebook import codebook_values
from qloralab.nf4.double_quant import dequantize_scales, quantize_scales

OPERATIONS = ("dequantize", "quantize", "linear", "input gradient", "adapted layer")
COMPUTE = processor.compute_dtype("cpu").dtype  # in which this machine multiplies
EMULATED = processor.emulates(torch.empty(0, dtype=torch.bfloat16))  # PyTorch's products in bfloat16
BLOCK_SIZE = 64
SCALE = 0.02  # of the weights, about that of a trained model's
ADAPTER = ql.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05)
SEED = 2  # torch's, before an adapted layer whose result is checked: its dropout draws one


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
        self.exact = definition_of_dequantize(self.quantized)
        self._dense: dict[torch.dtype, list[Tensor]] = {}

    def dequantized(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """What the codes and scales stand for, rounded to a dtype."""
        return self.exact.to(dtype)

    def dense(self, dtype: torch.dtype) -> list[Tensor]:
        """The dequantized weight."""
        if dtype not in self._dense:
            one = self.dequantized(dtype)
            self._dense[dtype] = [one.clone() for _ in range(copies(one.nbytes))]
        return self._dense[dtype]

    @cached_property
    def originals(self) -> list[Tensor]:
        """What quantize takes."""
        return [self.original.clone() for _ in range(copies(self.original.nbytes))]

    @cached_property
    def packed(self) -> list[ql.QuantizedTensor]:
        """The quantized weight as this library holds it."""
        return [self.quantized.map(torch.clone) for _ in range(copies(self.quantized.nbytes))]

    @cached_property
    def training_layers(self) -> list[peer.Linear4bit]:
        """The quantized weight as bitsandbytes holds it, in the dtype that this machine multiplies."""
        return [peer.layer(self.quantized, COMPUTE).train() for _ in range(copies(self.quantized.nbytes))]

    @cached_property
    def evaluation_layers(self) -> list[peer.Linear4bit]:
        """The same; the first forward rearranges it."""
        return [peer.layer(self.quantized, COMPUTE).eval() for _ in range(copies(self.quantized.nbytes))]

    @cached_property
    def adapter(self) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [N, r] in the midst of training, float32."""
        generator = torch.Generator().manual_seed(3)
        N, K = self.shape
        A, B = (torch.randn(size, generator=generator) for size in ((ADAPTER.r, K), (N, ADAPTER.r)))
        return A / K**0.5, B * SCALE


@dataclass(frozen=True)
class Problem:
    """One operation on one weight.

    Attributes:
        operation: one of OPERATIONS.
        weight: [N, K].
        M: rows of the input (of the gradient), or None where there is none.
        dtype: of the input and the gradient; of what dequantize gives.
    """

    operation: str
    weight: Weight
    M: int | None = None
    dtype: torch.dtype = torch.bfloat16

    @cached_property
    def x(self) -> Tensor:
        """The input, N(0, 1) [M, K]."""
        return self._random(self.weight.shape[1], seed=1)

    @cached_property
    def gradient(self) -> Tensor:
        """Of the output, N(0, 1) [M, N]."""
        return self._random(self.weight.shape[0], seed=4)

    def _random(self, width: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.M or 0, width, generator=generator).to(self.dtype)

    @cached_property
    def dense(self) -> tuple[Tensor, ...]:
        """The right answer without an adapter, float64; of an adapted layer y and the gradient of x.

        Of quantize it is the original weight, which codes and scales are to stand for.
        """
        if self.operation == "quantize":
            return (self.weight.original.double(),)
        W = self.weight.dequantized(self.dtype).double()
        match self.operation:
            case "dequantize":
                return (W,)
            case "linear":
                return (self.x.double() @ W.T,)
            case "input gradient":
                return (self.gradient.double() @ W,)
            case _:
                return self.x.double() @ W.T, self.gradient.double() @ W

    @cached_property
    def expected(self) -> tuple[Tensor, ...]:
        """The right answer, float64; of an adapted layer y and the gradients of x, A and B. See ``lora/ops.py``."""
        if self.operation != "adapted layer":
            return self.dense
        y, dx = self.dense
        x, dy, A, B = (part.double() for part in (self.x, self.gradient, *self.weight.adapter))
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            seed = torch.randint(2**63 - 1, (), dtype=torch.int64)
        p = ADAPTER.lora_dropout
        keep = keep_mask(seed, len(x), x.shape[1], p) / (1 - rate(p))
        h = ADAPTER.scaling * (x * keep) @ A.T
        G = ADAPTER.scaling * dy @ B
        return y + h @ B.T, dx + keep * (G @ A), G.T @ (x * keep), dy.T @ h

    @property
    def terms(self) -> tuple[int, ...]:
        """How many products are added up in each part of the right answer, one sum inside another counted too."""
        (N, K), M, r = self.weight.shape, self.M or 0, ADAPTER.r
        match self.operation:
            case "linear":
                return (K,)
            case "input gradient":
                return (N,)
            case _:
                return K + r, N + r, N + M, K + M

    def work(self, dense: bool) -> tuple[int, int]:
        """The least that a provider with a dense or a packed weight has to do: bytes moved, floating-point operations.

        A multiplication and an addition count as two. Dequantization's arithmetic is not counted, nor dropout's.
        """
        N, K = self.weight.shape
        full, packed = N * K * self.dtype.itemsize, self.weight.quantized.nbytes
        if self.M is None:
            return full + (full if dense else packed), 0
        one_way = (full if dense else packed) + self.dtype.itemsize * self.M * (N + K), 2 * self.M * N * K
        if self.operation != "adapted layer":
            return one_way
        adapter = 0 if dense else ADAPTER.r * (N + K)  # numbers, float32: read each way, their gradients written
        return 2 * one_way[0] + 3 * 4 * adapter, 2 * one_way[1] + 3 * 2 * self.M * adapter


def definition_of_quantize(weight: Tensor) -> ql.QuantizedTensor:
    """``ql.quantize`` by the functions that define it, whatever serves the operators."""
    values = codebook_values("nf4")
    packed, absmax = blockwise.quantize_blockwise(weight, values, BLOCK_SIZE)
    scales, absmax2, offset = quantize_scales(absmax)
    return ql.QuantizedTensor(
        packed, scales, absmax2, offset, values, weight.shape, weight.dtype, codebook="nf4", block_size=BLOCK_SIZE
    )


def definition_of_dequantize(weight: ql.QuantizedTensor) -> Tensor:
    """``QuantizedTensor.dequantize`` of double-quantized weights, in float32, by the functions that define it."""
    assert weight.absmax2 is not None
    assert weight.offset is not None
    absmax = dequantize_scales(weight.scales, weight.absmax2, weight.offset)
    flat = blockwise.dequantize_blockwise(weight.packed, absmax, weight.values, weight.block_size, weight.numel())
    return flat.view(weight.shape)
