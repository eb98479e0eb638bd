"""``dropout.c``, for each instruction set: the bits of the reference."""

from __future__ import annotations

import math

import pytest
import torch
from cases import all_numbers, dtypes, dtypes_of_16_bits, same_bits

from qloralab.lora import ops
from qloralab.lora.dropout import rate

pytestmark = pytest.mark.compiler


@dtypes
@pytest.mark.parametrize("p", [0.0, 1 / 65536, 0.05, 0.5, 0.9, 65535 / 65536])
def test_dropout_gives_the_bits_of_the_reference(library, dtype, p, empty):
    for seed in (0, 20230523, -1, 2**63 - 1, -(2**63)):
        for shape in [(1, 1), (3, 31), (9, 33), (17, 64), (40, 100)]:
            x = torch.randn(shape).to(dtype)
            x[0, 0] = math.nan
            out = empty(*shape, dtype=dtype)
            library.dropout(x, seed, round(rate(p) * 65536), 1 / (1 - rate(p)), out)
            assert same_bits(out, ops.dropout.reference(x, torch.tensor(seed), p)), (seed, shape)


@pytest.mark.parametrize("scale", [1.0, 1 / 3, 0.05, 1 + 2**-11, 1e-6, 7e4])
@dtypes_of_16_bits
def test_every_number_of_16_bits_times_a_factor(library, dtype, scale, empty):
    """Dropout that drops nothing reads and writes every number, through float32."""
    x = all_numbers(dtype)[None]
    out = empty(1, 65536, dtype=dtype)
    library.dropout(x, 0, 0, scale, out)
    assert same_bits(out, (x.float() * torch.tensor(scale)).to(dtype))
