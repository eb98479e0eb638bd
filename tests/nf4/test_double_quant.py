"""Double quantization against NumPy, brute force, and the figures of the paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qloralab.nf4 import double_quant
from qloralab.nf4.codebook import dynamic_map
from qloralab.nf4.tensor import quantize

SIZES = (0, 1, 63, 255, 256, 257, 1000)
MAP = dynamic_map().numpy()

# Decoded scales of N(0, 1) in blocks of 64, relative error: measured with bitsandbytes on 4096x1024 as mean 0.16 %,
# maximum 0.93 %. The mean of 65,536 scales varies by less than a percent of itself, the maximum by more.
MEAN_ERROR = 0.0016
MEAN_ERROR_SLACK = 0.00005
MAX_ERROR_RANGE = (0.006, 0.012)
# Half the widest gap of the map (its first, 0.0141) plus the rounding of float32 at the size of the offset.
HALF_GAP = 0.00704


def scales(n: int) -> Tensor:
    """What blocks of 64 of N(0, 1) have: positive, alike."""
    return torch.randn(n, 64).abs().amax(dim=1)


def quantize_numpy(absmax: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """A restatement with a loop over blocks; the nearest value by trying all 256 in float64."""
    offset = np.float32(absmax.astype(np.float64).sum() / max(len(absmax), 1))
    codes, absmax2 = [], []
    for start in range(0, len(absmax), 256):
        residual = absmax[start : start + 256] - offset
        scale = np.abs(residual).max()
        quotient = residual * (np.float32(1) / scale) if scale else np.zeros_like(residual)
        codes.append(np.abs(quotient[:, None].astype(np.float64) - MAP.astype(np.float64)).argmin(axis=1))
        absmax2.append(scale)
    return np.concatenate([np.zeros(0), *codes]).astype(np.uint8), np.array(absmax2, dtype=np.float32), offset


@pytest.mark.parametrize("n", SIZES)
def test_quantize_scales_equals_numpy(n):
    absmax = scales(n)
    codes, absmax2, offset = double_quant.quantize_scales(absmax)
    expected_codes, expected_absmax2, expected_offset = quantize_numpy(absmax.numpy())
    assert (codes.dtype, absmax2.dtype, offset.dtype, offset.shape) == (torch.uint8, *[torch.float32] * 2, ())
    assert codes.numpy().tobytes() == expected_codes.tobytes()
    assert absmax2.numpy().tobytes() == expected_absmax2.tobytes()
    assert offset.item() == expected_offset


@pytest.mark.parametrize("n", SIZES)
def test_dequantize_scales_rounds_twice_in_float32(n):
    codes = torch.randint(0, 256, (n,), dtype=torch.uint8)
    absmax2, offset = torch.rand(-(-n // 256)) + 0.1, torch.tensor(2.345678)
    product = MAP[codes.numpy()] * np.repeat(absmax2.numpy(), 256)[:n]
    expected = product + offset.numpy()
    assert double_quant.dequantize_scales(codes, absmax2, offset).numpy().tobytes() == expected.tobytes()
    if n == 1000:  # a fused multiply-add would round once, and differ
        once = MAP[codes.numpy()].astype(np.float64) * np.repeat(absmax2.numpy(), 256)[:n] + offset.double().numpy()
        assert (once.astype(np.float32) != expected).any()


def test_offset_is_the_mean_over_the_whole_tensor_summed_in_float64():
    # In float32 the thousand ones after 2**24 are lost.
    absmax = torch.tensor([2.0**24] + [1.0] * 1023)
    assert double_quant.quantize_scales(absmax)[2].item() == np.float32((2**24 + 1023) / 1024)


@pytest.mark.parametrize("n", [1, 64, 256, 300, 1000])
@pytest.mark.parametrize("value", [0.0, 0.1, 3.7, 2.0**-149, 2.0**127], ids=str)
def test_equal_scales_are_exact(n, value):
    absmax = torch.full((n,), value)
    codes, absmax2, offset = double_quant.quantize_scales(absmax)
    assert (codes == 127).all()
    assert (absmax2 == 0).all()
    assert torch.equal(double_quant.dequantize_scales(codes, absmax2, offset), absmax)


@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=600))
def test_a_decoded_scale_is_within_half_a_gap(numbers):
    absmax = torch.tensor(numbers)
    codes, absmax2, offset = double_quant.quantize_scales(absmax)
    error = (double_quant.dequantize_scales(codes, absmax2, offset).double() - absmax.double()).abs()
    scale = absmax2.double().repeat_interleave(256)[: len(absmax)]
    rounding = 2.0**-23 * (scale + offset.double()) + 2.0**-149
    assert (error <= HALF_GAP * scale + rounding).all()


def test_error_of_decoded_scales_is_that_of_bitsandbytes():
    absmax = scales(65_536)
    error = (double_quant.dequantize_scales(*double_quant.quantize_scales(absmax)) / absmax - 1).abs()
    assert error.mean().item() == pytest.approx(MEAN_ERROR, abs=MEAN_ERROR_SLACK)
    assert MAX_ERROR_RANGE[0] < error.max().item() < MAX_ERROR_RANGE[1]


def test_bits_per_parameter_are_those_of_the_paper():
    weight = torch.randn(4096, 1024)
    codes, absmax2, offset = double_quant.quantize_scales(scales(65_536))
    second = 8 * (codes.nbytes + absmax2.nbytes + offset.nbytes) / weight.numel()
    assert round(second, 3) == 0.127
    assert round(quantize(weight).bits_per_parameter, 3) == 4.127
    assert quantize(weight, double_quant=False).bits_per_parameter == 4.5
    assert round(quantize(weight, block_size=32).bits_per_parameter, 3) == 4.254
    assert round(quantize(weight, block_size=128).bits_per_parameter, 3) == 4.063
