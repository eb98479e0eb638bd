"""A weight of more than 2**31 elements: no index and no offset in bytes wraps around.

Its numbers repeat with a period that shares no factor with a power of two, so an address that is off by 2**31 or 2**32
finds other numbers. What is expected anywhere comes from the same numbers in a small tensor.
"""

from __future__ import annotations

import psutil
import pytest
import torch
from torch import Tensor

from qloralab import QuantizedTensor, linear, quantize
from qloralab.kernels import dispatch
from qloralab.nf4 import double_quant
from qloralab.nf4.blockwise import divide, nearest
from qloralab.nf4.packed import SCALES_PER_BLOCK

pytestmark = pytest.mark.slow

N, K = 46_341, 46_343  # odd; rows begin anywhere in a block
NUMEL = N * K  # 2**31 + 97,315
PERIOD = 1_000_003
GROUP = 64 * SCALES_PER_BLOCK  # weights under one second-level scale
MEMORY = (
    6_200_000_000  # bytes: the weight in bfloat16, its codes, its scales in float32 and, for their mean, in float64
)
SPARE = 2 * 10**9

# Groups to look at: both ends, the one below and above each power of two of elements and of bytes, some in between.
PLACES = sorted(
    {0, NUMEL // GROUP}
    | {2**exponent // GROUP + step for exponent in (29, 30, 31) for step in (-1, 0)}
    | {NUMEL // GROUP * part // 7 for part in range(1, 7)}
)
places = pytest.mark.parametrize("group", PLACES)


@pytest.fixture(scope="module")
def period() -> Tensor:
    """bfloat16 [PERIOD]."""
    return torch.randn(PERIOD, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.fixture(scope="module")
def q(period) -> QuantizedTensor:
    """The weight [N, K], quantized; it itself is gone."""
    if dispatch.native() is None:
        pytest.skip("needs the C kernels, so a C compiler: the reference takes ten times the memory")
    available = psutil.virtual_memory().available
    if available < MEMORY + SPARE:
        pytest.skip(f"needs {(MEMORY + SPARE) / 1e9:.0f} GB of free memory; there are {available / 1e9:.1f}")
    weight = torch.empty(NUMEL, dtype=torch.bfloat16)
    for start in range(0, NUMEL, PERIOD):
        weight[start : start + PERIOD] = period[: NUMEL - start]
    return quantize(weight.view(N, K))


@pytest.fixture(scope="module")
def dense(q) -> Tensor:
    """The weight that comes back: bfloat16 [N, K]."""
    return q.dequantize()


def numbers(period: Tensor, start: int, stop: int) -> Tensor:
    """What the weight had there."""
    return period[torch.arange(start, min(stop, NUMEL)) % PERIOD]


def test_it_is_large_and_its_parts_have_their_sizes(q):
    assert q.numel() > 2**31
    assert q.packed.shape == ((NUMEL + 1) // 2, 1)
    assert q.scales.shape == (-(-NUMEL // 64),)
    assert q.absmax2.shape == (-(-NUMEL // GROUP),)
    assert q.bits_per_parameter == pytest.approx(4.127, abs=1e-4)


@places
def test_codes_and_scales_are_those_of_the_part_alone(q, period, group):
    start = group * GROUP
    alone = quantize(numbers(period, start, start + GROUP), double_quant=False)
    assert torch.equal(q.packed[start // 2 : (start + GROUP) // 2], alone.packed)
    residual = alone.scales - q.offset
    absmax2 = residual.abs().amax()
    assert q.absmax2[group] == absmax2
    expected = nearest(divide(residual, absmax2), double_quant.dynamic_map())
    assert torch.equal(q.scales[group * 256 : (group + 1) * 256], expected)


def test_the_offset_is_the_mean_of_all_scales(q, period):
    # 64 periods hold a block from each place in the period.
    mean = quantize(period.repeat(64), double_quant=False).scales.double().mean()
    assert q.offset.item() == pytest.approx(mean.item(), rel=1e-4)


@places
def test_what_comes_back_is_value_times_scale(q, dense, group):
    start, stop = group * GROUP, min((group + 1) * GROUP, NUMEL)
    packed = q.packed[start // 2 : (stop + 1) // 2].flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: stop - start].int()
    scales = dynamic(q, group).repeat_interleave(64)[: stop - start]
    assert torch.equal(dense.view(-1)[start:stop], (q.values[codes] * scales).bfloat16())


def dynamic(q: QuantizedTensor, group: int) -> Tensor:
    """The scales under one second-level scale, decoded: float32 [256], or fewer in the last group."""
    assert q.absmax2 is not None
    assert q.offset is not None
    codes = q.scales[group * 256 : (group + 1) * 256]
    return double_quant.dynamic_map()[codes.int()] * q.absmax2[group] + q.offset


@pytest.mark.parametrize("column", [0, 1, K // 2, K - 1])
def test_one_input_alone_picks_its_column(q, dense, column):
    x = torch.zeros(1, K, dtype=torch.bfloat16)
    x[0, column] = 1
    assert torch.equal(linear(x, q)[0], dense[:, column])


def test_one_token(q, dense):
    x = torch.randn(1, K).bfloat16()
    y = linear(x, q)[0]
    for row in (0, 1, N // 4, N // 2, N - 2, N - 1, 2**31 // K, 2**30 // K):
        exact = dense[row].double() @ x[0].double()
        # One rounding to bfloat16, and those of a float32 sum.
        assert abs(y[row].item() - exact.item()) <= 2.0**-8 * abs(exact) + 1e-6 * (dense[row] * x[0]).abs().sum()


def test_the_gradient_of_one_output_is_its_row(q, dense):
    row = N - 1  # the others lie before it
    x = torch.zeros(1, K, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.zeros(1, N, dtype=torch.bfloat16)
    dy[0, row] = 1
    (dx,) = torch.autograd.grad(linear(x, q), x, dy)
    assert torch.equal(dx[0], dense[row])
