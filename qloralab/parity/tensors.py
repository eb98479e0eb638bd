"""The weights on which two quantizers are compared: random ones, hostile ones, and those of a model.

**Random** weights fill large tensors: seven distributions in turn, all eight block sizes in turn. Seven and eight share
no divisor, so longer runs reach every pair.

**Hostile** tensors are small, and each is made to hit one rule: numbers exactly on the decision thresholds and their
neighbours in floating point, one huge weight in a block, scales at both ends of the range, blocks of zeros, counts that
leave a short last block and quotients in it that rounding decides, rows that are no whole number of blocks, transposed
memory.

**Real** weights are those of every linear layer of a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from qloralab.nf4.codebook import codebook_values
from qloralab.nf4.packed import BLOCK_SIZES

from ..errors import UserError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 1 << 24  # weights of one random tensor
COLUMNS = 4096  # a whole number of blocks of any size


@dataclasses.dataclass(frozen=True)
class Sample:
    """A weight to compare on.

    Attributes:
        name: of where it comes from.
        weight: float32, bfloat16 or float16, any shape, finite.
        block_size: consecutive weights that share a scale.
        has_extremes: whether scales, or weights that are not 0, may be near or beyond the ends of the normal float32.
    """

    name: str
    weight: Tensor
    block_size: int
    has_extremes: bool = False

    @property
    def has_whole_rows(self) -> bool:
        """Whether no block crosses from one row to the next, as bitsandbytes' CPU dequantization takes for granted."""
        return self.weight.dim() < 2 or self.weight.shape[-1] % self.block_size == 0

    @property
    def tail(self) -> int:
        """How many weights the short last block has; 0 where there is none."""
        return self.weight.numel() % self.block_size

    def __str__(self) -> str:
        """As in "normal f32/64": the name, the dtype, the block size."""
        return f"{self.name} {short(self.weight.dtype)}/{self.block_size}"


def short(dtype: torch.dtype) -> str:
    """The name of a dtype as tables have room for it: f32, bf16, f16."""
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f")


def _laplace(n: int, g: torch.Generator) -> Tensor:
    u = torch.rand(n, generator=g) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs() * (1 - 1e-6))


def _scales(n: int, g: torch.Generator) -> Tensor:
    exponents = torch.randint(-12, 13, (-(-n // 32), 1), generator=g).float()
    return (torch.randn(len(exponents), 32, generator=g) * exponents.exp2()).flatten()[:n]


DISTRIBUTIONS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "normal": lambda n, g: torch.randn(n, generator=g),
    "uniform": lambda n, g: torch.rand(n, generator=g) * 2 - 1,
    "Laplace": _laplace,
    # The numbers are Cauchy's, cut at 1000.
    "heavy tails": lambda n, g: torch.tan((torch.rand(n, generator=g) - 0.5) * 3.14159).clamp_(-1000, 1000),
    # One in 200 is not zero: many blocks of 32 to 256 hold nothing but zeros.
    "sparse": lambda n, g: torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.005),
    # The multiples of 1/64 have few different quotients, and each many times.
    "grid": lambda n, g: torch.randint(-64, 65, (n,), generator=g) / 64,
    # The magnitude of normal numbers changes by up to 2**24 from one 32 to the next.
    "scales": _scales,
}


def random_samples(weights: int, dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    """Random tensors of at least this many weights together, one at a time in memory.

    Args:
        weights: in all; rounded up to whole rows of 4096 in each of eight tensors or more.
        dtype: that the float32 draws are rounded to.
        seed: of the draws.
    """
    count = max(len(BLOCK_SIZES), -(-weights // LARGEST))
    rows = -(-weights // (count * COLUMNS))
    sizes = [64, *(size for size in BLOCK_SIZES if size != 64)]
    for i in range(count):
        name = list(DISTRIBUTIONS)[i % len(DISTRIBUTIONS)]
        draw = DISTRIBUTIONS[name](rows * COLUMNS, torch.Generator().manual_seed(seed + i))
        yield Sample(name, draw.to(dtype).view(rows, COLUMNS), sizes[i % len(sizes)])


def hostile_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    """Small tensors, each made to hit one rule."""
    g = torch.Generator().manual_seed(seed)
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    for codebook in ("nf4", "fp4"):
        for size in BLOCK_SIZES:
            yield Sample(f"{codebook} ties", on_thresholds(codebook, size).to(dtype), size)
    for size in (32, 64, 4096):
        block = torch.randn(8, size, generator=g)
        peaks = block.abs().amax(1, keepdim=True)
        yield Sample("outlier", _with_first(block * 1e-3, 30000.0).to(dtype), size)
        # Two blocks: bitsandbytes sums the scales in float32, and the sum of more would be infinite.
        yield Sample("largest", (block / peaks * (0.45 * largest))[:2].to(dtype), size, True)
        yield Sample("smallest normal", _with_first(block / peaks * smallest, smallest).to(dtype), size, True)
        yield Sample("zero blocks", (block * (torch.arange(8) % 2)[:, None]).to(dtype), size)
        yield Sample("-0.0", torch.where(block > 0, block, -0.0).to(dtype), size)
        yield Sample("one sign", -block.abs().to(dtype), size)
        yield Sample("constant", torch.full((8, size), -0.37, dtype=dtype), size)
        yield Sample("transposed", torch.randn(size, 6, generator=g).to(dtype).T, size)
        yield Sample("three dimensions", torch.randn(3, 5, size, generator=g).to(dtype), size)
    for codebook in ("nf4", "fp4"):
        yield Sample(f"{codebook} tail", in_tail(codebook, g).to(dtype), 64)
        for name, scale in (("largest", 0.9 * largest), ("subnormal", 0.3 * smallest)):
            ties = on_thresholds(codebook, 64, (scale,)).clamp(-scale, scale)
            yield Sample(f"{codebook} ties, {name}", ties.to(dtype), 64, True)
    for n in (1, 2, 31, 63, 65, 1000, 4097, 99_999):
        yield Sample(f"{n} weights", torch.randn(n, generator=g).to(dtype), 64)
    for shape in ((9, 65), (7, 66), (12, 100), (5, 3, 7), (33, 1)):
        yield Sample("x".join(map(str, shape)), torch.randn(shape, generator=g).to(dtype), 64)


def split_row_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    """Matrices whose rows are a multiple of 16 long, and no whole number of blocks."""
    g = torch.Generator().manual_seed(seed)
    for columns, size in ((16, 64), (32, 64), (48, 64), (80, 64), (96, 64), (160, 64), (48, 32), (64, 128), (192, 128)):
        yield Sample(f"64x{columns}", torch.randn(64, columns, generator=g).to(dtype), size)


def real_samples(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[Sample]:
    """Weights of a model in another dtype, in blocks of 64; those that are beyond its range are left out."""
    for name, weight in weights:
        rounded = weight.to(dtype)
        if rounded.isfinite().all():
            yield Sample(name, rounded, 64)


def on_thresholds(codebook: str, block_size: int, scales: tuple[float, ...] = (2.0**-8, 1.0, 32.0)) -> Tensor:
    """Quotients on and beside every decision threshold of a codebook.

    Returns:
        float32 [n, block_size]: each row begins with its scale, and holds the thresholds and their neighbours above and
        below times the scale, zeros after them.
    """
    around = _around_thresholds(codebook).split(block_size - 1)
    rows = torch.stack([pad(part, (1, block_size - 1 - len(part))) for part in around])
    rows[:, 0] = 1.0
    return torch.cat([rows * scale for scale in scales])


def in_tail(codebook: str, g: torch.Generator) -> Tensor:
    """A short last block on whose weights quotient and product with the reciprocal choose different codes, if float32.

    Returns:
        float32 [64 + 32]: normal numbers, then the scale and up to 31 such weights, zeros after them.
    """
    edges = _around_thresholds(codebook)
    thresholds = edges[::3].contiguous()
    most = torch.zeros(0)
    for scale in torch.rand(200, generator=g) + 1:
        weights = edges * scale
        by_product, by_quotient = (torch.bucketize(q, thresholds) for q in (weights * (1 / scale), weights / scale))
        apart = weights[by_product != by_quotient]
        if len(apart) >= len(most):
            most = torch.cat([scale[None], apart])[:32]
    return torch.cat([torch.randn(64, generator=g), pad(most, (0, 32 - len(most)))])


def _around_thresholds(codebook: str) -> Tensor:
    """Each threshold, ascending, followed by its neighbours above and below: float32 [3 * thresholds]."""
    values = codebook_values(codebook).unique()  # ascending
    middle = (values[:-1] + values[1:]) / 2
    infinity = torch.tensor(torch.inf)
    return torch.stack([middle, middle.nextafter(infinity), middle.nextafter(-infinity)], dim=1).flatten()


def _with_first(block: Tensor, value: float) -> Tensor:
    block = block.clone()
    block[:, 0] = value
    return block


def linear_weights(path: Path) -> list[tuple[str, Tensor]]:
    """Name and weight, float32 [N, K], of every linear layer of a model; a weight that two layers share comes once.

    Args:
        path: a Hugging Face directory or a GGUF file.

    Raises:
        UserError: there is no model at path, it cannot be read, or a weight is not finite.
    """
    from ..checkpoint.models import load_model

    model: Any = load_model(path, torch.float32)
    found: dict[int, tuple[str, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if not module.weight.isfinite().all():
                raise UserError(f"{path}: {name}.weight holds NaN or infinity and cannot be quantized")
            found.setdefault(id(module.weight), (f"{name}.weight", module.weight.detach()))
    return list(found.values())
