"""Optimizers whose state pages: the numbers of PyTorch's AdamW, the same bits paged or not, memory within a budget."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim.adamw import AdamW8bit
from torch import Tensor
from torch.nn import Parameter

import qloralab as ql
from qloralab.optim import storage, unified_memory
from qloralab.optim.arena import ALIGNMENT
from qloralab.optim.layout import lay_out
from qloralab.optim.paged_lion import PagedLion

MIB = 2**20
CHUNK = 4 * MIB
BUDGET = 4 * CHUNK  # the smallest: as few slots as there may be
NUMELS = [1_000_003, 5, 0, 2_600_000, 4_096, 1_400_000]  # 40 MB of float32 moments, 10 chunks
NUMELS_8BIT = [4_000_003, 5, 0, 4_100_000, 4_096, 4_000_000]  # 24 MB of codes, 6 chunks
SMALL = [70_001, 5, 0, 256]
NOISE = torch.randn(2**22 + 2**16, generator=torch.Generator().manual_seed(7))
TWO_STEPS = 8 * 2**-24 * float(NOISE.abs().max())  # of four roundings each, of numbers no larger than the gradients
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

Bits = Any  # 32 or 8


def make(numels: Sequence[int] = NUMELS, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """Parameters without gradients."""
    return [Parameter(NOISE[i:][:numel].to(dtype, copy=True)) for i, numel in enumerate(numels)]


def give(params: Sequence[Tensor], step: int) -> None:
    """The gradients of a step."""
    for i, param in enumerate(params):
        param.grad = NOISE[997 * step + 101 * i + 11 :][: param.numel()].to(param.dtype, copy=True)


def run(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: range = range(3)) -> None:
    for step in steps:
        give(params, step)
        optimizer.step()


def bits(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the parameters and of all of their state."""
    state = [value for param in params for value in optimizer.state.get(param, {}).values()]
    return [tensor.detach().clone() for tensor in (*params, *state)]


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def settle(optimizer: ql.PagedAdamW) -> None:
    """Wait until nothing is on its way between memory and disk."""
    for device in optimizer._storage.devices.values():
        if device.pager is not None:
            device.pager.settle()


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


@contextmanager
def sampled(take: Callable[[], int]) -> Iterator[list[int]]:
    """What a thread of its own reads, again and again, while the body runs."""
    samples, stop = [], threading.Event()

    def body() -> None:
        while not stop.is_set():
            samples.append(take())

    thread = threading.Thread(target=body)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def groups_of(params: Sequence[Parameter]) -> list[dict[str, Any]]:
    """Three groups with rates of their own; one chunk of memory cannot hold two of them."""
    return [
        {"params": list(params[:1]), "lr": 1e-2},
        {"params": list(params[1:4]), "betas": (0.5, 0.9), "weight_decay": 0.3},
        {"params": list(params[4:]), "eps": 1e-3, "lr": 3e-4},
    ]


# the numbers of AdamW


@pytest.mark.parametrize("schedule", ["constant", "one cycle"])
def test_200_steps_are_as_near_to_float64_as_those_of_torch(schedule):
    """All round some operations of a step to float32, and the errors add up alike: twice PyTorch's is allowed."""
    rates = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1}
    start, ends = make(SMALL), []
    for kind, dtype in (
        (torch.optim.AdamW, torch.float64),
        (torch.optim.AdamW, torch.float32),
        (ql.PagedAdamW, torch.float32),
    ):
        params = [Parameter(param.detach().to(dtype, copy=True)) for param in start]
        optimizer = kind(params, **rates)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, 200) if schedule == "one cycle" else None
        for step in range(200):
            give(params, step)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        ends.append(
            [
                torch.cat([tensor.detach().double().flatten() for tensor in tensors])
                for tensors in (params, *zip(*(_moments(optimizer, param) for param in params), strict=True))
            ]
        )
    for exact, theirs, ours in zip(*ends, strict=True):
        assert torch.linalg.vector_norm(ours - exact) <= 2 * torch.linalg.vector_norm(theirs - exact)


def _moments(optimizer: torch.optim.Optimizer, param: Tensor) -> list[Tensor]:
    return [optimizer.state[param][name] for name in ("exp_avg", "exp_avg_sq")]


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize(
    ("kind", "state_bits", "numels", "budget"),
    [
        pytest.param(ql.PagedAdamW, 32, NUMELS, BUDGET, id="32 bits"),
        pytest.param(ql.PagedAdamW, 32, NUMELS, 36 * MIB, id="32 bits, a chunk stays"),
        pytest.param(ql.PagedAdamW, 8, NUMELS_8BIT, BUDGET, id="8 bits"),
        pytest.param(PagedLion, 32, NUMELS, BUDGET // 2, id="Lion"),
        pytest.param(PagedLion, 8, NUMELS_8BIT, BUDGET // 2, id="Lion, 8 bits"),
    ],
)
def test_paging_changes_no_bit(kind, state_bits, numels, budget, dtype):
    ends = []
    for limit in (None, budget):
        params = make(numels, dtype)
        optimizer = kind(groups_of(params), state_bits=state_bits, budget=limit)
        run(optimizer, params)
        assert (optimizer.paging().fetched > 0) == (limit is not None)
        assert optimizer.paging().resident_bytes <= (limit or optimizer.paging().state_bytes)
        ends.append(bits(optimizer, params))
    assert same(*ends)


@pytest.mark.parametrize("kind", [ql.PagedAdamW, PagedLion])
def test_an_update_in_backward_has_the_bits_of_a_step_and_frees_gradients(kind):
    ends = []
    for in_backward in (False, True):
        params = make()
        optimizer = kind(groups_of(params), budget=BUDGET, update_in_backward=in_backward)
        for step in range(3):
            loss = sum((param * NOISE[997 * step + i :][: param.numel()]).sum() for i, param in enumerate(params))
            assert isinstance(loss, Tensor)
            loss.backward()
            assert all((param.grad is None) == in_backward for param in params)
            optimizer.step()
            optimizer.zero_grad()
        ends.append(bits(optimizer, params))
    assert same(*ends)


def test_a_deleted_optimizer_updates_nothing_in_backward():
    params = make(SMALL)
    optimizer = ql.PagedAdamW(params, update_in_backward=True)
    del optimizer
    before = params[0].detach().clone()
    params[0].sum().backward()
    assert torch.equal(params[0], before)
    assert params[0].grad is not None


# what PyTorch's optimizers can do


def test_parameters_without_a_gradient_are_left_alone_and_page_later():
    ends = []
    for budget in (None, BUDGET):
        params = make()
        optimizer = ql.PagedAdamW(params, budget=budget)
        run(optimizer, [*params[:3], *params[4:]], range(2))
        assert torch.equal(params[3], make()[3])
        assert params[3] not in optimizer.state
        give(params[3:4], 5)
        for param in (*params[:3], *params[4:]):
            param.grad = None
        optimizer.step()
        run(optimizer, params, range(6, 8))
        assert [int(optimizer.state[param]["step"]) for param in params] == [4, 4, 4, 3, 4, 4]
        ends.append(bits(optimizer, params))
    assert same(*ends)


def test_a_closure_computes_the_loss_with_gradients():
    (param,) = make([1000])
    optimizer = ql.PagedAdamW([param], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_without_gradients_a_step_does_nothing():
    params = make(SMALL)
    optimizer = ql.PagedAdamW(params)
    run(optimizer, params)
    before = bits(optimizer, params)
    optimizer.zero_grad()
    assert [param.grad for param in params] == [None] * len(params)
    optimizer.step()
    assert same(bits(optimizer, params), before)


def test_a_grad_scaler_skips_a_step_with_an_infinite_gradient():
    params = make(SMALL)
    optimizer, scaler = ql.PagedAdamW(params), torch.amp.GradScaler("cpu", init_scale=8.0)
    expected = make(SMALL)
    plain = ql.PagedAdamW(expected)
    for step, spoiled in enumerate((False, True, False)):
        scaler.scale(torch.ones(()))
        give(params, step)
        for param in params:
            assert param.grad is not None
            param.grad.mul_(scaler.get_scale())
        if spoiled:
            assert params[0].grad is not None
            params[0].grad[3] = torch.inf
        else:
            run(plain, expected, range(step, step + 1))
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 4.0
    assert same(bits(optimizer, params), bits(plain, expected))


def test_a_group_that_is_added_pages_with_the_others():
    ends = []
    for budget in (None, BUDGET):
        params = make()
        optimizer = ql.PagedAdamW(params[:4], budget=budget)
        run(optimizer, params[:4], range(1))
        optimizer.add_param_group({"params": params[4:], "lr": 0.1})
        run(optimizer, params, range(1, 3))
        ends.append(bits(optimizer, params))
    assert same(*ends)


def test_a_parameter_that_is_unfrozen_later_pages():
    ends = []
    for budget in (None, BUDGET):
        params = make()
        params[3].requires_grad_(False)
        optimizer = ql.PagedAdamW(groups_of(params), budget=budget)
        allocated = optimizer.paging().state_bytes
        run(optimizer, [*params[:3], *params[4:]], range(1))
        params[3].requires_grad_(True)
        run(optimizer, params, range(1, 3))
        assert optimizer.paging().state_bytes > allocated + 8 * NUMELS[3]
        ends.append(bits(optimizer, params))
    assert same(*ends)


def test_names_of_parameters_are_kept():
    model = torch.nn.Linear(3, 2)
    optimizer = ql.PagedAdamW(model.named_parameters(), nonfinite="raise")
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    model(torch.full((1, 3), torch.nan)).sum().backward()
    with pytest.raises(ValueError, match=re.escape("parameter weight [2, 3] has a gradient that is not finite")):
        optimizer.step()


def test_its_repr_shows_the_groups():
    text = repr(ql.PagedAdamW(groups_of(make(SMALL)), lr=0.125))
    assert text.startswith("PagedAdamW (")
    for line in ("Parameter Group 2", "lr: 0.125", "betas: (0.5, 0.9)", "weight_decay: 0.3", "eps: 0.001"):
        assert line in text


# gradients that are not finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_gradient_that_is_not_finite_changes_nothing(nonfinite, value):
    params = make(SMALL)
    optimizer = ql.PagedAdamW(params, nonfinite=nonfinite)
    run(optimizer, params)
    before = bits(optimizer, params)
    give(params, 3)
    assert params[3].grad is not None
    params[3].grad[-1] = value
    if nonfinite == "raise":
        with pytest.raises(ValueError, match=re.escape("3 of group 0 [256] has a gradient that is not finite; no par")):
            optimizer.step()
    else:
        optimizer.step()
    assert same(bits(optimizer, params), before)
    assert optimizer.skipped == (nonfinite == "skip")
    run(optimizer, params, range(3, 4))
    assert not same(bits(optimizer, params), before)


def test_an_update_takes_nan_where_it_is():
    params = make(SMALL)
    optimizer = ql.PagedAdamW(params)
    give(params, 0)
    assert params[0].grad is not None
    params[0].grad[7] = torch.nan
    optimizer.step()
    assert [param.isnan().nonzero().flatten().tolist() for param in params] == [[7], [], [], []]
    assert optimizer.skipped == 0


# memory


@pytest.mark.parametrize("numels", [NUMELS, [5_004_104]], ids=["mixed", "one"])
def test_residency_is_within_the_budget_at_any_time(numels):
    """``mincore`` and smaps are walks, not moments: while one lasts a chunk may leave behind it, and one come ahead."""
    params = make(numels) if len(numels) > 1 else [Parameter(torch.zeros(numels))]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = ql.PagedAdamW(params, budget=BUDGET)
    with (
        sampled(lambda: optimizer.paging().resident_bytes) as cached,
        sampled(lambda: optimizer.paging().rss_bytes or 0) as mapped,
    ):
        steps = 0
        while steps < 4 or min(len(cached), len(mapped)) <= 8:  # on a busy machine samples are slow to come
            steps += 1
            optimizer.step()
            settle(optimizer)
            paging = optimizer.paging()
            assert 0 < paging.resident_bytes <= BUDGET
            assert 0 < (paging.rss_bytes or 0) <= BUDGET
            assert paging.evicted_bytes == paging.state_bytes - paging.resident_bytes >= 40 * MIB - BUDGET
    assert max(cached) <= BUDGET + CHUNK
    assert max(mapped) <= BUDGET + CHUNK


def test_a_step_takes_no_memory_beside_the_state():
    params = make()
    give(params, 0)
    ql.PagedAdamW(make(SMALL))  # what is loaded at the first use
    optimizer = ql.PagedAdamW(params, budget=BUDGET)
    optimizer.step()
    before = status("RssAnon")
    with sampled(lambda: status("RssAnon")) as private:
        for _ in range(3):
            optimizer.step()
    assert max(private) - before < 2 * MIB


def test_from_the_first_sweep_on_every_chunk_is_prefetched():
    params = make()
    optimizer = ql.PagedAdamW(params, budget=BUDGET)
    run(optimizer, params, range(4))
    paging = optimizer.paging()
    assert (paging.prefetches, paging.misses) == (4 * 10, 0)
    assert paging.stalls <= paging.prefetches
    assert (paging.stalled > 0) == (paging.stalls > 0)
    assert paging.state_bytes == 40 * MIB
    assert 4 * 40 * MIB <= paging.fetched <= 4 * 40 * MIB + BUDGET, "besides, the first of the next step"
    assert 0 < paging.fetched - paging.evicted <= BUDGET
    assert paging.where.startswith("a file in ")
    assert str(paging).startswith(f"optimizer state 42 MB, {paging.resident_bytes / 1e6:.0f} resident; 40 prefetches")


def test_the_order_of_a_backward_is_expected_at_the_next_one():
    params = make([CHUNK // 8] * 10)
    optimizer, missed = ql.PagedAdamW(params, budget=BUDGET, update_in_backward=True), []
    for _ in range(4):
        for param in reversed(params):
            param.sum().backward()
        optimizer.step()
        missed.append(optimizer.paging().misses)
    assert missed[0] > 0
    assert missed[1:] == missed[1:2] * 3, "the order was known, and chunks were missed"


def test_a_state_within_the_budget_does_not_page():
    params = make()
    optimizer = ql.PagedAdamW(params, budget=64 * MIB)
    run(optimizer, params)
    paging = optimizer.paging()
    assert (paging.where, paging.fetched, paging.rss_bytes) == ("memory of cpu", 0, None)
    assert str(paging) == "optimizer state 42 MB, 42 resident"


@pytest.mark.parametrize(("kind", "moments"), [(ql.PagedAdamW, 2), (PagedLion, 1)])
def test_8_bits_take_a_quarter_and_lion_the_half_of_adamw(kind, moments):
    sizes = [kind(make([4 * MIB]), state_bits=bits).paging().state_bytes for bits in (32, 8)]
    assert sizes == [moments * 16 * MIB, moments * 4 * MIB]
    with pytest.raises(ValueError, match=rf"^budget is .* bytes at least \({8 * moments} MiB\), not "):
        kind(make(SMALL), budget=8 * moments * MIB - 1)


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_deleted_optimizer_leaves_nothing(in_backward, tmp_path):
    def left() -> list[str]:
        names = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
        maps = Path("/proc/self/maps").read_text().splitlines()
        threads = [thread.name for thread in threading.enumerate() if thread not in before]
        return [name for name in (*names, *maps) if str(tmp_path) in name] + threads

    params, before = make(), threading.enumerate()
    assert left() == []
    optimizer = ql.PagedAdamW(params, budget=BUDGET, state_dir=tmp_path, update_in_backward=in_backward)
    give(params, 0)
    optimizer.step()
    assert len(left()) >= 4, "a descriptor, a mapping, two threads"
    assert list(tmp_path.iterdir()) == []
    del optimizer
    deadline = time.monotonic() + 10
    while left() and time.monotonic() < deadline:  # the threads finish what they are at
        time.sleep(0.01)
    assert left() == []


# state dictionaries


def test_torch_continues_from_our_state_and_we_from_its():
    params, theirs = make(), make()
    optimizer, torch_optimizer = ql.PagedAdamW(groups_of(params), budget=BUDGET), torch.optim.AdamW(groups_of(theirs))
    run(optimizer, params)
    for one, other in zip(theirs, params, strict=True):
        one.data.copy_(other.data)
    torch_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same(bits(torch_optimizer, theirs), bits(optimizer, params))
    for into, source in ((params, theirs), (theirs, params)):
        run(optimizer, params, range(3, 5))
        run(torch_optimizer, theirs, range(3, 5))
        for one, other in zip(bits(optimizer, params), bits(torch_optimizer, theirs), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=TWO_STEPS)
        for one, other in zip(into, source, strict=True):
            one.data.copy_(other.data)
        optimizer.load_state_dict(torch_optimizer.state_dict())
        assert same(_state(optimizer, params), _state(torch_optimizer, theirs))


def _state(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    return bits(optimizer, params)[len(params) :]


def test_bitsandbytes_continues_from_our_state_and_we_from_its():
    params, theirs = make(NUMELS_8BIT[3:]), make(NUMELS_8BIT[3:])
    optimizer = ql.PagedAdamW(params, lr=0.01, state_bits=8)
    peer = AdamW8bit(theirs, lr=0.01, weight_decay=0.01)
    run(optimizer, params)
    for one, other in zip(theirs, params, strict=True):
        one.data.copy_(other.data)
    peer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    names = ("state1", "state2", "absmax1", "absmax2")
    for one, other in zip(params, theirs, strict=True):
        assert all(torch.equal(optimizer.state[one][name], peer.state[other][name]) for name in names)
    run(optimizer, params, range(3, 4))
    run(peer, theirs, range(3, 4))
    for one, other in zip(params, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TWO_STEPS)
    optimizer.load_state_dict(peer.state_dict())
    for one, other in zip(params, theirs, strict=True):
        assert all(torch.equal(optimizer.state[one][name], peer.state[other][name]) for name in names)
        assert int(optimizer.state[one]["step"]) == peer.state[other]["step"] == 4


@pytest.mark.parametrize("kind", [ql.PagedAdamW, PagedLion])
@pytest.mark.parametrize(("state_bits", "numels"), [(32, NUMELS), (8, NUMELS_8BIT)], ids=["32 bits", "8 bits"])
def test_a_saved_state_goes_on_with_the_same_bits(state_bits, numels, kind, tmp_path):
    params, count = make(numels), len(kind.rule.moments)
    optimizer = kind(groups_of(params), state_bits=state_bits, budget=BUDGET)
    run(optimizer, params)
    torch.save(optimizer.state_dict(), tmp_path / "state")
    assert (tmp_path / "state").stat().st_size < 1.1 * count * sum(numels) * state_bits // 8 + MIB
    resumed = [Parameter(param.detach().clone()) for param in params]
    other = kind(groups_of(resumed), lr=7, state_bits=state_bits, budget=BUDGET)
    run(other, [Parameter(param.detach().clone()) for param in params])  # whatever it did before
    other.load_state_dict(torch.load(tmp_path / "state", mmap=True, weights_only=True))
    assert same(bits(other, resumed), bits(optimizer, params))
    for one, its in ((optimizer, params), (other, resumed)):
        run(one, its, range(3, 5))
    assert same(bits(other, resumed), bits(optimizer, params))


def test_loading_keeps_the_budget_and_doubles_nothing(tmp_path):
    params = make()
    source = ql.PagedAdamW(params, budget=BUDGET)
    run(source, params, range(1))
    torch.save(source.state_dict(), tmp_path / "state")
    optimizer = ql.PagedAdamW(make(), budget=BUDGET)
    settle(optimizer)
    state = torch.load(tmp_path / "state", mmap=True, weights_only=True)
    optimizer.load_state_dict(state)
    private = status("RssAnon")
    with sampled(lambda: optimizer.paging().resident_bytes) as cached, sampled(lambda: status("RssAnon")) as samples:
        optimizer.load_state_dict(state)
    settle(optimizer)
    assert max(samples) - private < CHUNK  # the moments of one of the large parameters are 8 to 21 MB
    assert max(cached) <= BUDGET + CHUNK  # a walk is not a moment, as above
    assert optimizer.paging().resident_bytes <= BUDGET
    assert same(_state(optimizer, optimizer.param_groups[0]["params"]), _state(source, params))


def test_parameters_that_had_no_state_have_none_after_loading():
    params = make(SMALL)
    optimizer = ql.PagedAdamW(params)
    fresh = copy.deepcopy(optimizer.state_dict())
    run(optimizer, params)
    optimizer.load_state_dict(fresh)
    assert not optimizer.state
    again = make(SMALL)
    for one, other in zip(params, again, strict=True):
        one.data.copy_(other.data)
    run(optimizer, params)
    other = ql.PagedAdamW(again)
    run(other, again)
    assert same(bits(optimizer, params), bits(other, again))


def test_a_state_that_does_not_fit_changes_nothing():
    params = make(SMALL)
    optimizer = ql.PagedAdamW(params, lr=0.5)
    run(optimizer, params)
    before = bits(optimizer, params)
    state = copy.deepcopy(ql.PagedAdamW(make(SMALL[:-1])).state_dict())
    with pytest.raises(ValueError, match=re.escape("the state has groups of [3] parameters, the optimizer of [4]")):
        optimizer.load_state_dict(state)
    assert same(bits(optimizer, params), before)
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("attempt", [pickle.dumps, copy.copy, copy.deepcopy])
def test_it_is_not_copied(attempt):
    with pytest.raises(TypeError, match="cannot be pickled or copied: save its state_dict"):
        attempt(ql.PagedAdamW(make(SMALL)))


# what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr is at least 0, not -1.0"),
        ({"lr": float("nan")}, "lr is at least 0, not nan"),
        ({"eps": -1e-8}, "eps is at least 0, not -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay is at least 0, not -0.1"),
        ({"betas": (0.9, 1.0)}, "betas are two numbers from 0 to 1, 1 excluded, not (0.9, 1.0)"),
        ({"betas": (-0.1, 0.9)}, "betas are two numbers from 0 to 1, 1 excluded, not (-0.1, 0.9)"),
        ({"betas": (0.9,)}, "betas are two numbers from 0 to 1, 1 excluded, not (0.9,)"),
        ({"state_bits": 16}, "state_bits is 32 or 8, not 16"),
        ({"nonfinite": "stop"}, "nonfinite is one of update, skip, raise, not 'stop'"),
        ({"budget": BUDGET - 1}, "budget is 16,777,216 bytes at least (16 MiB), not 16,777,215"),
        ({"budget": 0}, "budget is 16,777,216 bytes at least (16 MiB), not 0"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ql.PagedAdamW(make(SMALL), **arguments)


@pytest.mark.parametrize(
    ("param", "kind", "message"),
    [
        (torch.zeros(3, dtype=torch.float64), TypeError, "a parameter [3] is torch.float64; what can be updated is fl"),
        (torch.zeros(3, 4).t(), ValueError, "a parameter [4, 3] is not contiguous: its strides are (1, 4)"),
        (torch.zeros(3, device="meta"), ValueError, "a parameter [3] is on meta; the state pages on CPUs and NVIDIA"),
    ],
)
def test_parameters_that_cannot_be_updated(param, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        ql.PagedAdamW([Parameter(param)])


def test_no_parameters():
    with pytest.raises(ValueError, match="empty parameter list"):
        ql.PagedAdamW([])


def test_sparse_gradients_are_refused_before_anything_is_updated():
    params = make(SMALL)
    optimizer = ql.PagedAdamW(params)
    run(optimizer, params)
    before = bits(optimizer, params)
    params[-1].grad = params[-1].detach().to_sparse()
    with pytest.raises(RuntimeError, match=r"^parameter 3 of group 0 \[256\] has a gradient that is torch\.sparse_coo"):
        optimizer.step()
    assert same(bits(optimizer, params), before)


@pytest.mark.parametrize("state_bits", [32, 8])
def test_gradients_need_not_be_contiguous(state_bits):
    ends = []
    for transposed in (False, True):
        param = Parameter(NOISE[:6000].view(60, 100).clone())
        optimizer, grad = ql.PagedAdamW([param], state_bits=state_bits), NOISE[9000:15000].view(60, 100).clone()
        param.grad = grad.t().contiguous().t() if transposed else grad
        optimizer.step()
        ends.append(bits(optimizer, [param]))
    assert same(*ends)


def test_a_group_for_which_the_budget_has_no_room_leaves_the_optimizer_as_it_was():
    params = make([BUDGET // 8, 1])
    optimizer = ql.PagedAdamW(params[:1], budget=BUDGET)  # all of its slots are taken for good
    run(optimizer, params[:1], range(1))
    before, groups = bits(optimizer, params[:1]), copy.deepcopy(optimizer.state_dict()["param_groups"])
    for _ in itertools.repeat(None, 2):
        with pytest.raises(ValueError, match="paging needs room for 4 chunks; there is room for 0"):
            optimizer.add_param_group({"params": params[1:]})
    assert optimizer.state_dict()["param_groups"] == groups
    assert same(bits(optimizer, params[:1]), before)
    run(optimizer, params[:1], range(1, 2))


def test_on_a_gpu_without_the_bindings_only_a_budget_is_an_error(monkeypatch):
    def missing(*_: Any) -> None:
        raise ImportError("paging on a GPU needs cuda.bindings")

    optimizer, with_budget = ql.PagedAdamW(make(SMALL)), ql.PagedAdamW(make(SMALL), budget=BUDGET)
    monkeypatch.setattr(unified_memory, "UnifiedMemory", missing)
    monkeypatch.setattr(storage, "Memory", lambda nbytes, device: (nbytes, device))
    layout, device = lay_out([1000], 4, ALIGNMENT, 2), torch.device("cuda")
    with pytest.warns(RuntimeWarning, match="ordinary memory of cuda: paging on a GPU needs"):
        assert optimizer._storage._arena(layout, 1, device) == (layout.nbytes, device)
    with pytest.raises(ImportError, match=r"needs cuda\.bindings"):
        with_budget._storage._arena(layout, 1, device)
