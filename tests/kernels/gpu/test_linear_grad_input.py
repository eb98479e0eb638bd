"""dX = dY W' from the tiles of the forward kernel: exact sums bit for bit, the accuracy of its weights, splits."""

from __future__ import annotations

import pytest
import torch

from qloralab.kernels.gpu.adapter_operands import MaskedLowRank
from qloralab.kernels.gpu.linear import linear
from qloralab.kernels.gpu.linear_grad_input import linear_grad_input
from qloralab.kernels.gpu.packing import tile
from qloralab.lora.dropout import keep_mask
from qloralab.nf4 import blockwise
from qloralab.nf4.codebook import normal_float

from .test_linear import beside, cases, dequantized, few, rounded, tiled, whole_weight
from .test_linear import guarded_twice as guarded_twice


@cases
def test_exact_sums(M, N, K, block_size, splits, guarded_twice):
    operands = whole_weight(N, K, block_size)
    grad = few(M, N)
    found = linear_grad_input(guarded_twice(grad), tiled(operands, guarded_twice), splits)
    expected = grad.double() @ dequantized(operands)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.cpu().double(), rounded(expected))


@beside([(1, 0.1), (16, 0.0), (16, 0.5), (33, 0.999), (64, 0.1), (100, 0.0), (100, 0.1)])
def test_exact_sums_with_an_adapter(case, adapter, guarded_twice):
    (M, N, K, block_size, splits), (r, p) = case, adapter
    operands = whole_weight(N, K, block_size)
    grad, G, A, seed = few(M, N), few(M, r), few(r, K).float(), torch.tensor(-1234567891011)
    term = MaskedLowRank(guarded_twice(G), guarded_twice(A), guarded_twice(seed), p)
    found = linear_grad_input(guarded_twice(grad), tiled(operands, guarded_twice), splits, term)
    low_rank = torch.where(keep_mask(seed, M, K, p), G.double() @ A.double(), 0)
    assert torch.equal(found.cpu().double(), rounded(grad.double() @ dequantized(operands) + low_rank))


@pytest.mark.parametrize(
    ("G", "A", "seed", "message"),
    [
        (few(2, 4), few(4, 64), torch.tensor(1), r"A must be torch.float32 \[4, 64\]"),
        (few(2, 4), torch.zeros(3, 64), torch.tensor(1), r"A must be torch.float32 \[4, 64\]"),
        (few(1, 4), torch.zeros(4, 64), torch.tensor(1), r"G must be torch.bfloat16 \[2, 4\]"),
        (few(2, 4), torch.zeros(4, 64), torch.tensor(1.0), "seed must be one torch.int64"),
    ],
    ids=["dtype of A", "rows of A", "tokens of G", "seed"],
)
def test_an_adapter_that_does_not_fit_is_refused(G, A, seed, message, guarded):
    weight = tiled(whole_weight(70, 64, 64), guarded)
    on = weight.words.device
    term = MaskedLowRank(G.to(on), A.to(on), seed.to(on), 0.1)
    with pytest.raises(ValueError, match=message):
        linear_grad_input(few(2, 70).to(on), weight, adapter=term)


def test_accuracy_and_the_bits_of_the_forward_kernel(device):
    """With a unit matrix both kernels give W', in the same bits."""
    N = K = 128
    packed, absmax = blockwise.quantize_blockwise(torch.randn(N, K), normal_float(), 64)
    weight = tile(packed.to(device), absmax.to(device), None, None, normal_float().to(device), (N, K), 64)
    unit = torch.eye(N, dtype=torch.bfloat16, device=device)
    W = linear_grad_input(unit, weight)
    for tokens in (3, 33, N):
        assert torch.equal(W.T[:tokens], linear(unit[:tokens], weight))
        assert torch.equal(W[:tokens], linear_grad_input(unit[:tokens], weight))
    exact = dequantized((packed, absmax, None, None, normal_float(), (N, K), 64))
    assert 1.7e-3 < (W.cpu().double() - exact).norm() / exact.norm() < 2.7e-3


def test_splits_are_added_in_a_fixed_order(device):
    packed, absmax = blockwise.quantize_blockwise(torch.randn(256, 64), normal_float(), 64)
    weight = tile(packed.to(device), absmax.to(device), None, None, normal_float().to(device), (256, 64), 64)
    grad = torch.randn(2, 256).bfloat16().to(device)
    assert torch.equal(linear_grad_input(grad, weight, splits=4), linear_grad_input(grad, weight, splits=4))


def test_leading_dimensions_and_nothing(guarded):
    operands = whole_weight(70, 64, 64)
    weight = tiled(operands, guarded)
    grad = few(2, 3, 70)
    found = linear_grad_input(guarded(grad), weight)
    assert torch.equal(found.cpu().double(), rounded(grad.double() @ dequantized(operands)))
    assert linear_grad_input(guarded(few(0, 70)), weight).shape == (0, 64)


@pytest.mark.parametrize(
    ("grad", "message"),
    [(torch.zeros(1, 70), "grad must be bfloat16"), (few(1, 64), "last dimension of grad must be 70")],
    ids=["dtype", "columns"],
)
def test_refused(grad, message, guarded):
    weight = tiled(whole_weight(70, 64, 64), guarded)
    with pytest.raises(ValueError, match=message):
        linear_grad_input(grad.to(weight.words.device), weight)
