"""y = x W' + bias from tiles: exact sums bit for bit, the accuracy of its weights, splits, and no byte too far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qloralab.kernels.gpu.adapter_operands import LowRank
from qloralab.kernels.gpu.linear import FEWEST_STEPS, FEWEST_STEPS_OF_FEW_TOKENS, PROGRAMS, linear, split, token_tile
from qloralab.kernels.gpu.lookup import table
from qloralab.kernels.gpu.packing import TiledWeight, tile
from qloralab.nf4 import blockwise, ops
from qloralab.nf4.codebook import normal_float

MARGIN = 4096  # bytes, what ``guarded`` leaves around a tensor
Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Sequence[int], int]

# Whole numbers, so that sums are exact in any order; no two codes mean the same.
WHOLE = torch.tensor([-8.0, -7, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8])
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
cases = pytest.mark.parametrize(("M", "N", "K", "block_size", "splits"), CASES)


def beside(adapters: Sequence[Any]) -> pytest.MarkDecorator:
    """Each case with two of the adapters, and each adapter with some of the cases: the interpreter is slow."""
    pairs = [
        (case, adapters[(number + shift) % len(adapters)])
        for shift in (0, len(adapters) // 2)
        for number, case in enumerate(CASES)
    ]
    return pytest.mark.parametrize(("case", "adapter"), pairs, ids=str)


def whole_weight(N: int, K: int, block_size: int) -> Operands:
    """The operands of a weight whose table and scales are exact in bfloat16."""
    factor = table(WHOLE).factor
    packed = torch.randint(256, (N * K // 2, 1), dtype=torch.uint8)
    scales = torch.tensor([1.0, 2.0, -1.0])[torch.randint(3, (-(-N * K // block_size),))] * factor
    return packed, scales, None, None, WHOLE, (N, K), block_size


def dequantized(operands: Operands) -> Tensor:
    """float64 [N, K]."""
    return ops.dequantize.reference(*operands, torch.float32).double()


def few(*shape: int) -> Tensor:
    """A few whole numbers."""
    return torch.randint(-2, 3, shape).bfloat16()


def rounded(exact: Tensor) -> Tensor:
    """float64, rounded to bfloat16 (through float32, which holds the sums of these tests exactly)."""
    return exact.float().bfloat16().double()


def tiled(operands: Operands, guarded: Callable[..., Tensor]) -> TiledWeight:
    """The tiles of a weight, in guarded memory."""
    weight = tile(*operands)
    fields = {name: guarded(getattr(weight, name)) for name in ("words", "scales", "scales_bf16")}
    return replace(weight, **fields)


class Watched:
    """triton's interpreter, without permission to read from some places."""

    def __init__(self, interpreter: Any, forbidden: list[tuple[int, int]]):
        self._interpreter = interpreter
        self._forbidden = forbidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._interpreter, name)

    def load(self, addresses: Any, mask: Any, *others: Any) -> Any:
        read = addresses[mask.astype(bool)]
        for start, end in self._forbidden:
            assert not ((read >= start) & (read < end)).any(), "something is read beside a tensor"
        return self._interpreter.load(addresses, mask, *others)


@pytest.fixture
def guarded_twice(guarded, monkeypatch, device) -> Callable[..., Tensor]:
    """``guarded``, which sees what is written beside a tensor; in the interpreter also what is read there.

    What the launchers allocate lies in such memory too, and is NaN until it is written.
    """
    forbidden: list[tuple[int, int]] = []
    original = Tensor.new_empty

    def allocate(*what: Any, **options: Any) -> Tensor:
        tensor = guarded(*what, **options)
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        forbidden.extend([(start - MARGIN, start), (end, end + MARGIN)])
        return tensor

    def new_empty(self: Tensor, size: Any, **options: Any) -> Tensor:
        if "device" in options:  # triton's interpreter
            return original(self, size, **options)
        return allocate(*size, dtype=options["dtype"])

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    if device == "cpu":
        from triton.runtime import interpreter

        monkeypatch.setattr(interpreter, "_interpreter", Watched(interpreter._interpreter, forbidden))
    return allocate


def test_the_whole_numbers_are_exact_in_the_table():
    look_up = table(WHOLE)
    assert torch.equal(torch.tensor(look_up.values) / look_up.factor, WHOLE[list(look_up.order)])


@cases
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_exact_sums(M, N, K, block_size, splits, biased, guarded_twice):
    operands = whole_weight(N, K, block_size)
    x, bias = few(M, K), few(N)
    weight = tiled(operands, guarded_twice)
    found = linear(guarded_twice(x), weight, guarded_twice(bias) if biased else None, splits)
    expected = x.double() @ dequantized(operands).T + (bias.double() if biased else 0)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.cpu().double(), rounded(expected))


@beside([1, 4, 16, 33, 64, 100])
def test_exact_sums_with_an_adapter(case, adapter, guarded_twice):
    (M, N, K, block_size, splits), r = case, adapter
    operands = whole_weight(N, K, block_size)
    x, bias, h, B = few(M, K), few(N), few(M, r), few(N, r).float()
    term = LowRank(guarded_twice(h), guarded_twice(B))
    found = linear(guarded_twice(x), tiled(operands, guarded_twice), guarded_twice(bias), splits, term)
    expected = x.double() @ dequantized(operands).T + h.double() @ B.double().T + bias.double()
    assert torch.equal(found.cpu().double(), rounded(expected))


def test_an_adapters_matrix_is_rounded_and_the_sum_is_rounded_once(device):
    """Beside a weight of zeros y is h B', of B in bfloat16."""
    M, N, K, r = 5, 70, 64, 20
    packed, absmax = blockwise.quantize_blockwise(torch.zeros(N, K), normal_float(), 64)
    weight = tile(packed.to(device), absmax.to(device), None, None, normal_float().to(device), (N, K), 64)
    h, B = torch.randn(M, r).bfloat16(), torch.randn(N, r)
    x = torch.randn(M, K).bfloat16().to(device)
    found = linear(x, weight, adapter=LowRank(h.to(device), B.to(device))).cpu().double()
    exact = h.double() @ B.bfloat16().double().T
    assert torch.allclose(found, exact, rtol=2**-8, atol=1e-5)
    assert (found - exact).norm() / exact.norm() < 2e-3


@pytest.mark.parametrize(
    ("h", "B", "message"),
    [
        (few(2, 4), few(70, 4), r"B must be torch.float32 \[70, 4\]"),
        (few(2, 4), torch.zeros(64, 4), r"B must be torch.float32 \[70, 4\]"),
        (few(2, 3), torch.zeros(70, 4), r"h must be torch.bfloat16 \[2, 4\]"),
        (torch.zeros(2, 4), torch.zeros(70, 4), r"h must be torch.bfloat16 \[2, 4\]"),
        (few(2, 0), torch.zeros(70, 0), "B must be a matrix of 1 column or more"),
    ],
    ids=["dtype of B", "rows of B", "columns of h", "dtype of h", "no rank"],
)
def test_an_adapter_that_does_not_fit_is_refused(h, B, message, guarded):
    weight = tiled(whole_weight(70, 64, 64), guarded)
    on = weight.words.device
    with pytest.raises(ValueError, match=message):
        linear(few(2, 64).to(on), weight, adapter=LowRank(h.to(on), B.to(on)))


@pytest.mark.parametrize("M", [4, 32, 40, 65])
def test_accuracy_of_the_weights(M, device):
    """Each token is a row of the unit matrix times 1, so that y is W' itself, but for the rounding of the result.

    The rounding of y, 1.66e-3, adds to the error of the weights in the square.
    """
    N, K = 128, 128
    packed, absmax = blockwise.quantize_blockwise(torch.randn(N, K), normal_float(), 64)
    operands = packed, absmax, None, None, normal_float(), (N, K), 64
    x = torch.eye(K)[:M].bfloat16()
    weight = tile(packed.to(device), absmax.to(device), None, None, normal_float().to(device), (N, K), 64)
    found = linear(x.to(device), weight)
    W = dequantized(operands).T[:M]
    error = float((found.cpu().double() - W).norm() / W.norm())
    assert 2e-3 < error < (2.7e-3**2 + 1.7e-3**2) ** 0.5  # rounded twice: it does show


def test_against_float64_with_its_own_weights(device):
    """Sums of many products: only the rounding of the result away from the exact sum of the kernel's weights."""
    M, N, K = 5, 64, 512
    packed, absmax = blockwise.quantize_blockwise(torch.randn(N, K), normal_float(), 64)
    look_up = table(normal_float())
    by_code = torch.empty(16).index_put_((torch.tensor(look_up.order),), torch.tensor(look_up.values))
    codes = blockwise.unpack(packed, N * K).long()
    W = by_code[codes].bfloat16() * (absmax / look_up.factor).bfloat16().repeat_interleave(64)
    x, bias = torch.randn(M, K).bfloat16(), torch.randn(N).bfloat16()
    exact = x.double() @ W.double().view(N, K).T + bias.double()
    weight = tile(packed.to(device), absmax.to(device), None, None, normal_float().to(device), (N, K), 64)
    found = linear(x.to(device), weight, bias.to(device)).cpu().double()
    assert (found - exact).norm() / exact.norm() < 2e-3
    assert torch.allclose(found, exact, rtol=2**-8, atol=1e-4)


def test_splits_are_added_in_a_fixed_order(device):
    packed, absmax = blockwise.quantize_blockwise(torch.randn(64, 256), normal_float(), 64)
    weight = tile(packed.to(device), absmax.to(device), None, None, normal_float().to(device), (64, 256), 64)
    x = torch.randn(2, 256).bfloat16().to(device)
    assert torch.equal(linear(x, weight, splits=4), linear(x, weight, splits=4))


def test_leading_dimensions_strides_and_nothing(guarded):
    operands = whole_weight(70, 64, 64)
    weight = tiled(operands, guarded)
    x = few(64, 2, 3)
    found = linear(guarded(x).permute(1, 2, 0), weight)
    assert found.shape == (2, 3, 70)
    assert torch.equal(found.cpu().double(), rounded(x.permute(1, 2, 0).double() @ dequantized(operands).T))
    assert linear(guarded(few(0, 64)), weight).shape == (0, 70)
    assert linear(guarded(few(64)), weight).shape == (70,)


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(1, 64), None, "x must be bfloat16, not torch.float32"),
        (few(1, 128), None, "last dimension of x must be 64"),
        (few(1, 64), few(64), "last dimension of bias must be 70"),
        (few(1, 64), few(1, 70), "bias must have 1 dimension, not 2"),
        (torch.empty(1, 64, dtype=torch.bfloat16, device="meta"), None, "x is on meta, the weight on"),
    ],
    ids=["dtype", "columns", "bias", "2-D bias", "device"],
)
def test_refused(x, bias, message, guarded):
    weight = tiled(whole_weight(70, 64, 64), guarded)
    on = weight.words.device
    with pytest.raises(ValueError, match=message):
        linear(x if x.is_meta else x.to(on), weight, None if bias is None else bias.to(on))


@pytest.mark.parametrize(("M", "tokens"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (1500, 128)])
def test_the_tile_of_tokens(M, tokens):
    assert token_tile(M, torch.device("cpu")) == tokens


def test_splits_fill_the_gpu_and_leave_no_program_without_work():
    assert split(PROGRAMS, 64) == 64  # enough programs: not split
    assert split(32, 64) == FEWEST_STEPS  # 4096 x 4096: 8 splits
    assert split(1, 4) == 4  # too short
    assert split(32, 64, tokens=16) == FEWEST_STEPS_OF_FEW_TOKENS  # 16 splits
    assert split(112, 64, tokens=32) == -(-64 // 7)  # 14336 x 4096: 784 programs
    for programs in (1, 7, 100):
        for tiles in (1, 9, 64, 171):
            for splits in (None, 1, 2, 5, 1000):
                steps = split(programs, tiles, splits)
                assert 1 <= steps <= tiles
                assert (-(-tiles // steps) - 1) * steps < tiles
