"""Products from the canonical layout: the definition's weights bit for bit, exact sums, and no byte too far."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qloralab.kernels.gpu.adapter_operands import LowRank, MaskedLowRank
from qloralab.kernels.gpu.canonical import linear, linear_grad_input
from qloralab.lora.dropout import keep_mask
from qloralab.nf4 import ops

from .test_dequantize import (
    CODEBOOKS,
    DTYPES,
    NF4,
    Operands,
    any_weight,
    double_quants,
    dtypes,
    same_bits,
)
from .test_linear import few
from .test_linear import guarded_twice as guarded_twice

Guarded = Callable[..., Tensor]

# (N, K, block size): one weight; odd rows within a block, a block within several rows, segments with two blocks
SHAPES = [(1, 1, 32), (5, 7, 64), (70, 33, 32), (5, 63, 4096), (5, 65, 32), (70, 100, 64), (5, 96, 32), (5, 128, 64)]
shapes = pytest.mark.parametrize(("N", "K", "block_size"), SHAPES)
WHOLE = torch.tensor([-8.0, -7, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8])


def placed(operands: Operands, guarded: Guarded, offset: int = 0) -> Operands:
    """A weight in guarded memory that begins `offset` elements past an aligned address."""
    tensors: list[Any] = [None if one is None else guarded(one, offset=offset * one.itemsize) for one in operands[:5]]
    return (*tensors, *operands[5:])  # pyright: ignore[reportReturnType]


def whole_weight(N: int, K: int, block_size: int) -> Operands:
    """Small whole numbers, so that sums are exact in any order."""
    packed = torch.randint(256, ((N * K + 1) // 2, 1), dtype=torch.uint8)
    scales = torch.tensor([1.0, 2.0, -1.0])[torch.randint(3, (-(-N * K // block_size),))]
    return packed, scales, None, None, WHOLE, (N, K), block_size


def exact(operands: Operands) -> Tensor:
    """W, float64 [N, K]."""
    return ops.dequantize.reference(*operands, torch.float32).double()


def rounded(result: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 -> dtype, through float32, which holds the sums of these tests exactly."""
    return result.float().to(dtype)


def check_bits(operands: Operands, dtype: torch.dtype, guarded: Guarded, offset: int = 0) -> None:
    """Unit vectors, forward and backward, give the bits of W: those of the definition.

    Rows of a unit matrix pick a weight and add zeros, which may change the sign of a zero and nothing else; a W' has no
    -0.0.
    """
    W = ops.dequantize.reference(*operands, dtype)
    N, K = W.shape
    weight = placed(operands, guarded, offset)
    rows, columns = guarded(torch.eye(N, dtype=dtype)), guarded(torch.eye(K, dtype=dtype))
    assert same_bits(linear(columns, weight).cpu().T.contiguous(), W)
    assert same_bits(linear_grad_input(rows, weight).cpu(), W)


@dtypes
@double_quants
@shapes
def test_the_bits_of_the_definitions_weight(N, K, block_size, double_quant, dtype, guarded_twice):
    check_bits(any_weight((N, K), block_size, double_quant), dtype, guarded_twice)


@pytest.mark.parametrize("values", CODEBOOKS.values(), ids=CODEBOOKS)
@pytest.mark.parametrize("K", [64, 31])
def test_every_codebook(values, K, guarded_twice):
    check_bits(any_weight((9, K), 64, values=values), torch.bfloat16, guarded_twice)


@pytest.mark.parametrize("K", [128, 100, 63])
def test_nothing_is_aligned(K, guarded_twice):
    check_bits(any_weight((5, K), 64), torch.bfloat16, guarded_twice, offset=1)


def test_more_than_256_blocks(guarded_twice):
    """Each 256 scales have their own absmax2."""
    check_bits(any_weight((150, 67), 32), torch.float32, guarded_twice)


@pytest.mark.parametrize("K", [64, 65])
def test_small_products_and_zeros(K, guarded_twice):
    """Subnormal weights; +0.0 where the product is a negative zero or rounds to one."""
    scales = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 4e-45, 1e-41, -1e-39, 1.2e-38, -1.0])[: -(-4 * K // 32)]
    scales = torch.cat([scales, torch.zeros(max(-(-4 * K // 32) - len(scales), 0))])
    packed = torch.randint(256, (2 * K, 1), dtype=torch.uint8)
    check_bits((packed, scales, None, None, NF4, (4, K), 32), torch.float32, guarded_twice)


# (M, N, K, block size, splits): tokens within, at and beyond a tile; rows and columns of several programs
PRODUCTS = [
    (1, 5, 33, 32, None),
    (3, 70, 100, 64, 2),
    (17, 130, 65, 64, 1),
    (16, 1, 300, 4096, 3),
    (33, 140, 64, 64, 1000),
    (65, 33, 128, 128, None),
    (70, 3, 1, 32, None),
]
products = pytest.mark.parametrize(("M", "N", "K", "block_size", "splits"), PRODUCTS)


@dtypes
@products
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_exact_sums(M, N, K, block_size, splits, biased, dtype, guarded_twice):
    operands = whole_weight(N, K, block_size)
    x, bias = few(M, K).to(dtype), few(N).to(dtype)
    weight = placed(operands, guarded_twice)
    found = linear(guarded_twice(x), weight, guarded_twice(bias) if biased else None, splits)
    expected = x.double() @ exact(operands).T + (bias.double() if biased else 0)
    assert found.dtype == dtype
    assert torch.equal(found.cpu(), rounded(expected, dtype))


@dtypes
@products
def test_exact_sums_backward(M, N, K, block_size, splits, dtype, guarded_twice):
    operands = whole_weight(N, K, block_size)
    grad = few(M, N).to(dtype)
    found = linear_grad_input(guarded_twice(grad), placed(operands, guarded_twice), splits)
    assert found.dtype == dtype
    assert torch.equal(found.cpu(), rounded(grad.double() @ exact(operands), dtype))


@pytest.mark.parametrize("number", range(2 * len(PRODUCTS)))
def test_an_adapter_is_in_the_sum(number, guarded_twice):
    """Whole numbers, but for the term of the adapter, which is rounded to dtype before it is added.

    Each product with both ranks, in a dtype each.
    """
    M, N, K, block_size, splits = PRODUCTS[number % len(PRODUCTS)]
    r, dtype = (1, 70)[number // len(PRODUCTS)], list(DTYPES.values())[number % 3]
    operands = whole_weight(N, K, block_size)
    weight, p = placed(operands, guarded_twice), 0.3
    x, grad, bias = few(M, K).to(dtype), few(M, N).to(dtype), few(N).to(dtype)
    h, B, G, A = few(M, r).to(dtype), few(N, r).float(), few(M, r).to(dtype), few(r, K).float()
    seed = torch.tensor(-12345)
    found = linear(
        guarded_twice(x),
        weight,
        guarded_twice(bias),
        splits,
        LowRank(guarded_twice(h), guarded_twice(B)),
    )
    term = rounded(h.double() @ B.double().T, dtype).double()
    expected = x.double() @ exact(operands).T + bias.double() + term
    assert torch.equal(found.cpu(), rounded(expected, dtype))
    on = weight[0].device
    masked = MaskedLowRank(guarded_twice(G), guarded_twice(A), seed.to(on), p)
    found = linear_grad_input(guarded_twice(grad), weight, splits, masked)
    term = torch.where(keep_mask(seed, M, K, p), rounded(G.double() @ A.double(), dtype).double(), 0)
    assert torch.equal(found.cpu(), rounded(grad.double() @ exact(operands) + term, dtype))


@dtypes
@pytest.mark.parametrize("K", [256, 331])
def test_against_float64_with_the_definitions_weight(K, dtype, guarded):
    """Sums of many products: off by no more than one rounding of the result, and those of float32 sums."""
    operands = any_weight((40, K), 64)
    W = ops.dequantize.reference(*operands, dtype).double()
    x, grad, bias = torch.randn(5, K).to(dtype), torch.randn(5, 40).to(dtype), torch.randn(40).to(dtype)
    weight = placed(operands, guarded)
    forward = x.double() @ W.T + bias.double(), linear(guarded(x), weight, guarded(bias))
    backward = grad.double() @ W, linear_grad_input(guarded(grad), weight)
    for expected, found in (forward, backward):
        half_a_place = expected.abs() * torch.finfo(dtype).eps / 2
        assert ((found.cpu().double() - expected).abs() <= half_a_place + 1e-5 * math.sqrt(K)).all()


def test_splits_are_added_in_a_fixed_order(device):
    operands: Any = [one.to(device) if isinstance(one, Tensor) else one for one in any_weight((70, 290), 64)]
    x, grad = torch.randn(2, 290, device=device), torch.randn(2, 70, device=device)
    assert torch.equal(linear(x, operands, splits=4), linear(x, operands, splits=4))
    assert torch.equal(linear_grad_input(grad, operands, splits=3), linear_grad_input(grad, operands, splits=3))


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # where no token is
def test_a_row_does_not_see_the_next_one(guarded_twice):
    """Rows that share a segment, but no block, with weights that are infinite."""
    packed = torch.full((4 * 80 // 2, 1), 0xFF, dtype=torch.uint8)
    scales = torch.ones(10)
    scales[5] = math.inf  # weights 160 to 191: the first of row 2
    weight = placed((packed, scales, None, None, NF4, (4, 80), 32), guarded_twice)
    found = linear(guarded_twice(torch.ones(1, 80)), weight).flatten().cpu()
    assert found.tolist() == [80, 80, math.inf, 80]


def test_leading_dimensions_strides_and_nothing(guarded):
    operands = whole_weight(70, 33, 64)
    weight = placed(operands, guarded)
    x, grad = few(33, 2, 3), few(70, 2, 3)
    found = linear(guarded(x).permute(1, 2, 0), weight)
    assert torch.equal(found.cpu(), rounded(x.permute(1, 2, 0).double() @ exact(operands).T, torch.bfloat16))
    found = linear_grad_input(guarded(grad).permute(1, 2, 0), weight)
    assert torch.equal(found.cpu(), rounded(grad.permute(1, 2, 0).double() @ exact(operands), torch.bfloat16))
    assert linear(guarded(few(33)), weight).shape == (70,)
    for empty in ((0,), (2, 0, 3)):
        assert linear(guarded(few(*empty, 33)), weight).shape == (*empty, 70)
        assert linear_grad_input(guarded(few(*empty, 70)), weight).shape == (*empty, 33)


def test_a_weight_without_rows_or_columns(device):
    for N, K in itertools.product((0, 3), (0, 5)):
        packed = torch.zeros((N * K + 1) // 2, 1, dtype=torch.uint8, device=device)
        scales = torch.zeros(min(N * K, 1), device=device)
        operands = packed, scales, None, None, NF4.to(device), (N, K), 64
        x, bias = torch.ones(2, K, device=device), torch.arange(N, device=device).float()
        assert torch.equal(linear(x, operands, bias), bias.expand(2, N))
        assert torch.equal(linear_grad_input(torch.ones(2, N, device=device), operands), torch.zeros_like(x))
        adapter = LowRank(torch.ones(2, 1, device=device), torch.full((N, 1), 2.0, device=device))
        assert torch.equal(linear(x, operands, bias, adapter=adapter), bias.expand(2, N) + 2)


ONES = torch.ones(2, 33)


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (ONES.double(), None, "x must be float32, bfloat16 or float16, not torch.float64"),
        (torch.ones(()), None, "last dimension of x must be 33"),
        (torch.ones(2, 34), None, "last dimension of x must be 33"),
        (ONES, torch.ones(33), "last dimension of bias must be 70"),
        (ONES, torch.ones(1, 70), "bias must have 1 dimension, not 2"),
        (ONES, torch.ones(70).half(), r"bias must be torch.float32, as x is, not torch.float16"),
        (torch.empty(2, 33, device="meta"), None, "x is on meta, the weight on"),
    ],
    ids=["dtype", "scalar", "columns", "bias", "2-D bias", "bias dtype", "device"],
)
def test_refused(x, bias, message, guarded):
    weight = placed(whole_weight(70, 33, 64), guarded)
    on = weight[0].device
    with pytest.raises(ValueError, match=message):
        linear(x if x.is_meta else x.to(on), weight, None if bias is None else bias.to(on))


@pytest.mark.parametrize(
    ("grad", "message"),
    [(torch.ones(1, 70).int(), "grad must be float32"), (torch.ones(1, 33), "last dimension of grad must be 70")],
    ids=["dtype", "columns"],
)
def test_refused_backward(grad, message, guarded):
    weight = placed(whole_weight(70, 33, 64), guarded)
    with pytest.raises(ValueError, match=message):
        linear_grad_input(grad.to(weight[0].device), weight)
