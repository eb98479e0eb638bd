"""What users may change between steps: groups, rates and gradients, read anew at each step, and refused before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from qloralab.kernels.rule import Rule

from .distributed import any_of, local_beside
from .state_dict import check_options

Groups = Sequence[Mapping[str, Any]]


def check_rates(defaults: Mapping[str, Any]) -> None:
    """Refuse what no group may begin with: a number below 0, and a pair that is not in [0, 1)."""
    for name, value in defaults.items():
        if not _is_pair(value):
            if not float(value) >= 0:
                raise ValueError(f"{name} is at least 0, not {value}")
        elif len(value) != 2 or not all(0 <= one < 1 for one in value):
            raise ValueError(f"{name} are two numbers from 0 to 1, 1 excluded, not {value}")


def _is_pair(value: Any) -> bool:
    return hasattr(value, "__len__") and getattr(value, "ndim", 1) > 0


def rates_of(groups: Groups, number: int, defaults: Mapping[str, Any], rule: Rule) -> Any:
    """The rates of a group, as they are now; ``defaults`` are those that the optimizer was made with.

    Raises:
        ValueError: the group asks for another update, or an option is no number.
    """
    group = groups[number]
    check_options(group, f"group {number}", rule)
    options = [(group[name], default) for name, default in defaults.items()]
    try:
        return rule.rates(*(float(one) for some, default in options for one in (some if _is_pair(default) else [some])))
    except (TypeError, ValueError, RuntimeError) as error:
        *some, last = defaults
        raise ValueError(f"{', '.join(some)} and {last} of group {number} are no numbers: {error}") from error


def find(groups: Groups, param: Tensor) -> tuple[int, int] | None:
    """The number of the group that a parameter is in, and its index there; None: it was taken out."""
    for number, group in enumerate(groups):
        for index, other in enumerate(group["params"]):
            if other is param:
                return number, index
    return None


def name_of(groups: Groups, param: Tensor) -> str:
    """What messages call a parameter."""
    if (found := find(groups, param)) is None:
        return f"a parameter {list(param.shape)}"
    number, index = found
    group = groups[number]
    name = group["param_names"][index] if "param_names" in group else f"{index} of group {number}"
    return f"parameter {name} {list(param.shape)}"


def check_distinct(groups: Groups, params: Sequence[Tensor]) -> None:
    """Raise ValueError where a parameter is there twice."""
    if len(set(params)) < len(params):
        twice = next(param for index, param in enumerate(params) if any(param is other for other in params[:index]))
        raise ValueError(f"{name_of(groups, twice)} is there twice; an optimizer updates each once")


def gradients(groups: Groups, params: Sequence[Tensor], rule: Rule) -> list[Tensor]:
    """The gradients of parameters, or of their local parts, flat and contiguous.

    Raises:
        TypeError, ValueError, RuntimeError: one is not what its parameter needs; the message names it.
    """
    grads = []
    for param in params:
        try:
            grads.append(_gradient(param, rule))
        except (TypeError, ValueError, RuntimeError) as error:
            raise type(error)(f"{name_of(groups, param)} has a gradient that {error}") from None
    return grads


def _gradient(param: Tensor, rule: Rule) -> Tensor:
    grad = param.grad
    assert grad is not None
    if grad.layout is not torch.strided:
        raise RuntimeError(f"is {grad.layout}, for which Paged{rule.name} has no update")
    if grad.dtype is not param.dtype or grad.device != param.device or grad.shape != param.shape:
        found = f"{grad.dtype} {list(grad.shape)} on {grad.device}"
        raise ValueError(f"is {found}; the parameter is {param.dtype} {list(param.shape)} on {param.device}")
    if grad.is_neg() or grad._is_zerotensor():
        grad = grad.clone()  # which writes the values that it stands for
    if grad.requires_grad:
        grad = grad.detach()
    if type(grad) is not Tensor or type(param) is not Parameter:
        grad = local_beside(grad, param)
    return grad.contiguous().view(-1)


def not_finite(params: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor | None:
    """A parameter whose gradient has NaN or infinity, in any process. Waits for the device."""
    largest = torch.stack([grad.abs().amax().float() if len(grad) else grad.new_zeros(()).float() for grad in grads])
    bad = any_of(largest.isfinite().logical_not(), params).nonzero()
    return params[int(bad[0])] if len(bad) else None
