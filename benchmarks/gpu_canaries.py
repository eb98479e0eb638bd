"""What must hold on a device before anything is timed on it: the kernels give the definition's bits, and write only
where they are told to.

The tests of ``tests/kernels/gpu`` run the kernels in Triton's interpreter, on small shapes. These run on the device
that is there, on shapes that take many programs. ``pytest -m gpu`` runs them too.

What a canary gives to a kernel lies in guarded memory, between zones of 0xA5 that must be unchanged afterwards.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu_problem import relative_error
from qloralab.kernels.gpu import choice
from qloralab.nf4 import blockwise
from qloralab.nf4.adapter import keep_mask, rate
from qloralab.nf4.codebook import codebook_values
from qloralab.nf4.double_quant import dequantize_scales, quantize_scales

if TYPE_CHECKING:
    from qloralab.kernels.gpu.packing import TiledWeight

MARGIN = 4096  # bytes
POISON = 0xA5
SHAPES = ((4096, 4096), (1000, 1111), (63, 65), (1, 1))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILED = ((4096, 4096), (1000, 1088), (64, 64))
PRODUCT = 0.003  # bfloat16 output, see gpu_providers.py
FUSED = 0.005
ADAPTED = 0.01

Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Sequence[int], int]


class CanaryError(Exception):
    """Something on this device is not as it must be."""


class Guard:
    """Allocates in the middle of poisoned memory.

    Args:
        device: where.
    """

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

    def verify(self) -> None:
        """Raise CanaryError where something was written around a tensor."""
        for index, margin in enumerate(self._margins):
            if not bool((margin == POISON).all()):
                raise CanaryError(f"something wrote {('before', 'after')[index % 2]} tensor {index // 2}")


@dataclass(frozen=True)
class Canary:
    """One thing that must hold.

    Attributes:
        name: of it.
        run: raises CanaryError where it does not hold on the device of the guard.
    """

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
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def canaries(shapes: Sequence[tuple[int, int]] = SHAPES, tiled: Sequence[tuple[int, int]] = TILED) -> Iterator[Canary]:
    """All of them, the table look-ups first: the products stand on these. The fused ones hold only if the pairs that
    their inline assembly makes lie where the layout of the tiles says (``kernels/gpu/packing.py``).

    Args:
        shapes: [N, K] of the weights.
        tiled: of those for the fused kernels, K a multiple of 64.
    """
    for shape, dtype in itertools.product(shapes, DTYPES):
        what = f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}"
        yield Canary(f"quantize {what}", functools.partial(_quantize, shape=shape, dtype=dtype))
        for double_quant in (True, False):
            levels = "8-bit scales" if double_quant else "float32 scales"
            run = functools.partial(_dequantize, shape=shape, dtype=dtype, double_quant=double_quant)
            yield Canary(f"dequantize {what}, {levels}", run)
    for block_size in blockwise.BLOCK_SIZES:
        run = functools.partial(_dequantize, shape=(127, 129), block_size=block_size)
        yield Canary(f"dequantize 127x129, blocks of {block_size}", run)
    for shape in shapes:
        yield Canary(f"linear {shape[0]}x{shape[1]}", functools.partial(_linear, shape=shape))
        yield Canary(f"input gradient {shape[0]}x{shape[1]}", functools.partial(_linear_grad_input, shape=shape))
    yield Canary("two threads on two streams", _two_streams)
    for shape, M in itertools.product(tiled, (1, 16, 33, 300)):
        what = f"{shape[0]}x{shape[1]} M={M}"
        yield Canary(f"fused linear {what}", functools.partial(_fused_linear, shape=shape, M=M))
        yield Canary(f"fused input gradient {what}", functools.partial(_fused_linear_grad_input, shape=shape, M=M))
    for shape, way in itertools.product(tiled, choice.KERNELS):
        for M, p in itertools.product((1, 33, 300), (0.0, 0.1)):
            what = f"{shape[0]}x{shape[1]} M={M} {way}" + (", dropout" if p else "")
            yield Canary(f"adapted layer {what}", functools.partial(_adapted, shape=shape, M=M, way=way, p=p))


def _expect(result: Tensor, expected: Tensor, what: str) -> None:
    """Raise CanaryError unless shapes, dtypes and bits are the same."""
    if result.shape != expected.shape or result.dtype != expected.dtype:
        raise CanaryError(f"{what}: {result.dtype} {list(result.shape)}, not {expected.dtype} {list(expected.shape)}")
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[result.dtype.itemsize]
    wrong = int((result.contiguous().view(bits) != expected.contiguous().view(bits)).sum())
    if wrong:
        raise CanaryError(f"{what}: {wrong:,} of {result.numel():,} elements differ")


def _random(guard: Guard, shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator(guard.device).manual_seed(seed)
    return guard.copy(torch.randn(tuple(shape), generator=generator, device=guard.device).to(dtype))


def _values(guard: Guard) -> Tensor:
    return guard.copy(codebook_values("nf4").to(guard.device))


def _packed(guard: Guard, shape: tuple[int, int], block_size: int = 64, double_quant: bool = True) -> Operands:
    """The operands of a random weight, by the definition, each guarded."""
    values = _values(guard)
    packed, absmax = blockwise.quantize_blockwise(_random(guard, shape), values, block_size)
    if not double_quant:
        return guard.copy(packed), guard.copy(absmax), None, None, values, shape, block_size
    codes, absmax2, offset = map(guard.copy, quantize_scales(absmax))
    return guard.copy(packed), codes, absmax2, offset, values, shape, block_size


def _definition(operands: Operands, dtype: torch.dtype) -> Tensor:
    packed, scales, absmax2, offset, values, shape, block_size = operands
    absmax = scales if absmax2 is None or offset is None else dequantize_scales(scales, absmax2, offset)
    flat = blockwise.dequantize_blockwise(packed, absmax, values, block_size, math.prod(shape))
    return flat.to(dtype).view(shape)


def _quantize(guard: Guard, shape: tuple[int, int], dtype: torch.dtype) -> None:
    from qloralab.kernels.gpu.quantize import quantize_blockwise, quantize_scales

    weight, values = _random(guard, shape, dtype), _values(guard)
    packed, absmax = blockwise.quantize_blockwise(weight, values, 64)
    for result, expected, what in zip(
        quantize_blockwise(weight, values, 64), (packed, absmax), ("codes", "scales"), strict=True
    ):
        _expect(result, expected, what)
    second, names = quantize_scales(absmax), ("8-bit scales", "second-level scales", "offset")
    for result, expected, what in zip(quantize_scales(guard.copy(absmax)), second, names, strict=True):
        _expect(result, expected, what)


def _dequantize(
    guard: Guard,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    block_size: int = 64,
    double_quant: bool = True,
) -> None:
    from qloralab.kernels.gpu.dequantize import dequantize

    operands = _packed(guard, shape, block_size, double_quant)
    expected = _definition(operands, dtype)
    _expect(dequantize(*operands, dtype), expected, "weights")
    _expect(dequantize(*operands, dtype, out=guard.empty(shape, dtype)), expected, "weights in guarded memory")


def _linear(guard: Guard, shape: tuple[int, int], M: int = 33) -> None:
    from qloralab.kernels.gpu import operators

    operands = _packed(guard, shape)
    x, bias = _random(guard, (M, shape[1]), torch.bfloat16, 1), _random(guard, (shape[0],), torch.bfloat16, 2)
    expected = F.linear(x.double(), _definition(operands, torch.bfloat16).double(), bias.double())
    _near(operators.linear(x, *operands, bias), expected)


def _linear_grad_input(guard: Guard, shape: tuple[int, int], M: int = 33) -> None:
    from qloralab.kernels.gpu import operators

    operands = _packed(guard, shape)
    grad = _random(guard, (M, shape[0]), torch.bfloat16, 1)
    _near(
        operators.linear_grad_input(grad, *operands),
        grad.double() @ _definition(operands, torch.bfloat16).double(),
    )


def _fused_linear(guard: Guard, shape: tuple[int, int], M: int) -> None:
    from qloralab.kernels.gpu import linear, packing

    operands = _packed(guard, shape)
    x, bias = _random(guard, (M, shape[1]), torch.bfloat16, 1), _random(guard, (shape[0],), torch.bfloat16, 2)
    expected = F.linear(x.double(), _definition(operands, torch.float32).double(), bias.double())
    _near(linear.linear(x, _guarded(guard, packing.tile(*operands)), bias), expected, FUSED)


def _fused_linear_grad_input(guard: Guard, shape: tuple[int, int], M: int) -> None:
    from qloralab.kernels.gpu import linear_grad_input, packing

    operands = _packed(guard, shape)
    grad = _random(guard, (M, shape[0]), torch.bfloat16, 1)
    tiles = _guarded(guard, packing.tile(*operands))
    expected = grad.double() @ _definition(operands, torch.float32).double()
    _near(linear_grad_input.linear_grad_input(grad, tiles), expected, FUSED)


def _adapted(guard: Guard, shape: tuple[int, int], M: int, way: str, p: float, r: int = 16) -> None:
    """A layer with its adapter, forward and backward, by one of the ways to multiply."""
    from qloralab.kernels.gpu import operators

    (N, K), scaling = shape, 2.0
    operands = _packed(guard, shape)
    x, grad = _random(guard, (M, K), torch.bfloat16, 1), _random(guard, (M, N), torch.bfloat16, 2)
    A, B = guard.copy(_random(guard, (r, K), seed=3) * K**-0.5), _random(guard, (N, r), seed=4)
    seed = guard.copy(torch.tensor(20230523, device=guard.device))
    with choice.use(way):
        y, h = operators.adapted_linear(x, *operands, None, A, B, scaling, p, seed)
        of_x = operators.adapted_linear_backward(grad, x, h, *operands, A, B, scaling, p, seed, True)
    W = _definition(operands, torch.bfloat16).double()
    keep = keep_mask(seed, M, K, p).double() * (scaling / (1 - rate(p)))
    kept, G = x.double() * keep, grad.double() @ B.double()
    low_rank = kept @ A.double().T
    _near(y, x.double() @ W.T + low_rank @ B.double().T, ADAPTED)
    dA, dB = G.T @ kept, grad.double().T @ low_rank
    for result, expected in zip(of_x, (grad.double() @ W + keep * (G @ A.double()), dA, dB), strict=True):
        _near(result, expected, ADAPTED)


def _guarded(guard: Guard, tiles: TiledWeight) -> TiledWeight:
    parts = {name: guard.copy(getattr(tiles, name)) for name in ("words", "scales", "scales_bf16")}
    return dataclasses.replace(tiles, **parts)


def _near(result: Tensor, expected: Tensor, tolerance: float = PRODUCT) -> None:
    if result.shape != expected.shape:
        raise CanaryError(f"{list(result.shape)}, not {list(expected.shape)}")
    error = relative_error(result, expected)
    if not error <= tolerance:  # NaN is not
        raise CanaryError(f"error {error:.2g}, {tolerance:.2g} allowed")


def _two_streams(guard: Guard, shape: tuple[int, int] = (1024, 1024), turns: int = 50) -> None:
    """Products with different weights from two threads, each on a stream of its own: the workspace is shared."""
    from qloralab.kernels.gpu import two_pass

    on_gpu = guard.device.type == "cuda"
    wrong: list[str] = []

    def work(seed: int) -> None:
        packed, scales, absmax2, offset, values, _, block_size = _packed(guard, shape)
        operands = packed, scales, absmax2, offset, values * seed, shape, block_size
        x = _random(guard, (8, shape[1]), torch.bfloat16, seed)
        expected = F.linear(x.double(), _definition(operands, torch.bfloat16).double())
        try:
            results = [two_pass.linear(x, operands) for _ in range(turns)]
            differ = sum(not relative_error(result, expected) <= PRODUCT for result in results)
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")
        else:
            if differ:
                wrong.append(f"{differ} of {turns} products differ")

    def on_a_stream(seed: int) -> None:
        if not on_gpu:
            return work(seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            work(seed)
            torch.cuda.current_stream().synchronize()
        return None

    if on_gpu:
        torch.cuda.synchronize()
    threads = [threading.Thread(target=on_a_stream, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise CanaryError("; ".join(wrong))
