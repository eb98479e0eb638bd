"""What the state dictionaries of an optimizer look like, here and elsewhere.

==============================  ====================================================================================
``torch.optim.AdamW``           step, exp_avg, exp_avg_sq; the moments in the shape of the parameter
``PagedAdamW``, 32 bits         the same
bitsandbytes, 32 bits           step; state1, state2
bitsandbytes, 8 bits            step; state1, state2 (codes); absmax1, absmax2 (a scale for 256); qmap1, qmap2 (values)
``PagedAdamW``, 8 bits          the same, and bitsandbytes loads it
==============================  ====================================================================================

bitsandbytes puts all but the step one level deeper, below ``__bnb_optimizer_quant_state__``; its older files do not.
Each of them can be read into 32 bits and into 8; what has the same bits is copied, and the rest converted, a segment
at a time. A rule with one moment has the same without the second one: Lion's are exp_avg, or state1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qloralab.kernels.moment_codes import BLOCK_SIZE, dequantize_moment, moment_tables, quantize_moment
from qloralab.kernels.rule import Rule

from .distributed import local_beside
from .layout import Segment

NESTED = "__bnb_optimizer_quant_state__"

# Options of PyTorch's optimizers that change the update, and what they are here.
_OPTIONS = {"amsgrad": False, "maximize": False, "decoupled_weight_decay": True}


@dataclass(frozen=True)
class Entry:
    """The state of one parameter, wherever it comes from.

    Attributes:
        step: how many updates it has had.
        moments: of the rule, flat: floating-point numbers, or codes.
        scales: of codes: float32, one for 256 of them, for each moment.
    """

    step: int
    moments: Sequence[Tensor]
    scales: Sequence[Tensor] | None = None

    def copy(self) -> Entry:
        """The entry in memory of its own."""
        scales = None if self.scales is None else [scale.clone() for scale in self.scales]
        return Entry(self.step, [moment.clone() for moment in self.moments], scales)


def names(rule: Rule, state_bits: int) -> list[str]:
    """The keys of the moments of a rule, and of their scales, in the order of `Moments.of_param`."""
    if state_bits == 32:
        return [moment.name for moment in rule.moments]
    return [f"{name}{k}" for name in ("state", "absmax") for k in range(1, len(rule.moments) + 1)]


def nested(entry: Mapping[str, Any], rule: Rule) -> dict[str, Any]:
    """The 8-bit state of a parameter in the layout of bitsandbytes."""
    tensors = {name: entry[name] for name in names(rule, 8)}
    maps = {f"qmap{k}": _map(moment.signed) for k, moment in enumerate(rule.moments, start=1)}
    return {"step": int(entry["step"]), NESTED: tensors | maps}


def _map(signed: bool) -> Tensor:
    return moment_tables()[0][0 if signed else 1]


def read(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], rule: Rule) -> dict[Tensor, Entry]:
    """The entries of a state dictionary, by the parameters that an optimizer has at the same indices.

    Args:
        state_dict: of one of the optimizers above.
        groups: the ``param_groups`` of the optimizer that wants it.
        rule: of that optimizer.

    Raises:
        ValueError: the groups differ in number or size, a shape or a scale does not fit, or the optimizer was another.
    """
    saved = state_dict["param_groups"]
    sizes, own = [len(group["params"]) for group in saved], [len(group["params"]) for group in groups]
    if sizes != own:
        raise ValueError(f"the state has groups of {sizes} parameters, the optimizer of {own}")
    for number, group in enumerate(saved):
        check_options(group, f"group {number} of the state", rule)
    entries = {}
    for saved_group, group in zip(saved, groups, strict=True):
        for key, param in zip(saved_group["params"], group["params"], strict=True):
            if key in state_dict["state"]:
                entries[param] = entry_of(state_dict["state"][key], param, rule, f"the state of parameter {key}")
    return entries


def check_options(group: Mapping[str, Any], what: str, rule: Rule) -> None:
    """Raise ValueError where a group asks for another update than there is here."""
    for option, value in _OPTIONS.items():
        if bool(group.get(option, value)) is not value:
            raise ValueError(f"{what} has {option}={group[option]}, which Paged{rule.name} does not have")


def copy_(into: tuple[Sequence[Tensor], Sequence[Tensor]], entry: Entry | None, segment: Segment, rule: Rule) -> None:
    """Copy the state of a part of a parameter.

    Args:
        into: the moments of the segment, flat, and their scales where they are codes.
        entry: of the parameter; None: it has no state yet.
        segment: the part.
        rule: whose moments these are.
    """
    moments, scales = into
    part = slice(segment.first, segment.end)
    blocks = slice(segment.first // BLOCK_SIZE, -(-segment.end // BLOCK_SIZE))
    for i, (moment, kind) in enumerate(zip(moments, rule.moments, strict=True)):
        if entry is None:
            moment.zero_()
            if scales:
                scales[i].zero_()
            continue
        source, scale = entry.moments[i][part], None if entry.scales is None else entry.scales[i][blocks]
        if scales and scale is None:
            source, scale = quantize_moment(source.float(), kind.signed)
        elif scale is not None and not scales:
            source, scale = dequantize_moment(source, scale, kind.signed), None
        moment.copy_(source)
        if scale is not None:
            scales[i].copy_(scale)


def entry_of(saved: Mapping[str, Any], param: Tensor, rule: Rule, what: str) -> Entry:
    """The state of a parameter as any of the optimizers above has it.

    Raises:
        ValueError: it is another optimizer's, or does not fit the parameter; ``what`` it is called in the message.
    """
    tensors, count = {**saved, **saved.get(NESTED, {})}, len(rule.moments)
    found = next((some for some in (names(rule, 32), names(rule, 8)[:count]) if some[0] in tensors), None)
    if (
        found is None
        or "step" not in tensors
        or any(re.match(r"exp_avg|state\d", key) for key in tensors.keys() - found)
    ):
        raise ValueError(f"{what} has {', '.join(sorted(tensors)) or 'nothing'}: it is not {rule.name}'s")
    for name in found:
        if name not in tensors:
            raise ValueError(f"{what} has {found[0]} without {name}: it is not {rule.name}'s")
        if tensors[name].shape != param.shape:
            shapes = f"{list(tensors[name].shape)}; the parameter is {list(param.shape)}"
            raise ValueError(f"{name} in {what} is {shapes}")
    try:
        moments = [local_beside(tensors[name].detach(), param).reshape(-1) for name in found]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} {error}") from None
    scales = (
        [_scale(tensors, k, moments[0], rule, what) for k in range(count)] if moments[0].dtype == torch.uint8 else None
    )
    return Entry(int(tensors["step"]), moments, scales)


def _scale(tensors: Mapping[str, Any], k: int, codes: Tensor, rule: Rule, what: str) -> Tensor:
    """The scales of moment k, whose codes mean the dynamic map."""
    scale, values = tensors.get(f"absmax{k + 1}"), tensors.get(f"qmap{k + 1}")
    if scale is None or scale.numel() != -(-len(codes) // BLOCK_SIZE):
        raise ValueError(f"{what} has no scale for each {BLOCK_SIZE} codes in absmax{k + 1}")
    if values is not None and not torch.equal(values.cpu(), _map(rule.moments[k].signed)):
        raise ValueError(f"{what} has other values than the dynamic map in qmap{k + 1}")
    return scale
