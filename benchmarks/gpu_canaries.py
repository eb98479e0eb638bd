"""What must hold on a device before anything is timed on it: the kernels give the definition's bits, and write only
where they are told to.

The tests of ``tests/kernels/gpu`` run the kernels in Triton's interpreter, on small shapes. These run on the device
that is there, on shapes that take many programs. ``pytest -m gpu`` runs them too.

What a canary gives to a kernel lies in guarded memory, between zones of 0xA5 that must be unchanged afterwards.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import qloralab as ql
from qloralab.kernels.gpu import choice
from qloralab.nf4 import blockwise, double_quant
from qloralab.nf4.codebook import codebook_values
from qloralab.nf4.packed import BLOCK_SIZES

from .case import (
    SCALE,
    SCALING,
    Case,
    Weight,
    WrongResultError,
    definition_of_dequantize,
    definition_of_quantize,
    relative_error,
    within,
)
from .gpu_providers import ADAPTED, FUSED, ONCE
from .provider import text

MARGIN = 4096  # bytes
POISON = 0xA5
SHAPES = ((4096, 4096), (1000, 1111), (63, 65), (1, 1))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FUSED_SHAPES = ((4096, 4096), (1000, 1088), (64, 64))

CanaryError = WrongResultError


class Guard:
    """Allocates on a device in the middle of poisoned memory."""

    def __init__(self, device: torch.device):
        self.device = device
        self._margins: list[Tensor] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Like ``torch.empty``; all bits are ones, NaN in a floating-point type."""
        size = math.prod(shape) * dtype.itemsize
        memory = torch.full((2 * MARGIN + size,), POISON, dtype=torch.uint8, device=self.device)
        self._margins.extend([memory[:MARGIN], memory[MARGIN + size :]])
        return memory[MARGIN : MARGIN + size].fill_(0xFF).view(dtype).view(tuple(shape))

    def copy(self, tensor: Tensor) -> Tensor:
        """The same tensor in such memory."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def random(self, shape: Sequence[int], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
        """N(0, 1) in such memory."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return self.copy(torch.randn(tuple(shape), generator=generator, device=self.device).to(dtype))

    def operands(self, weight: ql.QuantizedTensor) -> Any:
        """What the operators take of a weight, in such memory."""
        return weight.map(self.copy).operands()

    def verify(self) -> None:
        """Raise CanaryError where something was written around a tensor."""
        for index, margin in enumerate(self._margins):
            if not bool((margin == POISON).all()):
                raise CanaryError(f"something wrote {('before', 'after')[index % 2]} tensor {index // 2}")


@dataclass(frozen=True)
class Canary:
    """One thing that must hold: ``run`` raises CanaryError where it does not, on the device of the guard."""

    name: str
    run: Callable[[Guard], None]


def verdict(canary: Canary, device: torch.device) -> str | None:
    """Run a canary: None where it holds, or what went wrong, whatever was raised."""
    guard = Guard(device)
    try:
        canary.run(guard)
        if device.type == "cuda":
            torch.cuda.synchronize()
        guard.verify()
    except CanaryError as error:
        return f"CanaryError: {error}"
    except Exception as error:
        return text(error)
    return None


def canaries(
    shapes: Sequence[tuple[int, int]] = SHAPES, fused: Sequence[tuple[int, int]] = FUSED_SHAPES
) -> Iterator[Canary]:
    """All of them, the table look-ups first: the products stand on these. The fused ones hold only if the lanes that
    exchange scales have the rows that ``kernels/gpu/canonical.py`` says.

    Args:
        shapes: [N, K] of the weights.
        fused: of those for the fused kernels, K a multiple of 64.
    """
    for shape, dtype in itertools.product(shapes, DTYPES):
        what = f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}"
        yield Canary(f"quantize {what}", partial(_quantize, shape=shape, dtype=dtype))
        for double, levels in ((True, "8-bit scales"), (False, "float32 scales")):
            run = partial(_dequantize, shape=shape, dtype=dtype, double=double)
            yield Canary(f"dequantize {what}, {levels}", run)
    for block_size in BLOCK_SIZES:
        run = partial(_dequantize, shape=(127, 129), block_size=block_size)
        yield Canary(f"dequantize 127x129, blocks of {block_size}", run)
    for shape, backward in itertools.product(shapes, (False, True)):
        name = f"{'input gradient' if backward else 'linear'} {shape[0]}x{shape[1]}"
        yield Canary(name, partial(_product, way="", backward=backward, shape=shape, M=33))
    yield Canary("two threads on two streams", _two_streams)
    for shape, M, backward in itertools.product(fused, (1, 16, 33, 300), (False, True)):
        name = f"fused {'input gradient' if backward else 'linear'} {shape[0]}x{shape[1]} M={M}"
        yield Canary(name, partial(_product, way="fused", backward=backward, shape=shape, M=M))
    for shape, way, M, p in itertools.product(fused, choice.KERNELS, (1, 33, 300), (0.0, 0.1)):
        what = f"{shape[0]}x{shape[1]} M={M} {way}" + (", dropout" if p else "")
        yield Canary(f"adapted layer {what}", partial(_adapted, shape=shape, M=M, way=way, p=p))


def _expect(result: Tensor, expected: Tensor, what: str) -> None:
    """Raise CanaryError unless shapes, dtypes and bits are the same."""
    if result.shape != expected.shape or result.dtype != expected.dtype:
        raise CanaryError(f"{what}: {result.dtype} {list(result.shape)}, not {expected.dtype} {list(expected.shape)}")
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[result.dtype.itemsize]
    wrong = int((result.contiguous().view(bits) != expected.contiguous().view(bits)).sum())
    if wrong:
        raise CanaryError(f"{what}: {wrong:,} of {result.numel():,} elements differ")


def _quantize(guard: Guard, shape: tuple[int, int], dtype: torch.dtype) -> None:
    from qloralab.kernels.gpu.quantize import quantize_blockwise, quantize_scales

    operands = guard.random(shape, dtype), guard.copy(codebook_values("nf4").to(guard.device)), 64
    first = blockwise.quantize_blockwise(*operands)
    found = (*quantize_blockwise(*operands), *quantize_scales(guard.copy(first[1])))
    names = ("codes", "scales", "8-bit scales", "second-level scales", "offset")
    for result, expected, what in zip(found, (*first, *double_quant.quantize_scales(first[1])), names, strict=True):
        _expect(result, expected, what)


def _dequantize(
    guard: Guard,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    block_size: int = 64,
    double: bool = True,
) -> None:
    from qloralab.kernels.gpu.dequantize import dequantize

    weight = definition_of_quantize(guard.random(shape, torch.float32), block_size, double)
    operands, expected = guard.operands(weight), definition_of_dequantize(weight).to(dtype)
    launch: Any = dequantize  # called with an unpacked tuple, whose length a type checker does not follow
    _expect(launch(*operands, dtype), expected, "weights")
    _expect(launch(*operands, dtype, out=guard.empty(shape, dtype)), expected, "weights in guarded memory")


def _product(guard: Guard, way: str, backward: bool, shape: tuple[int, int], M: int) -> None:
    """y = x W' + bias, or its gradient by x, by one of the ways to multiply; "": as it is registered."""
    from qloralab.kernels.gpu import linear, linear_grad_input, operators

    case = Case("input gradient" if backward else "linear", Weight(shape, guard.device), M)
    operands = guard.operands(case.weight.quantized)
    bias = guard.copy(guard.random(shape[:1], seed=2) * (SCALE * shape[1] ** 0.5))  # as large as the product
    x, (expected,) = guard.copy(case.gradient if backward else case.x), case.frozen
    if way == "fused":
        y = linear_grad_input.linear_grad_input(x, operands) if backward else linear.linear(x, operands, bias)
    else:
        y = operators.linear_grad_input(x, *operands) if backward else operators.linear(x, *operands, bias)
    within(y, expected if backward else expected + bias.double(), FUSED if way == "fused" else ONCE)


def _adapted(guard: Guard, shape: tuple[int, int], M: int, way: str, p: float) -> None:
    """A layer with its adapter, forward and backward, by one of the ways to multiply."""
    from qloralab.kernels.gpu import operators

    case = Case("adapted layer", Weight(shape, guard.device), M, dropout=p)
    operands = guard.operands(case.weight.quantized)
    x, grad, A, B, seed = map(guard.copy, (case.x, case.gradient, *case.adapter, case.seed))
    with choice.use(way):
        y, h = operators.adapted_linear(x, *operands, None, A, B, SCALING, p, seed)
        gradients = operators.adapted_linear_backward(grad, x, h, *operands, A, B, SCALING, p, seed, True)
    for result, expected in zip((y, *gradients), case.expected, strict=True):
        within(result, expected, ADAPTED)


def _two_streams(guard: Guard, shape: tuple[int, int] = (1024, 1024), turns: int = 50) -> None:
    """Products with different weights from two threads, each on a stream of its own: the workspace is shared."""
    from qloralab.kernels.gpu import two_pass

    wrong: list[str] = []

    def work(seed: int) -> None:
        weight = definition_of_quantize(seed * guard.random(shape, torch.float32))
        operands, x = guard.operands(weight), guard.random((8, shape[1]), seed=seed)
        expected = x.double() @ definition_of_dequantize(weight).bfloat16().double().T
        try:
            results = [two_pass.linear(x, operands) for _ in range(turns)]
            differ = sum(not relative_error(result, expected) <= ONCE for result in results)
        except Exception as error:
            wrong.append(text(error))
        else:
            if differ:
                wrong.append(f"{differ} of {turns} products differ")

    def on_a_stream(seed: int) -> None:
        if guard.device.type != "cuda":
            return work(seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            work(seed)
            torch.cuda.current_stream().synchronize()
        return None

    if guard.device.type == "cuda":
        torch.cuda.synchronize()
    threads = [threading.Thread(target=on_a_stream, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise CanaryError("; ".join(wrong))
