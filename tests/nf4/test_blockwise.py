"""Blockwise quantization: the definition against brute force and bitsandbytes, bit for bit; its error on N(0, 1).

``test_properties.py`` holds it, and each implementation, against loops over Python numbers."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch.nn.functional import pad

from qloralab.nf4 import blockwise
from qloralab.nf4.codebook import CODEBOOKS, codebook_values, dynamic_map, normal_float, thresholds
from qloralab.nf4.tensor import quantize

from .weights import dtypes

NF4 = normal_float(4)

# Mean and standard deviation of one draw's mean error, N(0, 1) 1024x1024: bitsandbytes' own, over 200 draws.
# block size: (mean |error|, sigma, mean |error| / |x|, sigma)
ERROR = {
    "nf4": {
        32: (0.067746, 6.9e-5, 0.189726, 3.04e-4),
        64: (0.072798, 7.4e-5, 0.203339, 3.40e-4),
        128: (0.076831, 9.1e-5, 0.215237, 3.91e-4),
        256: (0.080337, 1.02e-4, 0.226105, 3.98e-4),
        512: (0.083547, 1.43e-4, 0.236079, 5.44e-4),
        1024: (0.086610, 1.87e-4, 0.245370, 6.00e-4),
        2048: (0.089592, 2.51e-4, 0.254163, 7.47e-4),
        4096: (0.092547, 3.60e-4, 0.262473, 9.99e-4),
    },
    "fp4": {
        32: (0.088925, 9.1e-5, 0.242443, 3.30e-4),
        64: (0.096543, 1.11e-4, 0.260125, 3.79e-4),
        128: (0.102969, 1.34e-4, 0.275817, 4.33e-4),
        256: (0.108684, 1.82e-4, 0.289831, 4.97e-4),
        512: (0.114115, 2.34e-4, 0.302881, 5.83e-4),
        1024: (0.119333, 3.20e-4, 0.315000, 7.57e-4),
        2048: (0.124556, 4.55e-4, 0.326607, 9.55e-4),
        4096: (0.129536, 6.12e-4, 0.337169, 1.239e-3),
    },
}
SIGMAS = 7


# A factor for scales in (0.5, 1) -> whether the quotient is the true one there: their reciprocal is no normal float32.
@pytest.mark.parametrize(
    ("factor", "exact"), [(1.0, False), (2.0**126, False), (2.0**127, True), (2.0**-126, True)], ids=str
)
def test_the_quotient_is_by_the_reciprocal_where_that_is_normal(factor, exact):
    # Blocks of a scale and its products with the thresholds, and their neighbours: there the two quotients part.
    scale = (torch.rand(500, 1) / 2 + 0.5) * factor
    at = scale * thresholds(NF4)
    blocks = torch.cat([scale, at, at.nextafter(scale), at.nextafter(-scale)], dim=1)
    weight = pad(blocks, (0, 64 - blocks.shape[1]))
    by_division = blockwise.nearest(weight / scale, NF4).flatten().tolist()
    by_reciprocal = blockwise.nearest(weight * (1 / scale), NF4).flatten().tolist()
    assert by_division != by_reciprocal
    packed, _ = blockwise.quantize_blockwise(weight, NF4, 64)
    assert blockwise.unpack(packed, weight.numel()).tolist() == (by_division if exact else by_reciprocal)


@pytest.mark.parametrize("codebook", [*CODEBOOKS, "dynamic"])
def test_nearest_is_the_nearest_in_float64(codebook):
    """Of two codes of one value it is the lower."""
    values = dynamic_map() if codebook == "dynamic" else codebook_values(codebook)
    x = torch.cat([torch.rand(20_000) * 2 - 1, torch.randn(5_000), values, torch.tensor([0.0, -0.0, 1e-30, -1e-30])])
    distance = (x.double()[:, None] - values.double()).abs()
    codes = blockwise.nearest(x, values)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == distance.numpy().argmin(axis=1).tolist()


@pytest.mark.parametrize(("numbers", "packed"), [([1, -1, 0, 1], [[0xF0], [0x7F]]), ([1, -1, 1], [[0xF0], [0xF7]])])
def test_the_first_code_is_in_the_high_nibble_and_that_of_zero_completes(numbers, packed):
    assert blockwise.quantize_blockwise(torch.tensor(numbers).float(), NF4, 64)[0].tolist() == packed


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


@pytest.mark.parametrize(("codebook", "block_size"), [(name, size) for name in ERROR for size in ERROR[name]])
def test_error_on_normal_weights_is_that_of_bitsandbytes(codebook, block_size):
    weight = torch.randn(1024, 1024)
    error = (quantize(weight, codebook, block_size, double_quant=False).dequantize() - weight).abs()
    mean, sigma, relative_mean, relative_sigma = ERROR[codebook][block_size]
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
