"""Moments in 8 bits: codes are the nearest, and the tables with which kernels find them count thresholds."""

from __future__ import annotations

import pytest
import torch

from qloralab.kernels.moment_codes import BLOCK_SIZE, dequantize_moment, moment_tables, quantize_moment
from qloralab.nf4.codebook import dynamic_map, thresholds

signs = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


@signs
def test_a_moment_is_the_nearest_multiple_of_its_scale(signed):
    moment = torch.randn(5 * BLOCK_SIZE - 7) * torch.logspace(-9, 3, 5 * BLOCK_SIZE - 7)
    moment = moment if signed else moment.abs()
    codes, absmax = quantize_moment(moment, signed)
    for k in range(5):
        block = moment[BLOCK_SIZE * k : BLOCK_SIZE * (k + 1)].double()
        assert absmax[k] == block.abs().max()
        distance = (block[:, None] / absmax[k].double() - dynamic_map(signed).double()).abs()
        chosen = distance.gather(1, codes[BLOCK_SIZE * k : BLOCK_SIZE * (k + 1), None].long())[:, 0]
        assert (chosen <= distance.amin(dim=1) + 2e-7).all()  # a rounding of the quotient, one of the threshold


@signs
def test_what_a_moment_stands_for_has_the_same_codes(signed):
    codes = torch.randint(256, (1000,), dtype=torch.uint8)
    codes[::BLOCK_SIZE] = 255  # in each block an element as large as its scale
    absmax = torch.tensor([1.0, 2.0**-120, 3e5, 1e-9])
    again, scales = quantize_moment(dequantize_moment(codes, absmax, signed), signed)
    assert torch.equal(again, codes)
    assert torch.equal(scales, absmax)


@pytest.mark.parametrize("shift", [17, 16], ids=["signed", "unsigned"])
def test_the_tables_count_thresholds(shift):
    """For the smallest, the middle and the largest number of each bin, and beside each threshold."""
    row = 17 - shift
    values, limits, below = (table[row] for table in moment_tables())
    assert torch.equal(values, dynamic_map(signed=row == 0))
    exact = thresholds(values)
    assert torch.equal(limits, torch.cat([exact, torch.tensor([torch.inf])]))
    first = torch.arange(2**15) << shift
    bits = torch.cat([first, first + (1 << shift - 1), first + (1 << shift) - 1]).to(torch.int32)
    at = exact if row == 0 else exact[exact > 0]
    beside = [at, at.nextafter(torch.tensor(torch.inf)), at.nextafter(torch.tensor(-torch.inf))]
    numbers = torch.cat([bits.view(torch.float32), *beside, torch.tensor([0.0, 1.0, 1.0000001, torch.inf, torch.nan])])
    numbers = numbers[numbers != -torch.inf]  # no quotient is: x / inf is 0 or NaN
    bin_ = (numbers.view(torch.int32) >> shift) & (2**15 - 1)
    certain = below[bin_.long()].long()
    found = certain + (numbers > limits[certain])
    assert torch.equal(found, torch.bucketize(numbers, exact))
