"""The codebooks beside NF4: their values derived again, the codes of their numbers, their error, a user's own."""

from __future__ import annotations

import itertools
import math

import bitsandbytes.functional as bnb
import pytest
import torch

from qloralab import QuantizedTensor, normal_float, quantize
from qloralab.nf4.blockwise import unpack
from qloralab.nf4.codebook import CODEBOOKS, codebook_values

OF_THE_PAPER = ("nf4", "fp4", "fp4_e3m0", "int4")
FOUR_BITS = (*OF_THE_PAPER, "af4", "bof4")
NORMAL_FLOATS = tuple(f"nf{bits}" for bits in range(2, 9))

# The magnitudes of bitsandbytes' FP4 by code, times 12: the table of its CUDA source, in exact fractions.
FP4_TIMES_12 = (0, 1 / 16, 8, 12, 4, 6, 2, 3)
ONE_BLOCK = 4096  # holds every list of numbers below


def codes_of(numbers: list[float], name: str) -> list[int]:
    """The codes of numbers in [-1, 1], beside a 1 that fixes the scale."""
    q = quantize(torch.tensor([1.0, *numbers]), name, ONE_BLOCK, double_quant=False)
    return q.codes().tolist()[1:]


def test_the_names():
    assert set(CODEBOOKS) == {*FOUR_BITS, *NORMAL_FLOATS}
    for name in NORMAL_FLOATS:
        assert torch.equal(codebook_values(name), normal_float(int(name[2:])))


def test_fp4_is_the_table_of_bitsandbytes():
    values = codebook_values("fp4")
    assert torch.equal(values, bnb.get_4bit_type("fp4", device="cpu"))
    assert values[:8].tolist() == (torch.tensor(FP4_TIMES_12, dtype=torch.float32) / 12).tolist()
    assert torch.equal(values[8:], -values[:8])


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
def test_a_tie_goes_to_the_lower_value(name):
    ascending = codebook_values(name, ONE_BLOCK).unique()
    for below, above in itertools.pairwise(ascending):
        tie = (below + above) / 2
        if tie >= -1:
            around = [tie.nextafter(tie - 1), tie, tie.nextafter(tie + 1)]
            found = codebook_values(name, ONE_BLOCK)[codes_of([number.item() for number in around], name)]
            assert found.tolist() == [below, below, above]


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


def test_a_codebook_is_taken_as_it_is_now():
    """It may change afterwards, train, and be a view; no weight does."""
    values = torch.linspace(-1, 1, 31).requires_grad_()
    weight = torch.randn(128)
    q = quantize(weight, values[::2])
    assert torch.equal(q.packed, quantize(weight, torch.linspace(-1, 1, 16)).packed)
    assert not q.values.requires_grad
    before = q.dequantize()
    values.detach().zero_()
    assert torch.equal(q.dequantize(), before)


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
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_codebook_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        quantize(torch.ones(64), values)


@pytest.mark.parametrize("name", ["nf1", "nf9", "NF4", "", "custom", "int8", "fp4_e2m1"])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=rf"unknown data type '{name}'; known: nf4, fp4, fp4_e3m0, int4, nf2"):
        quantize(torch.ones(64), name)
