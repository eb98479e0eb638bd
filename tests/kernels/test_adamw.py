"""The AdamW update against torch.optim.AdamW, step by step; both implementations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from qloralab.kernels import dispatch
from qloralab.kernels.adamw import DTYPES, Rates, adamw_, adamw_reference_, adamw_rounded_, fast_update

STEPS = 200
DEFAULTS: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
SETTINGS = [
    pytest.param(DEFAULTS, id="defaults"),
    pytest.param({"lr": 0.3, "beta1": 0.5, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.5}, id="large"),
    pytest.param({"lr": 2e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0}, id="no decay"),
    pytest.param({"lr": 1e-3, "beta1": 0.0, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01}, id="no momentum"),
]
# Root mean square, relative. float32 rounds the decay's factor, and 200 updates: up to 4e-6 here, as in torch itself.
TOLERANCE = 1e-5
NAMES = ("params", "grads", "exp_avgs", "exp_avg_sqs")
Chunk = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]  # p, g, m and v of segments
SIZES = [1, 0, 7, 256, 1000, 0, 70_001, 33, 0]  # of segments; more than one task of the C code

implementation = pytest.mark.parametrize(
    "implementation", [pytest.param("native", marks=pytest.mark.compiler), "reference"]
)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])


def gradients(numel: int) -> list[Tensor]:
    """200 gradients of very different sizes; some elements stay zero throughout."""
    scale = torch.logspace(-6, 2, numel)
    scale[::7] = 0
    return [scale * torch.randn(numel) for _ in range(STEPS)]


def torch_adamw(
    start: Tensor, grads: list[Tensor], lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> list[Tensor]:
    """p, m and v after `grads`, from PyTorch's optimizer."""
    param = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([param], lr, (beta1, beta2), eps, weight_decay, foreach=False)
    for grad in grads:
        param.grad = grad.to(param.dtype)
        optimizer.step()
    state = optimizer.state[param]
    return [param.detach(), state["exp_avg"], state["exp_avg_sq"]]


def ours(start: Tensor, grads: list[Tensor], settings: dict[str, float]) -> list[Tensor]:
    param, exp_avg, exp_avg_sq = start.clone(), torch.zeros(len(start)), torch.zeros(len(start))
    for step, grad in enumerate(grads, start=1):
        adamw_([param], [grad.to(param.dtype)], [exp_avg], [exp_avg_sq], [step], **settings)
    return [param, exp_avg, exp_avg_sq]


def error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, relative to that of the expected values."""
    return ((found.double() - expected).norm() / expected.norm()).item()


def chunk(sizes: list[int] = SIZES, dtype: torch.dtype = torch.float32) -> Chunk:
    """p, g, m and v of segments."""
    p, g, m, v = ([torch.randn(n) for n in sizes] for _ in range(4))
    return [one.to(dtype) for one in p], [one.to(dtype) for one in g], m, [one.square() for one in v]


def copy(tensors: Chunk) -> Chunk:
    p, g, m, v = ([one.clone() for one in some] for some in tensors)
    return p, g, m, v


def same(found: Sequence[list[Tensor]], expected: Sequence[list[Tensor]]) -> bool:
    """Whether all bits are the same, zeros' signs included."""
    pairs = [pair for one, other in zip(found, expected, strict=True) for pair in zip(one, other, strict=True)]
    return all(a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


@implementation
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("numel", [1, 7, 1000])
def test_200_steps_against_torch_in_float64(numel, settings, implementation):
    start, grads = torch.randn(numel), gradients(numel)
    grads = grads if numel > 1 else [torch.randn(1) for _ in range(STEPS)]
    with dispatch.use(implementation):
        found = ours(start, grads, settings)
    expected = torch_adamw(start.double(), grads, **settings)
    for name, one, other in zip(("param", "exp_avg", "exp_avg_sq"), found, expected, strict=True):
        assert error(one, other) < TOLERANCE, name


@implementation
@pytest.mark.parametrize("settings", SETTINGS)
def test_no_worse_than_torch_in_float32(settings, implementation):
    start, grads = torch.randn(1000), gradients(1000)
    with dispatch.use(implementation):
        found = ours(start, grads, settings)
    peer, exact = torch_adamw(start, grads, **settings), torch_adamw(start.double(), grads, **settings)
    for one, other, expected in zip(found, peer, exact, strict=True):
        assert error(one, expected) <= 1.5 * error(other, expected) + 1e-9


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_reference_is_torch_bit_for_bit(settings):
    start, grads = torch.randn(1000), gradients(1000)
    with dispatch.use("reference"):
        found = ours(start, grads, settings)
    assert same([found], [torch_adamw(start, grads, **settings)])


@implementation
@pytest.mark.parametrize("beta1", [0.0, 0.1, 0.45, 0.5, 0.55, 0.9, 1 - 2**-24])
def test_a_small_gradient_behind_a_large_one_is_not_lost(beta1, implementation):
    """m is no further from float64 than two roundings of its own size and of the part that decays."""
    grads = [torch.tensor([1e6]), torch.tensor([1e-3]), torch.tensor([-3e-5])]
    settings = DEFAULTS | {"beta1": beta1}
    with dispatch.use(implementation):
        m = ours(torch.ones(1), grads, settings)[1]
    exact = torch_adamw(torch.ones(1).double(), grads, **settings)[1]
    peer = torch_adamw(torch.ones(1), grads, **settings)[1]
    assert abs(m - exact) <= 2 * abs(peer - exact) + 2**-22 * abs(exact)


@implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_a_narrow_parameter_is_rounded_once(dtype, implementation):
    """A step from p is the step in float32 from p, rounded to nearest, ties to even. Moments stay in float32."""
    p, g, m, v = chunk(dtype=dtype)
    found = copy((p, g, m, v))
    wide = [one.float() for one in p], [one.float() for one in g], m, v
    steps = [3] * len(SIZES)
    with dispatch.use(implementation):
        adamw_(*found, steps, **DEFAULTS)
        adamw_(*wide, steps, **DEFAULTS)
    assert same(found, [[one.to(dtype) for one in wide[0]], g, wide[2], wide[3]])
    assert not same(found[:1], [p])


@implementation
@dtypes
@pytest.mark.parametrize("settings", SETTINGS)
def test_segments_have_steps_of_their_own(settings, dtype, implementation):
    together, steps = chunk(dtype=dtype), [1, 5, 2, 1000, 3, 1, 77, 10**6, 4]
    apart = copy(together)
    with dispatch.use(implementation):
        adamw_(*together, steps, **settings)
        for p, g, m, v, step in zip(*apart, steps, strict=True):
            adamw_([p], [g], [m], [v], [step], **settings)
    assert same(together, apart)


@pytest.mark.compiler
@dtypes
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_c_rounds_after_each_operation(settings, dtype):
    found, steps = chunk(dtype=dtype), [1, 5, 2, 1000, 3, 1, 77, 10**6, 4]
    expected = copy(found)
    for k in range(3):
        with dispatch.use("native"):
            adamw_(*found, [step + k for step in steps], **settings)
        for p, g, m, v, step in zip(*expected, steps, strict=True):
            adamw_rounded_(p, g, m, v, step + k, Rates(**settings))
    assert same(found, expected)


@dtypes
def test_rounding_after_each_operation_is_near_the_definition(dtype):
    found = chunk([10_000], dtype)
    expected = copy(found)
    adamw_reference_(*expected, [3], Rates(**DEFAULTS))
    p, g, m, v = (one for (one,) in found)
    adamw_rounded_(p, g, m, v, 3, Rates(**DEFAULTS))
    for (one,), (other,) in zip(found, expected, strict=True):
        rtol = max(torch.finfo(one.dtype).eps, 1e-5)  # one place of p, or some roundings of m and v
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-6)


@implementation
def test_segments_of_all_dtypes_at_once(implementation):
    one, two, three = (chunk([100, 300], dtype) for dtype in DTYPES)
    p, g, m, v = (a + b + c for a, b, c in zip(copy(one), copy(two), copy(three), strict=True))
    with dispatch.use(implementation):
        adamw_(p, g, m, v, [2] * 6, **DEFAULTS)
        for some in (one, two, three):
            adamw_(*some, [2] * 2, **DEFAULTS)
    assert same([p, g, m, v], [a + b + c for a, b, c in zip(one, two, three, strict=True)])


@implementation
@dtypes
def test_a_parameter_may_be_cut_anywhere(dtype, implementation):
    numel = 150_000  # more than one task of the C code
    whole = chunk([numel], dtype)
    parts = copy(whole)
    cuts = [0, 1, 17, 17, 33_333, 131_073, numel]
    p, g, m, v = ([one[a:b] for a, b in pairwise(cuts)] for (one,) in parts)
    with dispatch.use(implementation):
        adamw_(*whole, [3], **DEFAULTS)
        adamw_(p, g, m, v, [3] * 6, **DEFAULTS)
    assert same(whole, parts)


@implementation
@dtypes
def test_the_gradient_and_the_neighbours_are_left_alone(dtype, implementation):
    buffers = [torch.full((20,), value) for value in (1.0, 2.0, 3.0, 5.0)]
    buffers[0], buffers[1] = buffers[0].to(dtype), buffers[1].to(dtype)
    before = [buffer.clone() for buffer in buffers]
    with dispatch.use(implementation):
        p, g, m, v = ([buffer[3:16]] for buffer in buffers)
        adamw_(p, g, m, v, [1], **DEFAULTS | {"lr": 0.1})
    changed = [(buffer != old).tolist() for buffer, old in zip(buffers, before, strict=True)]
    inside = [3 <= index < 16 for index in range(20)]
    assert changed == [inside, [False] * 20, inside, inside]


@implementation
def test_nothing_is_updated_in_an_empty_chunk(implementation):
    with dispatch.use(implementation):
        adamw_([], [], [], [], [], **DEFAULTS)
        adamw_(*chunk([0]), [1], **DEFAULTS)
        adamw_(*chunk([0, 0]), [1, 2], **DEFAULTS)


@implementation
def test_a_parameter_that_requires_a_gradient(implementation):
    param = torch.ones(5, requires_grad=True)
    with dispatch.use(implementation):
        adamw_([param], [torch.ones(5)], [torch.zeros(5)], [torch.zeros(5)], [1], **DEFAULTS)
    assert param.is_leaf
    torch.testing.assert_close(param.detach(), torch.full((5,), 1 - 1e-5 - 1e-3))  # the decay, then a step of lr


@implementation
def test_autograd_knows_that_a_parameter_has_changed(implementation):
    param = torch.ones(5, requires_grad=True)
    loss = (param * param).sum()
    with dispatch.use(implementation):
        adamw_([param], [torch.ones(5)], [torch.zeros(5)], [torch.zeros(5)], [1], **DEFAULTS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@implementation
@dtypes
def test_what_is_not_finite_stays_where_it_is(dtype, implementation):
    grad = torch.tensor([0.0, torch.nan, torch.inf, -torch.inf, 1.0]).to(dtype)
    param, exp_avg, exp_avg_sq = torch.ones(5, dtype=dtype), torch.zeros(5), torch.zeros(5)
    with dispatch.use(implementation):
        adamw_([param], [grad], [exp_avg], [exp_avg_sq], [1], **DEFAULTS)
    for tensor in (param, exp_avg, exp_avg_sq):
        assert tensor.isfinite().tolist() == [True, False, False, False, True]


def update(step: int = 1, /, **changes: Tensor) -> None:
    """An update of two segments of four elements, some tensors of the second one replaced."""
    tensors: dict[str, Any] = {name: [torch.zeros(4), changes.get(name, torch.zeros(4))] for name in NAMES}
    adamw_(**tensors | DEFAULTS, steps=[1, step])


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn], ids=str)
def test_another_dtype_of_a_parameter_is_refused(dtype):
    with pytest.raises(TypeError, match=rf"^params\[1\] is {dtype}, not float32, bfloat16 or float16$"):
        update(params=torch.zeros(4, dtype=dtype), grads=torch.zeros(4, dtype=dtype))


@pytest.mark.parametrize("name", ["grads", "exp_avgs", "exp_avg_sqs"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int32], ids=str)
def test_another_dtype_is_refused(name, dtype):
    with pytest.raises(TypeError, match=rf"^{name}\[1\] is {dtype}, not torch.float32$"):
        update(**{name: torch.zeros(4, dtype=dtype)})


def test_the_gradient_has_the_dtype_of_its_parameter():
    with pytest.raises(TypeError, match=r"^grads\[1\] is torch.float32, not torch.bfloat16$"):
        update(params=torch.zeros(4, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", ["exp_avgs", "exp_avg_sqs"])
def test_moments_are_float32_whatever_the_parameter_is(name):
    narrow = torch.zeros(4, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=rf"^{name}\[1\] is torch.bfloat16, not torch.float32$"):
        update(**{"params": narrow, "grads": narrow, name: narrow})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch.zeros(2, 2), id="matrix"),
        pytest.param(torch.zeros(8)[::2], id="strided"),
        pytest.param(torch.zeros(1).expand(4), id="expanded"),
        pytest.param(torch.zeros(4, device="meta"), id="meta"),
    ],
)
def test_another_layout_is_refused(name, tensor):
    with pytest.raises(ValueError, match=rf"^{name}\[1\] is not contiguous \[4\] on cpu, but "):
        update(**{name: tensor})


@pytest.mark.parametrize("name", ["grads", "exp_avgs", "exp_avg_sqs"])
def test_another_length_is_refused(name):
    with pytest.raises(ValueError, match=rf"^{name}\[1\] is not contiguous \[4\] on cpu, but \[5\]"):
        update(**{name: torch.zeros(5)})


@pytest.mark.parametrize("name", ["grads", "exp_avgs", "exp_avg_sqs", "steps"])
def test_lists_of_different_lengths_are_refused(name):
    lists: dict[str, Any] = {name: [torch.zeros(4)] * 2 for name in NAMES} | {"steps": [1, 1]}
    lists[name] = lists[name][:1]
    with pytest.raises(ValueError, match=rf"^{name} has 1 entries, and params has 2$"):
        adamw_(**lists | DEFAULTS)


@pytest.mark.parametrize("step", [0, -1])
def test_steps_count_from_one(step):
    with pytest.raises(ValueError, match=rf"^steps count from 1; steps\[1\] is {step}$"):
        update(step)


def test_nothing_is_changed_by_a_call_that_is_refused():
    param = torch.ones(4)
    with pytest.raises(ValueError, match="steps count from 1"):
        adamw_([param] * 2, [torch.ones(4)] * 2, [torch.ones(4)] * 2, [torch.ones(4)] * 2, [1, 0], **DEFAULTS)
    assert param.tolist() == [1] * 4


@pytest.mark.parametrize("name", dispatch.CHUNK_UPDATES)
def test_other_devices_have_the_reference(name):
    assert fast_update(name, torch.device("meta")) is None
    with dispatch.use("reference"):
        assert fast_update(name, torch.device("cpu")) is None


@pytest.mark.parametrize("name", dispatch.CHUNK_UPDATES)
def test_qloralab_gpu_chooses_on_gpus(name, monkeypatch):
    monkeypatch.setenv("QLORALAB_GPU", "reference")
    assert fast_update(name, torch.device("cuda", 0)) is None
    monkeypatch.setenv("QLORALAB_GPU", "tritn")
    with pytest.raises(ValueError, match="QLORALAB_GPU is one of auto, triton, reference"):
        fast_update(name, torch.device("cuda", 0))
