"""What holds for any weight: the definition of quantization as properties, for the reference and for the C.

Weights come from hypothesis as a few choices (a size, a seed, what kind of numbers each block has), so that a failure
shrinks to a small size and one kind. The oracle is written here with loops over Python numbers.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qloralab import QuantizedTensor, quantize
from qloralab.kernels import dispatch
from qloralab.kernels.cpu.build import COMPILERS
from qloralab.nf4.blockwise import unpack
from qloralab.nf4.codebook import CODEBOOKS, codebook_values
from qloralab.nf4.packed import DTYPES

from .weights import assert_same_bits, double_quants, dtypes

BLOCK_SIZES = (32, 64, 128, 4096)
TINY = float(np.finfo(np.float32).tiny)  # the smallest normal float32
# The spacing of each dtype's subnormal numbers.
UNIT = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}

# The smallest scale, in units of its dtype's subnormal spacing, whose block comes back to the codes it was made from;
# with any larger one every code survives. Below it, two values of the codebook times the scale round to one number: it
# is about one over the smallest distance of two values. fp4 needs one unit more in 16 bits.
SMALLEST = {
    "nf2": 2, "nf3": 5, "nf4": 11, "nf5": 26, "nf6": 58, "nf7": 131, "nf8": 287, "fp4": 97, "fp4_e3m0": 48, "int4": 7,
    "af4": 14, "bof4": 11,
}  # fmt: skip
codebooks = pytest.mark.parametrize("codebook", CODEBOOKS)


@pytest.fixture(scope="module", params=["reference", "native"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The implementation that serves the test."""
    if request.param == "native" and not (os.environ.get("CC") or any(map(shutil.which, COMPILERS))):
        pytest.skip("needs a C compiler: install gcc and the headers of the C library")
    with dispatch.use(request.param):
        yield request.param


def examples(count: int):
    """So many examples; hypothesis stays quiet about the size of what they make."""
    return settings(max_examples=count, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


KINDS = (
    "normal", "many exponents", "one huge", "huge", "subnormal", "a few units", "zeros", "constant",
    "quotients of int4", "quotients of int4, extreme scales",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A weight in a few numbers: element i is of the kind number (i // 32) modulo their count."""

    numel: int
    seed: int
    dtype: torch.dtype
    kinds: tuple[str, ...]

    def weight(self, reach: float = 1.0) -> Tensor:
        """dtype [numel], finite: up to this share of the dtype's range."""
        generator = torch.Generator().manual_seed(self.seed)
        rows = -(-self.numel // 32)
        made = [self._rows(kind, len(range(i, rows, len(self.kinds))), generator) for i, kind in enumerate(self.kinds)]
        weight = torch.empty(rows, 32)
        for i, some in enumerate(made):
            weight[i :: len(self.kinds)] = some
        most = torch.finfo(self.dtype).max * reach
        return weight.flatten()[: self.numel].clamp(-most, most).to(self.dtype)

    def _rows(self, kind: str, count: int, generator: torch.Generator) -> Tensor:
        """float32 [count, 32] of one kind."""
        normal = torch.randn(count, 32, generator=generator)
        if kind == "many exponents":
            return normal * 2.0 ** torch.randint(-120, 120, (count, 32), generator=generator)
        if kind == "one huge":
            normal[torch.arange(count), torch.randint(32, (count,), generator=generator)] *= 2.0**30
        if kind == "huge":
            return normal * torch.finfo(self.dtype).max / 2
        if kind == "subnormal":
            return normal * 2.0**13 * UNIT[self.dtype]
        if kind == "a few units":
            return (normal * 8).round() * UNIT[self.dtype]
        if kind == "zeros":
            return normal * 0
        if kind == "constant":
            return normal[:, :1].sign().expand(-1, 32) * 0.75
        if kind.startswith("quotients of int4"):  # on the thresholds of int4 and between them
            ratios = torch.randint(-14, 15, (count, 32), generator=generator) / 14
            ratios[:, 0] = 1
            if kind == "quotients of int4":
                return ratios
            exponents = torch.randint(-16, 16, (count, 1), generator=generator)
            exponents += torch.where(exponents < 0, -126, 112)  # where the policy for the quotient changes
            return ratios * (normal[:, :1].abs() % 1 + 1) * 2.0**exponents  # now just off them: the quotient decides
        return normal


def recipes(most: int = 100_000) -> st.SearchStrategy[Recipe]:
    """Any weight of 1 to `most` elements."""
    edges = [n for n in (1, 2, 31, 32, 33, 63, 64, 65, 4095, 4096, 4097, 65_535, 100_000) if n <= most]
    return st.builds(
        Recipe,
        numel=st.sampled_from(edges) | st.integers(1, min(300, most)) | st.integers(1, most),
        seed=st.integers(0, 2**32),
        dtype=st.sampled_from(DTYPES),
        kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4).map(tuple),
    )


def custom_codebooks() -> st.SearchStrategy[Tensor]:
    """float32 [16], ascending, from [-1, 1]; nothing between 0 and 2**-20."""
    magnitudes = st.floats(2.0**-20, 1, width=32)
    numbers = magnitudes | magnitudes.map(lambda number: -number) | st.just(0.0)
    return st.lists(numbers, min_size=16, max_size=16, unique=True).map(lambda some: torch.tensor(sorted(some)))


def codes_of(q: QuantizedTensor) -> Tensor:
    """uint8 [numel]."""
    return unpack(q.packed, q.numel()) if q.bits == 4 else q.packed.flatten()


def quotients(weight: Tensor, block_size: int) -> tuple[list[np.float32], list[np.float32]]:
    """weight / scale as the policy of nf4/blockwise.py has it, and the scales, by loops."""
    numbers, found, scales = weight.float().numpy().ravel(), [], []
    for start in range(0, len(numbers), block_size):
        block = numbers[start : start + block_size]
        scale = max((abs(number) for number in block), default=np.float32(0))
        scales.append(scale)
        with np.errstate(over="ignore", divide="ignore"):
            reciprocal = np.float32(1) / scale
        for number in block:
            if scale == 0:
                found.append(np.float32(0))
            elif scale < TINY or reciprocal < TINY:
                found.append(number / scale)
            else:
                found.append(number * reciprocal)
    return found, scales


def naive(weight: Tensor, values: Tensor, block_size: int) -> tuple[list[int], list[np.float32]]:
    """Codes and scales by the definition: the nearest of the different values, the lower one at a midpoint."""
    first_code: dict[np.float32, int] = {}
    for code, value in enumerate(values.numpy()):
        first_code.setdefault(value, code)
    ascending = sorted(first_code)
    midpoints = [(a + b) / np.float32(2) for a, b in itertools.pairwise(ascending)]
    found, scales = quotients(weight, block_size)
    return [first_code[ascending[bisect.bisect_left(midpoints, quotient)]] for quotient in found], scales


def assert_naive(weight: Tensor, q: QuantizedTensor) -> None:
    codes, scales = naive(weight, q.values, q.block_size)
    assert codes_of(q).tolist() == codes
    assert q.scales.tolist() == scales
    products = [q.values.numpy()[code] * scales[i // q.block_size] for i, code in enumerate(codes)]
    expected = torch.tensor(np.array(products, dtype=np.float32)) + 0.0
    for dtype in DTYPES:
        back = q.dequantize(dtype)
        assert back.dtype == dtype
        assert back.view(torch.uint8).equal(expected.to(dtype).view(torch.uint8))
    if q.bits == 4 and q.numel() % 2:
        assert q.packed[-1] & 15 == naive(torch.zeros(1), q.values, q.block_size)[0][0]


@codebooks
@examples(12)
@given(recipes(most=500), st.sampled_from(BLOCK_SIZES))
@example(Recipe(4000, 0, torch.float32, ("quotients of int4, extreme scales",)), 32)
@example(Recipe(9001, 0, torch.bfloat16, KINDS), 4096)
def test_it_is_the_naive_quantization(codebook, recipe, block_size):
    weight = recipe.weight()
    assert_naive(weight, quantize(weight, codebook, block_size, double_quant=False))


@examples(60)
@given(recipes(most=300), custom_codebooks(), st.sampled_from(BLOCK_SIZES))
def test_a_custom_codebook_is_the_naive_quantization(recipe, codebook, block_size):
    weight = recipe.weight()
    q = quantize(weight, codebook, block_size, double_quant=False)
    assert q.codebook == "custom"
    assert torch.equal(q.values, codebook)
    assert_naive(weight, q)


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 0.9e-30, 1.1e-30, 2e-30, 65504.0], ids=str)
def test_a_custom_codebook_may_have_tiny_values(scale):
    codebook = torch.linspace(-1, 1, 16)
    codebook[7], codebook[8] = -(2.0**-24), 2.0**-24
    weight = torch.zeros(64)
    weight[0], weight[1] = scale, -scale * 2.0**-100
    assert_naive(weight, quantize(weight, codebook, double_quant=False))


@double_quants
def test_the_zero_of_a_custom_codebook_may_be_negative(double_quant):
    codebook = torch.linspace(-1, 1, 16)
    codebook[7] = -0.0
    for shape in ((64,), (3, 65)):
        q = quantize(torch.randn(shape), codebook, double_quant=double_quant)
        for dtype in DTYPES:
            back = q.dequantize(dtype)
            assert (back == 0).any()
            assert not back[back == 0].signbit().any()


@codebooks
@examples(12)
@given(recipes(), st.sampled_from(BLOCK_SIZES), st.booleans())
@example(Recipe(100_000, 0, torch.float32, KINDS), 32, False)
def test_every_implementation_gives_the_bits_of_the_reference(codebook, recipe, block_size, double_quant):
    weight = recipe.weight(reach=0.5)
    q = quantize(weight, codebook, block_size, double_quant)
    back = [q.dequantize(dtype) for dtype in DTYPES]
    with dispatch.use("reference"):
        expected = quantize(weight, codebook, block_size, double_quant)
        assert_same_bits(q, expected)
        for found in back:
            assert found.view(torch.uint8).equal(expected.dequantize(found.dtype).view(torch.uint8))


# Round trips


def every_code(codebook: str, scales: Tensor, dtype: torch.dtype) -> QuantizedTensor:
    """A block of 256 for each scale, float32 [n]: every code that a number can get, the rest zeros."""
    values = codebook_values(codebook, 256)
    values = values[values.abs() <= 1]  # int4 has -8/7, which is never chosen
    block = quantize(torch.nn.functional.pad(values, (0, 256 - len(values))), codebook, 256, double_quant=False)
    packed = block.packed.repeat(len(scales), 1)
    return dataclasses.replace(block, packed=packed, scales=scales, shape=torch.Size([len(scales), 256]), dtype=dtype)


def survives(q: QuantizedTensor) -> Tensor:
    """Whether all codes of a block come back: bool [blocks]."""
    again = quantize(q.dequantize(), q.codebook, q.block_size, double_quant=False)
    return (again.packed == q.packed).view(len(q.scales), -1).all(dim=1)


@codebooks
@dtypes
def test_the_smallest_scale_that_keeps_every_code(codebook, dtype):
    scales = torch.arange(1, 1200).double().mul(UNIT[dtype]).float()
    scales = scales[scales == scales.to(dtype).float()]
    smallest = 96 if (codebook, dtype) == ("fp4", torch.float32) else SMALLEST[codebook]
    assert survives(every_code(codebook, scales, dtype)).tolist() == (scales >= smallest * UNIT[dtype]).tolist()


@examples(60)
@given(st.data(), st.sampled_from(DTYPES), st.booleans())
def test_a_view_is_quantized_as_its_copy(data, dtype, double_quant):
    shape = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3), label="shape")
    view = torch.randn(shape).to(dtype)
    for dim, size in enumerate(shape):
        start, step = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, 3))
        view = view.narrow(dim, start, size - start)[(slice(None),) * dim + (slice(None, None, step),)]
    view = view.permute(data.draw(st.permutations(range(view.dim())), label="order"))
    if data.draw(st.booleans(), label="expand"):
        view = view[None].expand(3, *view.shape)
    q = quantize(view, double_quant=double_quant)
    assert q.shape == view.shape
    assert_same_bits(q, quantize(view.clone(memory_format=torch.contiguous_format), double_quant=double_quant))
    assert q.dequantize().is_contiguous()
