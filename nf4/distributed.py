"""Tensors that several processes share, each a part of them: PyTorch's DTensors, and how files hold them whole.

A file knows no processes. To write one, all processes gather each tensor in turn, and the first of them writes; to read
one, each process takes its part of every tensor. So a file that N processes wrote is read by any other number.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def _is_shared(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, whose module need not be imported to know."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Of a DTensor all processes that share it have to ask, at the same time."""
    shared: Any = tensor
    return shared.full_tensor() if _is_shared(tensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which each process has, as the DTensor that another one of its shape is; else the tensor itself.

    Nothing is sent: each process keeps its part.
    """
    if not _is_shared(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    shared: Any = like
    return distribute_tensor(tensor, shared.device_mesh, shared.placements, src_data_rank=None)


def writes(tensors: Iterable[Tensor]) -> bool:
    """Whether this process is the one that writes a file of tensors: always, or the first one of those that share
    one."""
    for tensor in tensors:
        if _is_shared(tensor):
            shared: Any = tensor
            return not any(shared.device_mesh.get_coordinate() or [1])
    return True


def local_bytes(tensor: Tensor) -> int:
    """What this process holds of a tensor."""
    shared: Any = tensor
    with torch.no_grad():
        return shared.to_local().nbytes if _is_shared(tensor) else tensor.nbytes
