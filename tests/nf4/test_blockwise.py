"""Blockwise quantization: against NumPy, brute force and bitsandbytes, bit for bit; its error on N(0, 1)."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qloralab.nf4 import blockwise
from qloralab.nf4.codebook import dynamic_map, normal_float, thresholds
from qloralab.nf4.packed import BLOCK_SIZES

NF4 = normal_float(4)
SIZES = (0, 1, 2, 63, 64, 65, 127, 1000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
block_sizes = pytest.mark.parametrize("block_size", BLOCK_SIZES)

# Mean and standard deviation of one draw's mean error, N(0, 1) 1024x1024: bitsandbytes' own, over 200 draws.
# block size: (mean |error|, sigma, mean |error| / |x|, sigma)
ERROR = {
    32: (0.067746, 6.9e-5, 0.189726, 3.04e-4),
    64: (0.072798, 7.4e-5, 0.203339, 3.40e-4),
    128: (0.076831, 9.1e-5, 0.215237, 3.91e-4),
    256: (0.080337, 1.02e-4, 0.226105, 3.98e-4),
    512: (0.083547, 1.43e-4, 0.236079, 5.44e-4),
    1024: (0.086610, 1.87e-4, 0.245370, 6.00e-4),
    2048: (0.089592, 2.51e-4, 0.254163, 7.47e-4),
    4096: (0.092547, 3.60e-4, 0.262473, 9.99e-4),
}
SIGMAS = 7
HALF_GAP = 0.15191  # half the widest gap of NF4, between its first two values


def quantize_numpy(weight: Tensor, block_size: int) -> tuple[bytes, bytes]:
    """A restatement with loops; a code is the number of float32 midpoints strictly below the quotient."""
    w, table = weight.float().numpy().ravel(), NF4.numpy().astype(np.float64)
    midpoints = ((table[1:] + table[:-1]) / 2).astype(np.float32)
    codes, absmax = [], []
    for start in range(0, len(w), block_size):
        block = w[start : start + block_size]
        scale = np.abs(block).max()
        tiny = np.finfo(np.float32).tiny
        if scale == 0:
            quotient = np.zeros_like(block)
        elif scale < tiny or np.float32(1) / scale < tiny:
            quotient = block / scale
        else:
            quotient = block * (np.float32(1) / scale)
        codes += [int((midpoints < q).sum()) for q in quotient]
        absmax.append(scale)
    codes += [7] * (len(codes) % 2)
    packed = bytes(16 * high + low for high, low in zip(codes[::2], codes[1::2], strict=True))
    return packed, np.array(absmax, dtype=np.float32).tobytes()


def round_trip(weight: Tensor, block_size: int = 64) -> Tensor:
    packed, absmax = blockwise.quantize_blockwise(weight, NF4, block_size)
    return blockwise.dequantize_blockwise(packed, absmax, NF4, block_size, weight.numel())


def codes_of(weight: Tensor, block_size: int = 64) -> list[int]:
    packed, _ = blockwise.quantize_blockwise(weight, NF4, block_size)
    return blockwise.unpack(packed, weight.numel()).tolist()


@dtypes
@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("n", SIZES)
def test_codes_and_scales_equal_numpy(n, block_size, dtype):
    weight = torch.randn(n).to(dtype)
    packed, absmax = blockwise.quantize_blockwise(weight, NF4, block_size)
    assert (packed.dtype, packed.shape) == (torch.uint8, ((n + 1) // 2, 1))
    assert (absmax.dtype, absmax.shape) == (torch.float32, (-(-n // block_size),))
    assert (packed.numpy().tobytes(), absmax.numpy().tobytes()) == quantize_numpy(weight, block_size)


# A factor for scales in (0.5, 1) -> whether the quotient is the true one there: their reciprocal is no normal float32.
@pytest.mark.parametrize(
    ("factor", "exact"), [(1.0, False), (2.0**126, False), (2.0**127, True), (2.0**-126, True)], ids=str
)
def test_the_quotient_is_by_the_reciprocal_where_that_is_normal(factor, exact):
    # Blocks of a scale and its products with the thresholds, and their neighbours: there the two quotients part.
    scale = (torch.rand(500, 1) / 2 + 0.5) * factor
    at = scale * thresholds(NF4)
    blocks = torch.cat([scale, at, at.nextafter(scale), at.nextafter(-scale)], dim=1)
    weight = torch.nn.functional.pad(blocks, (0, 64 - blocks.shape[1]))
    by_division = blockwise.nearest(weight / scale, NF4).flatten().tolist()
    by_reciprocal = blockwise.nearest(weight * (1 / scale), NF4).flatten().tolist()
    assert by_division != by_reciprocal
    assert codes_of(weight) == (by_division if exact else by_reciprocal)
    assert blockwise.quantize_blockwise(weight, NF4, 64)[0].numpy().tobytes() == quantize_numpy(weight, 64)[0]


@pytest.mark.parametrize("k", range(15))
def test_a_tie_goes_to_the_lower_index(k):
    tie = thresholds(NF4)[k]
    around = torch.stack([tie.nextafter(torch.tensor(-2.0)), tie, tie.nextafter(torch.tensor(2.0))])
    assert codes_of(torch.cat([torch.ones(1), around]))[1:] == [k, k, k + 1]


@pytest.mark.parametrize("values", [NF4, dynamic_map()], ids=["nf4", "dynamic"])
def test_nearest_is_the_nearest_in_float64(values):
    x = torch.cat([torch.rand(20_000) * 2 - 1, torch.randn(5_000), values, torch.tensor([0.0, -0.0, 1e-30, -1e-30])])
    distance = (x.double()[:, None] - values.double()).abs()
    codes = blockwise.nearest(x, values)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == distance.numpy().argmin(axis=1).tolist()


def test_first_code_is_in_the_high_nibble():
    packed, _ = blockwise.quantize_blockwise(torch.tensor([1.0, -1.0, 0.0, 1.0]), NF4, 64)
    assert packed.tolist() == [[0xF0], [0x7F]]


def test_an_odd_count_is_completed_by_the_code_of_zero():
    packed, _ = blockwise.quantize_blockwise(torch.tensor([1.0, -1.0, 1.0]), NF4, 64)
    assert packed.tolist() == [[0xF0], [0xF7]]


@given(st.lists(st.integers(0, 15), max_size=200))
def test_unpack_inverts_pack(codes):
    tensor = torch.tensor(codes, dtype=torch.uint8)
    packed = blockwise.pack(tensor, NF4)
    assert packed.shape == ((len(codes) + 1) // 2, 1)
    assert torch.equal(blockwise.unpack(packed, len(codes)), tensor)


@pytest.mark.parametrize("n", SIZES)
@block_sizes
def test_dequantize_is_value_times_scale(n, block_size):
    codes = torch.randint(0, 16, (n,), dtype=torch.uint8)
    absmax = torch.rand(-(-n // block_size)) * 5
    found = blockwise.dequantize_blockwise(blockwise.pack(codes, NF4), absmax, NF4, block_size, n)
    expected = NF4.numpy()[codes.numpy()] * np.repeat(absmax.numpy(), block_size)[:n]
    assert found.dtype == torch.float32
    assert found.numpy().tobytes() == (expected + np.float32(0)).tobytes()


@dtypes
@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000])
def test_zeros_have_scale_0_and_code_7_and_come_back_as_plus_zero(n, dtype):
    packed, absmax = blockwise.quantize_blockwise(torch.full((n,), -0.0, dtype=dtype), NF4, 64)
    assert (absmax == 0).all()
    assert not absmax.signbit().any()
    assert (packed == 0x77).all()
    back = blockwise.dequantize_blockwise(packed, absmax, NF4, 64, n)
    assert (back == 0).all()
    assert not back.signbit().any()


def test_a_zero_under_a_negative_scale_is_plus_zero():
    back = blockwise.dequantize_blockwise(torch.full((32, 1), 0x77).byte(), torch.tensor([-0.5]), NF4, 64, 64)
    assert not back.signbit().any()


def test_one_element_is_kept_whichever_its_sign():
    assert round_trip(torch.tensor([-3.25])).tolist() == [-3.25]
    assert round_trip(torch.tensor([3.25])).tolist() == [3.25]


@pytest.mark.parametrize("exponent", [-149, -148, -140, -127, -126, -125, 0, 125, 126, 127])
def test_any_scale_is_divided_by_rightly(exponent):
    # Quarters are exact at any scale from 2**-147.
    ratios = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.25, 0.0])
    weight = ratios * 2.0**exponent
    packed, absmax = blockwise.quantize_blockwise(weight, NF4, 64)
    assert absmax.tolist() == [2.0**exponent]
    assert packed.numpy().tobytes() == quantize_numpy(weight, 64)[0]
    if exponent >= -147:
        assert codes_of(weight) == codes_of(ratios)
    assert round_trip(weight).isfinite().all()


def test_the_largest_float32_is_kept():
    big = torch.finfo(torch.float32).max
    assert round_trip(torch.tensor([big, -big])).tolist() == [big, -big]


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(finite, max_size=200), st.sampled_from([32, 64]))
def test_any_finite_weight_comes_back_within_half_a_gap(numbers, block_size):
    weight = torch.tensor(numbers, dtype=torch.float32)
    packed, absmax = blockwise.quantize_blockwise(weight, NF4, block_size)
    assert (packed.numpy().tobytes(), absmax.numpy().tobytes()) == quantize_numpy(weight, block_size)
    back = blockwise.dequantize_blockwise(packed, absmax, NF4, block_size, len(numbers))
    scale = absmax.double().repeat_interleave(block_size)[: len(numbers)]
    assert ((back.double() - weight.double()).abs() <= HALF_GAP * scale * (1 + 1e-5) + 2.0**-149).all()
    largest = weight.abs() == scale
    assert torch.equal(back[largest], weight[largest] + 0.0)


@pytest.mark.parametrize("n", [65, 1000, 4096])
def test_quantizing_what_came_back_changes_nothing(n):
    once = round_trip(torch.randn(n))
    assert torch.equal(round_trip(once), once)


@block_sizes
def test_error_on_normal_weights_is_that_of_nf4(block_size):
    weight = torch.randn(1024, 1024).flatten()
    error = (round_trip(weight, block_size) - weight).abs()
    mean, sigma, relative_mean, relative_sigma = ERROR[block_size]
    assert error.mean().item() == pytest.approx(mean, abs=SIGMAS * sigma)
    assert (error / (weight.abs() + 1e-8)).mean().item() == pytest.approx(relative_mean, abs=SIGMAS * relative_sigma)


# Whole blocks, rows of whole blocks: elsewhere bitsandbytes divides in the tail and misreads scales on some CPUs.
@dtypes
@pytest.mark.parametrize(("shape", "block_size"), [((8, 64), 64), ((65, 128), 64), ((32, 256), 128), ((4, 1024), 1024)])
def test_equals_bitsandbytes_bit_for_bit(shape, block_size, dtype):
    weight = torch.randn(shape).to(dtype)
    packed, absmax = blockwise.quantize_blockwise(weight, NF4, block_size)
    theirs, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
    assert torch.equal(packed, theirs)
    assert torch.equal(absmax, state.absmax)
    back = blockwise.dequantize_blockwise(packed, absmax, NF4, block_size, weight.numel()).view(shape)
    assert torch.equal(back.to(dtype), bnb.dequantize_4bit(theirs, state))
