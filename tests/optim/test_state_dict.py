"""State dictionaries of AdamW from PyTorch, from bitsandbytes and from here are read alike, and converted as they say.

The dictionaries are those that the optimizers themselves write, after two steps. What codes stand for is computed
beside the module: the values of bitsandbytes' dynamic maps, times the scale, in NumPy.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from bitsandbytes.optim.adamw import AdamW8bit, AdamW32bit
from torch import Tensor
from torch.nn import Parameter

import qloralab as ql
from qloralab.kernels.adamw import ADAMW
from qloralab.kernels.lion import LION
from qloralab.optim.layout import BLOCK_SIZE, Segment
from qloralab.optim.paged_lion import PagedLion
from qloralab.optim.state_dict import NESTED, Entry, copy_, names, nested, read

SHAPES = [(70, 64), (4097,), (3, 5)]  # bitsandbytes keeps those below 4,096 elements in 32 bits
MAPS = [create_dynamic_map(signed=signed).numpy() for signed in (True, False)]
LENGTH = 1000  # of the parameter of an Entry below; its last block has 232 elements

Optimizer = Callable[[Sequence[Tensor]], torch.optim.Optimizer]
StateDict = dict[str, Any]


def ours(state_bits: Any) -> Optimizer:
    return lambda params: ql.PagedAdamW(params, state_bits=state_bits)


OPTIMIZERS: dict[str, Optimizer] = {
    "torch": torch.optim.AdamW,
    "PagedAdamW, 32 bits": ours(32),
    "PagedAdamW, 8 bits": ours(8),
    "bitsandbytes, 32 bits": AdamW32bit,
    "bitsandbytes, 8 bits": AdamW8bit,
}


def written_by(optimizer: Optimizer) -> StateDict:
    """The state after two steps. The second parameter had no gradient in the first of them."""
    params = [Parameter(torch.randn(shape)) for shape in SHAPES]
    one = optimizer(params)
    for step in range(2):
        for i, param in enumerate(params):
            param.grad = torch.randn_like(param) if step or i != 1 else None
        one.step()
    return copy.deepcopy(one.state_dict())


def fresh() -> list[dict[str, Any]]:
    """The groups of an optimizer that wants the state."""
    return [{"params": [Parameter(torch.zeros(shape)) for shape in SHAPES]}]


def in_order(entries: dict[Tensor, Entry], groups: Sequence[dict[str, Any]]) -> list[Entry]:
    return [entries[param] for group in groups for param in group["params"]]


def saved_of(state: StateDict) -> list[StateDict]:
    """The state of each parameter."""
    return [state["state"][key] for key in range(len(SHAPES))]


def flat(state: StateDict) -> StateDict:
    """In the layout of bitsandbytes' older files."""
    return {
        **state,
        "state": {key: {**of.get(NESTED, of), "step": of["step"]} for key, of in state["state"].items()},
    }


def decode(codes: Tensor, absmax: Tensor, which: int) -> Tensor:
    """What codes stand for: float32, one rounding."""
    scales = np.repeat(absmax.numpy(), BLOCK_SIZE)[: len(codes)]
    return torch.from_numpy(MAPS[which][codes.numpy()] * scales)


# reading


@pytest.mark.parametrize("layout", [copy.copy, flat], ids=["as written", "flat"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_moments_and_scales_are_read(name, layout):
    state, groups = written_by(OPTIMIZERS[name]), fresh()
    entries = in_order(read(layout(state), groups, ADAMW), groups)
    assert [entry.step for entry in entries] == [2, 1, 2]
    assert all(type(entry.step) is int for entry in entries)
    for entry, saved in zip(entries, saved_of(state), strict=True):
        tensors = saved.get(NESTED, saved)
        keys = ("exp_avg", "exp_avg_sq") if NESTED not in saved else ("state1", "state2")
        for moment, key in zip(entry.moments, keys, strict=True):
            assert torch.equal(moment, tensors[key].flatten())
            assert moment.any()
        scales = [tensors[key] for key in ("absmax1", "absmax2") if key in tensors]
        assert (entry.scales is None) == (entry.moments[0].dtype != torch.uint8) == (not scales)
        assert all(torch.equal(one, other) for one, other in zip(entry.scales or (), scales, strict=True))
        assert all(scale.all() for scale in scales)


def test_a_state_of_ours_has_the_keys_shapes_and_maps_of_bitsandbytes():
    theirs, mine = (written_by(optimizer)["state"][0] for optimizer in (AdamW8bit, ours(8)))
    assert mine.keys() == theirs.keys() == {"step", NESTED}
    assert type(mine["step"]) is type(theirs["step"])
    assert mine[NESTED].keys() == theirs[NESTED].keys()
    for key, tensor in theirs[NESTED].items():
        assert (mine[NESTED][key].dtype, mine[NESTED][key].shape) == (tensor.dtype, tensor.shape)
    for key in ("qmap1", "qmap2"):
        assert torch.equal(mine[NESTED][key], theirs[NESTED][key])


def test_nested_copies_no_moment():
    entry = {name: torch.zeros(3, dtype=torch.uint8) for name in names(ADAMW, 8)} | {"step": torch.tensor(7.0)}
    found = nested(entry, ADAMW)
    assert found["step"] == 7
    assert all(found[NESTED][name] is entry[name] for name in names(ADAMW, 8))


def test_parameters_without_state_have_no_entry():
    state, groups = written_by(torch.optim.AdamW), fresh()
    del state["state"][1]
    assert list(read(state, groups, ADAMW)) == [groups[0]["params"][0], groups[0]["params"][2]]


def test_parameters_are_found_by_their_indices_in_the_groups():
    state, (group,) = written_by(torch.optim.AdamW), fresh()
    first, second, third = group["params"]
    saved = {"state": {key + 4: of for key, of in state["state"].items()}, "param_groups": [{"params": [6, 4]}]}
    saved["param_groups"].append({"params": [5]})
    entries = read(saved, [{"params": [third, first]}, {"params": [second]}], ADAMW)
    for param, key in ((first, 0), (second, 1), (third, 2)):
        assert torch.equal(entries[param].moments[0], state["state"][key]["exp_avg"].flatten())


def test_what_is_read_needs_no_gradient():
    state, groups = written_by(torch.optim.AdamW), fresh()
    state["state"][0]["exp_avg"].requires_grad_()
    assert not in_order(read(state, groups, ADAMW), groups)[0].moments[0].requires_grad


# what is refused


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_an_update_that_we_do_not_have(option):
    options: Any = {option: True}
    state = written_by(lambda params: torch.optim.AdamW(params, **options))
    message = f"^group 0 of the state has {option}=True, which PagedAdamW does not have$"
    with pytest.raises(ValueError, match=message):
        read(state, fresh(), ADAMW)


def test_the_state_of_another_optimizer():
    for kind in (torch.optim.Adagrad, lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.9)):
        with pytest.raises(ValueError, match=r"^the state of parameter 0 has .*: it is not AdamW's$"):
            read(written_by(kind), fresh(), ADAMW)


def without(*path: Any) -> Callable[[StateDict], None]:
    def spoil(state: StateDict) -> None:
        *way, last = path
        for key in way:
            state = state[key]
        del state[last]

    return spoil


def with_(change: Callable[[Tensor], Tensor], *path: Any) -> Callable[[StateDict], None]:
    def spoil(state: StateDict) -> None:
        *way, last = path
        for key in way:
            state = state[key]
        state[last] = change(state[last])

    return spoil


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("torch", without("step"), "{} has exp_avg, exp_avg_sq: it is not AdamW's"),
        ("torch", dict.clear, "{} has nothing: it is not AdamW's"),
        ("torch", without("exp_avg"), "{} has exp_avg_sq, step: it is not AdamW's"),
        ("torch", without("exp_avg_sq"), "{} has exp_avg without exp_avg_sq: it is not AdamW's"),
        ("bitsandbytes, 32 bits", without("step"), f"{{}} has {NESTED}, state1, state2: it is not AdamW's"),
        ("bitsandbytes, 32 bits", without(NESTED), "{} has step: it is not AdamW's"),
        ("bitsandbytes, 32 bits", without(NESTED, "state2"), "{} has state1 without state2: it is not AdamW's"),
        ("bitsandbytes, 8 bits", without(NESTED, "absmax1"), "{} has no scale for each 256 codes in absmax1"),
        ("bitsandbytes, 8 bits", without(NESTED, "absmax2"), "{} has no scale for each 256 codes in absmax2"),
        ("bitsandbytes, 8 bits", with_(lambda t: t[:-1], NESTED, "absmax2"), "{} has no scale for each 256 codes in a"),
        ("bitsandbytes, 8 bits", with_(lambda t: t[:1], NESTED, "absmax1"), "{} has no scale for each 256 codes in a"),
        (
            "bitsandbytes, 8 bits",
            with_(lambda t: t * 2, NESTED, "qmap1"),
            "{} has other values than the dynamic map",
        ),
        ("bitsandbytes, 8 bits", with_(lambda t: t.flip(0), NESTED, "qmap2"), "{} has other values than the dynamic m"),
        ("PagedAdamW, 8 bits", with_(lambda t: t[:16], NESTED, "qmap2"), "{} has other values than the dynamic map"),
        ("torch", with_(Tensor.t, "exp_avg"), "exp_avg in {} is [64, 70]; the parameter is [70, 64]"),
        ("PagedAdamW, 32 bits", with_(Tensor.t, "exp_avg_sq"), "exp_avg_sq in {} is [64, 70]; the parameter is [70, "),
        ("bitsandbytes, 32 bits", with_(Tensor.t, NESTED, "state1"), "state1 in {} is [64, 70]; the parameter is ["),
        ("bitsandbytes, 8 bits", with_(Tensor.t, NESTED, "state2"), "state2 in {} is [64, 70]; the parameter is [70, "),
    ],
)
def test_what_is_missing_or_does_not_fit(name, spoil, message):
    state = written_by(OPTIMIZERS[name])
    spoil(state["state"][0])
    with pytest.raises(ValueError, match=f"^{re.escape(message.format('the state of parameter 0'))}"):
        read(state, fresh(), ADAMW)


def test_without_maps_the_dynamic_ones_are_meant():
    state, groups = written_by(AdamW8bit), fresh()
    for key in ("qmap1", "qmap2"):
        del state["state"][0][NESTED][key]
    assert in_order(read(state, groups, ADAMW), groups)[0].scales


@pytest.mark.parametrize("state_bits", [32, 8])
def test_lion_has_one_moment_of_the_same_names_and_refuses_the_state_of_adamw(state_bits):
    state, groups = written_by(lambda params: PagedLion(params, state_bits=state_bits)), fresh()
    entries = in_order(read(state, groups, LION), groups)
    for entry, saved in zip(entries, saved_of(state), strict=True):
        tensors = saved.get(NESTED, saved)
        assert [key for key in tensors if key != "step"] == (
            ["exp_avg"] if state_bits == 32 else ["state1", "absmax1", "qmap1"]
        )
        (moment,) = entry.moments
        assert torch.equal(moment, tensors["exp_avg" if state_bits == 32 else "state1"].flatten())
    for written in OPTIMIZERS.values():
        with pytest.raises(ValueError, match=r"^the state of parameter 0 has .*: it is not Lion's$"):
            read(written_by(written), fresh(), LION)
    with pytest.raises(ValueError, match=r"^the state of parameter 0 has .* without .*: it is not AdamW's$"):
        read(state, fresh(), ADAMW)
    for into in (32, 8):
        optimizer = PagedLion(groups[0]["params"], state_bits=into)
        optimizer.load_state_dict(copy.deepcopy(state))
        assert [int(optimizer.state[param]["step"]) for param in groups[0]["params"]] == [2, 1, 2]


# copying


def numbers() -> Entry:
    """Moments in 32 bits, of magnitudes that differ from block to block; a block of each is zero."""
    magnitude = torch.logspace(-6, 3, LENGTH)
    exp_avg, exp_avg_sq = torch.randn(LENGTH) * magnitude, torch.rand(LENGTH) * magnitude.square()
    for moment in (exp_avg, exp_avg_sq):
        moment[256:512] = 0
    return Entry(5, (exp_avg, exp_avg_sq))


def codes() -> Entry:
    """Moments in 8 bits, with every code in them."""
    exp_avg, exp_avg_sq = (torch.randint(256, (LENGTH,), dtype=torch.uint8) for _ in range(2))
    exp_avg[:256] = exp_avg_sq[:256] = torch.arange(256)
    return Entry(5, (exp_avg, exp_avg_sq), (torch.rand(4), torch.rand(4) * 1e-4))


def room(state_bits: int, length: int) -> tuple[list[Tensor], list[Tensor]]:
    """The memory of a segment, full of what was there before: moments, and with 8 bits scales."""
    if state_bits == 32:
        return [torch.full((length,), torch.nan) for _ in range(2)], []
    codes = [torch.full((length,), 77, dtype=torch.uint8) for _ in range(2)]
    return codes, [torch.full((-(-length // BLOCK_SIZE),), torch.nan) for _ in range(2)]


def copied(entry: Entry | None, state_bits: int, first: int = 0, end: int = LENGTH) -> list[Tensor]:
    """The moments and scales of a segment behind a copy."""
    into = room(state_bits, end - first)
    copy_(into, entry, Segment(3, first, end, 4096), ADAMW)
    return [*into[0], *into[1]]


segments = pytest.mark.parametrize(
    ("first", "end"), [(0, LENGTH), (0, 512), (256, 768), (768, LENGTH)], ids=["all", "first", "middle", "last"]
)


@segments
@pytest.mark.parametrize("state_bits", [32, 8])
def test_what_has_the_same_bits_is_copied(state_bits, first, end):
    entry = numbers() if state_bits == 32 else codes()
    blocks = slice(first // BLOCK_SIZE, -(-end // BLOCK_SIZE))
    expected = [moment[first:end] for moment in entry.moments] + [scale[blocks] for scale in entry.scales or ()]
    found = copied(entry, state_bits, first, end)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@segments
def test_8_bits_become_the_32_that_they_stand_for(first, end):
    entry = codes()
    assert entry.scales
    for which, moment in enumerate(copied(entry, 32, first, end)):
        assert torch.equal(moment, decode(entry.moments[which], entry.scales[which], which)[first:end])


@segments
def test_32_bits_become_the_nearest_that_8_can_stand_for(first, end):
    entry = numbers()
    into = copied(entry, 8, first, end)
    for which in range(2):
        exact, (found, scales) = entry.moments[which][first:end].double().numpy(), into[which::2]
        blocks = [block.abs().max().item() for block in entry.moments[which][first:end].split(BLOCK_SIZE)]
        assert scales.tolist() == blocks
        scale = np.repeat(scales.double().numpy(), BLOCK_SIZE)[: end - first]
        error = np.abs(decode(found, scales, which).double().numpy() - exact)
        least = np.abs(MAPS[which].astype(np.float64)[:, None] * scale - exact).min(axis=0)
        assert (error <= least + 1e-6 * scale).all()
        assert error.max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("state_bits", [32, 8])
def test_moments_of_another_dtype_are_those_numbers(dtype, state_bits):
    source = [moment.clamp(-6e4, 6e4).to(dtype) for moment in numbers().moments]
    found, expected = (
        copied(Entry(1, source), state_bits),
        copied(Entry(1, [one.float() for one in source]), state_bits),
    )
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@segments
@pytest.mark.parametrize("state_bits", [32, 8])
def test_no_entry_is_zeros(state_bits, first, end):
    assert not any(tensor.any() for tensor in copied(None, state_bits, first, end))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("state_bits", [32, 8])
def test_each_state_is_loaded_into_each_optimizer(name, state_bits):
    """What the moments are, decoded, in units of the largest one of a block."""
    state, groups = written_by(OPTIMIZERS[name]), fresh()
    optimizer = ours(state_bits)(groups[0]["params"])
    optimizer.load_state_dict(copy.deepcopy(state))
    source = in_order(read(state, groups, ADAMW), groups)
    into = in_order(read(optimizer.state_dict(), groups, ADAMW), groups)
    assert [entry.step for entry in into] == [2, 1, 2]
    for one, other in zip(into, source, strict=True):
        for which in range(2):
            found, expected = (
                entry.moments[which]
                if entry.scales is None
                else decode(entry.moments[which], entry.scales[which], which)
                for entry in (one, other)
            )
            exact = one.scales is None or other.scales is not None
            tolerance = 0 if exact else 0.02 * float(expected.abs().max())
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
            assert expected.any()
