"""Weights that are kept in full: the same bits, a budget kept to the byte, and what lets go of them."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

import qloralab as ql
from qloralab.kernels.gpu import dense_cache, two_pass
from qloralab.kernels.gpu.adapter_operands import LowRank, MaskedLowRank
from qloralab.kernels.gpu.dense_cache import VARIABLE, Held
from qloralab.nf4.linear import QuantizedLinear
from qloralab.nf4.packed import DTYPES, Packed
from qloralab.nf4.sharded import shardable_

N, K = 32, 64
BYTES = N * K * 2  # of a weight in bfloat16


@pytest.fixture(autouse=True)
def made(monkeypatch) -> Iterator[list[Any]]:
    """The ``packed`` of each dequantization. The cache is empty, and nothing is asked for."""
    dequantized: list[Any] = []
    right = two_pass.dequantize

    def dequantize(packed, *rest, **named):
        dequantized.append(packed)
        return right(packed, *rest, **named)

    monkeypatch.setattr(two_pass, "dequantize", dequantize)
    monkeypatch.setattr(two_pass, "_workspaces", {})
    monkeypatch.setattr(dense_cache, "_weights", WeakTensorKeyDictionary())
    monkeypatch.setattr(dense_cache, "_accounts", {})
    monkeypatch.delenv(VARIABLE, raising=False)
    dense_cache._asked.cache_clear()
    yield dequantized
    dense_cache._asked.cache_clear()


@pytest.fixture
def asked(monkeypatch):
    """``asked(text)`` sets the variable."""

    def ask(text: str) -> None:
        monkeypatch.setenv(VARIABLE, text)
        dense_cache._asked.cache_clear()

    return ask


def weight(device: str, shape: tuple[int, int] = (N, K)) -> ql.QuantizedTensor:
    return ql.quantize(torch.randn(shape)).to(device)


def x_of(device: str, size: int = K, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(3, size, device=device).to(dtype)


def forward(*weights: ql.QuantizedTensor) -> None:
    for one in weights:
        two_pass.linear(x_of(str(one.device)), one.operands())


def held() -> Held:
    return next(iter(dense_cache.held().values()), Held(0, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_the_same_with_and_without(dtype, device, made):
    operands, seed = weight(device).operands(), torch.tensor(5, device=device)
    x, grad, bias = x_of(device, K, dtype), x_of(device, N, dtype), torch.randn(N, device=device).to(dtype)
    B, A = torch.randn(N, 4, device=device), torch.randn(4, K, device=device)
    up, down = LowRank(x[:, :4].contiguous(), B), MaskedLowRank(grad[:, :4].contiguous(), A, seed, 0.3)

    def products() -> list[torch.Tensor]:
        return [
            two_pass.linear(x, operands, bias),
            two_pass.linear(x, operands, bias, up),
            two_pass.linear_grad_input(grad, operands),
            two_pass.linear_grad_input(grad, operands, down),
        ]

    without = products()
    assert len(made) == 4
    with dense_cache.use(N * K * dtype.itemsize):
        first, second = products(), products()
    assert len(made) == 5  # both directions, and both times, of one
    for found, again, right in zip(first, second, without, strict=True):
        assert torch.equal(found, right)
        assert torch.equal(again, right)


def test_nothing_is_kept_unless_it_is_asked_for(device, made, asked):
    one = weight(device)
    forward(one, one)
    asked("0")
    forward(one, one)
    with dense_cache.use(10 * BYTES):  # what the user says holds
        forward(one, one)
    assert (len(made), dense_cache.held()) == (6, {})


def test_the_variable_is_the_budget(device, made, asked):
    asked(f"{BYTES}")
    one, two = weight(device), weight(device)
    forward(one, two, one, two)
    with dense_cache.use(10 * BYTES):
        forward(two)
    assert [packed is one.packed for packed in made] == [True, False, False, False]
    assert dense_cache.held() == {one.device: Held(1, BYTES)}  # not emptied


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("2GiB", 2 << 30), ("500MB", 500_000_000), ("1000", 1000), ("1.5 kib", 1536), ("3kB", 3000), ("0", 0),
        ("7B", 7), ("1TiB", 1 << 40), (" 1MiB ", 1 << 20), ("", None),
    ],
)  # fmt: skip
def test_bytes_in_words(text, nbytes, asked):
    asked(text)
    assert dense_cache._asked() == nbytes


@pytest.mark.parametrize("text", ["2 gigabytes", "-1", "1e9", "GiB", "2Gi", "all", "1,5GB", "2iB"])
def test_other_words_are_refused_at_first_use(text, device, asked):
    asked(text)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{VARIABLE} is a number of bytes, such as 2GiB, 500MB"):
            forward(weight(device))


def test_a_negative_budget_is_refused():
    with pytest.raises(ValueError, match="0 bytes or more, not -1"), dense_cache.use(-1):
        pass


@pytest.mark.parametrize("spare", [-1, 0, 1])
def test_the_budget_is_kept_to_the_byte_and_what_came_first_stays(spare, device, made):
    weights = [weight(device) for _ in range(4)]
    small = weight(device, (1, K))
    with dense_cache.use(3 * BYTES + spare):
        forward(*weights, *weights)
        kept = 3 if spare >= 0 else 2
        assert held() == (kept, kept * BYTES)
        assert len(made) == kept + 2 * (4 - kept)
        forward(small)  # fits beside two weights, not beside three
        assert held().weights == 3
        made.clear()
        forward(*weights[:kept])
        assert made == []
    assert held() == (0, 0)


def test_an_entry_dies_with_its_weight_and_makes_room(device, made):
    one, two = weight(device), weight(device)
    with dense_cache.use(BYTES):
        forward(one, two)
        assert [packed is one.packed for packed in made] == [True, False]
        made.clear()
        del one
        gc.collect()
        assert held() == (0, 0)
        forward(two, two)
        assert (len(made), held()) == (1, (1, BYTES))


@pytest.mark.parametrize("name", ["packed", "scales", "absmax2", "offset", "values"])
def test_a_weight_that_was_written_to_is_made_again(name, device, made):
    one = weight(device)
    with dense_cache.use(BYTES):
        forward(one)
        part = getattr(one, name)
        part.add_(1) if part.dtype == torch.uint8 else part.mul_(2)
        x = torch.eye(K, device=device).bfloat16()
        y = two_pass.linear(x, one.operands())
        assert torch.equal(y, one.dequantize(torch.bfloat16).T)
        forward(one)
        assert (len(made), held()) == (2, (1, BYTES))


def test_other_scales_for_the_same_codes_are_another_weight(device):
    operands, x = weight(device).operands(), torch.eye(K, device=device).bfloat16()
    with dense_cache.use(BYTES):
        y = two_pass.linear(x, operands)
        assert operands.offset is not None
        larger = operands._replace(offset=operands.offset + 1)
        assert not torch.equal(two_pass.linear(x, larger), y)
        assert torch.equal(two_pass.linear(x, operands), y)


def test_each_dtype_is_an_entry(device, made):
    one = weight(device)
    with dense_cache.use(10 * BYTES):
        for dtype in DTYPES * 2:
            two_pass.linear(x_of(device, K, dtype), one.operands())
        assert (len(made), held()) == (3, (3, 4 * BYTES))


def test_a_weight_that_is_whole_for_a_product_only_is_not_kept(device, made):
    model: Any = nn.Sequential(QuantizedLinear(weight(device)))
    shardable_(model)
    with dense_cache.use(10 * BYTES):
        for _ in range(2):
            two_pass.linear(x_of(device), model[0].weight.operands())
        assert (len(made), held()) == (2, (0, 0))


def test_a_use_within_a_use_gives_the_outer_budget_back(device):
    one, two = weight(device), weight(device)
    with dense_cache.use(BYTES):
        with dense_cache.use(2 * BYTES):
            forward(one, two)
            assert held() == (2, 2 * BYTES)
        assert held() == (0, 0)
        forward(one, two)
        assert held() == (1, BYTES)
    forward(one)
    assert held() == (0, 0)


def test_a_weight_may_be_kept_at_its_second_product(device, made):
    one, two = weight(device), weight(device)
    for _ in range(2):
        with dense_cache.use(10 * BYTES, "used again"):
            forward(one, two)
            assert held() == (0, 0)
            forward(one, one)
            assert held() == (1, BYTES)
            assert [packed is one.packed for packed in made] == [True, False, True]
        made.clear()


def on_a_gpu(free: int, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """One with so many bytes free, and 3 of PyTorch's."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 2 * free))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 10)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 7)
    return torch.device("cuda")


def test_what_is_spare_is_all_but_a_margin(monkeypatch):
    assert dense_cache.spare(on_a_gpu(dense_cache.MARGIN + 40, monkeypatch)) == 43
    assert dense_cache.spare(on_a_gpu(dense_cache.MARGIN - 40, monkeypatch)) == 0


def test_the_commands_use_what_is_spare_on_a_gpu_unless_the_user_says_how_much(device, monkeypatch, asked):
    with dense_cache.while_generating(torch.device("cpu")), dense_cache.while_recomputing(torch.device("cpu")):
        assert dense_cache._limit() is None
    gpu = on_a_gpu(dense_cache.MARGIN + 40, monkeypatch)
    with dense_cache.while_generating(gpu):
        assert dense_cache._limit() == (21, "used again")
    with dense_cache.while_recomputing(gpu):
        assert dense_cache._limit() == (43, "recomputed")
    for text, nbytes in (("0", 0), ("5", 5)):
        asked(text)
        with dense_cache.while_generating(gpu), dense_cache.while_recomputing(gpu):
            assert dense_cache._limit() == (nbytes, "all")


def test_where_an_allocation_fails_the_workspace_serves_and_the_cache_stops_to_grow(device, made, monkeypatch):
    right, weights, attempts = two_pass.dequantize, [weight(device) for _ in range(3)], []

    def dequantize(*args, **named):
        if "out" not in named:
            attempts.append(args[0])
            if len(attempts) > 1:
                raise torch.OutOfMemoryError("full")
        return right(*args, **named)

    monkeypatch.setattr(two_pass, "dequantize", dequantize)
    with dense_cache.use(10 * BYTES):
        forward(*weights, *weights)
        assert (len(made), held(), len(attempts)) == (5, (1, BYTES), 2)


class Product(torch.autograd.Function):
    """The two products of a layer, as its operators take them on a GPU."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: ql.QuantizedTensor) -> torch.Tensor:
        ctx.save_for_backward(*layer.operands().tensors)
        ctx.layout = layer.operands().layout
        return two_pass.linear(x, layer.operands())

    @staticmethod
    def backward(ctx, *grads: torch.Tensor) -> Any:
        return two_pass.linear_grad_input(grads[0], Packed(*ctx.saved_tensors, *ctx.layout)), None


def step(blocks: list[list[ql.QuantizedTensor]], use_reentrant: bool) -> torch.Tensor:
    """Forward and backward of blocks that are computed again: the gradient of the input."""
    torch.manual_seed(0)
    x = start = torch.randn(2, K, device=blocks[0][0].device).bfloat16().requires_grad_()

    def run(x: torch.Tensor, *layers: ql.QuantizedTensor) -> torch.Tensor:
        for layer in layers:
            x = Product.apply(x, layer)  # pyright: ignore[reportAssignmentType]
        return x

    for block in blocks:
        x = checkpoint(run, x, *block, use_reentrant=use_reentrant)
    x.float().sum().backward()
    assert start.grad is not None
    return start.grad


SQUARE = K * K * 2


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
def test_what_checkpointing_recomputes_is_kept_until_its_gradient(use_reentrant, device, made):
    blocks = [[weight(device, (K, K)) for _ in range(2)] for _ in range(3)]
    expected = step(blocks, use_reentrant)
    assert len(made) == 6 * 3
    made.clear()
    with dense_cache.use(2 * SQUARE, "recomputed"):
        for _ in range(2):
            assert torch.equal(step(blocks, use_reentrant), expected)
            assert held().nbytes == 0
        assert len(made) == 2 * 6 * 2


def test_recomputed_weights_take_the_room_that_is_left(device, made):
    blocks = [[weight(device, (K, K)) for _ in range(2)] for _ in range(3)]
    with dense_cache.use(5 * SQUARE):
        forward(*blocks[0], *blocks[1])
        made.clear()
        with torch.no_grad():
            forward(*blocks[0], *blocks[1])
        assert (made, held()) == ([], (4, 4 * SQUARE))
        made.clear()
        step(blocks, False)  # forward keeps the fifth; recomputed, the sixth finds no room
        assert [sum(packed is one.packed for packed in made) for block in blocks for one in block] == [0, 0, 0, 0, 1, 3]
        assert held() == (5, 5 * SQUARE)


def test_no_budget_is_exceeded_while_blocks_are_recomputed(device, monkeypatch):
    blocks = [[weight(device, (K, K)) for _ in range(3)] for _ in range(3)]
    most, right = [], two_pass.linear_grad_input

    def noted(*args: Any) -> torch.Tensor:
        most.append(held().nbytes)
        return right(*args)

    monkeypatch.setattr(two_pass, "linear_grad_input", noted)
    for budget in (1, SQUARE, 2 * SQUARE + 1, 4 * SQUARE, 20 * SQUARE):
        most.clear()
        with dense_cache.use(budget):
            step(blocks, False)
        assert max(most) <= budget
        assert max(most) >= min(budget - budget % SQUARE, 9 * SQUARE)


def test_what_no_gradient_asked_for_is_dropped_by_the_next_forward(device):
    one, other = weight(device, (K, K)), weight(device)
    x = torch.randn(2, K, device=device).bfloat16().requires_grad_()

    class Recomputed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, *grads: torch.Tensor) -> Any:
            forward(one)
            return grads[0]

    with dense_cache.use(2 * SQUARE, "recomputed"):
        Recomputed.apply(x).sum().backward()  # pyright: ignore[reportAttributeAccessIssue]
        assert held() == (1, SQUARE)
        forward(other)
        assert held() == (0, 0)


def test_threads_that_ask_at_once_get_the_same_weight(device, made, monkeypatch):
    one = weight(device)
    right, start = one.dequantize(torch.bfloat16), threading.Barrier(4)  # the interpreter is for one thread only

    def dequantize(packed: torch.Tensor, *_: Any) -> torch.Tensor:
        made.append(packed)
        time.sleep(0.01)
        return right.clone()

    monkeypatch.setattr(two_pass, "dequantize", dequantize)
    results: list[torch.Tensor] = []

    def run() -> None:
        start.wait()
        results.extend(two_pass.linear(torch.eye(K, device=device).bfloat16(), one.operands()) for _ in range(20))

    with dense_cache.use(BYTES):
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(made) == 1
    assert len(results) == 80
    assert all(torch.equal(y, right.T) for y in results)


class Stream:
    """What stands in for one of a GPU; it notes what it waited for."""

    def __init__(self) -> None:
        self.waited: list[Any] = []

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)


def test_another_stream_waits_once_for_the_one_that_made_it(monkeypatch):
    first, second, known = Stream(), Stream(), list[Stream]()
    given: Any = "made", {first}
    dense = dense_cache._Dense(torch.zeros(1), (), (), False, *given)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: known.append(stream))
    for stream in (first, second, second, first):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _, stream=stream: stream)
        dense_cache._order(dense)
    assert (first.waited, second.waited, known) == ([], ["made"], [second])


@pytest.mark.gpu
def test_a_graph_dequantizes_in_its_own_memory(device):
    one, x = weight("cuda", (K, K)), x_of("cuda")
    with dense_cache.use(1 << 20):
        y = two_pass.linear(x, one.operands())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = two_pass.linear(x, one.operands())
    assert held() == (0, 0)  # no address of the cache is in the graph
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, y)
