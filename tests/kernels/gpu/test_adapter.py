"""The products of an adapter: exact sums bit for bit, masks inside, splits, guard zones, accuracy, what is refused."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from qloralab.kernels.gpu.adapter import grad_A, masked_low_rank, project
from qloralab.kernels.gpu.adapter_operands import (
    coins,
    limit,
    quad_terms,
    rank_tiles,
    row_terms,
    row_words,
    threshold,
)
from qloralab.lora.dropout import keep_mask, rate

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
P = 0.1
# (M, K, r, splits): odd everywhere, sums across steps and programs, ranks of several tiles
CASES = [
    (1, 64, 16, None),
    (3, 65, 1, 2),
    (17, 200, 4, 3),
    (33, 128, 33, None),
    (130, 70, 8, 2),
    (5, 300, 100, 4),
    (2, 7, 130, None),
]
cases = pytest.mark.parametrize(("M", "K", "r", "splits"), CASES)


def few(*shape: int) -> Tensor:
    """A few whole numbers: their sums are exact in any order."""
    return torch.randint(-2, 3, shape).float()


def kept(matrix: Tensor, seed: Tensor, p: float) -> Tensor:
    """float64, zeros where the definition drops."""
    rows, columns = matrix.shape
    return torch.where(keep_mask(seed.cpu(), rows, columns, p), matrix.double(), 0)


@pytest.fixture
def seed(device) -> Tensor:
    return torch.tensor(-987654321987654321, device=device)


@cases
@pytest.mark.parametrize("p", [0.0, P, 0.999])
def test_exact_sums(M, K, r, splits, p, seed, guarded_twice):
    x, A, G = few(M, K), few(r, K), few(M, r)
    given = guarded_twice(x.bfloat16()), guarded_twice(A), guarded_twice(G.bfloat16())
    h = project(given[0], given[1], seed, p, 0.5, splits)
    dA = grad_A(given[2], given[0], seed, p, splits)
    assert (h.dtype, dA.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(h.cpu(), (0.5 * (kept(x, seed, p) @ A.T.double())).float().bfloat16())
    assert torch.equal(dA.cpu().double(), G.T.double() @ kept(x, seed, p))
    if p:  # without, cuBLAS allocates the result
        dx = masked_low_rank(given[2], given[1], seed, p)
        assert torch.equal(dx.cpu(), kept(G @ A, seed, p).float().bfloat16())


def test_without_dropout_the_low_rank_product_is_plain(seed, device):
    G, A = torch.randn(5, 3, device=device).bfloat16(), torch.randn(3, 70, device=device)
    assert torch.equal(masked_low_rank(G, A, seed, 0.0), G @ A.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype, seed, device):
    """Only the roundings of A and of the result: x, G and A are rounded to their dtype beforehand."""
    M, K, r = 40, 300, 20
    x, G, A = torch.randn(M, K).to(dtype), torch.randn(M, r).to(dtype), torch.randn(r, K)
    low = A.to(dtype).double()
    there = [tensor.to(device) for tensor in (x, A, G)]
    h = project(there[0], there[1], seed, P, 1.25)
    dA = grad_A(there[2], there[0], seed, P)
    dx = masked_low_rank(there[2], there[1], seed, P)
    assert (h.dtype, dA.dtype, dx.dtype) == (dtype, torch.float32, dtype)
    limit = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 1e-6}[dtype]
    for found, exact, most in (
        (h, 1.25 * (kept(x, seed, P) @ low.T), limit),
        (dA, G.double().T @ kept(x, seed, P), 1e-6),
        (dx, kept(G.double() @ low, seed, P), limit),
    ):
        assert (found.cpu().double() - exact).norm() / exact.norm() < most


def test_what_is_dropped_may_be_anything(seed, device):
    x = torch.ones(4, 64)
    x[~keep_mask(seed.cpu(), 4, 64, 0.5)] = float("nan")
    A, G = torch.ones(2, 64, device=device), torch.ones(4, 2, device=device)
    assert project(x.to(device), A, seed, 0.5, 1.0).isfinite().all()
    assert grad_A(G, x.to(device), seed, 0.5).isfinite().all()


def test_parts_are_added_in_a_fixed_order(seed, device):
    x, A, G = (
        torch.randn(130, 256, device=device),
        torch.randn(3, 256, device=device),
        torch.randn(130, 3, device=device),
    )
    x, G = x.bfloat16(), G.bfloat16()
    assert torch.equal(project(x, A, seed, P, 1.0, 4), project(x, A, seed, P, 1.0, 4))
    assert torch.equal(grad_A(G, x, seed, P, 3), grad_A(G, x, seed, P, 3))


def test_any_strides_and_nothing(seed, device):
    x, A, G = few(6, 70).to(device), few(3, 70).to(device), few(6, 3).to(device)
    across = x.T.contiguous().T
    assert torch.equal(project(across, A, seed, P, 1.0), project(x, A, seed, P, 1.0))
    assert torch.equal(grad_A(G.T.contiguous().T, across, seed, P), grad_A(G, x, seed, P))
    assert project(x[:0], A, seed, P, 1.0).shape == (0, 3)
    assert torch.equal(grad_A(G[:0], x[:0], seed, P), torch.zeros(3, 70, device=device))
    assert masked_low_rank(G[:0], A, seed, P).shape == (0, 70)


def test_a_rank_is_cut_into_tiles_that_hold_it():
    assert rank_tiles(0)[1] == 0
    for r in range(1, 300):
        rank, ranks = rank_tiles(r)
        assert rank in (16, 32, 64)
        assert rank * (ranks - 1) < r <= rank * ranks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 64, dtype=torch.float64)}, "x must be a matrix of float32"),
        ({"x": torch.zeros(64)}, "x must be a matrix"),
        ({"A": torch.zeros(3, 63)}, r"A must be torch.float32 \[3, 64\]"),
        ({"A": torch.zeros(3, 64).half()}, r"A must be torch.float32 \[3, 64\]"),
        ({"seed": torch.zeros(1)}, "seed must be one torch.int64"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed must be one torch.int64"),
    ],
)
def test_refused(change, message, device):
    given = {"x": torch.zeros(2, 64), "A": torch.zeros(3, 64), "seed": torch.tensor(1)} | change
    x, A, seed = (given[name].to(device) for name in ("x", "A", "seed"))
    with pytest.raises(ValueError, match=message):
        project(x, A, seed, P, 1.0)


def test_a_gradient_that_does_not_fit_is_refused(seed, device):
    x, A = torch.zeros(2, 64, device=device), torch.zeros(3, 64, device=device)
    with pytest.raises(ValueError, match=r"G must be torch.float32 \[2, 4\]"):
        grad_A(torch.zeros(3, 4, device=device), x, seed, P)
    with pytest.raises(ValueError, match=r"A must be torch.float32 \[4, 64\]"):
        masked_low_rank(torch.zeros(2, 4, device=device), A, seed, P)


@triton.jit
def _mask(seed, out, M, K, words, threshold, ROWS: tl.constexpr, QUADS: tl.constexpr):
    m = tl.arange(0, ROWS).to(tl.int64)
    k = tl.arange(0, 4 * QUADS)
    numbers = coins(row_terms(seed, m, words)[:, None] + quad_terms(tl.arange(0, QUADS))[None, :])
    keep = tl.reshape(numbers, (ROWS, 4 * QUADS)) >= limit(threshold)
    tl.store(out + m[:, None] * K + k[None, :], keep.to(tl.int8), mask=(m[:, None] < M) & (k[None, :] < K))


def mask(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    out = torch.empty(M, K, dtype=torch.int8, device=seed.device)
    _mask[(1,)](seed, out, M, K, row_words(K), threshold(p), ROWS=32, QUADS=64)  # pyright: ignore[reportArgumentType]
    return out.bool()


@pytest.mark.parametrize("p", [1e-4, 0.1, 0.5, 0.999, 1 - 1e-9])
@pytest.mark.parametrize(("M", "K"), [(1, 1), (3, 31), (17, 33), (32, 256)])
def test_the_mask_is_the_definitions(M, K, p, device):
    for number in (0, -1, 2**63 - 1, -(2**63), 1234567):
        seed = torch.tensor(number, device=device)
        assert torch.equal(mask(seed, M, K, p), keep_mask(seed, M, K, p))


@pytest.mark.parametrize("p", [0.0, 1e-6, 1e-5, 0.1, 0.5, 1 - 1e-9])
def test_the_threshold_is_that_of_the_applied_rate(p):
    assert threshold(p) / 65536 == rate(p)
    assert 0 <= threshold(p) <= 65535
