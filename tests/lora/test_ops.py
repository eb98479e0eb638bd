"""The dropout mask: its bits, and whether they are the coins that dropout throws. The adapted operators: gradients.

The statistical tests draw from the seed of the test, so they pass or fail for good. Their bounds say how surprising a
correct generator would have to be.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qloralab.lora import ops as lora_ops
from qloralab.lora.dropout import keep_mask, rate
from qloralab.nf4.tensor import QuantizedTensor, linear, quantize

# The first words of splitmix64 from the seed 1234567, as other implementations publish them for their tests.
PUBLISHED = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]

# Two-sided probability of a statistic this far out. Each test here draws a few times; a correct one never gets there.
SURPRISE = 1e-5
rates = pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.9])


def splitmix64(seed: int, number: int) -> int:
    """The definition again, in Python's own integers."""
    mask = (1 << 64) - 1
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
    return z ^ z >> 31


def kept(seed: int, m: int, k: int, columns: int, threshold: int) -> bool:
    words = 8 * math.ceil(columns / 32)
    word = splitmix64(seed, m * words + k // 4)
    return word >> 16 * (k % 4) & 0xFFFF >= threshold


def mask_of(rows: int, columns: int, p: float, seed: int | None = None) -> np.ndarray:
    """bool [rows, columns], True where dropped; the seed drawn as layers draw it, if not given."""
    drawn = torch.randint(2**63 - 1, ()) if seed is None else torch.tensor(seed)
    return ~keep_mask(drawn, rows, columns, p).numpy()


def test_splitmix64_gives_the_published_words():
    assert [splitmix64(1234567, n) for n in range(5)] == PUBLISHED


def test_the_mask_reads_the_published_words_from_their_lowest_bits():
    lanes = [word >> shift & 0xFFFF for word in PUBLISHED for shift in (0, 16, 32, 48)]
    for p in (0.1, 0.5, 0.9):
        assert keep_mask(torch.tensor(1234567), 1, 20, p)[0].tolist() == [n >= round(p * 65536) for n in lanes]


def test_a_lane_equal_to_the_threshold_is_kept():
    lane = PUBLISHED[0] & 0xFFFF
    seed = torch.tensor(1234567)
    assert keep_mask(seed, 1, 1, lane / 65536).item()
    assert not keep_mask(seed, 1, 1, (lane + 1) / 65536).item()


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    rows=st.integers(0, 4),
    columns=st.integers(0, 70),
    p=st.floats(0, 1, exclude_max=True),
)
@example(seed=-1, rows=3, columns=33, p=0.5)
@example(seed=2**63 - 1, rows=2, columns=64, p=0.999999)
@example(seed=-(2**63), rows=2, columns=31, p=0.05)
def test_the_mask_is_the_definition(seed, rows, columns, p):
    threshold = min(round(p * 65536), 65535)
    found = keep_mask(torch.tensor(seed), rows, columns, p)
    assert found.dtype == torch.bool
    assert found.shape == (rows, columns)
    assert found.tolist() == [[kept(seed, m, k, columns, threshold) for k in range(columns)] for m in range(rows)]


# Earlier runs are repeated, and other implementations compared, by these bits. The key is (seed, rows, columns, p);
# a row reads from column 0, 1 is kept.
PINNED = {
    (0, 1, 40, 0.5): ["1011011001001011001010100010110110001001"],
    (20230523, 2, 33, 0.25): ["111101011111101010110111110110110", "111111111111111111101111011111110"],
    (-1, 3, 8, 0.9): ["00000011", "00000000", "00001000"],
}


@pytest.mark.parametrize(("drawn", "rows"), PINNED.items(), ids=str)
def test_these_bits_stay(drawn, rows):
    seed, m, k, p = drawn
    found = lora_ops.dropout(torch.ones(m, k), torch.tensor(seed), p) != 0
    assert ["".join("01"[bit] for bit in row) for row in found.tolist()] == rows


@pytest.mark.gpu
def test_a_gpu_draws_the_same_bits():
    for columns in (33, 1024):
        expected = keep_mask(torch.tensor(-7), 50, columns, 0.3)
        assert torch.equal(keep_mask(torch.tensor(-7, device="cuda"), 50, columns, 0.3).cpu(), expected)


@pytest.mark.parametrize(
    ("p", "q"),
    [(0.0, 0), (1e-9, 0), (1e-5, 1 / 65536), (0.05, 3277 / 65536), (0.5, 0.5), (1 - 1e-9, 65535 / 65536)],
    ids=str,
)
def test_the_rate_applied_is_the_nearest_of_65536(p, q):
    assert rate(p) == q


@rates
def test_as_many_as_coins_would(p):
    assert stats.binomtest(int(mask_of(1000, 1000, p).sum()), 1_000_000, rate(p)).pvalue > SURPRISE


@rates
@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (1, 64), (13, 65)], ids=str)
def test_each_place_is_as_likely_as_another(shape, p):
    rows, columns = shape
    draws = 2_000
    counts = np.sum([mask_of(rows, columns, p) for _ in range(draws)], axis=0)
    bound = SURPRISE / (rows * columns) / 2
    assert stats.binom.ppf(bound, draws, rate(p)) <= counts.min()
    assert counts.max() <= stats.binom.isf(bound, draws, rate(p))


def assert_independent(first: np.ndarray, second: np.ndarray) -> None:
    table = [[np.sum(first & second), np.sum(first & ~second)], [np.sum(~first & second), np.sum(~first & ~second)]]
    result: Any = stats.chi2_contingency(table, correction=False)
    assert result.pvalue > SURPRISE


@rates
@pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 32])
def test_neighbours_are_independent(p, lag):
    dropped = mask_of(1000, 1000, p)
    assert_independent(dropped[:, :-lag], dropped[:, lag:])


@rates
@pytest.mark.parametrize("lag", [1, 2, 7])
def test_rows_are_independent(p, lag):
    dropped = mask_of(1000, 1000, p)
    assert_independent(dropped[:-lag], dropped[lag:])


@rates
@pytest.mark.parametrize("distance", [1, 2, 2**16, 2**32, 2**62])
def test_seeds_are_independent(p, distance):
    assert_independent(mask_of(1000, 1000, p, seed=5), mask_of(1000, 1000, p, seed=5 + distance))


@rates
def test_distances_are_geometric(p):
    distances = np.diff(np.flatnonzero(mask_of(1000, 1000, p)), prepend=-1)
    longest = int(stats.geom.isf(20 / len(distances), rate(p))) + 1  # everything longer is one class
    edges = np.unique(np.linspace(1, longest, 30).astype(int))
    expected = np.diff(stats.geom.cdf(edges - 1, rate(p)), append=1) * len(distances)
    ends = [*edges[1:], distances.max() + 1]
    found = [np.sum((distances >= low) & (distances < high)) for low, high in zip(edges, ends, strict=True)]
    assert stats.chisquare(found, expected * sum(found) / expected.sum()).pvalue > SURPRISE


@pytest.mark.parametrize("run", [lora_ops.dropout.reference, lora_ops.dropout], ids=["reference", "operator"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1000,), (3, 5, 7), (63, 65), (0, 8), (8, 0)], ids=str)
def test_dropped_are_zero_and_kept_are_scaled(run, shape, p, dtype):
    x = torch.randn(shape).to(dtype)
    before, seed = x.clone(), torch.tensor(11)
    y = run(x, seed, p)
    keep = keep_mask(seed, math.prod(shape[:-1]), shape[-1], p).view(shape)
    factor = torch.tensor(1 / (1 - rate(p))).double()
    assert y.dtype == dtype
    assert torch.equal(y, torch.where(keep, (x.double() * factor).float().to(dtype), 0))
    assert torch.equal(x, before)


@pytest.mark.parametrize("view", [lambda x: x.t(), lambda x: x[:, ::2], lambda x: x[1:]], ids=["t", "step", "part"])
def test_a_view_is_dropped_by_its_own_rows_and_columns(view):
    x, seed = view(torch.randn(40, 48)), torch.tensor(3)
    assert torch.equal(
        lora_ops.dropout(x, seed, 0.5), lora_ops.dropout(x.clone(memory_format=torch.contiguous_format), seed, 0.5)
    )


def test_dropped_infinity_is_zero():
    x = torch.full((4, 64), math.inf)
    keep = keep_mask(torch.tensor(3), 4, 64, 0.5)
    for value in (math.inf, -math.inf, math.nan):
        y = lora_ops.dropout(x.fill_(value), torch.tensor(3), 0.5)
        assert (y[~keep] == 0).all()
        assert not y[keep].isfinite().any()


@pytest.mark.parametrize("p", [0.0, 1e-9, 1e-300], ids=str)
def test_a_tiny_probability_drops_nothing(p):
    x = torch.randn(9, 65)
    y = lora_ops.dropout(x, torch.tensor(3), p)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()


def test_the_gradient_goes_through_the_same_mask():
    x = torch.randn(9, 65, dtype=torch.float64, requires_grad=True)
    seed = torch.tensor(3)
    y = lora_ops.dropout(x, seed, 0.5)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, 2.0 * keep_mask(seed, 9, 65, 0.5))
    assert torch.autograd.gradcheck(lambda x: lora_ops.dropout(x, seed, 0.3), (x,))
    assert torch.autograd.gradgradcheck(lambda x: lora_ops.dropout(x, seed, 0.3), (x,))


def test_mean_is_kept():
    mean = lora_ops.dropout(torch.ones(1000, 1000), torch.tensor(3), 0.1).double().mean().item()
    assert abs(mean - 1) < 5 * math.sqrt(0.1 / 0.9 / 1e6)


K, N, R = 65, 33, 7  # inputs, outputs, rank
SCALING, SEED = 1.5, torch.tensor(20230523)
# Root-mean-square error relative to float64 for the same W, A and B. float32: sums of up to 130 terms stay within a
# few of its 6e-8. bfloat16 rounds each of two terms, their sum, and h or G: four times at most 2**-9 / sqrt(3).
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["f32", "bf16", "f16"])
dropouts = pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
biases = pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])


class Case:
    """A packed weight, a bias, and an adapter that is exact in the low precisions and adds about as much as W."""

    def __init__(self, dtype: torch.dtype = torch.float32, bias: bool = True, shape: tuple[int, int] = (N, K)):
        n, k = shape
        self.weight: QuantizedTensor = quantize(torch.randn(shape) / max(k, 1) ** 0.5)
        self.b = torch.randn(n).to(dtype).requires_grad_() if bias else None
        self.A = (torch.randn(R, k) / max(k, 1) ** 0.5).half().bfloat16().float().requires_grad_()
        self.B = (torch.randn(n, R) / R**0.5).half().bfloat16().float().requires_grad_()

    def __call__(self, x: Tensor, p: float = 0.0, run: Any = lora_ops.adapted_linear) -> Tensor:
        return run(x, *self.weight.operands(), self.b, self.A, self.B, SCALING, p, SEED)[0]

    def leaves(self, x: Tensor) -> dict[str, Tensor]:
        named = {"x": x, "A": self.A, "B": self.B, "bias": self.b}
        return {name: leaf for name, leaf in named.items() if leaf is not None}

    def exact(self, x: Tensor, p: float, grad: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """y and the gradients in float64, by autograd through the formula."""
        leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in self.leaves(x).items()}
        W = self.weight.dequantize(x.dtype).double()
        keep = keep_mask(SEED, math.prod(x.shape[:-1]), x.shape[-1], p).view(x.shape)
        h = SCALING / (1 - rate(p)) * (leaves["x"] * keep) @ leaves["A"].T
        y = leaves["x"] @ W.T + h @ leaves["B"].T + leaves.get("bias", 0)
        return y.detach(), dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad.double()), strict=True))


def assert_near(found: Tensor, exact: Tensor, tolerance: float, name: str = "") -> None:
    assert found.shape == exact.shape, name
    assert found.isfinite().all(), name
    assert (found.double() - exact).norm() <= tolerance * exact.norm(), name


@dtypes
@dropouts
@biases
@pytest.mark.parametrize("rows", [(), (1,), (0,), (63,), (2, 3), (2, 0), (2, 3, 5)], ids=str)
def test_forward_and_gradients_against_float64(dtype, p, bias, rows):
    case = Case(dtype, bias)
    x = torch.randn(*rows, K).to(dtype).requires_grad_()
    grad = torch.randn(*rows, N).to(dtype)
    y = case(x, p)
    assert y.dtype == dtype
    y64, exact = case.exact(x, p, grad)
    assert_near(y.detach(), y64, TOLERANCE[dtype], "y")
    found = torch.autograd.grad(y, list(case.leaves(x).values()), grad)
    for (name, leaf), gradient in zip(case.leaves(x).items(), found, strict=True):
        assert gradient.dtype == leaf.dtype
        assert_near(gradient, exact[name], TOLERANCE[dtype], name)


@dropouts
@biases
def test_first_derivatives_numerically(p, bias):
    case = Case(torch.float64, bias, shape=(5, 9))
    A, B = (t.detach().double().requires_grad_() for t in (case.A, case.B))
    x = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True)

    def function(x, A, B, b=None):
        return lora_ops.adapted_linear(x, *case.weight.operands(), b, A, B, SCALING, p, SEED)[0]

    assert torch.autograd.gradcheck(function, (x, A, B) if case.b is None else (x, A, B, case.b))


def test_the_second_result_is_what_backward_takes():
    case, x = Case(), torch.randn(2, 3, K)
    _, h = lora_ops.adapted_linear(x, *case.weight.operands(), case.b, case.A, case.B, SCALING, 0.3, SEED)
    kept_x = x.double().view(6, K) * keep_mask(SEED, 6, K, 0.3)
    assert_near(h, SCALING / (1 - rate(0.3)) * kept_x @ case.A.detach().double().T, TOLERANCE[torch.float32])
    assert not h.requires_grad


@dtypes
def test_forward_and_backward_draw_the_same_mask(dtype):
    """With nothing but the adapter, and that an identity, the mask is what is left of ones."""
    weight = quantize(torch.zeros(K, K))
    eye = torch.eye(K)
    x = torch.ones(9, K, dtype=dtype, requires_grad=True)
    A, B = eye.clone().requires_grad_(), eye.clone().requires_grad_()
    y, _ = lora_ops.adapted_linear(x, *weight.operands(), None, A, B, 1.0, 0.5, SEED)
    keep = keep_mask(SEED, 9, K, 0.5)
    dx, dA = torch.autograd.grad(y, [x, A], torch.ones_like(y))
    assert torch.equal(y, 2.0 * keep.to(dtype))
    assert torch.equal(dx, 2.0 * keep.to(dtype))
    assert torch.equal(dA, 2.0 * keep.sum(0).expand(K, K))


@dropouts
@pytest.mark.parametrize(
    "view",
    [lambda t: t.transpose(0, 1), lambda t: t[:, :1].expand(t.shape), lambda t: t.flip(0)[::2], lambda t: t[:0]],
    ids=["transposed", "expanded", "step", "none"],
)
def test_strides_of_the_input_and_of_the_gradient_do_not_matter(p, view):
    case = Case()
    x, grad = view(torch.randn(4, 6, K)), view(torch.randn(4, 6, N))
    y64, exact = case.exact(x, p, grad)
    x = x.detach().requires_grad_()
    y = case(x, p)
    assert_near(y.detach(), y64, TOLERANCE[torch.float32])
    found = torch.autograd.grad(y, list(case.leaves(x).values()), grad)
    for name, gradient in zip(case.leaves(x), found, strict=True):
        assert_near(gradient, exact[name], TOLERANCE[torch.float32], name)


def test_a_sum_as_the_loss():
    case, x = Case(), torch.randn(5, K, requires_grad=True)  # its gradient is one number, expanded
    _, exact = case.exact(x, 0.3, torch.ones(5, N))
    case(x, 0.3).sum().backward()
    for name, leaf in case.leaves(x).items():
        assert leaf.grad is not None
        assert_near(leaf.grad, exact[name], TOLERANCE[torch.float32], name)


@pytest.mark.parametrize("shape", [(0, 64), (5, 0)], ids=["no-outputs", "no-inputs"])
@dropouts
def test_an_empty_weight(shape, p):
    case = Case(shape=shape)
    x = torch.randn(3, shape[1], requires_grad=True)
    y = case(x, p)
    assert torch.equal(y, case.b.expand(3, -1))  # pyright: ignore[reportOptionalMemberAccess]
    y.sum().backward()
    for leaf in case.leaves(x).values():
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
    assert not case.A.grad.any()  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("names", [["x"], ["A"], ["B"], ["bias"], ["x", "bias"], ["A", "B"], []], ids=str)
def test_gradients_only_where_asked_for(names):
    case, x = Case(), torch.randn(3, K)
    for name, leaf in case.leaves(x).items():
        leaf.requires_grad_(name in names)
    y = case(x, 0.3)
    assert y.requires_grad == bool(names)
    if names:
        y.sum().backward()
    _, exact = case.exact(x, 0.3, torch.ones(3, N))
    for name, leaf in case.leaves(x).items():
        assert (leaf.grad is not None) == (name in names)
        if leaf.grad is not None:
            assert_near(leaf.grad, exact[name], TOLERANCE[torch.float32], name)


def test_the_gradient_of_the_input_is_left_out_when_not_needed():
    case, x, grad = Case(), torch.randn(3, K), torch.randn(3, N)
    operands = *case.weight.operands(), case.A.detach(), case.B.detach(), SCALING, 0.3, SEED
    with torch.no_grad():
        _, h = lora_ops.adapted_linear(x, *case.weight.operands(), None, case.A, case.B, SCALING, 0.3, SEED)
    _, *expected = lora_ops.adapted_linear_backward(grad, x, h, *operands, True)
    dx, *found = lora_ops.adapted_linear_backward(grad, x, h, *operands, False)
    assert dx.shape == (0,)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@dtypes
@dropouts
@pytest.mark.parametrize("x_grad", [False, True], ids=["x-frozen", "x-trains"])
def test_backward_keeps_the_operands_h_and_the_seed(dtype, p, x_grad):
    """No weight in full, no mask, no second x, no copy of A or B."""
    case = Case(dtype, shape=(256, 512))
    x = torch.randn(64, 512, dtype=dtype, requires_grad=x_grad)
    saved: dict[int, int] = {}

    def note(part: Tensor) -> Tensor:
        saved[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        return part

    with torch.autograd.graph.saved_tensors_hooks(note, lambda part: part):
        y = case(x, p)
    parts = [x, *case.weight.operands()[:5], case.A, case.B, SEED]
    own = {part.untyped_storage().data_ptr() for part in parts if part is not None}
    assert own <= set(saved)
    assert [size for place, size in saved.items() if place not in own] == [64 * R * x.itemsize]  # h
    y.sum().backward()
    assert case.A.grad is not None


def test_a_second_derivative_is_refused():
    case, x = Case(), torch.randn(3, K, requires_grad=True)
    (first,) = torch.autograd.grad(case(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="qloralab::adapted_linear has a first derivative only"):
        first.sum().backward()


@dtypes
def test_gradient_checkpointing_changes_nothing(dtype):
    case = Case(dtype)
    x = torch.randn(5, K).to(dtype)

    def layer(x: Tensor) -> Tensor:
        seed = torch.randint(2**63 - 1, ())
        return lora_ops.adapted_linear(x, *case.weight.operands(), case.b, case.A, case.B, SCALING, 0.5, seed)[0]

    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        results.append(torch.autograd.grad(run(leaf).square().sum(), list(case.leaves(leaf).values())))  # pyright: ignore
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@dtypes
@dropouts
def test_autocast_does_not_change_the_dtype(dtype, p):
    case, x = Case(dtype), torch.randn(5, K).to(dtype).requires_grad_()
    grad = torch.randn(5, N).to(dtype)
    expected = [case(x, p), *torch.autograd.grad(case(x, p), [x, case.A], grad)]
    with torch.autocast("cpu", torch.bfloat16):
        found = [case(x, p), *torch.autograd.grad(case(x, p), [x, case.A], grad)]
        plain = linear(x, case.weight)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert torch.equal(plain, linear(x, case.weight))


@torch.no_grad()
def test_no_dropout_is_the_same_for_every_seed():
    case, x = Case(), torch.randn(5, K)
    run = lora_ops.adapted_linear.reference
    y, h = run(x, *case.weight.operands(), case.b, case.A, case.B, SCALING, 0.0, torch.tensor(1))
    again, h_again = run(x, *case.weight.operands(), case.b, case.A, case.B, SCALING, 0.0, torch.tensor(2))
    assert torch.equal(y, again)
    assert torch.equal(h, h_again)


@torch.no_grad()
def test_an_adapter_of_zeros_adds_nothing():
    case, x = Case(), torch.randn(5, K)
    case.B.zero_()
    assert torch.equal(case(x, 0.3, run=lora_ops.adapted_linear.reference), linear(x, case.weight, case.b))
