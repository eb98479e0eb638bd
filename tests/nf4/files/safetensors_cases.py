"""Tensors of every dtype and shape that a safetensors file holds."""

from __future__ import annotations

import torch
from torch import Tensor

from qloralab.nf4.files.safetensors_reader import DTYPES, Description

MB = 1 << 20
SHAPES = [(2, 6), (0,), (3, 0, 2), (1,), (7, 2)]


def random_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Any bits, but for booleans, which have two."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    flat = torch.randint(256, (torch.Size(shape).numel() * dtype.itemsize,), dtype=torch.uint8)
    return flat.view(dtype).reshape(shape)


def layout(tensors: dict[str, Tensor]) -> dict[str, Description]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


EVERY_DTYPE = {f"{code}.{shape}": random_bytes(dtype, shape) for code, dtype in DTYPES.items() for shape in SHAPES}
EVERY_DTYPE |= {f"{code}.scalar": random_bytes(dtype, ()) for code, dtype in DTYPES.items() if code != "F4"}
