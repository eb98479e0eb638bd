"""Dequantized weights that are kept and used again, as many as a budget of bytes holds. It is 0 unless you set it.

A two-pass product (``two_pass.py``) dequantizes its weight into a workspace, which the next product overwrites. What is
kept here is the same tensor, so no bit of a result changes; a product with it is the product of an unquantized layer.
The price is that layer's memory, 2 bytes a weight beside the 0.52 of the packed one. ``QLORALAB_DENSE_CACHE=2GiB`` is
the budget, for each device.

**What is kept is what came first**, for as long as its weight lives. Training and decoding use the layers in a cycle,
and a cache that lets go of what was used least recently would always let go of what comes next: with a budget for all
layers but one, it would hit nothing. Of a fixed set, every layer hits, each time.

**Recomputed weights go before.** Gradient checkpointing computes a block again within the backward pass and takes its
gradient right after: of the three dequantizations of a weight in a step, the third has the bits of the second. A
product that runs forward within a backward pass is known by PyTorch's number of that pass, without anyone's help. Its
weight is kept until its input gradient was taken, where the budget has room left; what no gradient asked for is dropped
by the next product that runs forward outside. The bytes of one block so save one dequantization for each block of the
model, where those of a block that stays save three of its own.

**An entry** is of a ``packed`` tensor and a dtype, and dies with that tensor. It is made again when an operand was
written to, or is another one. A weight that is whole for a product only (``nf4/sharded.py``) has none.

**Memory.** The budget is kept to the byte, as elements are counted; PyTorch's allocator rounds up. On a GPU, moreover,
nothing is kept that would leave less than `MARGIN` free. There, or where an allocation fails, the cache stops to grow,
and the workspace serves.

**Streams.** An entry is made on the stream of its first product. Another stream waits for that once, and is made known
to the allocator. A CUDA graph replays addresses, so a product that is captured takes none from here: its weight is
dequantized in the graph's own memory, at each replay.
"""

from __future__ import annotations

import functools
import math
import os
import re
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qloralab.nf4.packed import Packed

Keep = Literal["all", "used again", "recomputed"]
VARIABLE = "QLORALAB_DENSE_CACHE"
MARGIN = 1 << 30  # bytes of a GPU that stay free


class Held(NamedTuple):
    """What is held on a device."""

    weights: int
    nbytes: int


class _Limit(NamedTuple):
    """What may be held on each device."""

    budget: int  # bytes
    keep: Keep = "all"


@dataclass(eq=False)
class _Dense:
    """A weight in full.

    Attributes:
        weight: [N, K].
        operands: it was made from, but for packed: they live as long, so that nothing else gets their addresses.
        state: of all operands at that time.
        recomputed: it is kept until its input gradient was taken.
        made: when, on the stream that made it; None where there are no streams.
        streams: that may use it.
    """

    weight: Tensor
    operands: tuple[Tensor | None, ...]
    state: tuple[Any, ...]
    recomputed: bool
    made: torch.cuda.Event | None = None
    streams: set[torch.cuda.Stream] = field(default_factory=set)


class _Account:
    """The bytes of a device."""

    def __init__(self) -> None:
        self.held = 0
        self.most = 0  # that was held
        self.ceiling = math.inf  # where memory came to an end
        self._freed: deque[int] = deque()  # entries die at any moment, in any thread

    def add(self, dense: _Dense) -> None:
        self.held += dense.weight.nbytes
        self.most = max(self.most, self.held)
        weakref.finalize(dense, self._freed.append, dense.weight.nbytes).atexit = False

    def settle(self) -> None:
        """Take off what has died."""
        while self._freed:
            self.held -= self._freed.popleft()


_lock = threading.Lock()
_weights = WeakTensorKeyDictionary()  # packed -> by dtype
_recomputed = weakref.WeakSet["_Dense"]()
_accounts: dict[torch.device, _Account] = {}
_used: _Limit | None = None


def weight(operands: Packed, dtype: torch.dtype, forward: bool, dequantize: Callable[..., Tensor]) -> Tensor | None:
    """A weight in full, kept or made now.

    Args:
        operands: of the weight, as the operators of ``nf4/ops.py`` take it, on the current device.
        dtype: float32, bfloat16 or float16.
        forward: whether it is for x W'; otherwise for an input gradient.
        dequantize: makes it of the operands and the dtype, on the current stream.

    Returns:
        dtype [N, K], to be read on the current stream; None where it is not kept.

    Raises:
        ValueError: QLORALAB_DENSE_CACHE is no number of bytes.
    """
    limit = _limit()
    if limit is None or not limit.budget or getattr(operands.packed, "is_fleeting", False):
        return None
    if operands.packed.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    with _lock:
        return _find(operands, dtype, forward, limit, dequantize)


@contextmanager
def use(budget: int, keep: Keep = "all") -> Iterator[None]:
    """Set the budget for the body, and empty the cache at its end; no effect where QLORALAB_DENSE_CACHE is set.

    It is the whole process'.

    Args:
        budget: bytes, on each device.
        keep: "used again": a weight is kept at its second product; "recomputed": what gradient checkpointing computes
            again is kept, and nothing else.

    Raises:
        ValueError: the budget is negative; or QLORALAB_DENSE_CACHE is no number of bytes.
    """
    global _used
    if budget < 0:
        raise ValueError(f"a budget is 0 bytes or more, not {budget}")
    if _asked() is not None:
        yield
        return
    before, _used = _used, _Limit(budget, keep)
    try:
        yield
    finally:
        _used = before
        clear()


def while_generating(device: torch.device) -> AbstractContextManager[None]:
    """``use`` half of what is spare on a GPU; nothing elsewhere.

    The keys and values of the tokens grow in the other half. Where the products of single tokens are fused, the prompt
    is the only two-pass product of a weight, and nothing is kept.
    """
    return use(spare(device) // 2, "used again") if device.type == "cuda" else nullcontext()


def while_recomputing(device: torch.device) -> AbstractContextManager[None]:
    """``use`` what is spare on a GPU, for what gradient checkpointing recomputes; nothing elsewhere."""
    return use(spare(device), "recomputed") if device.type == "cuda" else nullcontext()


def clear() -> None:
    """Let go of all weights."""
    with _lock:
        _weights.clear()
        _accounts.clear()


def held() -> dict[torch.device, Held]:
    """What is held, by device."""
    with _lock:
        found = dict[torch.device, Held]()
        for entries in list(_weights.values()):
            for dense in entries.values():
                weights, nbytes = found.get(dense.weight.device, (0, 0))
                found[dense.weight.device] = Held(weights + 1, nbytes + dense.weight.nbytes)
        return found


def spare(device: torch.device) -> int:
    """Bytes of a GPU that may be held: what is free, and what PyTorch has and does not use, but for `MARGIN`."""
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(free + unused - MARGIN, 0)


@functools.cache
def _asked() -> int | None:
    """The budget that was asked for, in bytes; None: none was."""
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:(|[KMGT]I?)B)?", text.upper())
    if found is None:
        raise ValueError(f"{VARIABLE} is a number of bytes, such as 2GiB, 500MB or 1000000000, or 0, not {text!r}")
    number, prefix = found[1], found[2] or " "
    return int(float(number) * (1024 if prefix.endswith("I") else 1000) ** " KMGT".index(prefix[0]))


def _limit() -> _Limit | None:
    asked = _asked()
    return _used if asked is None else _Limit(asked)


def _find(
    operands: Packed, dtype: torch.dtype, forward: bool, limit: _Limit, dequantize: Callable[..., Tensor]
) -> Tensor | None:
    packed = operands.packed
    within_backward = torch._C._current_graph_task_id() >= 0
    if _recomputed and forward and not within_backward:
        _drop_recomputed()
    entries = _weights.get(packed)
    again = entries is not None
    if entries is None:
        entries = _weights[packed] = {}
    dense = entries.get(dtype)
    if dense is None or dense.state != _state(operands):
        dense = None
        entries.pop(dtype, None)
        recomputed = forward and within_backward
        if recomputed or limit.keep == "all" or (limit.keep == "used again" and again):
            dense = _made(operands, dtype, recomputed, limit.budget, dequantize)
        if dense is None:
            return None
        entries[dtype] = dense
    _order(dense)
    if dense.recomputed and not forward:
        del entries[dtype]
    return dense.weight


def _made(
    operands: Packed, dtype: torch.dtype, recomputed: bool, budget: int, dequantize: Callable[..., Tensor]
) -> _Dense | None:
    """A new entry; None: there is no room for it."""
    device, nbytes = operands.packed.device, math.prod(operands.shape) * dtype.itemsize
    account = _accounts.setdefault(device, _Account())
    account.settle()
    total = account.held + nbytes
    if total > min(budget, account.ceiling):
        return None
    try:
        if device.type == "cuda" and total > account.most and spare(device) < nbytes:
            raise torch.OutOfMemoryError
        made = dequantize(*operands, dtype)
    except torch.OutOfMemoryError:
        account.ceiling = account.held
        return None
    dense = _Dense(made, operands.tensors[1:], _state(operands), recomputed)
    if made.is_cuda:
        stream, dense.made = torch.cuda.current_stream(device), torch.cuda.Event()
        dense.made.record(stream)
        dense.streams.add(stream)
    account.add(dense)
    if recomputed:
        _recomputed.add(dense)
    return dense


def _drop_recomputed() -> None:
    """The backward pass that they were made in is over."""
    for entries in list(_weights.values()):
        for key in [key for key, dense in entries.items() if dense.recomputed]:
            del entries[key]


def _order(dense: _Dense) -> None:
    """Let the current stream wait for the one that made a weight."""
    if dense.made is None:
        return
    stream = torch.cuda.current_stream(dense.weight.device)
    if stream not in dense.streams:
        stream.wait_event(dense.made)
        dense.weight.record_stream(stream)
        dense.streams.add(stream)


def _state(operands: Packed) -> tuple[Any, ...]:
    """What a dequantized weight depends on: where the operands are, and how often each was written to. Inference
    tensors do not count that."""
    tensors = operands.tensors
    at = [None if t is None else (t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
    return *at, tuple(operands.shape), operands.block_size
