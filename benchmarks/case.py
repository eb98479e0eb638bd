"""A case of the operators' benchmarks: an operation on a weight, its operands, the right answer, what passes for it.

All operations but quantize start from the codes and scales of the definition in plain PyTorch: a peer loads them, and a
dense weight is the dequantized one, rounded to the dtype of the product. So all providers have one right answer,
computed in float64 (products on at most 512 of their rows), and differ in time only.

The adapted layer is a layer in training, both ways: y = x W' + s (x A') B', then the gradients of x, A and B. A dense
layer beside it has no adapter: y and the gradient of x. "eager" is the same with every launch of it, as a program has
it that captures no CUDA graph.

===============  ===================================================================================================
products         root-mean-square error against float64, over that of the answer, within the provider's tolerance
dequantize       the definition's values, each of them; of a peer that rounds otherwise, within its tolerance
quantize         the definition's codes and scales, bit for bit, where that is documented (ours); of others an error as
                 small as the definition's: second-level codes beside the nearest make up to a thousandth of it
===============  ===================================================================================================

**In bfloat16** sums are added up in float32 and rounded once; that is the provider's tolerance. Beside an adapter three
roundings follow each other: A or B, the small product between, the result. Being independent, they add up by their
squares.

**In float32** the additions round. The products of a sum are independent here and of mean zero, so after i of n the sum
is sqrt(i) times as large as one of them. Adding the next rounds it by at most 2**-24 of that, and the n roundings,
independent too, add up to 2**-24 * sqrt(1 + 2 + ... + n), which is 2**-24 * sqrt(n / 2) of the whole sum: 2.7e-6 for
4096. Any other order adds smaller sums. A product in bfloat16 is off by 1.7e-3, one in TF32 by 2e-4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

import qloralab as ql
from qloralab.lora.dropout import keep_mask, rate
from qloralab.nf4 import blockwise
from qloralab.nf4.codebook import codebook_values
from qloralab.nf4.double_quant import quantize_scales

from .work import BLOCK_SIZE, RANK, Work, least

if TYPE_CHECKING:
    from .provider import Provider

OPERATIONS = ("dequantize", "quantize", "linear", "input gradient", "adapted layer", "adapted layer, eager")
SCALING = 2.0  # of the adapter
SCALE = 0.02  # of the weights, about that of a trained model's
ROWS = 512  # of a product, that are checked
SEED = 2  # torch's, before an adapted layer whose result is checked: its dropout draws one
FALLBACK_CACHE = 32 * 2**20

T = TypeVar("T")


class WrongResultError(Exception):
    """A result is not what was asked for; the message says by how much."""


class Weight:
    """One weight, bfloat16 [N, K], in every form that a provider works on, each in copies to rotate over.

    Args:
        shape: (N, K).
        device: that holds it.
        cache: bytes of the last-level cache there; None: of the processor.
        most: copies.
        seed: of its elements.
    """

    def __init__(
        self, shape: tuple[int, int], device: str | torch.device = "cpu", cache: int = 0, most: int = 8, seed: int = 0
    ):
        self.shape, self.device = shape, torch.device(device)
        self.cache, self.most = cache or last_level_cache(), most
        self.original = (self.normal(seed, *shape) * SCALE).bfloat16()
        self.quantized = definition_of_quantize(self.original)
        self.exact = definition_of_dequantize(self.quantized)  # float32
        self._forms: dict[Any, list[Any]] = {}

    def normal(self, seed: int, *shape: int) -> Tensor:
        """N(0, 1), float32, the same for the same seed."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device)

    def dequantized(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """What the codes and scales stand for, rounded to a dtype."""
        return self.exact.to(dtype, copy=True)

    def form(self, name: Any, make: Callable[[], T], count: int) -> list[T]:
        """``count`` copies of a form, each made by ``make()`` when it is first asked for."""
        made = self._forms.setdefault(name, [])
        made.extend(make() for _ in range(count - len(made)))
        return made[:count]


@dataclass(frozen=True)
class Case:
    """One operation on one weight.

    Attributes:
        operation: one of OPERATIONS.
        weight: [N, K].
        M: rows of the input and of the gradient; None: there are none.
        dtype: of the input and the gradient; of what dequantize gives.
        dropout: of an adapted layer.
        rank: of its adapter.
    """

    operation: str
    weight: Weight
    M: int | None = None
    dtype: torch.dtype = torch.bfloat16
    dropout: float = 0.0
    rank: int = RANK

    @cached_property
    def x(self) -> Tensor:
        """The input, N(0, 1) [M, K]."""
        return self.weight.normal(1, self.M or 0, self.weight.shape[1]).to(self.dtype)

    @cached_property
    def gradient(self) -> Tensor:
        """The gradient of the output, N(0, 1) [M, N]."""
        return self.weight.normal(2, self.M or 0, self.weight.shape[0]).to(self.dtype)

    @cached_property
    def adapter(self) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [N, r] in float32; their product is about as large as the weight."""
        N, K = self.weight.shape
        A, B = self.weight.normal(3, self.rank, K), self.weight.normal(4, N, self.rank)
        return A * K**-0.5, B * (SCALE * K**0.5 / (SCALING * self.rank**0.5))

    @property
    def packed(self) -> list[ql.QuantizedTensor]:
        """The copies of the quantized weight, as this library holds it."""
        return self.form("packed", self.weight.quantized.clone)

    @property
    def originals(self) -> list[Tensor]:
        """The copies of what quantize takes."""
        return self.form("original", self.weight.original.clone)

    @property
    def dense(self) -> list[Tensor]:
        """The copies of the dequantized weight, in the dtype of the case."""
        return self.weight.form(self.dtype, partial(self.weight.dequantized, self.dtype), self.copies(dense=True))

    def form(self, name: Any, make: Callable[[], T]) -> list[T]:
        """The copies of another form of the packed weight, made by ``make()``."""
        return self.weight.form(name, make, self.copies())

    @property
    def adapted(self) -> bool:
        """Whether it is a layer with an adapter, both ways."""
        return self.operation.startswith("adapted layer")

    def copies(self, dense: bool = False) -> int:
        """How many copies to rotate over: what one turn touches fills the last-level cache twice, within 2 and most."""
        return max(2, min(self.weight.most, math.ceil(2 * self.weight.cache / self.least(dense).nbytes)))

    def least(self, dense: bool) -> Work:
        """The least that a provider with a dense or a packed weight has to do."""
        return least(self.operation, self.weight.shape, self.M, dense, self.dtype.itemsize, self.rank)

    def memory(self, providers: int) -> int:
        """Bytes that so many providers take at most: the copies, and for each its outputs and a full weight."""
        (N, K), M = self.weight.shape, self.M or 0
        full, packed = self.weight.original.nbytes, self.weight.quantized.nbytes
        output = full if self.M is None else 2 * M * max(N, K)
        if self.adapted:
            output = 16 * M * (N + K)  # PEFT's copies in float32 among them
        held = self.copies() * (2 * full + 3 * packed) + 2 * M * max(N, K)
        check = 8 * N * K + 8 * min(M, ROWS) * (N + K) if self.M else 24 * N * K
        return held + check + providers * (self.copies() * output + full)

    @cached_property
    def rows(self) -> Tensor:
        """The rows of a product that are checked: ROWS of them, the first and the last among them."""
        M = self.M or 0
        return torch.linspace(0, M - 1, min(M, ROWS), device=self.weight.device).round().long()

    @cached_property
    def seed(self) -> Tensor:
        """What the dropout of an adapted layer draws after ``torch.manual_seed(SEED)``: int64 [], on the device."""
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            return torch.randint(2**63 - 1, (), dtype=torch.int64).to(self.weight.device)

    @cached_property
    def frozen(self) -> tuple[Tensor, ...]:
        """The right answer without an adapter, float64; of an adapted layer y and the gradient of x."""
        W = self.weight.dequantized(self.dtype).double()
        if self.operation == "dequantize":
            return (W,)
        y = () if self.operation == "input gradient" else (self.x[self.rows].double() @ W.T,)
        return y if self.operation == "linear" else (*y, self.gradient[self.rows].double() @ W)

    @cached_property
    def expected(self) -> tuple[Tensor, ...]:
        """The right answer, float64; of an adapted layer y and the gradients of x, A and B. See ``lora/ops.py``."""
        if not self.adapted:
            return self.frozen
        y, dx = self.frozen
        x, dy, A, B = (part.double() for part in (self.x, self.gradient, *self.adapter))
        keep = keep_mask(self.seed, len(x), x.shape[1], self.dropout) / (1 - rate(self.dropout))
        h, G = SCALING * (x * keep) @ A.T, SCALING * dy @ B
        rows = self.rows
        return y + h[rows] @ B.T, dx + keep[rows] * (G[rows] @ A), G.T @ (x * keep), dy.T @ h

    def terms(self) -> tuple[int, ...]:
        """How many products are added up in each part of the right answer, one sum inside another counted too."""
        (N, K), M, r = self.weight.shape, self.M or 0, self.rank
        return {"linear": (K,), "input gradient": (N,)}.get(self.operation, (K + r, N + r, N + M, K + M))

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the parts of a whole answer."""
        (N, K), M = self.weight.shape, self.M or 0
        one = {"dequantize": (N, K), "linear": (M, N), "input gradient": (M, K)}.get(self.operation)
        return (one,) if one else ((M, N), (M, K), (self.rank, K), (N, self.rank))


def check(case: Case, provider: Provider, result: Any) -> float:
    """Compare a result with the right one.

    Args:
        case: that was given.
        provider: who answered.
        result: a tensor; several of an adapted layer: y and the gradients of x, A and B, of a dense one the first two;
            what the provider's quantize returns.

    Returns:
        the root-mean-square error over the root mean square of the right answer, the largest where that has several
        parts. Of quantize, the error that the codes and scales make.

    Raises:
        WrongResultError: the result is not the operation's.
    """
    if case.operation == "quantize":
        if provider.codes == 0:
            for part in ("packed", "scales", "absmax2", "offset"):
                if not torch.equal(getattr(result, part), getattr(case.weight.quantized, part)):
                    raise WrongResultError(f"{part} is not the definition's")
        original = case.weight.original
        least = relative_error(case.weight.dequantized(), original)
        return within(provider.finish(result).to(original.dtype), original, least * (1 + provider.codes))
    parts = result if isinstance(result, tuple | list) else (result,)
    right = case.frozen if provider.dense else case.expected
    if len(parts) != len(right):
        raise WrongResultError(f"{len(parts)} results, not {len(right)}")
    errors = []
    for number, (part, expected, shape) in enumerate(zip(parts, right, case.shapes(), strict=False)):
        dtype = case.dtype if number < 2 else torch.float32
        if part.shape != shape or part.dtype != dtype:
            raise WrongResultError(f"{part.dtype} {list(part.shape)}, not {dtype} {list(shape)}")
        checked = part[case.rows] if case.M is not None and number < 2 else part
        errors.append(within(checked, expected, _tolerance(case, provider, number)))
    return max(errors)


def _tolerance(case: Case, provider: Provider, part: int) -> float:
    if case.operation == "dequantize":
        return provider.table
    if case.dtype == torch.float32:
        return 2**-24 * math.sqrt(case.terms()[part] / 2)
    if case.adapted and not provider.dense:
        return provider.adapted or math.sqrt(3) * provider.tolerance
    return provider.tolerance


def within(result: Tensor, expected: Tensor, tolerance: float) -> float:
    """The relative error of a result; raises WrongResultError where it is larger than the tolerance, or NaN."""
    if result.shape != expected.shape:
        raise WrongResultError(f"{list(result.shape)}, not {list(expected.shape)}")
    error = relative_error(result, expected)
    if not error <= tolerance:  # NaN is not
        raise WrongResultError(f"error {error:.2g}, {tolerance:.2g} allowed")
    return error


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Root-mean-square error over the root mean square of what is expected, in float64."""
    difference = torch.linalg.vector_norm(result.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()))


def definition_of_quantize(weight: Tensor, block_size: int = BLOCK_SIZE, double: bool = True) -> ql.QuantizedTensor:
    """``ql.quantize`` by the functions that define it, whatever serves the operators."""
    values = codebook_values("nf4").to(weight.device)
    packed, absmax = blockwise.quantize_blockwise(weight, values, block_size)
    levels = quantize_scales(absmax) if double else (absmax, None, None)
    return ql.QuantizedTensor(
        packed, *levels, values, weight.shape, weight.dtype, codebook="nf4", block_size=block_size
    )


def definition_of_dequantize(weight: ql.QuantizedTensor) -> Tensor:
    """``QuantizedTensor.dequantize`` in float32, by the functions that define it."""
    size = weight.block_size, weight.numel()
    return blockwise.dequantize_blockwise(weight.packed, weight.absmax(), weight.values, *size).view(weight.shape)


def last_level_cache() -> int:
    """Bytes of the largest cache of the first processor; 32 MiB where Linux does not say."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    found = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()  # 32768K
        found.append(int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text))
    return max(found, default=FALLBACK_CACHE)
