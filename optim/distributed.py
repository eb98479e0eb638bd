"""Parameters that several processes share: each updates the part that it has.

``fully_shard`` and ``distribute_tensor`` make a parameter a ``DTensor``: of a global shape, with a local tensor in each
process. AdamW updates every element by itself, so each process updates its local tensor and keeps the state of that,
and no update needs another process. Only whether all gradients are finite has to be decided together.

The state is shown as DTensors with the placements of the parameter, as ``torch.optim.AdamW`` has it, so that
``torch.distributed.checkpoint`` can save it and load it into another number of processes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qloralab.kernels.update import has_memory

_PLAIN = (Tensor, torch.nn.Parameter)  # tensors of these very types are no DTensors


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor. There is none before its module is imported, and that takes a while."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor in the memory of this process: of a DTensor its local tensor, else the tensor itself.

    Raises:
        TypeError: it is another subclass without memory of its own, or its memory does not hold its values.
    """
    if type(tensor) not in _PLAIN and is_distributed(tensor):
        distributed: Any = tensor
        if any(placement.is_partial() for placement in distributed.placements):
            raise TypeError(f"is a DTensor that is still to be summed over processes: {distributed.placements}")
        with torch.no_grad():
            part: Any = distributed.to_local()
        tensor = part.wait() if hasattr(part, "wait") else part  # it is on its way from other processes
    if not has_memory(tensor):
        raise TypeError(
            f"is a {type(tensor).__name__} ({tensor.layout}), whose values are not in its own memory; what can be "
            "updated is a plain tensor, or the local part of a DTensor"
        )
    return tensor


def local_beside(tensor: Tensor, param: Tensor) -> Tensor:
    """The local part of what belongs to a parameter: its gradient, or a part of its state.

    Raises:
        TypeError: as for `local`.
        ValueError: one of them is a DTensor and the other is not, or they are placed differently.
    """
    if is_distributed(tensor) != is_distributed(param):
        raise ValueError(f"is a {type(tensor).__name__}, and the parameter a {type(param).__name__}")
    if is_distributed(param):
        one, other = ((any_.device_mesh, any_.placements) for any_ in (tensor, param))  # pyright: ignore
        if one != other:
            raise ValueError(f"is placed as {one[1]} on {one[0]}, and the parameter as {other[1]} on {other[0]}")
    return local(tensor)


def shown_like(tensor: Tensor, param: Tensor) -> Tensor:
    """A local tensor of the state as the DTensor that its parameter is; itself beside a plain parameter."""
    if not is_distributed(param):
        return tensor
    from torch.distributed.tensor import DTensor

    like: Any = param
    with torch.no_grad():
        # The same memory without a storage offset: a DTensor takes over the offset, and can then not be deep-copied.
        return DTensor.from_local(
            torch.from_dlpack(tensor),
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )


def any_of(flags: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Which flags hold in any of the processes that share a parameter.

    Args:
        flags: bool [len(params)], one for each parameter, of this process.
        params: the parameters; every process that shares one calls this with the same ones.
    """
    meshes: dict[Any, list[int]] = {}
    for index, param in enumerate(params):
        if is_distributed(param):
            shared: Any = param
            meshes.setdefault(shared.device_mesh, []).append(index)
    for mesh, indices in meshes.items():
        from torch.distributed.tensor import DTensor, Partial

        some: Any = DTensor.from_local(flags[indices].float(), mesh, [Partial("max")] * mesh.ndim, run_check=False)
        flags[indices] = some.full_tensor() > 0
    return flags
