"""Two runs of an arena seen as tensors: the views are where the layout says, and an update is the kernel's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qloralab.kernels.adamw import Rates, adamw_
from qloralab.kernels.adamw_8bit import adamw_8bit_
from qloralab.optim.arena import ALIGNMENT, Memory
from qloralab.optim.layout import BLOCK_SIZE, lay_out
from qloralab.optim.moments import ITEMSIZE, Moments

RATES = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(3, 5), (0, 4), (), (ALIGNMENT // 4 + 77,), (1000,)]  # the fourth is in two chunks, or in one of 8 bits

bits = pytest.mark.parametrize("state_bits", [32, 8])


def make(state_bits: int, resident: int | None = None, streams: bool = False) -> Moments:
    params = [torch.randn(shape) for shape in SHAPES]
    layout = lay_out([param.numel() for param in params], ITEMSIZE[state_bits], ALIGNMENT)
    return Moments(params, layout, state_bits, Memory(layout.nbytes, torch.device("cpu")), resident, streams)


@bits
def test_moments_begin_as_zeros_in_the_shape_of_the_parameter(state_bits):
    moments = make(state_bits)
    for number, param in enumerate(moments.params):
        exp_avg, exp_avg_sq, *scales = moments.of_param(number)
        assert exp_avg.shape == exp_avg_sq.shape == param.shape
        assert {exp_avg.dtype, exp_avg_sq.dtype} == {torch.float32 if state_bits == 32 else torch.uint8}
        assert [(scale.dtype, len(scale)) for scale in scales] == (
            [] if state_bits == 32 else [(torch.float32, -(-param.numel() // BLOCK_SIZE))] * 2
        )
        assert not any(tensor.any() for tensor in (exp_avg, exp_avg_sq, *scales))


@bits
def test_views_are_in_the_arena_where_the_layout_says(state_bits):
    moments, size = make(state_bits), ITEMSIZE[state_bits]
    start = moments.arena.bytes.data_ptr()
    for number, place in enumerate(moments.layout.places):
        if moments.params[number].numel():
            exp_avg, exp_avg_sq = moments.of_param(number)[:2]
            assert exp_avg.data_ptr() - start == place * size
            assert exp_avg_sq.data_ptr() - start == moments.layout.run + place * size


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
            found = moments.of_segment(one)
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
    moments.params[4].data = moments.params[4].double()
    with pytest.raises(TypeError, match="float64"):
        moments.batches([0, 4])
    moments.params[4].data = torch.randn(4, 4).T
    with pytest.raises(ValueError, match="not contiguous"):
        moments.batches([0, 4])


def test_steps_are_counted_for_each_parameter():
    moments = make(32)
    assert moments.advance([0, 3]) == [1, 1]
    assert moments.advance([3]) == [2]
    assert moments.advance(range(5)) == [2, 1, 1, 3, 1]
    assert moments.steps.tolist() == [2, 1, 1, 3, 1]


@bits
def test_an_update_of_all_chunks_is_that_of_each_parameter(state_bits):
    moments, kernel = make(state_bits), adamw_ if state_bits == 32 else adamw_8bit_
    grads = [torch.randn(param.numel()) for param in moments.params]
    steps = [1, 2, 3, 40, 5]
    flat: list[Tensor] = [param.clone().view(-1) for param in moments.params]
    states = [[torch.zeros_like(tensor).flatten() for tensor in moments.of_param(i)] for i in range(len(flat))]
    numbers = list(range(len(flat)))
    for later in (0, 1):
        for batch in moments.batches(numbers):
            moments.update(batch, grads, [step + later for step in steps], Rates(**RATES))
        for i, (param, state) in enumerate(zip(flat, states, strict=True)):
            lists = [[param], [grads[i]], *([tensor] for tensor in state), [steps[i] + later]]
            kernel(*lists, **RATES)  # pyright: ignore[reportArgumentType]
    for i, (param, state) in enumerate(zip(flat, states, strict=True)):
        assert torch.equal(moments.params[i].view(-1), param)
        assert all(torch.equal(a.flatten(), b) for a, b in zip(moments.of_param(i), state, strict=True))


def test_a_parameter_that_requires_a_gradient_is_updated_in_place():
    param = torch.ones(300, requires_grad=True)
    layout = lay_out([300], 4, ALIGNMENT)
    moments = Moments([param], layout, 32, Memory(layout.nbytes, torch.device("cpu")))
    (batch,) = moments.batches([0])
    moments.update(batch, [torch.ones(300)], [1], Rates(**RATES))
    torch.testing.assert_close(param.detach(), torch.full((300,), 1 - 1e-3 - 1e-2))
