"""The codebooks beside NF4: their values derived again, the codes of their numbers, their error, a user's own."""

from __future__ import annotations

import itertools
import math

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from qloralab import QuantizedTensor, normal_float, quantize
from qloralab.nf4 import codebook
from qloralab.nf4.blockwise import nearest, unpack
from qloralab.nf4.codebook import CODEBOOKS, codebook_values

OF_THE_PAPER = ("nf4", "fp4", "fp4_e3m0", "int4")
FOUR_BITS = (*OF_THE_PAPER, "af4", "bof4")
NORMAL_FLOATS = tuple(f"nf{bits}" for bits in range(2, 9))

# The magnitudes of bitsandbytes' FP4 by code, times 12: the table of its CUDA source, in exact fractions.
FP4_TIMES_12 = (0, 1 / 16, 8, 12, 4, 6, 2, 3)

# Mean and standard deviation of one draw's mean error, N(0, 1) 1024x1024: those of bitsandbytes' FP4, over 200 draws.
# block size: (mean |error|, sigma, mean |error| / |x|, sigma)
FP4_ERROR = {
    32: (0.088925, 9.1e-5, 0.242443, 3.30e-4),
    64: (0.096543, 1.11e-4, 0.260125, 3.79e-4),
    128: (0.102969, 1.34e-4, 0.275817, 4.33e-4),
    256: (0.108684, 1.82e-4, 0.289831, 4.97e-4),
    512: (0.114115, 2.34e-4, 0.302881, 5.83e-4),
    1024: (0.119333, 3.20e-4, 0.315000, 7.57e-4),
    2048: (0.124556, 4.55e-4, 0.326607, 9.55e-4),
    4096: (0.129536, 6.12e-4, 0.337169, 1.239e-3),
}
SIGMAS = 7
ONE_BLOCK = 4096  # holds every list of numbers below


def codes_of(numbers: list[float], name: str) -> list[int]:
    """The codes of numbers in [-1, 1], beside a 1 that fixes the scale."""
    q = quantize(torch.tensor([1.0, *numbers]), name, ONE_BLOCK, double_quant=False)
    return q.codes().tolist()[1:]


def error(weight: Tensor, name: str | Tensor, block_size: int = 64) -> Tensor:
    return (quantize(weight, name, block_size, double_quant=False).dequantize() - weight).abs()


def test_the_names():
    assert set(CODEBOOKS) == {*FOUR_BITS, *NORMAL_FLOATS}
    for name in CODEBOOKS:
        values = codebook_values(name)
        assert (values.dtype, values.device.type) == (torch.float32, "cpu")
        assert len(values) == 16 if name in FOUR_BITS else 2 ** int(name[2:])


@pytest.mark.parametrize("name", NORMAL_FLOATS)
def test_a_normal_float_goes_by_its_width(name):
    assert torch.equal(codebook_values(name), normal_float(int(name[2:])))


def test_fp4_is_the_table_of_bitsandbytes():
    values = codebook_values("fp4")
    assert torch.equal(values, bnb.get_4bit_type("fp4", device="cpu"))
    assert values[:8].tolist() == (torch.tensor(FP4_TIMES_12, dtype=torch.float32) / 12).tolist()
    assert torch.equal(values[8:], -values[:8])


def test_fp4_codes_are_those_of_bitsandbytes_but_for_its_second_zero():
    weight = torch.randn(256, 64)
    q = quantize(weight, "fp4", double_quant=False)
    theirs, state = bnb.quantize_4bit(weight, quant_type="fp4")
    ours, theirs = unpack(q.packed, q.numel()), unpack(theirs, q.numel())
    assert torch.equal(q.scales, state.absmax)
    zero = q.values[ours.int()] == 0
    assert torch.equal(ours[~zero], theirs[~zero])
    assert (ours[zero] == 0).all()
    assert set(theirs[zero].tolist()) == {0, 8}
    assert torch.equal(q.dequantize(), bnb.dequantize_4bit(q.packed, state))


def test_e3m0_is_the_powers_of_two():
    values = codebook_values("fp4_e3m0")
    assert values[:8].tolist() == [0.0, *[2.0**-e for e in range(6, -1, -1)]]
    assert torch.equal(values[8:], -values[:8])


def test_int4_is_twos_complement():
    for code, value in enumerate(codebook_values("int4").tolist()):
        q = code - 16 if code & 8 else code
        assert value == torch.tensor(q / 7.0, dtype=torch.float64).float().item()


def test_int4_never_chooses_minus_8():
    weight = torch.cat(
        [torch.randn(1000, 64), -torch.ones(1, 64), torch.full((1, 64), -torch.finfo(torch.float32).max)]
    )
    # A quotient can be one unit below -1: scales of every kind.
    weight *= torch.rand(1002, 1)
    q = quantize(weight, "int4", double_quant=False)
    assert 8 not in unpack(q.packed, q.numel()).tolist()
    assert q.dequantize().abs().amax(dim=1).tolist() == weight.abs().amax(dim=1).tolist()


@pytest.mark.parametrize("name", CODEBOOKS)
def test_a_value_of_the_codebook_gets_its_own_code(name):
    values = codebook_values(name, ONE_BLOCK)
    within = values.abs() <= 1
    expected = torch.arange(len(values))
    if name.startswith("fp4"):
        expected[8] = 0  # the second zero is never written
    assert codes_of(values[within].tolist(), name) == expected[within].tolist()


@pytest.mark.parametrize("name", CODEBOOKS)
def test_zero_is_exact_and_positive(name):
    values = codebook_values(name)
    assert not values[values == 0].signbit().any()
    (code,) = codes_of([0.0], name)
    assert codes_of([-0.0, 1e-30, -1e-30], name) == [code] * 3
    assert values[code] == 0
    ascending = 7 if name in FOUR_BITS else 2 ** (int(name[2:]) - 1) - 1
    assert code == (0 if name in ("fp4", "fp4_e3m0", "int4") else ascending)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_both_ends_are_exact(name):
    values = codebook_values(name)
    high, low = codes_of([1.0, -1.0], name)
    assert values[[high, low]].tolist() == [1.0, -1.0]


@pytest.mark.parametrize("name", CODEBOOKS)
def test_a_tie_goes_to_the_lower_value(name):
    ascending = codebook_values(name, ONE_BLOCK).unique()
    for below, above in itertools.pairwise(ascending):
        tie = (below + above) / 2
        if tie >= -1:
            around = [tie.nextafter(tie - 1), tie, tie.nextafter(tie + 1)]
            found = codebook_values(name, ONE_BLOCK)[codes_of([number.item() for number in around], name)]
            assert found.tolist() == [below, below, above]


@pytest.mark.parametrize("name", CODEBOOKS)
def test_the_decision_table_holds_each_value_once_in_order(name):
    values = codebook_values(name)
    thresholds, codes = codebook.decision_table(values)
    ascending = values[codes.int()]
    assert torch.equal(ascending, values.unique())
    assert torch.equal(thresholds, ((ascending.double()[1:] + ascending.double()[:-1]) / 2).float())
    assert torch.equal(nearest(ascending, values), codes)


@pytest.mark.parametrize("block_size", FP4_ERROR)
def test_error_on_normal_weights_is_that_of_fp4(block_size):
    weight = torch.randn(1024, 1024).flatten()
    found = error(weight, "fp4", block_size)
    mean, sigma, relative_mean, relative_sigma = FP4_ERROR[block_size]
    assert found.mean().item() == pytest.approx(mean, abs=SIGMAS * sigma)
    assert (found / (weight.abs() + 1e-8)).mean().item() == pytest.approx(relative_mean, abs=SIGMAS * relative_sigma)


def test_on_normal_weights_nf4_is_the_best_of_the_four():
    weight = torch.randn(1024, 1024)
    by_error = sorted(OF_THE_PAPER, key=lambda name: error(weight, name).square().mean().item())
    assert by_error[0] == "nf4"
    assert by_error[-1] == "fp4_e3m0"


def test_each_bit_more_about_halves_the_error():
    weight = torch.randn(512, 1024)
    errors = [error(weight, name).mean().item() for name in NORMAL_FLOATS]
    ratios = [wide / narrow for narrow, wide in itertools.pairwise(errors)]
    assert all(0.35 < ratio < 0.6 for ratio in ratios)
    assert ratios == sorted(ratios)  # the wider the type, the further out its quantiles reach, past the largest weights


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("numel", [0, 1, 63, 64, 1000])
def test_four_bits_share_a_byte_and_the_others_do_not(name, numel):
    q = quantize(torch.randn(numel), name, double_quant=False)
    assert q.bits == (4 if name in FOUR_BITS else int(name[2:]))
    assert q.packed.shape == ((numel + 1) // 2 if q.bits == 4 else numel, 1)
    assert q.codebook == name
    assert torch.equal(q.values, codebook_values(name))


def test_bits_per_parameter_count_the_bytes_held():
    weight = torch.randn(1024, 64)
    assert quantize(weight, "fp4", double_quant=False).bits_per_parameter == 4.5
    nf3 = quantize(weight, "nf3", double_quant=False)
    assert (nf3.bits_per_parameter, nf3.ideal_bits_per_parameter) == (8.5, 3.5)
    assert quantize(weight, "fp4").ideal_bits_per_parameter == quantize(weight, "fp4").bits_per_parameter
    assert quantize(weight, "nf8", double_quant=False).bits_per_parameter == 8.5


# A codebook of one's own


def test_a_copy_of_nf4_is_nf4_by_another_name():
    weight = torch.randn(65, 66)
    ours, named = quantize(weight, normal_float(4)), quantize(weight, "nf4")
    assert ours.codebook == "custom"
    assert torch.equal(ours.packed, named.packed)
    assert torch.equal(ours.scales, named.scales)
    assert torch.equal(ours.dequantize(), named.dequantize())


@pytest.mark.parametrize("count", [4, 5, 8, 15, 17, 32, 256])
@pytest.mark.parametrize("kind", [torch.Tensor, list, tuple], ids=["tensor", "list", "tuple"])
def test_a_codebook_has_4_to_256_values(count, kind):
    """Each weight is the nearest of them, by float64; and comes back from a checkpoint."""
    grid = (torch.linspace(-1, 1, count).abs().sqrt() * torch.linspace(-1, 1, count).sign()).float()
    weight = torch.randn(5, 13)
    q = quantize(weight, grid if kind is torch.Tensor else kind(grid.tolist()), double_quant=False)
    scales = weight.flatten().split(64)
    scaled = torch.cat([part.double() / part.abs().max() for part in scales]).view(5, 13, 1)
    assert torch.equal(q.codes(), (scaled - grid.double()).abs().argmin(-1).int())
    assert (q.bits, q.codebook, len(q.values)) == (math.ceil(math.log2(count)), "custom", count)
    stored = q.stored("w")
    assert torch.equal(QuantizedTensor.from_bitsandbytes(stored, "w").dequantize(), q.dequantize())


def test_values_of_a_named_codebook_are_the_named_codebook():
    weight = torch.randn(65, 66)
    assert torch.equal(quantize(weight, normal_float(3)).dequantize(), quantize(weight, "nf3").dequantize())


@pytest.mark.parametrize("values", [None, 4, ["a", "b", "c", "d"], [[1.0], [1.0, 2.0]], [10**400] * 4], ids=repr)
def test_what_is_no_codebook_is_a_type_error(values):
    with pytest.raises(TypeError, match="a codebook is a name, or 4 to 256 numbers, not"):
        quantize(torch.ones(64), values)


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (3, 5, 11)], ids=str)
def test_codes_are_those_of_each_weight(name, shape):
    q = quantize(torch.randn(shape), name, double_quant=False)
    assert (q.codes().shape, q.codes().dtype) == (shape, torch.int32)
    scales = q.absmax().repeat_interleave(64)[: q.numel()].view(shape)
    assert torch.equal(q.values[q.codes()] * scales + 0.0, q.dequantize())


def test_a_codebook_for_a_distribution_beats_nf4_on_it():
    weight = torch.rand(512, 512) * 2 - 1
    assert error(weight, torch.linspace(-1, 1, 16)).mean() < 0.95 * error(weight, "nf4").mean()


def test_changing_the_tensor_afterwards_changes_no_weight():
    values = torch.linspace(-1, 1, 16)
    weight = torch.randn(128)
    q = quantize(weight, values)
    before = q.dequantize()
    values.zero_()
    assert torch.equal(q.dequantize(), before)


def test_a_codebook_that_trains_is_taken_as_it_is_now():
    values = torch.linspace(-1, 1, 16).requires_grad_()
    q = quantize(torch.randn(128), values)
    assert not q.values.requires_grad
    assert not q.dequantize().requires_grad


@pytest.mark.parametrize("step", [-1, 2], ids=["reversed", "strided"])
def test_a_codebook_may_be_a_view(step):
    values = torch.linspace(-1, 1, 31)[::2] if step == 2 else torch.linspace(1, -1, 16).flip(0)
    weight = torch.randn(100)
    assert torch.equal(quantize(weight, values).packed, quantize(weight, values.clone()).packed)


def test_values_short_of_the_ends_saturate():
    values = torch.arange(-10, 6) / 20  # -0.5 to 0.25
    q = quantize(torch.tensor([2.0, -2.0, 1.5, 0.5]), values, double_quant=False)
    assert q.scales.tolist() == [2.0]
    assert q.dequantize().tolist() == [0.5, -1.0, 0.5, 0.5]


GRID = torch.linspace(-1, 1, 16)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (GRID.double(), r"float32 \[4 to 256\], not float64 \[16\]"),
        (GRID.bfloat16(), r"float32 \[4 to 256\], not bfloat16 \[16\]"),
        (GRID[:3], r"float32 \[4 to 256\], not float32 \[3\]"),
        (GRID[None], r"float32 \[4 to 256\], not float32 \[1, 16\]"),
        (torch.linspace(-1, 1, 257), r"not float32 \[257\]"),
        ([[-1.0, 0.0], [0.5, 1.0]], r"not float32 \[2, 2\]"),
        ([-1.0, 0.0, 0.5, 1e300], r"lie in \[-1, 1\]"),
        (GRID.flip(0), r"ascend and lie in \[-1, 1\]"),
        (GRID.index_fill(0, torch.tensor(3), GRID[4].item()), r"ascend"),
        (GRID.index_fill(0, torch.tensor(3), float("nan")), r"ascend"),
        (GRID.index_fill(0, torch.tensor(15), float("nan")), r"ascend"),
        (GRID.index_fill(0, torch.tensor(15), float("inf")), r"lie in"),
        (GRID * 1.01, r"lie in \[-1, 1\]"),
        (GRID.index_fill(0, torch.tensor(7), -(2.0**-25)), r"0 or at least 2\*\*-24"),
    ],
    ids=[
        "f64",
        "bf16",
        "3",
        "2-d",
        "257",
        "2-d-list",
        "inf-list",
        "descending",
        "equal",
        "nan",
        "last-nan",
        "inf",
        "beyond",
        "tiny",
    ],
)
def test_another_codebook_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        quantize(torch.ones(64), values)


@pytest.mark.parametrize("name", ["nf1", "nf9", "NF4", "", "custom", "int8", "fp4_e2m1"])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=rf"unknown data type '{name}'; known: nf4, fp4, fp4_e3m0, int4, nf2"):
        quantize(torch.ones(64), name)
