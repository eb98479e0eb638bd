"""Optimizers whose state pages: the numbers of PyTorch's AdamW, the same bits paged or not, memory within a budget."""

from __future__ import annotations

import copy
import pickle
import re
import threading
import weakref
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

from .steps import BUDGET, MIB, NOISE, bits, give, make, run, same, state_of, take

CHUNK = 4 * MIB
NUMELS = [1_000_003, 5, 0, 2_600_000, 4_096, 1_400_000]  # 40 MB of float32 moments, 10 chunks
NUMELS_8BIT = [4_000_003, 5, 0, 4_100_000, 4_096, 4_000_000]  # 24 MB of codes, 6 chunks
SMALL = [70_001, 5, 0, 256]
TWO_STEPS = 8 * 2**-24 * float(NOISE.abs().max())  # of four roundings each, of numbers no larger than the gradients
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

kinds = pytest.mark.parametrize("kind", [ql.PagedAdamW, PagedLion])


def settle(optimizer: ql.PagedAdamW) -> None:
    """Wait until nothing is on its way between memory and disk."""
    for device in optimizer._storage.devices.values():
        if device.pager is not None:
            device.pager.settle()


def private_bytes() -> int:
    """The resident bytes of this process that are of no file."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
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


# the numbers of AdamW, which ``test_state_and_groups.py`` compares with PyTorch's


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


@kinds
def test_an_update_in_backward_has_the_bits_of_a_step_and_frees_gradients(kind):
    ends = []
    for in_backward in (False, True):
        params = make(NUMELS)
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


# what PyTorch's optimizers can do


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
    optimizer.step()
    assert same(bits(optimizer, params), before)


def test_a_grad_scaler_skips_a_step_with_an_infinite_gradient():
    params, expected = make(SMALL), make(SMALL)
    optimizer, plain = ql.PagedAdamW(params), ql.PagedAdamW(expected)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step, factor in enumerate((1.0, torch.inf, 1.0)):
        scaler.scale(torch.ones(()))
        for grad in give(params, step):
            grad.mul_(scaler.get_scale() * factor)
        if factor == 1:
            run(plain, expected, range(step, step + 1))
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 4.0
    assert same(bits(optimizer, params), bits(plain, expected))


def test_a_frozen_parameter_takes_no_memory_before_it_is_thawed():
    params = make(NUMELS)
    params[3].requires_grad_(False)
    optimizer = ql.PagedAdamW(params, budget=BUDGET)
    allocated = optimizer.paging().state_bytes
    params[3].requires_grad_(True)
    run(optimizer, params, range(1))
    assert optimizer.paging().state_bytes > allocated + 8 * NUMELS[3]


def test_names_of_parameters_are_kept():
    model = torch.nn.Linear(3, 2)
    optimizer = ql.PagedAdamW(model.named_parameters(), nonfinite="raise")
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    model(torch.full((1, 3), torch.nan)).sum().backward()
    with pytest.raises(ValueError, match=re.escape("parameter weight [2, 3] has a gradient that is not finite")):
        optimizer.step()


# gradients


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_gradient_that_is_not_finite_changes_nothing(nonfinite, value):
    params = make(SMALL)
    optimizer = ql.PagedAdamW(params, nonfinite=nonfinite)
    run(optimizer, params)
    before = bits(optimizer, params)
    give(params, 3)[3][-1] = value
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
    give(params, 0)[0][7] = torch.nan
    optimizer.step()
    assert [param.isnan().nonzero().flatten().tolist() for param in params] == [[7], [], [], []]
    assert optimizer.skipped == 0


class Renamed(Tensor):
    """A subclass that has its values itself."""


class Standing(Tensor):
    """A subclass that stands for another tensor, as weights that are quantized or kept elsewhere do."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, *rest: Any) -> Standing:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)  # pyright: ignore
        made.held = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Standing(args[0].held)
        return NotImplemented


GRADIENTS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: NOISE[:6000].view(60, 100).t().contiguous().t(),
    "renamed": lambda: NOISE[:6000].view(60, 100).as_subclass(Renamed),
    "negated late": lambda: torch.complex(*NOISE[:12000].view(2, 60, 100)).conj().imag,
    "zeros that are written late": lambda: torch.ops.aten._efficientzerotensor.default([60, 100]),
}


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients_are_the_numbers_that_they_stand_for(kind, state_bits):
    ends = []
    for grad in (GRADIENTS[kind](), torch.zeros(60, 100).copy_(GRADIENTS[kind]())):
        (param,) = make([(60, 100)])
        optimizer, param.grad = ql.PagedAdamW([param], state_bits=state_bits), grad
        optimizer.step()
        ends.append(bits(optimizer, [param]))
    assert same(*ends)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (Tensor.to_sparse, RuntimeError, r"torch\.sparse_coo"),
        (Standing, TypeError, "a Standing"),
    ],
)
def test_gradients_that_are_refused_before_anything_is_updated(change, kind, message):
    params = make(SMALL)
    optimizer = ql.PagedAdamW(params)
    run(optimizer, params)
    before = bits(optimizer, params)
    params[-1].grad = change(params[-1].detach())
    with pytest.raises(kind, match=rf"^parameter 3 of group 0 \[256\] has a gradient that is {message}"):
        optimizer.step()
    assert same(bits(optimizer, params), before)
    run(optimizer, params)


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
    params = make(NUMELS)
    give(params, 0)
    ql.PagedAdamW(make(SMALL))  # what is loaded at the first use
    optimizer = ql.PagedAdamW(params, budget=BUDGET)
    optimizer.step()
    before = private_bytes()
    with sampled(private_bytes) as private:
        for _ in range(3):
            optimizer.step()
    assert max(private) - before < 2 * MIB


def test_from_the_first_sweep_on_every_chunk_is_prefetched():
    params = make(NUMELS)
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
    params = make(NUMELS)
    optimizer = ql.PagedAdamW(params, budget=64 * MIB)
    run(optimizer, params, range(1))
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
def test_a_deleted_optimizer_leaves_nothing_and_updates_nothing(in_backward, tmp_path):
    """With the arena go its file and its mapping, as ``test_mapped_file.py`` has it."""
    params, before = make(NUMELS), threading.enumerate()
    optimizer = ql.PagedAdamW(params, budget=BUDGET, state_dir=tmp_path, update_in_backward=in_backward)
    run(optimizer, params, range(1))
    threads = [thread for thread in threading.enumerate() if thread not in before]
    assert len(threads) >= 2, "one reads, and one writes"
    arena = weakref.ref(optimizer._storage.parts[0].moments.arena)
    del optimizer
    for thread in threads:
        thread.join(60)  # it finishes what it is at
        assert not thread.is_alive()
    assert arena() is None
    value = params[0].detach().clone()
    params[0].sum().backward()
    assert torch.equal(params[0], value)
    assert params[0].grad is not None


# state dictionaries


def test_torch_continues_from_our_state_and_we_from_its():
    params, theirs = make(NUMELS), make(NUMELS)
    optimizer, peer = ql.PagedAdamW(groups_of(params), budget=BUDGET), torch.optim.AdamW(groups_of(theirs))
    run(optimizer, params)
    take(theirs, params)
    peer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same(bits(peer, theirs), bits(optimizer, params))
    for into, source in ((params, theirs), (theirs, params)):
        run(optimizer, params, range(3, 5))
        run(peer, theirs, range(3, 5))
        for one, other in zip(bits(optimizer, params), bits(peer, theirs), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=TWO_STEPS)
        take(into, source)
        optimizer.load_state_dict(peer.state_dict())
        assert same(state_of(optimizer, params), state_of(peer, theirs))


def test_bitsandbytes_continues_from_our_state_and_we_from_its():
    def assert_same_state() -> None:
        for one, other in zip(params, theirs, strict=True):
            for name in ("state1", "state2", "absmax1", "absmax2"):
                assert torch.equal(optimizer.state[one][name], peer.state[other][name])
            assert int(optimizer.state[one]["step"]) == peer.state[other]["step"]

    params, theirs = make(NUMELS_8BIT[3:]), make(NUMELS_8BIT[3:])
    optimizer = ql.PagedAdamW(params, lr=0.01, state_bits=8)
    peer = AdamW8bit(theirs, lr=0.01, weight_decay=0.01)
    run(optimizer, params)
    take(theirs, params)
    peer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_state()
    run(optimizer, params, range(3, 4))
    run(peer, theirs, range(3, 4))
    for one, other in zip(params, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TWO_STEPS)
    optimizer.load_state_dict(peer.state_dict())
    assert_same_state()


@kinds
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
    params, others = make(NUMELS), make(NUMELS)
    source, optimizer = ql.PagedAdamW(params, budget=BUDGET), ql.PagedAdamW(others, budget=BUDGET)
    run(source, params, range(1))
    torch.save(source.state_dict(), tmp_path / "state")
    settle(optimizer)
    state = torch.load(tmp_path / "state", mmap=True, weights_only=True)
    optimizer.load_state_dict(state)
    before = private_bytes()
    with sampled(lambda: optimizer.paging().resident_bytes) as cached, sampled(private_bytes) as private:
        optimizer.load_state_dict(state)
    settle(optimizer)
    assert max(private) - before < CHUNK  # the moments of one of the large parameters are 8 to 21 MB
    assert max(cached) <= BUDGET + CHUNK  # a walk is not a moment, as above
    assert optimizer.paging().resident_bytes <= BUDGET
    assert same(state_of(optimizer, others), state_of(source, params))


def test_parameters_that_had_no_state_have_none_after_loading():
    params, again = make(SMALL), make(SMALL)
    optimizer, other = ql.PagedAdamW(params), ql.PagedAdamW(again)
    fresh = copy.deepcopy(optimizer.state_dict())
    run(optimizer, params)
    optimizer.load_state_dict(fresh)
    assert not optimizer.state
    take(again, params)
    run(optimizer, params)
    run(other, again)
    assert same(bits(optimizer, params), bits(other, again))


@pytest.mark.parametrize(("groups", "sizes"), [([SMALL[1:]], [3]), ([SMALL[:2], SMALL[2:]], [2, 2])], ids=str)
def test_a_state_that_does_not_fit_changes_nothing(groups, sizes):
    params = make(SMALL)
    optimizer = ql.PagedAdamW(params, lr=0.5)
    run(optimizer, params)
    before = bits(optimizer, params)
    state = ql.PagedAdamW([{"params": make(numels)} for numels in groups]).state_dict()
    message = f"the state has groups of {sizes} parameters, the optimizer of [4]"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
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
        (torch.zeros(3, dtype=torch.float64), TypeError, "is torch.float64; what can be updated is float32, bfl"),
        (torch.zeros(4, 3).t(), ValueError, "is not contiguous: its strides are (1, 3)"),
        (torch.zeros(3, device="meta"), ValueError, "is on meta; the state pages on CPUs and NVIDIA"),
        (Standing(torch.ones(3)), TypeError, "is a Standing (torch.strided), whose values are not in its own memory"),
    ],
)
def test_parameters_that_cannot_be_updated(param, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(f'a parameter {list(param.shape)} {message}')}"):
        ql.PagedAdamW([*make(SMALL), Parameter(param)])


def test_a_group_for_which_the_budget_has_no_room_leaves_the_optimizer_as_it_was():
    params = make([BUDGET // 8, 1])
    optimizer = ql.PagedAdamW(params[:1], budget=BUDGET)  # all of its slots are taken for good
    run(optimizer, params[:1], range(1))
    before, groups = bits(optimizer, params[:1]), copy.deepcopy(optimizer.state_dict()["param_groups"])
    for _ in range(2):
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
