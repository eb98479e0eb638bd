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
from qloralab.nf4 import double_quant
from qloralab.nf4.blockwise import unpack
from qloralab.nf4.codebook import CODEBOOKS, codebook_values, dynamic_map
from qloralab.nf4.packed import SCALES_PER_BLOCK

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (32, 64, 128, 4096)
SYMMETRIC = ("fp4", "fp4_e3m0", "int4")
TINY = float(np.finfo(np.float32).tiny)  # the smallest normal float32
# The spacing of each dtype's subnormal numbers.
UNIT = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}

# The smallest scale, in units of its dtype's subnormal spacing, whose block comes back to the codes it was made from;
# with any larger one every code survives. Below it, two values of the codebook times the scale round to one number: it
# is about one over the smallest distance of two values. fp4 needs one unit more in 16 bits.
SMALLEST = {
    "nf2": 2,
    "nf3": 5,
    "nf4": 11,
    "nf5": 26,
    "nf6": 58,
    "nf7": 131,
    "nf8": 287,
    "fp4": 97,
    "fp4_e3m0": 48,
    "int4": 7,
    "af4": 14,
    "bof4": 11,
}


def enough(codebook: str, block_size: int) -> int:
    """A scale, in the same units, that keeps every code. The values of af4 and bof4 are for blocks of 256 above; for
    larger blocks they are closer together, less than twice as close."""
    return SMALLEST[codebook] * (2 if codebook in ("af4", "bof4") and block_size > 256 else 1)


# A scale that was quantized too is between two numbers of the dtype, and is rounded with the weights. This is enough.
DECODED = 2

codebooks = pytest.mark.parametrize("codebook", CODEBOOKS)
symmetric = pytest.mark.parametrize("codebook", SYMMETRIC)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])


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
    "normal",
    "many exponents",
    "one huge",
    "huge",
    "subnormal",
    "a few units",
    "zeros",
    "constant",
    "quotients of int4",
    "quotients of int4, extreme scales",
)


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


def absmax(weight: Tensor, block_size: int) -> Tensor:
    """The scales before they are quantized: float32 [blocks]."""
    return quantize(weight, block_size=block_size, double_quant=False).scales


def by_block(parts: Tensor, q: QuantizedTensor) -> Tensor:
    """One number for each block -> one for each weight, in its shape."""
    return parts.repeat_interleave(q.block_size)[: q.numel()].view(q.shape)


def assert_same_bits(a: QuantizedTensor, b: QuantizedTensor) -> None:
    for name in ("packed", "scales", "absmax2", "offset"):
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.shape == other.shape, name
            assert one.numpy().tobytes() == other.numpy().tobytes(), name


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


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
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


@codebooks
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bf16", "f16"])
def test_a_decoded_scale_keeps_every_code(codebook, dtype):
    units = torch.arange(DECODED * SMALLEST[codebook], 1200, 1 / 8, dtype=torch.float64)
    scales = torch.cat([units * UNIT[dtype], torch.rand(4000) + 1]).float()  # near the smallest, and as scales are
    assert survives(every_code(codebook, scales, dtype)).all()


@codebooks
@dtypes
def test_every_mantissa_of_a_scale_keeps_every_code(codebook, dtype):
    count = {torch.float32: 4096, torch.bfloat16: 128, torch.float16: 1024}[dtype]
    scales = 1 + torch.arange(count) / count
    assert torch.equal(scales.to(dtype).float(), scales)
    assert survives(every_code(codebook, scales, dtype)).all()


@codebooks
@examples(12)
@given(recipes(), st.sampled_from(BLOCK_SIZES))
def test_quantizing_what_came_back_changes_nothing(codebook, recipe, block_size):
    q = quantize(recipe.weight(), codebook, block_size, double_quant=False)
    again = quantize(q.dequantize(), codebook, block_size, double_quant=False)
    assert torch.equal(again.scales, q.scales)
    sure = by_block((q.scales == 0) | (q.scales >= enough(codebook, block_size) * UNIT[q.dtype]), q)
    assert torch.equal(codes_of(again)[sure], codes_of(q)[sure])


@codebooks
@examples(12)
@given(recipes(), st.sampled_from(BLOCK_SIZES))
def test_double_quantized_codes_come_back_under_positive_scales(codebook, recipe, block_size):
    q = quantize(recipe.weight(reach=0.5), codebook, block_size)
    again = quantize(q.dequantize(), codebook, block_size, double_quant=False)
    decoded = q.absmax()
    sure = decoded >= DECODED * enough(codebook, block_size) * UNIT[q.dtype]
    assert torch.equal(codes_of(again)[by_block(sure, q)], codes_of(q)[by_block(sure, q)])
    # Where a number of the block is the scale itself, that is the new scale. Only a block of zeros has none.
    zeros = again.scales == 0
    assert torch.equal(again.scales[sure & ~zeros], decoded[sure & ~zeros].to(q.dtype).float())
    assert (codes_of(q)[by_block(zeros & sure, q)] == naive(torch.zeros(1), q.values, 64)[0][0]).all()


# Equivariances


@examples(50)
@given(st.sampled_from(CODEBOOKS), recipes(), st.integers(-60, 60), st.sampled_from(BLOCK_SIZES), st.booleans())
@example("nf4", Recipe(1000, 0, torch.float32, ("normal",)), 100, 64, True)
@example("nf4", Recipe(1000, 0, torch.float32, ("normal",)), -100, 64, False)
def test_a_power_of_two_goes_to_the_scales(codebook, recipe, exponent, block_size, double_quant):
    normal = Recipe(recipe.numel, recipe.seed, torch.float32, ("normal", "constant", "zeros", "quotients of int4"))
    weight = normal.weight().to(recipe.dtype).float()  # as many bits as the dtype has, in the range of float32
    q, scaled = (quantize(some, codebook, block_size, double_quant) for some in (weight, weight * 2.0**exponent))
    assert torch.equal(scaled.packed, q.packed)
    assert torch.equal(scaled.absmax(), q.absmax() * 2.0**exponent)
    if double_quant:
        assert torch.equal(scaled.scales, q.scales)
        for one, other in ((scaled.absmax2, q.absmax2), (scaled.offset, q.offset)):
            assert one is not None
            assert other is not None
            assert torch.equal(one, other * 2.0**exponent)


@examples(50)
@given(
    st.sampled_from(CODEBOOKS), recipes(most=20_000), st.sampled_from(BLOCK_SIZES), st.randoms(use_true_random=False)
)
def test_blocks_do_not_see_each_other(codebook, recipe, block_size, random):
    weight = recipe.weight()
    q = quantize(weight, codebook, block_size, double_quant=False)
    blocks = list(weight.split(block_size))
    changed = random.randrange(len(blocks))
    blocks[changed] = (blocks[changed].float() * 0.5 + 0.1).to(weight.dtype)
    other = quantize(torch.cat(blocks), codebook, block_size, double_quant=False)
    kept = torch.arange(len(blocks)) != changed
    assert torch.equal(other.scales[kept], q.scales[kept])
    assert torch.equal(codes_of(other)[by_block(kept, q)], codes_of(q)[by_block(kept, q)])
    alone = quantize(blocks[changed], codebook, block_size, double_quant=False)
    assert torch.equal(codes_of(alone), codes_of(other)[by_block(~kept, q)])


@examples(50)
@given(st.sampled_from(CODEBOOKS), recipes(most=20_000), st.sampled_from(BLOCK_SIZES))
def test_the_codes_do_not_depend_on_double_quantization(codebook, recipe, block_size):
    weight = recipe.weight(reach=0.5)
    single, twice = (quantize(weight, codebook, block_size, double_quant) for double_quant in (False, True))
    assert torch.equal(single.packed, twice.packed)


@examples(50)
@given(st.sampled_from(CODEBOOKS), recipes(most=20_000), st.sampled_from(BLOCK_SIZES))
def test_blocks_can_be_reordered(codebook, recipe, block_size):
    weight = recipe.weight()
    weight = torch.cat([weight, weight.new_zeros(-len(weight) % block_size)]).view(-1, block_size)
    order = torch.randperm(len(weight))
    q, reordered = (quantize(some, codebook, block_size, double_quant=False) for some in (weight, weight[order]))
    assert torch.equal(reordered.scales, q.scales[order])
    assert torch.equal(reordered.packed.view(len(weight), -1), q.packed.view(len(weight), -1)[order])
    assert torch.equal(reordered.dequantize(), q.dequantize()[order])


@symmetric
@examples(20)
@given(recipes(), st.sampled_from(BLOCK_SIZES))
def test_a_symmetric_codebook_treats_both_signs_alike(codebook, recipe, block_size):
    weight = recipe.weight()
    q, mirrored = (quantize(some, codebook, block_size, double_quant=False) for some in (weight, -weight))
    assert torch.equal(mirrored.scales, q.scales)
    # A number on a threshold goes to the lower value: away from 0 on one side, towards it on the other.
    ascending = codebook_values(codebook).unique()
    thresholds = (ascending[1:] + ascending[:-1]) / 2
    tie = torch.isin(quotient(weight, q), thresholds)
    assert torch.equal(mirrored.dequantize()[~tie], 0 - q.dequantize()[~tie])


def test_of_two_equally_near_values_the_lower_one_is_taken_on_both_sides_of_zero():
    weight = torch.tensor([1.0, 1.5 / 7, -1.5 / 7])
    assert (quantize(weight * 7, "int4", double_quant=False).dequantize()).tolist() == [7.0, 1.0, -2.0]


# Views


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


# Distances


def quotient(weight: Tensor, q: QuantizedTensor) -> Tensor:
    """weight / scale by the policy of nf4/blockwise.py, float32 in the shape of the weight."""
    scale = by_block(q.scales, q)
    by_reciprocal = weight.float() * (1 / scale)
    exact = (scale < TINY) | (1 / scale < TINY)
    return torch.where(scale == 0, 0, torch.where(exact, weight.float() / scale, by_reciprocal))


@codebooks
@examples(12)
@given(recipes(most=20_000), st.sampled_from(BLOCK_SIZES))
def test_no_value_is_nearer_than_the_chosen_one(codebook, recipe, block_size):
    weight = recipe.weight()
    q = quantize(weight, codebook, block_size, double_quant=False)
    x, values = quotient(weight, q).double(), q.values.double()
    chosen = (x - values[codes_of(q).int()]).abs()
    nearest = (x[:, None] - values).abs().amin(dim=1)
    # A midpoint is rounded to float32: by up to 2**-25, half of the spacing in [0.5, 1]. Twice that between distances.
    assert (chosen - nearest).max() <= 2 * 2.0**-25


@examples(60)
@given(recipes(most=5_000), custom_codebooks(), st.sampled_from(BLOCK_SIZES))
def test_a_weight_comes_back_within_half_a_gap_of_any_codebook(recipe, codebook, block_size):
    assert_within_half_a_gap(recipe.weight(), quantize(recipe.weight(), codebook, block_size, double_quant=False))


@codebooks
@examples(12)
@given(recipes(), st.sampled_from(BLOCK_SIZES))
def test_a_weight_comes_back_within_half_a_gap(codebook, recipe, block_size):
    assert_within_half_a_gap(recipe.weight(), quantize(recipe.weight(), codebook, block_size, double_quant=False))


def assert_within_half_a_gap(weight: Tensor, q: QuantizedTensor) -> None:
    values = q.values.double().sort().values
    beyond = torch.stack([values[0] + 1, 1 - values[-1]]).amax()  # from the ends of the codebook to -1 and 1
    half_gap = torch.maximum(values.diff().amax() / 2, beyond)
    scale = by_block(q.scales, q).double()
    error = (q.dequantize(torch.float32).double() - weight.double()).abs()
    # The quotient is rounded twice, its threshold once, the product once: 2**-24 each.
    assert (error <= scale * (half_gap + 4 * 2.0**-24) + 2.0**-150).all()


@examples(60)
@given(recipes(), st.sampled_from([32, 64]))
def test_a_decoded_scale_is_within_half_a_gap_of_the_map_around_it(recipe, block_size):
    weight = recipe.weight(reach=0.5)
    exact = absmax(weight, block_size)
    q = quantize(weight, block_size=block_size)
    assert q.absmax2 is not None
    assert q.offset is not None
    second = q.absmax2.double().repeat_interleave(SCALES_PER_BLOCK)[: len(exact)]
    values = torch.cat([torch.tensor([-1.0]), dynamic_map(), torch.tensor([1.0])]).double()  # -1 is nobody's: code 0
    here = q.scales.int() + 1
    gap = torch.maximum(values[here + 1] - values[here], values[here] - values[here - 1])
    gap[q.scales == 0] = torch.maximum(gap, 2 * (values[1] + 1))[q.scales == 0]
    error = (q.absmax().double() - exact.double()).abs()
    # Rounded: the difference to the offset, the quotient (twice), the threshold, the product, the sum.
    rounding = 2.0**-24 * (4 * second + q.offset.double() + exact.double()) + 2.0**-148
    assert (error <= second * gap / 2 + rounding).all()


@examples(60)
@given(recipes(), st.sampled_from([32, 64]))
@example(Recipe(129, 0, torch.float16, ("many exponents",)), 64)  # this one is refused
def test_no_finite_weight_comes_back_infinite(recipe, block_size):
    weight = recipe.weight()
    assert quantize(weight, block_size=block_size, double_quant=False).dequantize().isfinite().all()
    decoded = double_quant.dequantize_scales(*double_quant.quantize_scales(absmax(weight, block_size)))
    if decoded.to(weight.dtype).isfinite().all():
        assert quantize(weight, block_size=block_size).dequantize().isfinite().all()
    else:
        assert weight.abs().amax() > 0.9 * torch.finfo(weight.dtype).max
        with pytest.raises(ValueError, match="pass double_quant=False"):
            quantize(weight, block_size=block_size)


# Blocks out of the ordinary


@codebooks
@dtypes
@pytest.mark.parametrize("place", [0, 31, 63], ids=str)
def test_one_huge_value_takes_its_block_and_no_other(codebook, dtype, place):
    weight = torch.randn(3, 64).to(dtype)
    expected = quantize(weight, codebook, double_quant=False)
    weight[1, place] = torch.finfo(dtype).max
    q = quantize(weight, codebook, double_quant=False)
    back, before = q.dequantize(), expected.dequantize()
    assert torch.equal(back[0], before[0])
    assert torch.equal(back[2], before[2])
    assert back[1, place] == torch.finfo(dtype).max
    others = torch.arange(64) != place
    assert (back[1, others] == 0).all()


@codebooks
@dtypes
def test_the_smallest_number_there_is_is_kept(codebook, dtype):
    weight = torch.zeros(64, dtype=dtype)
    weight[5] = -UNIT[dtype]
    q = quantize(weight, codebook, double_quant=False)
    assert q.scales.item() == UNIT[dtype]
    assert torch.equal(q.dequantize(), weight)


@codebooks
@pytest.mark.parametrize("numel", [1, 2, 63, 64, 65])
@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
def test_a_constant_is_kept(codebook, numel, double_quant):
    for value in (0.1, -3.7, 2.0**-140, 2.0**127):
        weight = torch.full((numel,), value)
        assert torch.equal(quantize(weight, codebook, double_quant=double_quant).dequantize(), weight)
