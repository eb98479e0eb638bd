"""The codebooks: bit for bit the published ones, and those of SciPy's own normal distribution."""

from __future__ import annotations

import hashlib

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


def sha256(values: torch.Tensor) -> str:
    return hashlib.sha256(values.numpy().astype("<f4").tobytes()).hexdigest()


def test_nf4_is_the_published_table_bit_for_bit():
    values = codebook.normal_float()
    assert values.dtype == torch.float32
    assert sha256(values) == NF4_SHA256
    assert values.tolist() == list(APPENDIX_E)
    assert torch.equal(codebook.codebook_values("nf4"), values)
    assert torch.equal(bnb.get_4bit_type("nf4", device="cpu"), values)


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_float_equals_one_built_with_scipys_norm_ppf(bits):
    half = 2 ** (bits - 1)
    offset = round((1 - 1 / (4 * half) + 1 - 1 / (4 * half - 2)) / 2, 7)
    upper = norm.ppf(torch.linspace(offset, 0.5, half + 1, dtype=torch.float32)[:-1].numpy().astype(np.float64))
    lower = -norm.ppf(torch.linspace(offset, 0.5, half, dtype=torch.float32)[:-1].numpy().astype(np.float64))
    values = np.sort(np.concatenate([upper, lower, [0.0]]).astype(np.float32))
    assert codebook.normal_float(bits).numpy().tobytes() == (values / values.max()).tobytes()


@pytest.mark.parametrize("bits", [-1, 0, 1, 9])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match=rf"2 to 8 bits, not {bits}"):
        codebook.normal_float(bits)


@pytest.mark.parametrize(("signed", "sha"), [(True, DYNAMIC_SHA256), (False, UNSIGNED_SHA256)])
def test_the_dynamic_map_is_the_published_one_bit_for_bit(signed, sha):
    values = codebook.dynamic_map(signed)
    assert sha256(values) == sha
    assert torch.equal(values, bnb.create_dynamic_map(signed))


def test_nf4_thresholds_are_those_of_bitsandbytes():
    assert torch.equal(codebook.thresholds(codebook.normal_float(4)), torch.tensor(NF4_THRESHOLDS))


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
    assert sha256(codebook.dynamic_map()) == DYNAMIC_SHA256
