"""Two runs of an arena seen as tensors: the views are where the layout says, and an update is the kernel's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qloralab.kernels.adamw import adamw_
from qloralab.kernels.adamw_8bit import adamw_8bit_
from qloralab.optim.arena import ALIGNMENT, Memory
from qloralab.optim.chunks import BLOCK_SIZE, lay_out
from qloralab.optim.moments import ITEMSIZE, Moments

RATES = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(3, 5), (0, 4), (), (ALIGNMENT // 4 + 77,), (1000,)]  # the fourth is in two chunks, or in one of 8 bits

bits = pytest.mark.parametrize("state_bits", [32, 8])


def make(state_bits: int) -> Moments:
    params = [torch.randn(shape) for shape in SHAPES]
    layout = lay_out([param.numel() for param in params], ITEMSIZE[state_bits], ALIGNMENT)
    return Moments(params, layout, state_bits, Memory(layout.nbytes, torch.device("cpu")))


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
    moments = make(state_bits)
    assert [chunk.ranges for chunk in moments.chunks] == list(moments.layout.ranges)
    assert all(chunk.arena is moments.arena for chunk in moments.chunks)
    assert sum(chunk.nbytes for chunk in moments.chunks) == len(moments.arena.bytes)


@bits
def test_an_update_of_all_chunks_is_that_of_each_parameter(state_bits):
    moments, kernel = make(state_bits), adamw_ if state_bits == 32 else adamw_8bit_
    grads = [torch.randn(param.numel()) for param in moments.params]
    steps = [1, 2, 3, 40, 5]
    flat: list[Tensor] = [param.clone().view(-1) for param in moments.params]
    states = [[torch.zeros_like(tensor).flatten() for tensor in moments.of_param(i)] for i in range(len(flat))]
    for later in (0, 1):
        for segments in moments.layout.segments:
            of_owners = [grads[one.param] for one in segments], [steps[one.param] + later for one in segments]
            moments.update(segments, *of_owners, **RATES)
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
    moments.update(layout.segments[0], [torch.ones(300)], [1], **RATES)
    torch.testing.assert_close(param.detach(), torch.full((300,), 1 - 1e-3 - 1e-2))
