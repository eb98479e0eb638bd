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

from .steps import BUDGET, NOISE, make, run

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


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"step": torch.tensor(1.0)}, "the state of parameter 1 of group 0 [7] has step: it is not AdamW's"),
        (
            {"step": torch.tensor(1.0), "exp_avg": torch.ones(8), "exp_avg_sq": torch.ones(8)},
            "exp_avg in the state of parameter 1 of group 0 [7] is [8]; the parameter is [7]",
        ),
    ],
)
def test_a_state_that_is_not_adamws_is_refused_before_anything_is_updated(entry, message):
    params = make(SHAPES)
    optimizer = ql.PagedAdamW(params)
    run(optimizer, params, range(1))
    before = [param.detach().clone() for param in params]
    optimizer.state[params[1]] = entry
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run(optimizer, params, range(1, 2))
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    optimizer.state.pop(params[1])
    run(optimizer, params, range(1, 2))


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


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "shorter": lambda data: data[:-1],
    "longer": lambda data: torch.cat([data, data]),
    "another shape": lambda data: data.view(-1, 2),
    "every second": lambda data: data.repeat(2)[::2],
    "another dtype": lambda data: data.double(),
    "negated late": lambda data: torch.complex(data, data).conj().imag,
}


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in CHANGES.items()])
def test_a_parameter_that_changed_under_its_state_is_refused_before_anything_is_updated(change, state_bits):
    params = make([(5,), (8,)])
    optimizer = ql.PagedAdamW(params, state_bits=state_bits)
    run(optimizer, params, range(2))
    guard, old = params[0].detach().clone(), params[1].data
    params[1].data = change(old)
    for _ in range(2):
        with pytest.raises((ValueError, TypeError), match=r"a parameter \["):
            run(optimizer, params, range(2, 3))
    assert torch.equal(params[0], guard)
    params[1].data = old.clone()  # other memory, as large
    run(optimizer, params, range(2, 3))
    assert not torch.equal(params[0], guard)


def test_a_parameter_twice_is_refused():
    param, other = make([(3,), (3,)])
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match=r"group 0 \[3\] is there twice"):
        ql.PagedAdamW([param, param])
    optimizer = ql.PagedAdamW([param])
    optimizer.param_groups[0]["params"].append(param)
    with pytest.raises(ValueError, match=r"is there twice"):
        run(optimizer, [param], range(1))
    assert not optimizer.state
    optimizer.param_groups[0]["params"].pop()
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match=r"is there twice"):
        optimizer.add_param_group({"params": [other, other]})
    assert len(optimizer.param_groups) == 1
    run(optimizer, [param], range(1))


@pytest.mark.parametrize("option", [{"amsgrad": True}, {"maximize": True}, {"decoupled_weight_decay": False}])
def test_a_group_that_asks_for_another_update_is_refused(option):
    params = make([(3,), (3,)])
    (name,) = option
    with pytest.raises(ValueError, match=f"^group 0 has {name}="):
        ql.PagedAdamW([{"params": params, **option}])
    optimizer = ql.PagedAdamW(params[:1])
    with pytest.raises(ValueError, match=f"^group 1 has {name}="):
        optimizer.add_param_group({"params": params[1:], **option})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0].update(option)
    with pytest.raises(ValueError, match=f"^group 0 has {name}="):
        run(optimizer, params[:1], range(1))
    assert not optimizer.state


@pytest.mark.parametrize("wrong", [torch.tensor([0.1, 0.2]), None, "fast"])
@pytest.mark.parametrize("rate", ["lr", "eps", "weight_decay"])
def test_a_rate_that_is_no_number_breaks_nothing(rate, wrong):
    params = make([(3,)])
    optimizer = ql.PagedAdamW(params)
    run(optimizer, params, range(1))
    before, right = params[0].detach().clone(), optimizer.param_groups[0][rate]
    optimizer.param_groups[0][rate] = wrong
    with pytest.raises(ValueError, match=r"^lr, betas, eps and weight_decay of group 0 are no numbers: "):
        run(optimizer, params, range(1, 2))
    assert torch.equal(params[0], before)
    optimizer.param_groups[0][rate] = right
    run(optimizer, params, range(1, 2))


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
    for param, peer in zip(params, reversed(saved_by), strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(other.state[param].values(), optimizer.state[peer].values(), strict=True)
        )


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
