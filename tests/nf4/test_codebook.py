"""The codebooks: bit for bit the published ones, derived again here by other means."""

from __future__ import annotations

import hashlib
from statistics import NormalDist

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from scipy.stats import norm

from qloralab.nf4 import codebook

NF4_SHA256 = "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a"
UNSIGNED_SHA256 = "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398"
DYNAMIC_SHA256 = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"

# Appendix E of the paper, as printed.
APPENDIX_E = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# The decision tree of bitsandbytes' CUDA kernel, whose literals are rounded to float32.
NF4_THRESHOLDS = (
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
    -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
    0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
)  # fmt: skip

# Float64 quantiles against float32 ones: the rounding of a probability near 1, magnified by Q' (at 8 bits, offset
# 0.998: 6e-8 / 2 * 160 / 2.9 = 2e-6), and no more.
QUANTILE_TOLERANCE = 4e-6
# One rounding of an edge and one of a middle in float32.
DYNAMIC_TOLERANCE = 2e-7


def sha256(values: torch.Tensor) -> str:
    return hashlib.sha256(values.numpy().astype("<f4").tobytes()).hexdigest()


def quantiles(bits: int) -> np.ndarray:
    """NormalFloat from its definition, in float64, the standard library's quantile function."""
    positive, negative = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    offset = round(((1 - 1 / 2 / 2**bits) + (1 - 1 / 2 / (2**bits - 1))) / 2, 7)
    upper = [NormalDist().inv_cdf(offset + (0.5 - offset) * i / positive) for i in range(positive)]
    lower = [-NormalDist().inv_cdf(offset + (0.5 - offset) * i / negative) for i in range(negative)]
    return np.array(sorted([*upper, *lower, 0.0])) / max(upper)


def test_nf4_is_the_published_table_bit_for_bit():
    values = codebook.normal_float(4)
    assert values.dtype == torch.float32
    assert sha256(values) == NF4_SHA256
    assert values.tolist() == list(APPENDIX_E)


def test_nf4_is_the_table_of_bitsandbytes():
    assert torch.equal(codebook.codebook_values("nf4"), bnb.get_4bit_type("nf4", device="cpu"))


def test_default_width_is_four_bits():
    assert torch.equal(codebook.normal_float(), codebook.normal_float(4))


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_float_equals_one_built_with_scipys_norm_ppf(bits):
    half = 2 ** (bits - 1)
    offset = round((1 - 1 / (4 * half) + 1 - 1 / (4 * half - 2)) / 2, 7)
    upper = norm.ppf(torch.linspace(offset, 0.5, half + 1, dtype=torch.float32)[:-1].numpy().astype(np.float64))
    lower = -norm.ppf(torch.linspace(offset, 0.5, half, dtype=torch.float32)[:-1].numpy().astype(np.float64))
    values = np.sort(np.concatenate([upper, lower, [0.0]]).astype(np.float32))
    assert codebook.normal_float(bits).numpy().tobytes() == (values / values.max()).tobytes()


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_float_is_near_float64_quantiles(bits):
    np.testing.assert_allclose(codebook.normal_float(bits).numpy(), quantiles(bits), rtol=0, atol=QUANTILE_TOLERANCE)


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_float_is_an_ascending_codebook_with_an_exact_zero(bits):
    values = codebook.normal_float(bits)
    zero = 2 ** (bits - 1) - 1
    assert values.shape == (2**bits,)
    assert (values.diff() > 0).all()
    assert values[0] == -1
    assert values[-1] == 1
    assert values[zero] == 0
    assert not values[zero].signbit()


@pytest.mark.parametrize("bits", [-1, 0, 1, 9])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match=rf"2 to 8 bits, not {bits}"):
        codebook.normal_float(bits)


def test_unknown_codebook_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'fp5'.*nf4"):
        codebook.codebook_values("fp5")


def test_dynamic_map_is_the_published_one_bit_for_bit():
    values = codebook.dynamic_map()
    assert values.dtype == torch.float32
    assert sha256(values) == DYNAMIC_SHA256
    assert torch.equal(values, bnb.create_dynamic_map())


def test_the_unsigned_dynamic_map_is_the_published_one_bit_for_bit():
    values = codebook.dynamic_map(signed=False)
    assert sha256(values) == UNSIGNED_SHA256
    assert torch.equal(values, bnb.create_dynamic_map(signed=False))
    assert (values.diff() > 0).all()
    assert values[0] == 0
    assert values[255] == 1


def test_dynamic_map_is_seven_evenly_cut_decades():
    expected = [0.0, 1.0]
    for decade in range(7):
        n = 2**decade
        middles = [(0.1 + 0.9 * (i + 0.5) / n) * 10.0 ** (decade - 6) for i in range(n)]
        expected += middles + [-m for m in middles]
    values = codebook.dynamic_map()
    np.testing.assert_allclose(values.numpy(), np.array(sorted(expected)), rtol=DYNAMIC_TOLERANCE)
    assert (values.diff() > 0).all()
    assert values[127] == 0
    assert values[255] == 1
    assert values[0].item() == -0.992968738079071


def test_nf4_thresholds_are_those_of_bitsandbytes():
    assert torch.equal(codebook.thresholds(codebook.normal_float(4)), torch.tensor(NF4_THRESHOLDS))


@pytest.mark.parametrize("values", [codebook.normal_float(4), codebook.dynamic_map()], ids=["nf4", "dynamic"])
def test_thresholds_are_midpoints_rounded_once(values):
    exact = (values.double()[1:] + values.double()[:-1]) / 2
    assert torch.equal(codebook.thresholds(values), exact.float())


@pytest.fixture(params=["float64", "bfloat16", "meta"])
def defaults(request):
    """Other defaults of torch than float32 on the CPU."""
    before = torch.get_default_dtype()
    try:
        if request.param == "meta":
            with torch.device("meta"):
                yield
        else:
            torch.set_default_dtype(getattr(torch, request.param))
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.usefixtures("defaults")
def test_codebooks_do_not_depend_on_torchs_defaults():
    assert sha256(codebook.normal_float(4)) == NF4_SHA256
    assert sha256(codebook.codebook_values("nf4")) == NF4_SHA256
    assert sha256(codebook.dynamic_map()) == DYNAMIC_SHA256
