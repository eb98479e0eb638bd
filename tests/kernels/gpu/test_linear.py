"""Both products of a packed weight, y = x W' + bias and dX = dY W': exact sums, accuracy, splits, no byte too far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qloralab.kernels.gpu import canonical
from qloralab.kernels.gpu.adapter_operands import LowRank, MaskedLowRank
from qloralab.kernels.gpu.linear import linear
from qloralab.kernels.gpu.linear_grad_input import linear_grad_input
from qloralab.kernels.gpu.lookup import table
from qloralab.lora.dropout import keep_mask
from qloralab.nf4 import blockwise, double_quant, ops
from qloralab.nf4.packed import Packed

from ..cpu.cases import NF4, ONE, WHOLE, ZERO
from .conftest import few

# (M, N, K, block size, splits, double quantization): one tile; odd rows and tokens; blocks that span rows; K and N
# across programs; each tile of tokens, with words of one step and of two
CASES = [
    (1, 128, 128, 64, None, True),
    (3, 65, 64, 64, None, False),
    (16, 67, 192, 128, 1, True),
    (17, 130, 256, 64, 2, True),
    (33, 64, 128, 4096, None, False),
    (2, 200, 320, 64, 3, True),
    (65, 70, 128, 128, 2, True),
    (130, 129, 320, 64, None, True),
]
directions = pytest.mark.parametrize("forward", [True, False], ids=["linear", "linear_grad_input"])


def beside(adapters: Sequence[Any]) -> list[Any]:
    """Each case with two of the adapters, and each adapter with some of the cases: the interpreter is slow."""
    shifts = 0, len(adapters) // 2
    return [(case, adapters[(n + shift) % len(adapters)]) for shift in shifts for n, case in enumerate(CASES)]


def multiply(forward: bool, x: Tensor, weight: Packed, bias: Tensor | None = None, **options: Any) -> Tensor:
    """x W' + bias, or x W."""
    return linear(x, weight, bias, **options) if forward else linear_grad_input(x, weight, **options)


def exact(forward: bool, x: Tensor, W: Tensor) -> Tensor:
    """The same in float64."""
    return x.double() @ (W.T if forward else W).double()


def whole_weight(N: int, K: int, block_size: int = 64, double: bool = True) -> Packed:
    """A weight whose table and scales are exact in bfloat16."""
    packed, blocks = torch.randint(256, (N * K // 2, 1), dtype=torch.uint8), -(-N * K // block_size)
    if not double:
        scales = torch.tensor([1.0, 2.0, -1.0])[torch.randint(3, (blocks,))]
        return Packed(packed, scales, None, None, WHOLE, (N, K), block_size)
    codes = torch.tensor([ZERO, ONE], dtype=torch.uint8)[torch.randint(2, (blocks,))]
    absmax2 = torch.tensor([1.0, -3.0, 2.0])[torch.randint(3, (-(-blocks // 256),))]
    return Packed(packed, codes, absmax2, torch.tensor(1.0), WHOLE, (N, K), block_size)


def random_weight(N: int, K: int, device: str, double: bool = True) -> Packed:
    """Random numbers."""
    packed, absmax = blockwise.quantize_blockwise(torch.randn(N, K), NF4, 64)
    scales = double_quant.quantize_scales(absmax) if double else (absmax, None, None)
    return moved(Packed(packed, *scales, NF4, (N, K), 64), lambda tensor: tensor.to(device))


def dequantized(weight: Packed) -> Tensor:
    """float64 [N, K]."""
    return ops.dequantize.reference(*weight, torch.float32).double()


def rounded(exact: Tensor) -> Tensor:
    """float64, rounded to bfloat16 (through float32, which holds the sums of these tests exactly)."""
    return exact.float().bfloat16().double()


def moved(weight: Packed, move: Any) -> Packed:
    """A weight with its tensors copied, as into guarded memory."""
    tensors = {name: tensor for name, tensor in weight._asdict().items() if isinstance(tensor, Tensor)}
    return weight._replace(**{name: move(tensor) for name, tensor in tensors.items()})


def test_the_whole_numbers_are_exact_in_the_table():
    assert table(WHOLE).factor == 1
    assert torch.equal(torch.tensor(table(WHOLE).values), WHOLE)


@pytest.fixture(params=[False, True], ids=["wgmma", "mma.sync"])
def order(request, monkeypatch) -> None:
    """Both orders in which tensor cores have columns in lanes; each is right in the interpreter."""
    if request.param:
        monkeypatch.setattr(canonical, "mma_sync", lambda device: True)


@pytest.mark.parametrize(("M", "N", "K", "block_size", "splits", "double"), CASES)
@pytest.mark.parametrize(
    ("forward", "biased"), [(True, False), (True, True), (False, False)], ids=["linear", "bias", "linear_grad_input"]
)
@pytest.mark.usefixtures("order")
def test_exact_sums(M, N, K, block_size, splits, double, forward, biased, guarded_twice):
    operands = whole_weight(N, K, block_size, double)
    x, bias = few(M, K if forward else N), few(N) if biased else None
    given = guarded_twice(x), moved(operands, guarded_twice), None if bias is None else guarded_twice(bias)
    found = multiply(forward, *given, splits=splits)
    assert found.dtype == torch.bfloat16
    expected = exact(forward, x, dequantized(operands)) + (0 if bias is None else bias.double())
    assert torch.equal(found.cpu().double(), rounded(expected))


@pytest.mark.parametrize(("case", "r"), beside([1, 4, 16, 33, 64, 100]), ids=str)
def test_exact_sums_with_an_adapter(case, r, guarded_twice):
    (M, N, K, block_size, splits, double) = case
    operands = whole_weight(N, K, block_size, double)
    x, bias, h, B = few(M, K), few(N), few(M, r), few(N, r).float()
    term = LowRank(guarded_twice(h), guarded_twice(B))
    found = linear(guarded_twice(x), moved(operands, guarded_twice), guarded_twice(bias), splits, term)
    expected = exact(True, x, dequantized(operands)) + h.double() @ B.double().T + bias.double()
    assert torch.equal(found.cpu().double(), rounded(expected))


MASKED = [(1, 0.1), (16, 0.0), (16, 0.5), (33, 0.999), (64, 0.1), (100, 0.0), (100, 0.1)]


@pytest.mark.parametrize(("case", "adapter"), beside(MASKED), ids=str)
def test_exact_sums_with_a_masked_adapter(case, adapter, guarded_twice):
    (M, N, K, block_size, splits, double), (r, p) = case, adapter
    operands = whole_weight(N, K, block_size, double)
    grad, G, A, seed = few(M, N), few(M, r), few(r, K).float(), torch.tensor(-1234567891011)
    term = MaskedLowRank(guarded_twice(G), guarded_twice(A), guarded_twice(seed), p)
    found = linear_grad_input(guarded_twice(grad), moved(operands, guarded_twice), splits, term)
    low_rank = torch.where(keep_mask(seed, M, K, p), G.double() @ A.double(), 0)
    assert torch.equal(found.cpu().double(), rounded(exact(False, grad, dequantized(operands)) + low_rank))


def test_an_adapters_matrix_is_rounded_and_the_sum_is_rounded_once(device):
    """Beside a weight of zeros y is h B', of B in bfloat16."""
    M, N, K, r = 5, 70, 64, 20
    packed, absmax = blockwise.quantize_blockwise(torch.zeros(N, K), NF4, 64)
    weight = Packed(packed.to(device), absmax.to(device), None, None, NF4.to(device), (N, K), 64)
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
    weight, forward = moved(whole_weight(70, 64), guarded), isinstance(term, LowRank)
    on = {name: value.to(weight.packed.device) for name, value in vars(term).items() if isinstance(value, Tensor)}
    with pytest.raises(ValueError, match=message):
        multiply(forward, few(2, 64 if forward else 70).to(weight.packed.device), weight, adapter=replace(term, **on))


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_accuracy_and_the_same_bits_in_both_directions_and_for_any_number_of_tokens(double, device):
    """With a unit matrix both kernels give W' itself; they round it twice, and it does show."""
    weight = random_weight(128, 128, device, double)
    unit = torch.eye(128, dtype=torch.bfloat16, device=device)
    W, W64 = linear_grad_input(unit, weight), dequantized(weight)
    for tokens in (3, 32, 40, 65, 128):
        assert torch.equal(linear(unit[:tokens], weight), W.T[:tokens])
        assert torch.equal(linear_grad_input(unit[:tokens], weight), W[:tokens])
    assert 1.7e-3 < (W.double() - W64).norm() / W64.norm() < 2.7e-3


def test_against_float64_with_its_own_weights(device):
    """Sums of many products: only the rounding of the result away from the exact sum of the kernel's weights."""
    M, N, K = 5, 64, 512
    weight = random_weight(N, K, device)
    W = linear_grad_input(torch.eye(N, dtype=torch.bfloat16, device=device), weight).cpu()
    x, bias = torch.randn(M, K).bfloat16(), torch.randn(N).bfloat16()
    expected = exact(True, x, W) + bias.double()
    found = linear(x.to(device), weight, bias.to(device)).cpu().double()
    assert (found - expected).norm() / expected.norm() < 2e-3
    assert torch.allclose(found, expected, rtol=2**-8, atol=1e-4)


@directions
def test_splits_are_added_in_a_fixed_order(forward, device):
    weight = random_weight(256, 256, device)
    x = torch.randn(2, 256).bfloat16().to(device)
    assert torch.equal(multiply(forward, x, weight, splits=4), multiply(forward, x, weight, splits=4))


@directions
def test_leading_dimensions_strides_and_nothing(forward, guarded):
    operands = whole_weight(70, 64)
    weight, (given, made) = moved(operands, guarded), (64, 70) if forward else (70, 64)
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
    weight = moved(whole_weight(70, 64), guarded)
    on = weight.packed.device
    with pytest.raises(ValueError, match=message):
        multiply(forward, x if x.is_meta else x.to(on), weight, None if bias is None else bias.to(on))


@directions
def test_what_cannot_be_fused_is_refused(forward, device):
    weight = random_weight(64, 64, device)._replace(block_size=32)
    with pytest.raises(ValueError, match="block size must be a multiple of 64, not 32"):
        multiply(forward, few(1, 64).to(device), weight)
