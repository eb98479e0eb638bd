"""What the state dictionaries of AdamW look like, here and elsewhere.

==============================  ====================================================================================
``torch.optim.AdamW``           step, exp_avg, exp_avg_sq; the moments in the shape of the parameter
``PagedAdamW``, 32 bits         the same
bitsandbytes, 32 bits           step; state1, state2
bitsandbytes, 8 bits            step; state1, state2 (codes); absmax1, absmax2 (a scale for 256); qmap1, qmap2 (values)
``PagedAdamW``, 8 bits          the same, and bitsandbytes loads it
==============================  ====================================================================================

bitsandbytes puts all but the step one level deeper, below ``__bnb_optimizer_quant_state__``; its older files do not.
Each of them can be read into 32 bits and into 8; what has the same bits is copied, and the rest converted, a segment
at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qloralab.kernels.adamw_8bit import BLOCK_SIZE, dequantize_moment, moment_tables, quantize_moment

from .distributed import local_beside
from .layout import Segment

NESTED = "__bnb_optimizer_quant_state__"
NAMES = {32: ("exp_avg", "exp_avg_sq"), 8: ("state1", "state2", "absmax1", "absmax2")}

# Options of torch.optim.AdamW that change the update, and what they are here.
_OPTIONS = {"amsgrad": False, "maximize": False, "decoupled_weight_decay": True}


@dataclass(frozen=True)
class Entry:
    """The state of one parameter, wherever it comes from.

    Attributes:
        step: how many updates it has had.
        moments: exp_avg and exp_avg_sq, flat: floating-point numbers, or codes.
        scales: of codes: float32, one for 256 of them, for each moment.
    """

    step: int
    moments: tuple[Tensor, Tensor]
    scales: tuple[Tensor, Tensor] | None = None

    def copy(self) -> Entry:
        """In memory of its own."""
        moments, scales = self.moments, self.scales
        return Entry(
            self.step,
            (moments[0].clone(), moments[1].clone()),
            None if scales is None else (scales[0].clone(), scales[1].clone()),
        )


def nested(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The 8-bit state of a parameter in the layout of bitsandbytes."""
    qmap1, qmap2 = moment_tables()[0].unbind()
    tensors = {name: entry[name] for name in NAMES[8]} | {"qmap1": qmap1, "qmap2": qmap2}
    return {"step": int(entry["step"]), NESTED: tensors}


def read(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, Entry]:
    """The entries of a state dictionary, by the parameters that an optimizer has in the same places.

    Args:
        state_dict: of one of the optimizers above.
        groups: the ``param_groups`` of the optimizer that wants it.

    Raises:
        ValueError: the groups differ in number or size, a shape or a scale does not fit, or the optimizer was another.
    """
    saved = state_dict["param_groups"]
    sizes, own = [len(group["params"]) for group in saved], [len(group["params"]) for group in groups]
    if sizes != own:
        raise ValueError(f"the state has groups of {sizes} parameters, the optimizer of {own}")
    for number, group in enumerate(saved):
        check_options(group, f"group {number} of the state")
    entries = {}
    for saved_group, group in zip(saved, groups, strict=True):
        for key, param in zip(saved_group["params"], group["params"], strict=True):
            if key in state_dict["state"]:
                entries[param] = entry_of(state_dict["state"][key], param, f"the state of parameter {key}")
    return entries


def check_options(group: Mapping[str, Any], what: str) -> None:
    """Raise ValueError where a group asks for another update than there is here."""
    for option, value in _OPTIONS.items():
        if bool(group.get(option, value)) is not value:
            raise ValueError(f"{what} has {option}={group[option]}, which PagedAdamW does not have")


def copy_(into: Sequence[Tensor], entry: Entry | None, segment: Segment) -> None:
    """Copy the state of a part of a parameter.

    Args:
        into: exp_avg and exp_avg_sq of the segment, flat, and their scales where they are codes.
        entry: of the parameter; None: it has no state yet.
        segment: the part.
    """
    moments, scales = into[:2], into[2:]
    blocks = slice(segment.first // BLOCK_SIZE, -(-segment.end // BLOCK_SIZE))
    for i, moment in enumerate(moments):
        if entry is None:
            moment.zero_()
            if scales:
                scales[i].zero_()
            continue
        source = entry.moments[i][segment.first : segment.end]
        if entry.scales is not None:
            scale = entry.scales[i][blocks]
            if scales:
                moment.copy_(source)
                scales[i].copy_(scale)
            else:
                moment.copy_(dequantize_moment(source, scale, signed=i == 0))
        elif scales:
            codes, absmax = quantize_moment(source.float(), signed=i == 0)
            moment.copy_(codes)
            scales[i].copy_(absmax)
        else:
            moment.copy_(source)


def entry_of(saved: Mapping[str, Any], param: Tensor, what: str) -> Entry:
    """The state of a parameter as any of the optimizers above has it.

    Raises:
        ValueError: it is another optimizer's, or does not fit the parameter; ``what`` it is called in the message.
    """
    tensors = {**saved, **saved.get(NESTED, {})}
    names = next((pair for pair in (NAMES[32], NAMES[8][:2]) if pair[0] in tensors), None)
    if names is None or "step" not in tensors:
        raise ValueError(f"{what} has {', '.join(sorted(tensors)) or 'nothing'}: it is not AdamW's")
    for name in names:
        if name not in tensors:
            raise ValueError(f"{what} has {names[0]} without {name}: it is not AdamW's")
        if tensors[name].shape != param.shape:
            shapes = f"{list(tensors[name].shape)}; the parameter is {list(param.shape)}"
            raise ValueError(f"{name} in {what} is {shapes}")
    try:
        exp_avg, exp_avg_sq = (local_beside(tensors[name].detach(), param).reshape(-1) for name in names)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} {error}") from None
    return Entry(int(tensors["step"]), (exp_avg, exp_avg_sq), _scales(tensors, exp_avg, what))


def _scales(tensors: Mapping[str, Any], codes: Tensor, what: str) -> tuple[Tensor, Tensor] | None:
    if codes.dtype != torch.uint8:
        return None
    for number, expected in enumerate(moment_tables()[0], start=1):
        scale, values = tensors.get(f"absmax{number}"), tensors.get(f"qmap{number}")
        if scale is None or scale.numel() != -(-len(codes) // BLOCK_SIZE):
            raise ValueError(f"{what} has no scale for each {BLOCK_SIZE} codes in absmax{number}")
        if values is not None and not torch.equal(values.cpu(), expected):
            raise ValueError(f"{what} has other values than the dynamic map in qmap{number}")
    return tensors["absmax1"], tensors["absmax2"]
