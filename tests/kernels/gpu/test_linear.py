"""Both products from tiles, y = x W' + bias and dX = dY W': exact sums, accuracy, splits, and no byte too far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qloralab.kernels.gpu.adapter_operands import LowRank, MaskedLowRank
from qloralab.kernels.gpu.linear import linear, token_tile
from qloralab.kernels.gpu.linear_grad_input import linear_grad_input
from qloralab.kernels.gpu.lookup import table
from qloralab.kernels.gpu.packing import TiledWeight, tile
from qloralab.lora.dropout import keep_mask
from qloralab.nf4 import blockwise, ops

from ..cpu.cases import NF4, WHOLE
from .conftest import Guarded, Operands, few

# (M, N, K, block size, splits): one tile; odd rows and tokens; K and N across programs; each tile of tokens
CASES = [
    (1, 128, 128, 64, None),
    (3, 65, 64, 64, None),
    (16, 3, 192, 128, 1),
    (17, 130, 192, 64, 2),
    (33, 64, 128, 4096, None),
    (2, 200, 320, 64, 3),
    (65, 70, 128, 64, 2),
    (130, 64, 64, 64, None),
]
directions = pytest.mark.parametrize("forward", [True, False], ids=["linear", "linear_grad_input"])


def beside(adapters: Sequence[Any]) -> list[Any]:
    """Each case with two of the adapters, and each adapter with some of the cases: the interpreter is slow."""
    shifts = 0, len(adapters) // 2
    return [(case, adapters[(n + shift) % len(adapters)]) for shift in shifts for n, case in enumerate(CASES)]


def multiply(forward: bool, x: Tensor, weight: TiledWeight, bias: Tensor | None = None, **options: Any) -> Tensor:
    """x W' + bias, or x W."""
    return linear(x, weight, bias, **options) if forward else linear_grad_input(x, weight, **options)


def exact(forward: bool, x: Tensor, W: Tensor) -> Tensor:
    """The same in float64."""
    return x.double() @ (W.T if forward else W).double()


def whole_weight(N: int, K: int, block_size: int = 64) -> Operands:
    """The operands of a weight whose table and scales are exact in bfloat16."""
    packed = torch.randint(256, (N * K // 2, 1), dtype=torch.uint8)
    scales = torch.tensor([1.0, 2.0, -1.0])[torch.randint(3, (-(-N * K // block_size),))] * table(WHOLE).factor
    return packed, scales, None, None, WHOLE, (N, K), block_size


def random_weight(N: int, K: int, device: str) -> tuple[TiledWeight, Tensor, Tensor, Tensor]:
    """Random numbers in tiles, in full as float64, and their codes and scales."""
    packed, absmax = blockwise.quantize_blockwise(torch.randn(N, K), NF4, 64)
    weight = tile(packed.to(device), absmax.to(device), None, None, NF4.to(device), (N, K), 64)
    return weight, dequantized((packed, absmax, None, None, NF4, (N, K), 64)), packed, absmax


def dequantized(operands: Operands) -> Tensor:
    """float64 [N, K]."""
    return ops.dequantize.reference(*operands, torch.float32).double()


def rounded(exact: Tensor) -> Tensor:
    """float64, rounded to bfloat16 (through float32, which holds the sums of these tests exactly)."""
    return exact.float().bfloat16().double()


def tiled(operands: Operands, guarded: Guarded) -> TiledWeight:
    """The tiles of a weight, in guarded memory."""
    weight = tile(*operands)
    return replace(weight, **{name: guarded(getattr(weight, name)) for name in ("words", "scales", "scales_bf16")})


def test_the_whole_numbers_are_exact_in_the_table():
    look_up = table(WHOLE)
    assert torch.equal(torch.tensor(look_up.values) / look_up.factor, WHOLE[list(look_up.order)])


@pytest.mark.parametrize(("M", "N", "K", "block_size", "splits"), CASES)
@pytest.mark.parametrize(
    ("forward", "biased"), [(True, False), (True, True), (False, False)], ids=["linear", "bias", "linear_grad_input"]
)
def test_exact_sums(M, N, K, block_size, splits, forward, biased, guarded_twice):
    operands = whole_weight(N, K, block_size)
    x, bias = few(M, K if forward else N), few(N) if biased else None
    given = guarded_twice(x), tiled(operands, guarded_twice), None if bias is None else guarded_twice(bias)
    found = multiply(forward, *given, splits=splits)
    assert found.dtype == torch.bfloat16
    expected = exact(forward, x, dequantized(operands)) + (0 if bias is None else bias.double())
    assert torch.equal(found.cpu().double(), rounded(expected))


@pytest.mark.parametrize(("case", "r"), beside([1, 4, 16, 33, 64, 100]), ids=str)
def test_exact_sums_with_an_adapter(case, r, guarded_twice):
    (M, N, K, _, splits), operands = case, whole_weight(*case[1:4])
    x, bias, h, B = few(M, K), few(N), few(M, r), few(N, r).float()
    term = LowRank(guarded_twice(h), guarded_twice(B))
    found = linear(guarded_twice(x), tiled(operands, guarded_twice), guarded_twice(bias), splits, term)
    expected = exact(True, x, dequantized(operands)) + h.double() @ B.double().T + bias.double()
    assert torch.equal(found.cpu().double(), rounded(expected))


MASKED = [(1, 0.1), (16, 0.0), (16, 0.5), (33, 0.999), (64, 0.1), (100, 0.0), (100, 0.1)]


@pytest.mark.parametrize(("case", "adapter"), beside(MASKED), ids=str)
def test_exact_sums_with_a_masked_adapter(case, adapter, guarded_twice):
    (M, N, K, _, splits), (r, p), operands = case, adapter, whole_weight(*case[1:4])
    grad, G, A, seed = few(M, N), few(M, r), few(r, K).float(), torch.tensor(-1234567891011)
    term = MaskedLowRank(guarded_twice(G), guarded_twice(A), guarded_twice(seed), p)
    found = linear_grad_input(guarded_twice(grad), tiled(operands, guarded_twice), splits, term)
    low_rank = torch.where(keep_mask(seed, M, K, p), G.double() @ A.double(), 0)
    assert torch.equal(found.cpu().double(), rounded(exact(False, grad, dequantized(operands)) + low_rank))


def test_an_adapters_matrix_is_rounded_and_the_sum_is_rounded_once(device):
    """Beside a weight of zeros y is h B', of B in bfloat16."""
    M, N, K, r = 5, 70, 64, 20
    packed, absmax = blockwise.quantize_blockwise(torch.zeros(N, K), NF4, 64)
    weight = tile(packed.to(device), absmax.to(device), None, None, NF4.to(device), (N, K), 64)
    h, B = torch.randn(M, r).bfloat16(), torch.randn(N, r)
    x = torch.randn(M, K).bfloat16().to(device)
    found = linear(x, weight, adapter=LowRank(h.to(device), B.to(device))).cpu().double()
    expected = h.double() @ B.bfloat16().double().T
    assert torch.allclose(found, expected, rtol=2**-8, atol=1e-5)
    assert (found - expected).norm() / expected.norm() < 2e-3


SEED = torch.tensor(1)
NOT_FITTING = {
    "dtype of B": (LowRank(few(2, 4), few(70, 4)), r"B must be torch.float32 \[70, 4\]"),
    "rows of B": (LowRank(few(2, 4), torch.zeros(64, 4)), r"B must be torch.float32 \[70, 4\]"),
    "columns of h": (LowRank(few(2, 3), torch.zeros(70, 4)), r"h must be torch.bfloat16 \[2, 4\]"),
    "dtype of h": (LowRank(torch.zeros(2, 4), torch.zeros(70, 4)), r"h must be torch.bfloat16 \[2, 4\]"),
    "no rank": (LowRank(few(2, 0), torch.zeros(70, 0)), "B must be a matrix of 1 column or more"),
    "dtype of A": (MaskedLowRank(few(2, 4), few(4, 64), SEED, 0.1), r"A must be torch.float32 \[4, 64\]"),
    "rows of A": (MaskedLowRank(few(2, 4), torch.zeros(3, 64), SEED, 0.1), r"A must be torch.float32 \[4, 64\]"),
    "tokens of G": (MaskedLowRank(few(1, 4), torch.zeros(4, 64), SEED, 0.1), r"G must be torch.bfloat16 \[2, 4\]"),
    "seed": (MaskedLowRank(few(2, 4), torch.zeros(4, 64), SEED.float(), 0.1), "seed must be one torch.int64"),
}


@pytest.mark.parametrize(("term", "message"), NOT_FITTING.values(), ids=NOT_FITTING)
def test_an_adapter_that_does_not_fit_is_refused(term, message, guarded):
    weight, forward = tiled(whole_weight(70, 64), guarded), isinstance(term, LowRank)
    on = {name: value.to(weight.words.device) for name, value in vars(term).items() if isinstance(value, Tensor)}
    with pytest.raises(ValueError, match=message):
        multiply(forward, few(2, 64 if forward else 70).to(weight.words.device), weight, adapter=replace(term, **on))


def test_accuracy_and_the_same_bits_in_both_directions_and_for_any_number_of_tokens(device):
    """With a unit matrix both kernels give W' itself; they round it twice, and it does show."""
    weight, W64, *_ = random_weight(128, 128, device)
    unit = torch.eye(128, dtype=torch.bfloat16, device=device)
    W = linear_grad_input(unit, weight)
    for tokens in (3, 32, 40, 65, 128):
        assert torch.equal(linear(unit[:tokens], weight), W.T[:tokens])
        assert torch.equal(linear_grad_input(unit[:tokens], weight), W[:tokens])
    assert 1.7e-3 < (W.cpu().double() - W64).norm() / W64.norm() < 2.7e-3


def test_against_float64_with_its_own_weights(device):
    """Sums of many products: only the rounding of the result away from the exact sum of the kernel's weights."""
    M, N, K, look_up = 5, 64, 512, table(NF4)
    weight, _, packed, absmax = random_weight(N, K, device)
    by_code = torch.empty(16).index_put_((torch.tensor(look_up.order),), torch.tensor(look_up.values))
    codes = blockwise.unpack(packed, N * K).long()
    W = by_code[codes].bfloat16() * (absmax / look_up.factor).bfloat16().repeat_interleave(64)
    x, bias = torch.randn(M, K).bfloat16(), torch.randn(N).bfloat16()
    expected = exact(True, x, W.view(N, K)) + bias.double()
    found = linear(x.to(device), weight, bias.to(device)).cpu().double()
    assert (found - expected).norm() / expected.norm() < 2e-3
    assert torch.allclose(found, expected, rtol=2**-8, atol=1e-4)


@directions
def test_splits_are_added_in_a_fixed_order(forward, device):
    weight, *_ = random_weight(256, 256, device)
    x = torch.randn(2, 256).bfloat16().to(device)
    assert torch.equal(multiply(forward, x, weight, splits=4), multiply(forward, x, weight, splits=4))


@directions
def test_leading_dimensions_strides_and_nothing(forward, guarded):
    operands = whole_weight(70, 64)
    weight, (given, made) = tiled(operands, guarded), (64, 70) if forward else (70, 64)
    x = few(given, 2, 3)
    found = multiply(forward, guarded(x).permute(1, 2, 0), weight)
    assert found.shape == (2, 3, made)
    assert torch.equal(found.cpu().double(), rounded(exact(forward, x.permute(1, 2, 0), dequantized(operands))))
    assert multiply(forward, guarded(few(0, given)), weight).shape == (0, made)
    assert multiply(forward, guarded(few(given)), weight).shape == (made,)


REFUSED = {
    "dtype": (True, torch.zeros(1, 64), None, "x must be bfloat16, not torch.float32"),
    "columns": (True, few(1, 128), None, "last dimension of x must be 64"),
    "bias": (True, few(1, 64), few(64), "last dimension of bias must be 70"),
    "2-D bias": (True, few(1, 64), few(1, 70), "bias must have 1 dimension, not 2"),
    "device": (True, torch.empty(1, 64, dtype=torch.bfloat16, device="meta"), None, "x is on meta, the weight on"),
    "dtype of grad": (False, torch.zeros(1, 70), None, "grad must be bfloat16"),
    "columns of grad": (False, few(1, 64), None, "last dimension of grad must be 70"),
}


@pytest.mark.parametrize(("forward", "x", "bias", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(forward, x, bias, message, guarded):
    weight = tiled(whole_weight(70, 64), guarded)
    on = weight.words.device
    with pytest.raises(ValueError, match=message):
        multiply(forward, x if x.is_meta else x.to(on), weight, None if bias is None else bias.to(on))


@pytest.mark.parametrize(("M", "tokens"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (1500, 128)])
def test_the_tile_of_tokens(M, tokens):
    assert token_tile(M, torch.device("cpu")) == tokens
