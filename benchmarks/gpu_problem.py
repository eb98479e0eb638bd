"""What ``benchmarks/gpu.py`` asks of every provider: an operation, a weight in each form, the right answer.

All operations but quantize start from the codes and scales of the definition, so there is one right answer. Products
are checked on some rows of it, in float64: all rows of the largest would take longer than the measurement.

An adapted layer is a step of training: y = x W' + s (x A') B' forward, and the gradients of x, A and B from that of y;
"eager" is the same with every launch of it, as a program has it that captures no graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import qloralab as ql
from qloralab.nf4 import blockwise
from qloralab.nf4.codebook import codebook_values
from qloralab.nf4.double_quant import quantize_scales

OPERATIONS = ("dequantize", "quantize", "linear", "input gradient", "adapted layer", "adapted layer, eager")
BLOCK_SIZE = 64
RANK, SCALING = 16, 2.0  # of the adapter of an adapted layer, which has no dropout
SCALE = 0.02  # of the weights, about that of a trained model's
ROWS = 256  # of a product that are checked
FEWEST, MOST = 2, 32  # copies


class WrongResultError(Exception):
    """A result is not the operation's; the message says by how much."""


class Weight:
    """One weight, bfloat16 [N, K], in every form that a provider works on, each in copies to rotate over.

    Args:
        shape: (N, K).
        device: where it lies.
        cache: bytes of the device's last-level cache.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device, cache: int):
        generator = torch.Generator(device).manual_seed(0)
        self.shape, self.device, self.cache = shape, device, cache
        self.original = (torch.randn(shape, generator=generator, device=device) * SCALE).bfloat16()
        self.quantized = definition_of_quantize(self.original)
        self.dequantized = definition_of_dequantize(self.quantized)
        self._forms: dict[str, list[Any]] = {}

    def copies(self, form: str, make: Any, count: int) -> list[Any]:
        """At least ``count`` copies of a form, made by ``make()``; the first ``count`` of them."""
        made = self._forms.setdefault(form, [])
        made.extend(make() for _ in range(count - len(made)))
        return made[:count]


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
        return self._normal(1, self.M or 0, N if self.operation == "input gradient" else K).bfloat16()

    @cached_property
    def output_gradient(self) -> Tensor:
        """bfloat16 [M, N], N(0, 1): what goes backward through an adapted layer."""
        return self._normal(2, self.M or 0, self.weight.shape[0]).bfloat16()

    @cached_property
    def adapter(self) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [N, r] in float32, which train; their product is about as large as the weight."""
        N, K = self.weight.shape
        A, B = self._normal(3, RANK, K) * K**-0.5, self._normal(4, N, RANK) * (SCALE * K**0.5 / (SCALING * RANK**0.5))
        return A.requires_grad_(), B.requires_grad_()

    def _normal(self, seed: int, *shape: int) -> Tensor:
        generator = torch.Generator(self.weight.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.weight.device)

    @property
    def adapted(self) -> bool:
        """Whether it is a layer with an adapter, both ways."""
        return self.operation.startswith("adapted layer")

    @property
    def eager(self) -> bool:
        """Whether the time of the launches is part of it."""
        return self.operation.endswith("eager")

    @property
    def copies(self) -> int:
        """How many copies of the weight to rotate over: what one turn touches fills the cache twice."""
        return copies(self.work(dense=False)[0], self.weight.cache)

    def work(self, dense: bool) -> tuple[int, int]:
        """The least that a provider with a dense or a packed weight has to do: bytes moved, floating-point operations.

        A multiplication and an addition count as two. Dequantization's arithmetic is not counted.
        """
        N, K = self.weight.shape
        full, packed = self.weight.original.nbytes, self.weight.quantized.nbytes
        if self.M is None:
            return full + (full if dense else packed), 0
        if self.adapted:  # both ways; the adapter only where the weight is packed
            adapters = 0 if dense else 6 * self.M * RANK * (N + K)
            return 2 * (full if dense else packed) + 4 * self.M * (N + K), 4 * self.M * N * K + 2 * adapters
        return (full if dense else packed) + 2 * self.M * (N + K), 2 * self.M * N * K

    def memory(self, providers: int) -> int:
        """Bytes that the point takes at most: the copies, and for each provider its outputs and a full weight."""
        N, K = self.weight.shape
        full, packed = self.weight.original.nbytes, self.weight.quantized.nbytes
        M = self.M or 0
        output = full if self.M is None else 2 * M * max(N, K)
        if self.adapted:
            output = 16 * M * (N + K)  # PEFT's copies in float32 among them
        held = self.copies * (2 * full + 3 * packed) + 2 * M * max(N, K)
        check = 8 * N * K + 8 * min(M, ROWS) * (N + K) if self.M else 24 * N * K
        return held + check + providers * (self.copies * output + full)

    def check(self, result: Any, tolerance: float) -> float:
        """Compare a result with the right one.

        Args:
            result: of dequantize or a product, a tensor; of quantize, the dequantized weight that its codes stand for;
                of an adapted layer, y and the gradients of x, A and B, or those of y and x without an adapter.
            tolerance: root-mean-square error over the root mean square of the right answer; 0 asks for every bit. Of
                quantize it is what the error may have beyond the definition's.

        Returns:
            the error.

        Raises:
            WrongResultError: the result is not the operation's.
        """
        if self.operation == "quantize":
            expected = self.weight.original
            least = relative_error(self.weight.dequantized, expected)
            return _within(result, expected, least * (1 + tolerance))
        if self.operation == "dequantize":
            return _within(result, self.weight.dequantized, tolerance)
        if self.adapted:
            expected = self._adapted() if len(result) == 4 else self._frozen()
            return max(_within(*pair, tolerance) for pair in zip(self._of_rows(*result), expected, strict=True))
        N, K = self.weight.shape
        width = K if self.operation == "input gradient" else N
        if result.dtype != torch.bfloat16 or tuple(result.shape) != (self.M, width):
            raise WrongResultError(f"{result.dtype} {list(result.shape)}, not bfloat16 {[self.M, width]}")
        W = self.weight.dequantized.double()
        expected = self.input[self._rows].double() @ (W if self.operation == "input gradient" else W.T)
        return _within(result[self._rows], expected, tolerance)

    @property
    def _rows(self) -> Tensor:
        """Those that are checked."""
        assert self.M is not None
        return torch.linspace(0, self.M - 1, min(self.M, ROWS), device=self.weight.device).long()

    def _of_rows(self, y: Tensor, dx: Tensor, *gradients: Tensor) -> list[Tensor]:
        if y.dtype != torch.bfloat16 or dx.dtype != torch.bfloat16:
            raise WrongResultError(f"y is {y.dtype} and dx {dx.dtype}, not bfloat16")
        return [y[self._rows], dx[self._rows], *gradients]

    def _frozen(self) -> list[Tensor]:
        """Some rows of y and dx in float64, without the adapter."""
        W = self.weight.dequantized.double()
        return [self.input[self._rows].double() @ W.T, self.output_gradient[self._rows].double() @ W]

    def _adapted(self) -> list[Tensor]:
        """Those with the adapter; dA and dB."""
        A, B = (part.detach().double() for part in self.adapter)
        x, dy = self.input.double(), self.output_gradient.double()
        h, G = SCALING * (x @ A.T), SCALING * (dy @ B)
        y, dx = self._frozen()
        return [y + h[self._rows] @ B.T, dx + G[self._rows] @ A, G.T @ x, dy.T @ h]


def copies(nbytes: int, cache: int) -> int:
    """How many buffers of nbytes fill a cache twice, within FEWEST and MOST."""
    return max(FEWEST, min(MOST, math.ceil(2 * cache / nbytes)))


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Root-mean-square error over the root mean square of what is expected, in float64."""
    difference = torch.linalg.vector_norm(result.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()))


def _within(result: Tensor, expected: Tensor, tolerance: float) -> float:
    if result.shape != expected.shape:
        raise WrongResultError(f"{list(result.shape)}, not {list(expected.shape)}")
    error = relative_error(result, expected)
    if not error <= tolerance:  # NaN is not
        raise WrongResultError(f"error {error:.2g}, {tolerance:.2g} allowed")
    return error


def definition_of_quantize(weight: Tensor) -> ql.QuantizedTensor:
    """``ql.quantize`` by the functions that define it, whatever serves the operators."""
    values = codebook_values("nf4").to(weight.device)
    packed, absmax = blockwise.quantize_blockwise(weight, values, BLOCK_SIZE)
    scales, absmax2, offset = quantize_scales(absmax)
    return ql.QuantizedTensor(
        packed, scales, absmax2, offset, values, weight.shape, weight.dtype, codebook="nf4", block_size=BLOCK_SIZE
    )


def definition_of_dequantize(weight: ql.QuantizedTensor) -> Tensor:
    """``QuantizedTensor.dequantize`` by the functions that define it."""
    flat = blockwise.dequantize_blockwise(
        weight.packed, weight.absmax(), weight.values, weight.block_size, weight.numel()
    )
    return flat.to(weight.dtype).view(weight.shape)
