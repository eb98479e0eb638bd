"""AdamW with moments of 8 bits: its codes, its bits, and how near it is to 32 bits and to bitsandbytes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from qloralab.kernels import dispatch
from qloralab.kernels.adamw import DTYPES, Rates, adamw_, adamw_rounded_
from qloralab.kernels.adamw_8bit import BLOCK_SIZE, adamw_8bit_, dequantize_moment, moment_tables, quantize_moment
from qloralab.nf4.codebook import dynamic_map, thresholds

DEFAULTS: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
LARGE: dict[str, Any] = {"lr": 0.3, "beta1": 0.5, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.5}
SIZES = [1, 0, 255, 256, 257, 0, 70_001, 33]  # of segments; more than one task of the C code
NAMES = ("params", "grads", "exp_avgs", "exp_avg_sqs", "absmaxes", "absmax_sqs")

implementation = pytest.mark.parametrize(
    "implementation", [pytest.param("native", marks=pytest.mark.compiler), "reference"]
)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
signs = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])

Segments = list[Tensor]


class Chunk:
    """Segments and their moments."""

    def __init__(self, sizes: Sequence[int] = SIZES, dtype: torch.dtype = torch.float32, begin: bool = False):
        """Numbers of many sizes; `begin` with moments of 0, otherwise with any."""
        self.p: Segments = [torch.randn(n).to(dtype) for n in sizes]
        self.g: Segments = [(torch.randn(n) * torch.logspace(-6, 1, n)).to(dtype) for n in sizes]
        moments = [[torch.zeros(n) if begin else torch.randn(n).exp() for n in sizes] for _ in range(2)]
        m, v = (
            [quantize_moment(one, signed) for one in some] for some, signed in zip(moments, (True, False), strict=True)
        )
        self.m, self.m_absmax = [codes for codes, _ in m], [absmax for _, absmax in m]
        self.v, self.v_absmax = [codes for codes, _ in v], [absmax for _, absmax in v]

    def lists(self) -> tuple[Segments, Segments, Segments, Segments, Segments, Segments]:
        return self.p, self.g, self.m, self.v, self.m_absmax, self.v_absmax

    def copy(self) -> Chunk:
        other = Chunk([])
        for name, tensors in vars(self).items():
            setattr(other, name, [one.clone() for one in tensors])
        return other

    def update(self, steps: Sequence[int], settings: dict[str, Any] = DEFAULTS) -> None:
        adamw_8bit_(*self.lists(), steps, **settings)

    def same(self, other: Chunk) -> bool:
        """Whether all bits are the same, zeros' signs included; one NaN is as good as another."""
        return all(
            same_bits(a, b)
            for one, two in zip(self.lists(), other.lists(), strict=True)
            for a, b in zip(one, two, strict=True)
        )


def same_bits(found: Tensor, expected: Tensor) -> bool:
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    nan = expected.isnan()
    a, b = (one.masked_fill(nan, 0) if nan.any() else one for one in (found, expected))
    return torch.equal(found.isnan(), nan) and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


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


@pytest.mark.compiler
@dtypes
@pytest.mark.parametrize(
    "settings", [DEFAULTS, LARGE, LARGE | {"beta1": 0.0}], ids=["defaults", "large", "no momentum"]
)
@pytest.mark.parametrize("begin", [True, False], ids=["first", "later"])
def test_the_c_has_the_bits_of_the_reference(begin, settings, dtype):
    found = Chunk(dtype=dtype, begin=begin)
    expected = found.copy()
    for k in range(3):
        steps = [1 + k, 5, 2, 1000, 3, 1, 77, 10**6]
        with dispatch.use("native"):
            found.update(steps, settings)
        with dispatch.use("reference"):
            expected.update(steps, settings)
        assert found.same(expected)
        found.g = expected.g = [one * 1.25 for one in found.g]


@pytest.mark.compiler
@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-39, 1.2e-38, 2.0**-63, 1e-12, 1e12, 1.4e19, 9e37])
def test_the_c_has_the_bits_of_the_reference_at_any_scale(scale):
    """Also where a scale or its reciprocal is no normal float32; v is the square of the gradient."""
    found = Chunk([700, 300])
    found.g = [torch.randn(n).clamp(-3, 3) * scale for n in (700, 300)]
    found.m_absmax, found.v_absmax = ([one * scale for one in some] for some in (found.m_absmax, found.v_absmax))
    expected = found.copy()
    for step in (1, 2):
        with dispatch.use("native"):
            found.update([step, step])
        with dispatch.use("reference"):
            expected.update([step, step])
        assert found.same(expected)


@implementation
@dtypes
def test_one_update_is_that_of_32_bits_between_two_conversions(dtype, implementation):
    chunk = Chunk(dtype=dtype)
    steps = list(range(1, 1 + len(SIZES)))
    wide = chunk.copy()
    m = [dequantize_moment(*one, signed=True) for one in zip(chunk.m, chunk.m_absmax, strict=True)]
    v = [dequantize_moment(*one, signed=False) for one in zip(chunk.v, chunk.v_absmax, strict=True)]
    for segment in zip(wide.p, wide.g, m, v, steps, strict=True):
        adamw_rounded_(*segment, Rates(**DEFAULTS))
    wide.m, wide.m_absmax = map(list, zip(*(quantize_moment(one, True) for one in m), strict=True))
    wide.v, wide.v_absmax = map(list, zip(*(quantize_moment(one, False) for one in v), strict=True))
    with dispatch.use(implementation):
        chunk.update(steps)
    assert chunk.same(wide)


@implementation
@dtypes
def test_a_parameter_may_be_cut_at_blocks(dtype, implementation):
    whole = Chunk([20_001], dtype)
    part = whole.copy()
    blocks = [0, 1, 1, 33, 64, 79]  # a task of the C code has 32
    spans = [slice(a * BLOCK_SIZE, b * BLOCK_SIZE) for a, b in pairwise(blocks)]
    p, g, m, v = ([one[0][span] for span in spans] for one in part.lists()[:4])
    scales = [slice(a, b) for a, b in pairwise(blocks)]
    m_absmax, v_absmax = ([one[0][span] for span in scales] for one in part.lists()[4:])
    with dispatch.use(implementation):
        whole.update([3])
        adamw_8bit_(p, g, m, v, m_absmax, v_absmax, [3] * 5, **DEFAULTS)
    assert whole.same(part)


@implementation
def test_moments_begin_as_zeros_whatever_the_codes_are(implementation):
    zeros, any_codes = Chunk([300, 5], begin=True), Chunk([300, 5], begin=True)
    any_codes.p, any_codes.g = ([one.clone() for one in some] for some in (zeros.p, zeros.g))
    any_codes.m, any_codes.v = (
        [torch.randint(256, one.shape, dtype=torch.uint8) for one in some] for some in (zeros.m, zeros.v)
    )
    with dispatch.use(implementation):
        zeros.update([1, 1])
        any_codes.update([1, 1])
    assert zeros.same(any_codes)
    assert (zeros.m_absmax[0] > 0).all()


@implementation
def test_a_block_without_gradient_stays_without_moments(implementation):
    chunk = Chunk([2 * BLOCK_SIZE], begin=True)
    chunk.g[0][:BLOCK_SIZE] = 0
    before = chunk.p[0].clone()
    with dispatch.use(implementation):
        chunk.update([1])
    assert chunk.m_absmax[0].tolist()[0] == chunk.v_absmax[0].tolist()[0] == 0
    assert (chunk.m[0][:BLOCK_SIZE] == 127).all()
    assert (chunk.v[0][:BLOCK_SIZE] == 0).all()
    torch.testing.assert_close(chunk.p[0][:BLOCK_SIZE], before[:BLOCK_SIZE] * (1 - 1e-5))


@implementation
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_its_block(wrong, implementation):
    chunk = Chunk([3 * BLOCK_SIZE])
    chunk.g[0][BLOCK_SIZE + 5] = wrong
    with dispatch.use(implementation):
        chunk.update([1])
        assert (~chunk.p[0].isfinite()).nonzero().tolist() == [[BLOCK_SIZE + 5]]
        assert chunk.m_absmax[0].isfinite().tolist() == chunk.v_absmax[0].isfinite().tolist() == [True, False, True]
        chunk.g[0][BLOCK_SIZE + 5] = 0
        chunk.update([2])
    finite = chunk.p[0].view(3, BLOCK_SIZE).isfinite()
    assert finite[[0, 2]].all()
    assert not finite[1].any()


@pytest.mark.compiler
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_the_c_has_the_codes_of_the_reference_where_nothing_is_finite(wrong):
    found = Chunk([3 * BLOCK_SIZE, 9])
    found.g[0][BLOCK_SIZE + 5] = found.g[1][3] = wrong
    expected = found.copy()
    for step in (1, 2, 3):
        with dispatch.use("native"):
            found.update([step, step])
        with dispatch.use("reference"):
            expected.update([step, step])
        assert found.same(expected)


class Theirs:
    """A parameter that bitsandbytes' operator on CPUs updates."""

    def __init__(self, start: Tensor):
        self.p, (n,) = start.clone(), start.shape
        self.m, self.v = torch.full((n,), 127, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8)
        self.m_absmax, self.v_absmax = torch.zeros(-(-n // BLOCK_SIZE)), torch.zeros(-(-n // BLOCK_SIZE))
        self.maps = bnb.create_dynamic_map(signed=True), bnb.create_dynamic_map(signed=False)

    def update(self, grad: Tensor, step: int, lr: float = 1e-3) -> None:
        bnb.optimizer_update_8bit_blockwise(
            "adam", grad, self.p, self.m, self.v, 0.9, 0.999, 0.0, 0.0, 1e-8, step, lr, *self.maps, self.m_absmax,
            self.v_absmax, 0.01, 1.0,
        )  # fmt: skip


def quadratic(numel: int = 8192) -> tuple[Tensor, Tensor]:
    """A start, and where the loss is least."""
    return torch.randn(numel), torch.randn(numel)


@implementation
def test_it_descends_as_bitsandbytes_does(implementation):
    """On the way, 8 bits are behind 32 by a tenth; in the end they arrive."""
    start, target = quadratic()
    settings = DEFAULTS | {"lr": 0.03}
    p, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    chunk, theirs = Chunk([len(start)], begin=True), Theirs(start)
    chunk.p = [start.clone()]
    losses = []
    with dispatch.use(implementation):
        for step in range(1, 401):
            adamw_([p], [p - target], [m], [v], [step], **settings)
            chunk.g = [chunk.p[0] - target]
            chunk.update([step], settings)
            theirs.update(theirs.p - target, step, lr=0.03)
            if step in (100, 400):
                losses.append([(one - target).square().mean().item() for one in (p, chunk.p[0], theirs.p)])
    (exact, found, peer), end = losses
    assert exact < found < 0.05 * (start - target).square().mean().item()
    assert abs(found - peer) < 0.01 * peer
    assert max(end) < 1e-4


# bitsandbytes' own test of its 8-bit AdamW against 32 bits, over steps of lr 1e-3: the parameters' mean error.
MEAN_ERROR = 6e-5


@implementation
def test_as_near_to_32_bits_as_bitsandbytes_asks_of_itself(implementation):
    chunk = Chunk([1024 * 64], begin=True)
    chunk.p = [torch.randn(1024 * 64) * 0.1]
    p, m, v = chunk.p[0].clone(), torch.zeros(1024 * 64), torch.zeros(1024 * 64)
    with dispatch.use(implementation):
        for step in range(1, 51):
            chunk.g = [torch.randn(1024 * 64) * 0.01]
            adamw_([p], chunk.g, [m], [v], [step], **DEFAULTS)
            chunk.update([step])
            assert (chunk.p[0] - p).abs().mean() < MEAN_ERROR
            p.copy_(chunk.p[0])
            found = dequantize_moment(chunk.m[0], chunk.m_absmax[0], signed=True)
            assert ((found - m).abs() > 3e-3 + 1e-3 * m.abs()).sum() < 20


def test_beside_bitsandbytes():
    """Over some updates: the same but for the rule for the sign, and ties."""
    numel = 16 * BLOCK_SIZE
    ours = Chunk([numel], begin=True)
    theirs = Theirs(ours.p[0])
    for step in range(1, 11):
        ours.g = [torch.randn(numel) * 0.01]
        ours.update([step])
        theirs.update(ours.g[0], step)
        assert (ours.p[0] - theirs.p).abs().mean() < MEAN_ERROR
        torch.testing.assert_close(ours.m_absmax[0], theirs.m_absmax, rtol=1e-2, atol=0)
        torch.testing.assert_close(ours.v_absmax[0], theirs.v_absmax, rtol=1e-2, atol=0)


def update(step: int = 1, /, **changes: Tensor) -> None:
    """An update of two segments of 300 elements, some tensors of the second one replaced."""
    codes = torch.zeros(300, dtype=torch.uint8)
    usual = dict.fromkeys(NAMES[:2], torch.zeros(300)) | dict.fromkeys(NAMES[2:4], codes)
    usual |= dict.fromkeys(NAMES[4:], torch.zeros(2))
    tensors: dict[str, Any] = {name: [one.clone(), changes.get(name, one.clone())] for name, one in usual.items()}
    adamw_8bit_(**tensors | DEFAULTS, steps=[1, step])


@pytest.mark.parametrize("name", NAMES[2:4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_codes_of_another_dtype_are_refused(name, dtype):
    with pytest.raises(TypeError, match=rf"^{name}\[1\] is {dtype}, not torch.uint8$"):
        update(**{name: torch.zeros(300, dtype=dtype)})


@pytest.mark.parametrize("name", NAMES[4:])
def test_scales_of_another_dtype_are_refused(name):
    with pytest.raises(TypeError, match=rf"^{name}\[1\] is torch.bfloat16, not torch.float32$"):
        update(**{name: torch.zeros(2, dtype=torch.bfloat16)})


@pytest.mark.parametrize(("name", "n"), [*((name, 300) for name in NAMES[1:4]), *((name, 2) for name in NAMES[4:])])
@pytest.mark.parametrize("more", [-1, 1])
def test_another_length_is_refused(name, n, more):
    dtype = torch.uint8 if name in NAMES[2:4] else torch.float32
    with pytest.raises(ValueError, match=rf"^{name}\[1\] is not contiguous \[{n}\] on cpu, but \[{n + more}\]"):
        update(**{name: torch.zeros(n + more, dtype=dtype)})


def test_steps_count_from_one():
    with pytest.raises(ValueError, match=r"^steps count from 1; steps\[1\] is 0$"):
        update(0)


@implementation
def test_autograd_knows_that_a_parameter_has_changed(implementation):
    chunk = Chunk([5], begin=True)
    chunk.p[0].requires_grad_()
    loss = (chunk.p[0] * chunk.p[0]).sum()
    with dispatch.use(implementation):
        chunk.update([1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@implementation
def test_nothing_is_updated_in_an_empty_chunk(implementation):
    with dispatch.use(implementation):
        adamw_8bit_([], [], [], [], [], [], [], **DEFAULTS)
        Chunk([0, 0]).update([1, 2])
