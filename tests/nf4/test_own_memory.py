"""Copies have memory of their own, the same bits, and overlap where the tensors did."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qloralab.nf4.model import quantize_
from qloralab.nf4.own_memory import own_memory_


def test_each_tensor_lets_go_of_the_memory_it_lay_in():
    whole = torch.arange(64.0)
    parts = [whole[:8], whole[8:24].view(4, 4).T, whole[30], whole[40:40]]
    before = [part.clone() for part in parts]
    own_memory_(parts)
    whole.zero_()
    for part, expected in zip(parts, before, strict=True):
        assert torch.equal(part, expected)
        assert part.untyped_storage().nbytes() <= max(part.nbytes, 16 * 4) or not part.numel()


def test_what_overlaps_overlaps_in_the_copy():
    whole = torch.arange(64.0)[1:]  # begins between multiples of 16 bytes
    row, column, bits = whole[:8], whole[:56].view(8, 7)[:, 6], whole.view(torch.int32)[50:60]
    tensors = [row, column, bits, whole, whole[3].expand(2, 5), torch.from_numpy(whole[20:30].numpy())]
    before = [one.clone() for one in tensors]
    own_memory_(reversed(tensors))
    for found, expected in zip(tensors, before, strict=True):
        assert torch.equal(found, expected)
    whole.zero_()
    assert not any(one.any() for one in tensors)


def test_parameters_that_are_nothing_but_one_memory_stay_one():
    a = nn.Parameter(torch.randn(3, 4))
    b = nn.Parameter(a.detach().view(4, 3))
    grad = a.grad = torch.ones(3, 4)
    own_memory_([a, b])
    assert a.data_ptr() == b.data_ptr()
    assert a.grad is grad


def test_tensors_without_a_stretch_of_their_own():
    sparse, meta, zeros = torch.eye(3).to_sparse(), torch.empty(3, device="meta"), torch.zeros(1).expand(4, 4)
    own_memory_([sparse, meta, zeros])
    assert torch.equal(sparse.to_dense(), torch.eye(3))
    assert torch.equal(zeros, torch.zeros(4, 4))


def test_a_buffer_that_is_a_view_of_a_parameter_stays_one():
    class Tied(nn.Module):
        lower: Tensor

        def __init__(self):
            super().__init__()
            self.table, self.linear = nn.Embedding(8, 4), nn.Linear(4, 4)
            self.register_buffer("lower", self.table.weight.detach()[4:])

    model: Any = quantize_(Tied())
    with torch.no_grad():
        model.table.weight.fill_(3)
    assert torch.equal(model.lower, torch.full((4, 4), 3.0))
