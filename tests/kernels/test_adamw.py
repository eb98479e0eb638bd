"""The AdamW update against torch.optim.AdamW, step by step; both implementations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qloralab.kernels import dispatch
from qloralab.kernels.adamw import adamw_, adamw_reference_

STEPS = 200
DEFAULTS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
SETTINGS = [
    pytest.param(DEFAULTS, id="defaults"),
    pytest.param({"lr": 0.3, "beta1": 0.5, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.5}, id="large"),
    pytest.param({"lr": 2e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0}, id="no decay"),
]
# Root mean square, relative. float32 rounds the decay's factor, and 200 updates: up to 4e-6 here, as in torch itself.
TOLERANCE = 1e-5

implementation = pytest.mark.parametrize(
    "implementation", [pytest.param("native", marks=pytest.mark.compiler), "reference"]
)


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


def ours(start: Tensor, grads: list[Tensor], settings: dict[str, float], function=adamw_) -> list[Tensor]:
    param, exp_avg, exp_avg_sq = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step, grad in enumerate(grads, start=1):
        function(param, grad, exp_avg, exp_avg_sq, step, **settings)
    return [param, exp_avg, exp_avg_sq]


def error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, relative to that of the expected values."""
    return ((found.double() - expected).norm() / expected.norm()).item()


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
    for one, other in zip(
        ours(start, grads, settings, adamw_reference_), torch_adamw(start, grads, **settings), strict=True
    ):
        assert torch.equal(one, other)


@implementation
def test_a_parameter_may_be_cut_anywhere(implementation):
    numel = 50_000  # more than one chunk of the C code
    whole = [torch.randn(numel) for _ in range(3)] + [torch.rand(numel)]
    parts = [tensor.clone() for tensor in whole]
    with dispatch.use(implementation):
        adamw_(*whole, step=3, **DEFAULTS)
        for first, end in [(0, 1), (1, 17), (17, 33_333), (33_333, numel)]:
            adamw_(*(part[first:end] for part in parts), step=3, **DEFAULTS)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


@implementation
def test_the_gradient_and_the_neighbours_are_left_alone(implementation):
    buffers = [torch.full((20,), value) for value in (1.0, 2.0, 3.0, 5.0)]
    before = [buffer.clone() for buffer in buffers]
    with dispatch.use(implementation):
        adamw_(*(buffer[3:16] for buffer in buffers), step=1, **DEFAULTS)
    changed = [(buffer != old).tolist() for buffer, old in zip(buffers, before, strict=True)]
    inside = [3 <= index < 16 for index in range(20)]
    assert changed == [inside, [False] * 20, inside, inside]


@implementation
def test_nothing_is_updated_in_an_empty_chunk(implementation):
    with dispatch.use(implementation):
        adamw_(*(torch.empty(0) for _ in range(4)), step=1, **DEFAULTS)


@implementation
def test_a_parameter_that_requires_a_gradient(implementation):
    param = torch.ones(5, requires_grad=True)
    with dispatch.use(implementation):
        adamw_(param, torch.ones(5), torch.zeros(5), torch.zeros(5), step=1, **DEFAULTS)
    assert param.is_leaf
    torch.testing.assert_close(param.detach(), torch.full((5,), 1 - 1e-5 - 1e-3))  # the decay, then a step of lr


@implementation
def test_a_gradient_that_is_not_finite_shows(implementation):
    tensors = [torch.ones(3), torch.tensor([0.0, float("nan"), float("inf")]), torch.zeros(3), torch.zeros(3)]
    with dispatch.use(implementation):
        adamw_(*tensors, step=1, **DEFAULTS)
    assert tensors[0].isfinite().tolist() == [True, False, False]


def update(step: int = 1, /, **changes: Tensor) -> None:
    """One update of four elements, some of its tensors replaced."""
    tensors = {name: torch.zeros(4) for name in ("param", "grad", "exp_avg", "exp_avg_sq")} | changes
    adamw_(**tensors, step=step, **DEFAULTS)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["param", "grad", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int32], ids=str)
def test_another_dtype_is_refused(name, dtype):
    with pytest.raises(TypeError, match=f"^{name} is {dtype}, not float32$"):
        update(**{name: torch.zeros(4, dtype=dtype)})


@pytest.mark.parametrize("name", ["param", "grad", "exp_avg", "exp_avg_sq"])
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
    with pytest.raises(ValueError, match=rf"^{name} is not contiguous \[4\] on the CPU, but "):
        update(**{name: tensor})


@pytest.mark.parametrize("name", ["grad", "exp_avg", "exp_avg_sq"])
def test_another_length_is_refused(name):
    with pytest.raises(ValueError, match=rf"^{name} is not contiguous \[4\] on the CPU, but \[5\]"):
        update(**{name: torch.zeros(5)})


@pytest.mark.parametrize("step", [0, -1])
def test_steps_count_from_one(step):
    with pytest.raises(ValueError, match=f"step counts from 1, not {step}"):
        update(step)
