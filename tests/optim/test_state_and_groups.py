"""What users do to ``state``, ``param_groups`` and parameters between steps: the same becomes of it as in PyTorch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import qloralab as ql

from .steps import BUDGET, NOISE, bits, make, run, same, state_of

# 27 MB of moments: 7 chunks, or 4 and a budget; and 10 MB more of parameters that are frozen at first.
SHAPES = [(1100, 1000), (7,), (1100, 1000), (1000, 1300), (), (0, 3), (700, 900), (800, 900)]

Act = Callable[[Any, list[Parameter]], object]


def groups(params: list[Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:3], "lr": 0.1}, {"params": params[3:], "lr": 0.01, "weight_decay": 0.5}]


def pair(budget: int | None = None) -> list[tuple[Any, list[Parameter]]]:
    """Ours and PyTorch's, each with its parameters. The last two are frozen, one of which has no room for its state."""
    params, peers = make(SHAPES), make(SHAPES)
    for its in (params, peers):
        its[-1].requires_grad_(False)
    ours, theirs = ql.PagedAdamW(groups(params), budget=budget), torch.optim.AdamW(groups(peers), foreach=False)
    for its in (params, peers):
        its[-2].requires_grad_(False)
    return [(ours, params), (theirs, peers)]


def near(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= 1e-6 * expected.norm())


def assert_same(pair: Sequence[tuple[Any, Sequence[Tensor]]]) -> None:
    (ours, params), (theirs, peers) = pair
    for param, peer in zip(params, peers, strict=True):
        assert near(param, peer)
        assert (param in ours.state) == (peer in theirs.state)
        if peer in theirs.state:
            found, expected = ours.state[param], theirs.state[peer]
            assert found.keys() == expected.keys()
            assert all(near(found[name], expected[name]) for name in found)


def assign(name: str, value: Callable[[Tensor], Any]) -> Act:
    def act(optimizer: Any, params: list[Parameter]) -> None:
        for param in params[1:6:2]:
            optimizer.state[param][name] = value(optimizer.state[param][name])

    return act


def swap(optimizer: Any, params: list[Parameter]) -> None:
    state = optimizer.state
    state[params[0]], state[params[2]] = state[params[2]], state[params[0]]


def move(optimizer: Any, params: list[Parameter]) -> None:
    first, second = (group["params"] for group in optimizer.param_groups)
    second.insert(0, first.pop(1))


def trade(optimizer: Any, params: list[Parameter]) -> None:
    first, second = (group["params"] for group in optimizer.param_groups)
    first[0], second[0] = second[0], first[0]


def more(optimizer: Any, params: list[Parameter]) -> None:
    params.append(Parameter(NOISE[:33].clone()))
    optimizer.param_groups[1]["params"].append(params[-1])


def thaw(optimizer: Any, params: list[Parameter]) -> None:
    assert not any(param in optimizer.state for param in params[-2:])
    for param in params[-2:]:
        param.requires_grad_(True)


def another_group(optimizer: Any, params: list[Parameter]) -> None:
    params += make([(900, 1000), (3,)])
    optimizer.add_param_group({"params": params[-2:], "lr": 0.2})


def whole(optimizer: Any, params: list[Parameter]) -> None:
    optimizer.state[params[0]] = {name: tensor.clone() * 0.5 for name, tensor in optimizer.state[params[0]].items()}


ACTS: dict[str, Act] = {
    "clear": lambda optimizer, params: optimizer.state.clear(),
    "pop": lambda optimizer, params: [optimizer.state.pop(param) for param in params[:2]],
    "an empty entry": lambda optimizer, params: optimizer.state.update({params[0]: {}}),
    "another exp_avg": assign("exp_avg", lambda old: torch.full_like(old, 0.25)),
    "another exp_avg_sq, not contiguous": assign("exp_avg_sq", lambda old: (old.T.contiguous() + 1).T),
    "another step": assign("step", lambda old: torch.tensor(100.0)),
    "a whole entry": whole,
    "in place": lambda optimizer, params: [entry["exp_avg"].zero_() for entry in optimizer.state.values()],
    "swap": swap,
    "move to another group": move,
    "trade between groups": trade,
    "add to a group": more,
    "add a group": another_group,
    "thaw": thaw,
    "take out of a group": lambda optimizer, params: optimizer.param_groups[0]["params"].pop(0),
    "another lr": lambda optimizer, params: optimizer.param_groups[1].update(lr=torch.tensor(0.3), betas=(0.1, 0.2)),
}


@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors of dimension other than 2")
@pytest.mark.parametrize("budget", [None, BUDGET], ids=["in memory", "paged"])
@pytest.mark.parametrize("act", [pytest.param(act, id=name) for name, act in ACTS.items()])
def test_the_next_steps_go_on_from_what_users_do(act, budget):
    both = pair(budget)
    for optimizer, its in both:
        run(optimizer, its, range(2))
        act(optimizer, its)
        run(optimizer, its, range(2, 4))
    assert_same(both)


def test_a_state_that_is_there_before_the_first_step_is_taken():
    both = pair()
    for optimizer, its in both:
        moments = {"exp_avg": torch.ones(7), "exp_avg_sq": torch.full((7,), 0.5)}
        optimizer.state[its[1]] = {"step": torch.tensor(10.0), **moments}
        run(optimizer, its, range(2))
    assert_same(both)


@pytest.mark.parametrize("state_bits", [32, 8])
def test_what_is_assigned_is_what_is_saved(state_bits):
    params, twins = make(SHAPES), make(SHAPES)
    optimizer, twin = (ql.PagedAdamW(its, state_bits=state_bits) for its in (params, twins))
    run(optimizer, params, range(2))
    run(twin, twins, range(3))
    optimizer.state[params[0]] = twin.state[twins[0]]
    saved = optimizer.state_dict()["state"][0]
    expected = twin.state_dict()["state"][0]
    assert int(saved["step"]) == 3
    tensors = saved.get("__bnb_optimizer_quant_state__", saved)
    others = expected.get("__bnb_optimizer_quant_state__", expected)
    assert all(torch.equal(tensors[name], others[name]) for name in others)


def test_an_update_in_backward_has_the_group_of_the_moment():
    """Also where both groups stay as long as they were, and where a parameter is in none."""
    params, peers = make([(3,)] * 4), make([(3,)] * 4)
    pairs = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": 0.01}]
    ours = ql.PagedAdamW(pairs, update_in_backward=True)
    theirs = torch.optim.AdamW([{"params": peers[:2], "lr": 0.1}, {"params": peers[2:], "lr": 0.01}], foreach=False)
    for step in range(6):
        for optimizer, its in ((ours, params), (theirs, peers)):
            theirs.zero_grad()
            torch.stack([(param * (step + i)).square().sum() for i, param in enumerate(its)]).sum().backward()
            optimizer.step()
            if step == 1:
                trade(optimizer, its)
            elif step == 2:
                move(optimizer, its)
            elif step == 3:
                optimizer.param_groups[0]["params"].pop(0)
    for param, peer in zip(params, peers, strict=True):
        torch.testing.assert_close(param, peer)


# what is refused

Spoil = Callable[[pytest.MonkeyPatch, Any, list[Parameter]], None]


def option(name: str, value: Any) -> Spoil:
    return lambda patch, optimizer, params: patch.setitem(optimizer.param_groups[0], name, value)


def entry(**state: Tensor) -> Spoil:
    return lambda patch, optimizer, params: patch.setitem(optimizer.state, params[1], state)


def data(change: Callable[[Tensor], Tensor]) -> Spoil:
    return lambda patch, optimizer, params: patch.setattr(params[1], "data", change(params[1].data))


def twice(patch: pytest.MonkeyPatch, optimizer: Any, params: list[Parameter]) -> None:
    patch.setitem(optimizer.param_groups[0], "params", [*params, params[1]])


WRONG: list[tuple[str, Spoil, str]] = [
    *(
        (f"{rate} is {kind}", option(rate, value), "lr, betas, eps and weight_decay of group 0 are no numbers: ")
        for rate in ("lr", "eps", "weight_decay")
        for kind, value in (("two numbers", torch.tensor([0.1, 0.2])), ("None", None), ("a word", "fast"))
    ),
    ("amsgrad", option("amsgrad", True), "group 0 has amsgrad=True, which"),
    ("coupled decay", option("decoupled_weight_decay", False), "group 0 has decoupled_weight_decay=False, which"),
    (
        "a state without moments",
        entry(step=torch.tensor(1.0)),
        "the state of parameter 1 of group 0 [8] has step: it is not AdamW's",
    ),
    (
        "a longer state",
        entry(step=torch.tensor(1.0), exp_avg=torch.ones(9), exp_avg_sq=torch.ones(9)),
        "exp_avg in the state of parameter 1 of group 0 [8] is [9]; the parameter is [8]",
    ),
    ("shorter", data(lambda data: data[:-1]), "a parameter [7] was [8]"),
    ("longer", data(lambda data: torch.cat([data, data])), "a parameter [16] was [8]"),
    ("another shape", data(lambda data: data.view(-1, 2)), "a parameter [4, 2] was [8]"),
    ("every second", data(lambda data: data.repeat(2)[::2]), "a parameter [8] is not contiguous"),
    ("another dtype", data(lambda data: data.double()), "a parameter [8] is torch.float64"),
    ("negated late", data(lambda data: torch.complex(data, data).conj().imag), "a parameter [8] is a Parameter ("),
    ("twice", twice, "parameter 1 of group 0 [8] is there twice"),
]


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize(("spoil", "message"), [pytest.param(*case, id=name) for name, *case in WRONG])
def test_what_is_wrong_is_refused_before_anything_is_updated(spoil, message, state_bits, monkeypatch):
    params = make([(5,), (8,)])
    optimizer = ql.PagedAdamW(params, state_bits=state_bits)
    run(optimizer, params, range(2))
    before = bits(optimizer, params)
    with monkeypatch.context() as patch:
        spoil(patch, optimizer, params)
        for _ in range(2):
            with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}"):
                run(optimizer, params, range(2, 3))
    assert same(bits(optimizer, params), before)
    run(optimizer, params, range(2, 3))
    assert not torch.equal(params[0], before[0])


def test_a_parameter_twice_in_a_new_group_is_refused():
    param, other = make([(3,), (3,)])
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match=r"group 0 \[3\] is there twice"):
        ql.PagedAdamW([param, param])
    optimizer = ql.PagedAdamW([param])
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match=r"is there twice"):
        optimizer.add_param_group({"params": [other, other]})
    assert len(optimizer.param_groups) == 1
    run(optimizer, [param], range(1))


@pytest.mark.parametrize("option", [{"amsgrad": True}, {"maximize": True}, {"decoupled_weight_decay": False}])
def test_a_new_group_that_asks_for_another_update_is_refused(option):
    params = make([(3,), (3,)])
    (name,) = option
    with pytest.raises(ValueError, match=f"^group 0 has {name}="):
        ql.PagedAdamW([{"params": params, **option}])
    optimizer = ql.PagedAdamW(params[:1])
    with pytest.raises(ValueError, match=f"^group 1 has {name}="):
        optimizer.add_param_group({"params": params[1:], **option})
    assert len(optimizer.param_groups) == 1


# groups and hooks


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("budget", [None, BUDGET])
def test_groups_of_nothing_but_empty_parameters(budget, state_bits):
    params = [Parameter(torch.empty(0, 4)), Parameter(torch.ones(3))]
    optimizer = ql.PagedAdamW(params[:1], state_bits=state_bits, budget=budget)
    optimizer.add_param_group({"params": params[1:]})
    run(optimizer, params, range(2))
    again = ql.PagedAdamW(params[:1], state_bits=state_bits, budget=budget)
    run(again, params[:1], range(1))
    assert optimizer.state[params[0]]["step"] == 2
    assert again.paging().state_bytes == 0
    again.load_state_dict(again.state_dict())


@pytest.mark.parametrize("state_bits", [32, 8])
def test_hooks_of_loading_change_what_is_loaded_and_see_what_was(state_bits):
    """The pattern of PyTorch's documentation: the state of names, put in the order of this optimizer's."""
    names = ["a", "b", "c"]
    saved_by = make([(4,), (4,), (4,)])
    optimizer = ql.PagedAdamW(zip(names, saved_by, strict=True), state_bits=state_bits)
    run(optimizer, saved_by, range(3))
    saved = optimizer.state_dict()

    def reorder(one: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        by_name = dict(zip(state_dict["param_groups"][0]["param_names"], state_dict["state"].values(), strict=True))
        mine = one.param_groups[0]["param_names"]
        return {**state_dict, "state": {i: by_name[name] for i, name in enumerate(mine)}}

    seen = []
    params = make([(4,), (4,), (4,)])
    other = ql.PagedAdamW(zip(names[::-1], params, strict=True), state_bits=state_bits)
    other.register_load_state_dict_pre_hook(reorder)
    other.register_load_state_dict_post_hook(lambda one: seen.append(len(one.state)), prepend=True)
    other.load_state_dict(saved)
    assert seen == [3]
    assert same(state_of(other, params), state_of(optimizer, saved_by[::-1]))


def test_a_hook_that_fails_changes_nothing():
    params = make([(4,)])
    optimizer = ql.PagedAdamW(params)
    run(optimizer, params, range(1))
    saved = torch.optim.AdamW(make([(4,)])).state_dict()

    def fail(*_: Any) -> None:
        raise KeyError("no such name")

    handle = optimizer.register_load_state_dict_pre_hook(fail)
    with pytest.raises(KeyError, match="no such name"):
        optimizer.load_state_dict(saved)
    handle.remove()
    assert optimizer.state[params[0]]["step"] == 1
    run(optimizer, params, range(1, 2))
    optimizer.load_state_dict(saved)
    assert not optimizer.state
