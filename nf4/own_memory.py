"""Memory of their own for tensors that lie in memory of others.

A checkpoint is often mapped into memory, and one tensor that still lies in it keeps all of it there: weights that were
quantized would be freed in name only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def own_memory_(tensors: Iterable[Tensor]) -> None:
    """Copy the plain tensors on the CPU among these, in place; those that overlap in memory overlap in their copies."""
    groups: list[list[Tensor]] = []
    end = 0
    for tensor in sorted(filter(_is_plain, tensors), key=Tensor.data_ptr):
        if tensor.data_ptr() >= end:
            groups.append([])
        groups[-1].append(tensor)
        end = max(end, _end(tensor))
    for group in groups:
        if len(group) == 1:
            group[0].data = group[0].data.clone()
        else:
            _copy_together_(group)


def _is_plain(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter)
    return plain and tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.numel() > 0


def _end(tensor: Tensor) -> int:
    """The address behind the last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.itemsize


def _copy_together_(group: list[Tensor]) -> None:
    """Copy the one stretch of memory that tensors cover, which begins with the first of them."""
    first, end = group[0].data_ptr(), max(map(_end, group))
    start = first // 16 * 16  # a multiple of every itemsize
    memory = torch.empty(end - start, dtype=torch.uint8, device="cpu")
    ctypes.memmove(memory.data_ptr() + first - start, first, end - first)
    for tensor in group:
        copy, offset = torch.empty(0, dtype=tensor.dtype, device="cpu"), tensor.data_ptr() - start
        tensor.data = copy.set_(memory.untyped_storage(), offset // tensor.itemsize, tensor.shape, tensor.stride())
