"""AdamW beside others: ``torch.optim.AdamW`` step by step, and with moments of 8 bits bitsandbytes."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from qloralab.kernels import dispatch
from qloralab.kernels.adamw import ADAMW, Rates
from qloralab.kernels.moment_codes import BLOCK_SIZE, dequantize_moment
from qloralab.kernels.rule import DTYPES, Segments
from qloralab.kernels.update import update_

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

implementation = pytest.mark.parametrize(
    "implementation", [pytest.param("native", marks=pytest.mark.compiler), "reference"]
)


class Ours:
    """A parameter and its moments, zero before the first update."""

    def __init__(self, start: Tensor, bits: int = 32):
        n, dtype = len(start), torch.float32 if bits == 32 else torch.uint8
        self.p, (self.m, self.v) = start.clone(), (torch.zeros(n, dtype=dtype) for _ in range(2))
        self.scales = None if bits == 32 else [[torch.zeros(-(-n // BLOCK_SIZE))] for _ in range(2)]

    def update(self, grad: Tensor, step: int, **settings: Any) -> None:
        moments = [[self.m], [self.v]]
        segments = Segments([self.p], [grad.to(self.p.dtype)], moments, self.scales, [step])
        update_(ADAMW, segments, Rates(**DEFAULTS | settings))


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
    one = Ours(start)
    for step, grad in enumerate(grads, start=1):
        one.update(grad, step, **settings)
    return [one.p, one.m, one.v]


def error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, relative to that of the expected values."""
    return ((found.double() - expected).norm() / expected.norm()).item()


@implementation
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("numel", [1, 7, 1000])
def test_200_steps_beside_torch(numel, settings, implementation):
    """The formula has torch's bits, and the C is about as near to float64."""
    start, grads = torch.randn(numel), gradients(numel)
    grads = grads if numel > 1 else [torch.randn(1) for _ in range(STEPS)]
    with dispatch.use(implementation):
        found = ours(start, grads, settings)
    peer, exact = torch_adamw(start, grads, **settings), torch_adamw(start.double(), grads, **settings)
    for name, one, other, expected in zip(("param", "exp_avg", "exp_avg_sq"), found, peer, exact, strict=True):
        assert error(one, expected) < TOLERANCE, name
        assert numel < 1000 or error(one, expected) <= 1.5 * error(other, expected) + 1e-9, name
        assert implementation != "reference" or torch.equal(one, other), name


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


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
def test_rounding_after_each_operation_is_near_the_definition(dtype):
    p, g, m, v = (torch.randn(10_000) for _ in range(4))
    found, expected = (Segments([p.to(dtype)], [g.to(dtype)], [[m.clone()], [v.square()]], None, [3]) for _ in range(2))
    ADAMW.apply_(found, Rates(**DEFAULTS), rounded=True)
    ADAMW.apply_(expected, Rates(**DEFAULTS))
    for (one,), (other,) in zip(found.tensors, expected.tensors, strict=True):
        rtol = max(torch.finfo(one.dtype).eps, 1e-5)  # one unit in the last digit of p, some roundings of m and v
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-6)


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


@implementation
def test_8_bits_descend_as_bitsandbytes_does(implementation):
    """On the way, 8 bits are behind 32 by a tenth; in the end they arrive."""
    start, target = torch.randn(8192), torch.randn(8192)
    exact, found, theirs = Ours(start), Ours(start, 8), Theirs(start)
    losses = []
    with dispatch.use(implementation):
        for step in range(1, 401):
            for one in (exact, found, theirs):
                one.update(one.p - target, step, lr=0.03)
            if step in (100, 400):
                losses.append([(one.p - target).square().mean().item() for one in (exact, found, theirs)])
    (of_32, of_8, peer), end = losses
    assert of_32 < of_8 < 0.05 * (start - target).square().mean().item()
    assert abs(of_8 - peer) < 0.01 * peer
    assert max(end) < 1e-4


# bitsandbytes' own test of its 8-bit AdamW against 32 bits, over steps of lr 1e-3: the parameters' mean error.
MEAN_ERROR = 6e-5


@implementation
def test_as_near_to_32_bits_as_bitsandbytes_asks_of_itself(implementation):
    start = torch.randn(1024 * 64) * 0.1
    found, exact = Ours(start, 8), Ours(start)
    with dispatch.use(implementation):
        for step in range(1, 51):
            grad = torch.randn(1024 * 64) * 0.01
            found.update(grad, step)
            exact.update(grad, step)
            assert (found.p - exact.p).abs().mean() < MEAN_ERROR
            exact.p.copy_(found.p)
            assert found.scales
            m = dequantize_moment(found.m, found.scales[0][0], signed=True)
            assert ((m - exact.m).abs() > 3e-3 + 1e-3 * exact.m.abs()).sum() < 20


def test_beside_bitsandbytes():
    """Over some updates: the same but for the rule for the sign, and ties."""
    start, *grads = torch.randn(12, 16 * BLOCK_SIZE)
    found, theirs = Ours(start, 8), Theirs(start)
    for step, grad in enumerate(grads[1:], start=1):
        found.update(grad * 0.01, step)
        theirs.update(grad * 0.01, step)
        assert found.scales
        assert (found.p - theirs.p).abs().mean() < MEAN_ERROR
        for (mine,), other in zip(found.scales, (theirs.m_absmax, theirs.v_absmax), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-2, atol=0)
