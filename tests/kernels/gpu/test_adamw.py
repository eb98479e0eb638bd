"""AdamW in Triton: the bits of the definition, for segments of any size, dtype and alignment, and no byte too far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

import pytest
import torch
from torch import Tensor

from qloralab.kernels.adamw import ADAMW, Rates
from qloralab.kernels.gpu import adamw, adamw_8bit
from qloralab.kernels.gpu.segments import launches
from qloralab.kernels.moment_codes import quantize_moment
from qloralab.kernels.rule import DTYPES, Segments

RATES = Rates(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
SIZES = [1, 0, 16, adamw.TILE, 33, adamw_8bit.TILE + 256, 5000]
STEPS = [1, 1, 5, 2, 1000, 3, 7]

Guarded = Callable[..., Tensor]
Lists = list[list[Tensor]]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
both_bits = pytest.mark.parametrize("bits", [32, 8])
# The interpreter's numpy, where a quotient overflows or is none.
numpy_warnings = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def chunk(
    guarded: Guarded, sizes: Sequence[int], dtype: torch.dtype, bits: int = 32, scale: float = 1.0, offset: int = 0
) -> tuple[Lists, Lists]:
    """Lists of p, g, m and v, and of their scales: in guarded memory, and once more on the CPU."""
    p = [torch.randn(n).to(dtype) for n in sizes]
    for one in p:
        one[:1] = -0.0
    g = [(scale * torch.randn(n) * torch.logspace(-4, 0, n)).to(dtype) for n in sizes]
    lists = [p, g, [scale * torch.randn(n) for n in sizes], [scale * torch.rand(n) for n in sizes]]
    if bits == 8:
        coded = [[quantize_moment(one, k == 2) for one in lists[k]] for k in (2, 3)]
        lists[2:] = [[pair[i] for pair in some] for i in (0, 1) for some in coded]
    return [[guarded(one, offset=offset * one.itemsize) for one in some] for some in lists], lists


def segments(lists: Lists, steps: Sequence[int]) -> Segments:
    return Segments(lists[0], lists[1], lists[2:4], lists[4:] or None, steps)


def check(found: Lists, expected: Lists, steps: Sequence[int], updates: int = 2, rates: Rates = RATES) -> None:
    """Both updated: no bit differs; one NaN is as good as another."""
    launch = adamw.adamw if len(found) == 4 else adamw_8bit.adamw_8bit
    for k in range(updates):
        now = [step + k for step in steps]
        launch(segments(found, now), rates)
        ADAMW.apply_(segments(expected, now), rates, rounded=True)
        for a, b in zip(chain(*found), chain(*expected), strict=True):
            nan = b.isnan()
            assert torch.equal(a.cpu().isnan(), nan)
            a, b = a.cpu().masked_fill(nan, 0), b.masked_fill(nan, 0)
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@dtypes
@both_bits
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "anywhere"])
def test_bits_of_the_definition(offset, bits, dtype, guarded):
    check(*chunk(guarded, SIZES, dtype, bits, offset=offset), STEPS)


@both_bits
@pytest.mark.parametrize("beta1", [0.0, 0.3])
def test_a_small_beta1(beta1, bits, guarded):
    check(*chunk(guarded, [700, 512], torch.float32, bits), [1, 2], rates=replace(RATES, beta1=beta1))


@numpy_warnings
@pytest.mark.parametrize("scale", [0.0, 1e-39, 2.0**-63, 1e12, 1.4e19])
def test_scales_of_any_size(scale, guarded):
    check(*chunk(guarded, [700, 512], torch.float32, 8, scale), [1, 2])


@numpy_warnings
@both_bits
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite(wrong, bits, guarded):
    found, expected = chunk(guarded, [700, 33], torch.float32, bits)
    for some in (found, expected):
        some[1][0][300] = some[1][1][3] = wrong
    check(found, expected, [1, 2], updates=3)


@both_bits
def test_segments_of_all_kinds_at_once(bits, guarded):
    parts = [chunk(guarded, [33, 1024], dtype, bits) for dtype in DTYPES]
    found, expected = ([list(chain(*some)) for some in zip(*(part[k] for part in parts), strict=True)] for k in (0, 1))
    check(found, expected, [1, 2, 3, 4, 5, 6])


@both_bits
def test_nothing_is_launched_for_nothing(bits, guarded):
    check(*chunk(guarded, [0, 0], torch.float32, bits), [1, 2])
    assert list(launches(segments([[], [], [], []], []), RATES, 1024)) == []


def test_each_kind_is_one_launch(guarded):
    """Of whole and aligned segments, of others, and of another dtype; every program has its segment."""
    found, _ = chunk(guarded, [4096, 0, 32, 2048 + 16], torch.bfloat16)
    for some, other in zip(found, chunk(guarded, [5000], torch.bfloat16)[0], strict=True):
        some += other
    made = list(launches(segments(found, [1, 2, 3, 4, 5]), RATES, 1024))
    assert [(one.dtype, one.aligned) for one in made] == [(torch.bfloat16, True), (torch.bfloat16, False)]
    whole, other = made
    assert whole.segment_of.tolist() == [0] * 4 + [1] + [2] * 3
    assert whole.table[:, 4:6].tolist() == [[4096, 0], [32, 4], [2064, 5]]
    assert whole.table[:, 0].tolist() == [found[0][k].data_ptr() for k in (0, 2, 3)]
    assert other.segment_of.tolist() == [0] * 5
    assert len(list(launches(segments(chunk(guarded, [16], torch.float16)[0], [1]), RATES, 1024))) == 1
