"""Quantization in Triton: codes and scales of the definition, bit for bit, and no byte too far.

In the interpreter every division is IEEE's. That the compiled ones are too, and that they keep subnormal numbers, only
a GPU can show: there the same tests run.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qloralab.kernels.gpu.quantize import BINS, SPAN, STRETCH, TILE, _search_of, quantize_blockwise, quantize_scales
from qloralab.nf4 import blockwise, double_quant
from qloralab.nf4.codebook import codebook_values, custom, decision_table, dynamic_map

from ..cpu.cases import NF4, block_sizes, dtypes, neighbours
from .conftest import Guarded

TINY = 2.0**-126  # the smallest normal float32
CODEBOOKS = {name: codebook_values(name) for name in ("nf4", "fp4", "fp4_e3m0", "int4")}
# Whose thresholds crowd into a few bins.
CODEBOOKS["near one"] = custom(1 - torch.arange(15, -1, -1) / 64)
CODEBOOKS["near zero"] = custom(torch.cat([torch.linspace(-2e-3, 2e-3, 16)[:15], torch.ones(1)]))

codebooks = pytest.mark.parametrize("values", CODEBOOKS.values(), ids=CODEBOOKS)
# The interpreter's numpy, where a quotient overflows or is none.
numpy_warnings = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.fixture
def fresh(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guarded]:
    """`guarded`, from which the launchers take their results too."""

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return guarded(*shape, dtype=dtype)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield guarded


def check(weight: Tensor, fresh: Guarded, values: Tensor = NF4, block_size: int = 64, offset: int = 0) -> Tensor:
    """Quantize in guarded memory, compare the bits, and return the codes, [numel]."""
    codes, absmax = blockwise.quantize_blockwise(weight, values, block_size)
    packed, scales = quantize_blockwise(fresh(weight, offset=offset * weight.itemsize), fresh(values), block_size)
    assert packed.dtype == torch.uint8
    assert torch.equal(packed.cpu(), codes)
    assert scales.dtype == torch.float32
    assert torch.equal(scales.cpu(), absmax)
    return blockwise.unpack(codes, weight.numel())


@codebooks
@dtypes
def test_bits_of_the_definition(dtype, values, fresh):
    check(torch.randn(37, 451).to(dtype), fresh, values)


@dtypes
@pytest.mark.parametrize("shape", [(1,), (2,), (3, 21), (TILE,), (TILE + 1,), (2, TILE - 1), (3, 5, 7, 64)], ids=str)
def test_shapes(shape, dtype, fresh):
    check(torch.randn(shape).to(dtype), fresh)


@block_sizes
def test_block_sizes(block_size, fresh):
    check(torch.randn(41, 451).bfloat16(), fresh, block_size=block_size, offset=1)
    check(torch.randn(2 * TILE), fresh, block_size=block_size, offset=3)


@codebooks
def test_ties_go_to_the_lower_value(values, fresh):
    """The thresholds, and the float32 numbers on both sides of each, in blocks whose scale is a power of two."""
    at, _ = decision_table(values)
    at = at[at.abs() <= 1]
    beside = neighbours(at)
    block = torch.zeros(64)
    block[0] = 1
    block[1 : 1 + len(beside)] = beside
    codes = check(torch.cat([block, block / 1024, block * 2.0**40]), fresh, values)
    lower, upper = (values[codes[1 + k * len(at) : 1 + (k + 1) * len(at)].int()] for k in (1, 2))
    assert (lower < upper).all()


@codebooks
def test_every_bfloat16_from_minus_1_to_1(values, fresh):
    bits = torch.arange(0x3F81, dtype=torch.int16)
    some = torch.cat([bits.view(torch.bfloat16), -bits.view(torch.bfloat16)])
    rows = torch.nn.functional.pad(some, (0, -len(some) % 63)).view(-1, 63)
    codes = check(torch.cat([torch.ones(len(rows), 1, dtype=torch.bfloat16), rows], dim=1), fresh, values, 64)
    assert len(codes.unique()) == len(decision_table(values)[1]) - int(values.min() < -1)  # -8 / 7 of int4


@numpy_warnings
@pytest.mark.parametrize("scale", [1.0, 1e-39, 1.5 * 2.0**126], ids=["ordinary", "small", "large"])
def test_the_product_with_the_reciprocal_and_at_the_ends_of_the_range_the_quotient(scale, fresh):
    """Where the two have different codes."""
    scales = (torch.rand(4096 if scale == 1 else 64, 1) + 0.5) * scale
    at = decision_table(NF4)[0] * scales  # [blocks, 15]: near enough to the thresholds to tell
    weight = torch.cat([scales, *neighbours(at).chunk(3)], dim=1)
    weight = torch.nn.functional.pad(weight, (0, 64 - weight.shape[1]))
    product, quotient = (blockwise.nearest(x, NF4) for x in (weight * (1 / scales), weight / scales))
    assert (product != quotient).sum() > (1000 if scale == 1 else 10)
    check(weight[:1024], fresh)


@numpy_warnings
@codebooks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_extreme_blocks(dtype, values, fresh):
    """Scales on both sides of 2**-126 and of 2**126, the smallest and the largest of all, among ordinary ones."""
    scales = [
        2.0**-133,
        2.0**-149,
        1e-40,
        1e-39,
        0.99 * TINY,
        TINY,
        1.0,
        0.0,
        2.0**126,
        1.01 * 2.0**126,
        2.0**127,
        3e38,
    ]
    scale = torch.tensor(scales).to(dtype).float()[:, None]
    weight = (torch.rand(len(scales), 64) * 2 - 1) * scale
    weight[:, 7] = scale[:, 0]
    check(weight.to(dtype), fresh, values)


@numpy_warnings
def test_extreme_blocks_of_several_programs(fresh):
    """In the first and the last place that a program looks at, and in a short block at the end."""
    weight = torch.ones(2 * SPAN + 3, 64)
    for block in (SPAN - 1, SPAN, 2 * SPAN - 1, 2 * SPAN + 2):
        weight[block] = (torch.rand(64) - 0.5) * 1e-39
    check(weight.flatten()[:-33], fresh)


def test_float16_below_its_normal_numbers(fresh):
    check(torch.tensor([2.0**-24, -(2.0**-24), 2.0**-15, 0, 3 * 2.0**-24, 65504]).half().repeat_interleave(64), fresh)


@codebooks
@dtypes
def test_zeros(dtype, values, fresh):
    """A block of zeros, zeros of both signs, and the code of 0 that completes an odd count."""
    zero = torch.zeros(129, dtype=dtype)
    zero[5] = -0.0
    expected = blockwise.nearest(torch.zeros(1), values)
    assert (check(zero, fresh, values) == expected).all()
    packed, absmax = quantize_blockwise(fresh(torch.ones(65, dtype=dtype)), fresh(values), 64)
    assert packed[-1].cpu() & 15 == expected
    assert torch.equal(absmax.cpu(), torch.ones(2))


@numpy_warnings
@dtypes
@pytest.mark.parametrize("wrong", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_show_in_the_scale(wrong, dtype, fresh):
    weight = torch.randn(5, 64).to(dtype)
    weight[2, 9] = wrong
    _, absmax = quantize_blockwise(fresh(weight), fresh(NF4), 64)
    assert absmax.isfinite().tolist() == [True, True, False, True, True]
    assert bool(absmax[2].isnan()) == bool(torch.tensor(wrong).isnan())


def test_bisection_as_deep_as_a_codebook_needs():
    steps = {name: _search_of(tuple(values.tolist()), torch.device("cpu")).steps for name, values in CODEBOOKS.items()}
    assert steps == {
        "nf4": 1, "fp4": 2, "fp4_e3m0": 3, "int4": 1, "near one": 3, "near zero": 4
    }  # fmt: skip


@pytest.mark.parametrize("values", CODEBOOKS.values(), ids=CODEBOOKS)
def test_a_bin_knows_how_many_thresholds_are_below(values):
    """With the bins' borders in exact arithmetic: of the numbers a bin may hold, none is outside what it can find."""
    search = _search_of(tuple(values.tolist()), torch.device("cpu"))
    thresholds = decision_table(values)[0].double()
    below = search.entries >> 32
    x = torch.linspace(-1, 1, 100_001, dtype=torch.float64)
    rank = (thresholds < x[:, None]).sum(dim=1)
    for error in (-0.0626, 0.0, 0.0626):  # half a step, and a little
        bin_ = (x * STRETCH + BINS / 2 + error).floor().long()
        assert ((bin_ >= 0) & (bin_ < BINS)).all()
        found = rank - below[bin_]
        assert ((found >= 0) & (found < 2**search.steps)).all()


def test_an_empty_weight(device):
    packed, absmax = quantize_blockwise(torch.empty(0, 64, device=device), NF4.to(device), 64)
    assert packed.shape == (0, 1)
    assert absmax.shape == (0,)


def check_scales(absmax: Tensor, fresh: Guarded, offset: int = 0) -> None:
    expected = double_quant.quantize_scales(absmax)
    found = quantize_scales(fresh(absmax, offset=4 * offset))
    assert all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))
    assert [one.dtype for one in found] == [one.dtype for one in expected]


@pytest.mark.parametrize("blocks", [1, 2, 255, 256, 257, 1000, 4096])
def test_scales(blocks, fresh):
    check_scales(torch.rand(blocks), fresh)
    check_scales(torch.randn(blocks).abs() ** 4, fresh, offset=1)


@numpy_warnings
@pytest.mark.parametrize("size", [0.0, 1e-39, 2.0**-126, 0.3, 1.2e38, 2.0**127])
def test_scales_of_any_size(size, fresh):
    for scales in (torch.full((300,), size), torch.rand(257) * size, torch.tensor([0.0, size])):
        check_scales(scales, fresh)


def test_ties_of_scales(fresh):
    """The thresholds of the map, and the numbers beside them; their mean is 0 and the largest of them 1."""
    at = decision_table(dynamic_map())[0]
    some = neighbours(at)
    some = torch.nn.functional.pad(some, (0, -len(some) % 127)).view(-1, 127)
    one = torch.ones(len(some), 1)
    scales = torch.cat([one, some, -some, -one], dim=1)  # of 256, which share an absmax2
    assert double_quant.quantize_scales(scales.flatten())[1].tolist() == [1.0] * len(some)
    check_scales(scales.flatten(), fresh)


def test_no_scales(device):
    codes, absmax2, offset = quantize_scales(torch.empty(0, device=device))
    assert (codes.shape, absmax2.shape, offset.item()) == ((0,), (0,), 0)
