"""Two runs of an arena seen as tensors: the views are where the layout says, and an update is the kernel's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qloralab.kernels import adamw, lion
from qloralab.kernels.adamw import ADAMW
from qloralab.kernels.lion import LION
from qloralab.kernels.rule import Rule, Segments
from qloralab.kernels.update import update_
from qloralab.optim.arena import ALIGNMENT, Memory
from qloralab.optim.layout import BLOCK_SIZE, lay_out
from qloralab.optim.moments import Moments

RATES = {ADAMW: adamw.Rates(1e-2, 0.9, 0.999, 1e-8, 0.1), LION: lion.Rates(1e-2, 0.9, 0.99, 0.1)}
SHAPES = [(3, 5), (0, 4), (), (ALIGNMENT // 4 + 77,), (1000,)]  # the fourth is in two chunks, or in one of 8 bits

bits = pytest.mark.parametrize("state_bits", [32, 8])
rules = pytest.mark.parametrize("rule", [ADAMW, LION], ids=["AdamW", "Lion"])


def make(state_bits: int, resident: int | None = None, streams: bool = False, rule: Rule = ADAMW) -> Moments:
    params = [torch.randn(shape) for shape in SHAPES]
    layout = lay_out([param.numel() for param in params], state_bits // 8, ALIGNMENT, len(rule.moments))
    arena = Memory(layout.nbytes, torch.device("cpu"))
    return Moments(params, layout, rule, state_bits, arena, resident, streams)


@rules
@bits
def test_moments_begin_as_zeros_where_the_layout_says_in_the_shape_of_the_parameter(state_bits, rule):
    moments, count = make(state_bits, rule=rule), len(rule.moments)
    start, dtype = moments.arena.bytes.data_ptr(), torch.float32 if state_bits == 32 else torch.uint8
    for number, (param, offset) in enumerate(zip(moments.params, moments.layout.offsets, strict=True)):
        found = moments.of_param(number)
        assert [(one.dtype, one.shape) for one in found[:count]] == [(dtype, param.shape)] * count
        assert [(scale.dtype, len(scale)) for scale in found[count:]] == (
            [] if state_bits == 32 else [(torch.float32, -(-param.numel() // BLOCK_SIZE))] * count
        )
        assert not any(tensor.any() for tensor in found)
        for k, one in enumerate(found[:count] if param.numel() else ()):
            assert one.data_ptr() - start == k * moments.layout.run + offset * state_bits // 8


@bits
def test_views_of_segments_are_parts_of_those_of_parameters(state_bits):
    moments = make(state_bits)
    flat = [[tensor.flatten() for tensor in moments.of_param(number)] for number in range(len(SHAPES))]
    for i, tensors in enumerate(flat):
        for k, tensor in enumerate(tensors):
            tensor.copy_(torch.arange(len(tensor)) % 199 + i + k)
    for segments in moments.layout.segments:
        for one in segments:
            blocks = slice(one.first // BLOCK_SIZE, -(-one.end // BLOCK_SIZE))
            parts = [slice(one.first, one.end)] * 2 + [blocks] * 2
            found = [tensor for some in moments.of_segment(one) for tensor in some]
            assert len(found) == len(flat[one.param])
            for tensor, whole, part in zip(found, flat[one.param], parts, strict=False):
                assert torch.equal(tensor, whole[part])
                assert tensor.data_ptr() == whole[part].data_ptr()


@bits
def test_chunks_are_the_ranges_of_the_layout(state_bits):
    moments = make(state_bits, resident=1, streams=True)
    first, *others = moments.chunks
    assert first is None
    assert [chunk and chunk.ranges for chunk in others] == list(moments.layout.ranges[1:])
    assert all(chunk and chunk.arena is moments.arena for chunk in others)
    for all_there in (make(state_bits), make(state_bits, resident=1)):
        assert all_there.chunks == [None] * len(moments.layout.ranges)


def test_what_is_within_reach_is_one_call_and_each_chunk_that_streams_another():
    large = 3  # in chunks 0 and 1
    (batch,) = make(32).batches(range(len(SHAPES)))
    assert [batch.owners[i] for i in range(len(batch.owners))] == [0, 2, 3, 4]  # the second one is empty
    assert batch.parts == [None] * 4
    assert batch.away == 0
    here, away = make(32, resident=1, streams=True).batches([0, large])
    assert (here.chunk, here.owners, away.owners, here.away, away.away) == (None, [0, 1], [1], 0, 0)
    cut = len(here.params[1])
    assert (here.parts, away.parts) == ([None, slice(0, cut)], [slice(cut, ALIGNMENT // 4 + 77)])
    (one,) = make(32, resident=1).batches([0, large])
    assert one.parts == [None, None]
    assert one.away == 8 * (ALIGNMENT // 4 + 77 - cut)


def test_batches_are_kept_until_a_parameter_has_other_memory():
    moments = make(32)
    first = moments.batches([0, 4])
    assert moments.batches([0, 4]) is first
    assert moments.batches([4]) is not first
    moments.params[4].data = moments.params[4].clone()
    again = moments.batches([0, 4])
    assert again is not first
    assert again[0].params[1].data_ptr() == moments.params[4].data_ptr()


def test_steps_are_counted_for_each_parameter():
    moments = make(32)
    assert moments.advance([0, 3]) == [1, 1]
    assert moments.advance([3]) == [2]
    assert moments.advance(range(5)) == [2, 1, 1, 3, 1]
    assert moments.steps.tolist() == [2, 1, 1, 3, 1]


@rules
@bits
def test_an_update_of_all_chunks_is_that_of_each_parameter(state_bits, rule):
    moments, count = make(state_bits, rule=rule), len(rule.moments)
    grads = [torch.randn(param.numel()) for param in moments.params]
    steps = [1, 2, 3, 40, 5]
    flat: list[Tensor] = [param.clone().view(-1) for param in moments.params]
    states = [[torch.zeros_like(tensor).flatten() for tensor in moments.of_param(i)] for i in range(len(flat))]
    for later in (0, 1):
        for batch in moments.batches(range(len(flat))):
            update_(rule, batch.segments(grads, [step + later for step in steps]), RATES[rule])
        for i, (param, state) in enumerate(zip(flat, states, strict=True)):
            lists = [[tensor] for tensor in state]
            alone = Segments([param], [grads[i]], lists[:count], lists[count:] or None, [steps[i] + later])
            update_(rule, alone, RATES[rule])
    for i, (param, state) in enumerate(zip(flat, states, strict=True)):
        assert torch.equal(moments.params[i].view(-1), param)
        assert all(torch.equal(a.flatten(), b) for a, b in zip(moments.of_param(i), state, strict=True))
