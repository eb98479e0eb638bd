"""The two-pass product: dequantize the weight into a workspace, then multiply by cuBLAS. Forward and input gradient.

For a weight [N, K] and M tokens the first pass moves 2.52 bytes a weight (0.52 read, 2 written, in bfloat16) and the
second is the product that an unquantized layer has. The price over that layer is the first pass: 335/M of the product
on an H100 (``choice.py``), 8 % at 4,096 tokens, and all of the time at 16. Both directions multiply by the same bits,
which are the definition's (``nf4/ops.py``), so the gradient is exactly that of the forward that ran.

**An adapter** adds h B' to y, and keep∘(G A) to dx. Here the result starts as that term, which one small product
writes, and cuBLAS adds the large one to it (beta = 1), so nothing passes over the result once the product is there. In
bfloat16, a start writes 2 M N bytes, and the product reads them in its epilogue, beneath its arithmetic; a sum
afterwards reads 2 M N and writes 2 M N more, with nothing to hide them.

The alternative is one product of augmented operands, y = [x, h] [W, B]'. What dequantizes W could write it with the
columns of B beside it, but what writes x, the layer before, leaves no room for h: x would be copied, 2 M K bytes read
and 2 M K written, all of it before the product begins. That is twice what a start costs where N = K, 22 instead of 11
microseconds at 3.0 TB/s for 4,096 tokens and 4096 x 4096. It would pay where N > 2 K. And with dropout it does not
exist for dx: the mask is on G A alone, not on the sum.

The start is rounded to the dtype of x, as the definition rounds each of its two terms.

**The workspace** is one buffer for each device and dtype, as large as the largest weight that was multiplied. The next
product writes over it: a model pays for one dequantized weight, whatever the number and shapes of its layers, at an
address that stays, and nothing fragments the allocator's memory between layers.

**Streams.** The buffer is held by one product at a time.

* On one stream, kernels run in the order of their launches: the next dequantization waits for the product before it.
* On another stream than the last, the new stream first waits for all that the last one has been given.
* Threads that launch at once take turns: a lock is held from the first launch of a product to its last. It is held for
  the launches, not for their execution; nothing waits for the device.
* Every stream that uses the buffer is made known to the allocator, so that memory given back is not handed out while a
  stream still works on it.
* A CUDA graph replays the addresses of its capture, on a stream of the caller's choice and behind the back of all this.
  While one is captured, a buffer of the graph's own memory is used instead.

**The first pass is left out** for a weight that ``dense_cache.py`` holds in full; without a budget it holds none.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from qloralab.nf4.packed import Packed
from qloralab.nf4.product import reshaped

from . import dense_cache
from .adapter import masked_low_rank
from .adapter_operands import LowRank, MaskedLowRank
from .dequantize import dequantize


def linear(x: Tensor, operands: Packed, bias: Tensor | None = None, adapter: LowRank | None = None) -> Tensor:
    """x W' + bias, plus h B' of an adapter.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        operands: W, as the operators of ``nf4/ops.py`` take it: packed, scales, absmax2, offset, values, (N, K),
            block_size.
        bias: the dtype of x, [N], or None.
        adapter: what y starts as, or None.

    Returns:
        the dtype of x, [..., N].
    """
    if adapter is None:
        with _dequantized(operands, x, forward=True) as W:
            return reshaped(F.linear(x, W, bias), (*x.shape[:-1], len(W)))
    y = F.linear(adapter.h, adapter.B.to(x.dtype), bias)  # [tokens, N]
    with _dequantized(operands, x, forward=True) as W:
        y.addmm_(_rows(x), W.T)
    return reshaped(y, (*x.shape[:-1], y.shape[1]))


def linear_grad_input(grad: Tensor, operands: Packed, adapter: MaskedLowRank | None = None) -> Tensor:
    """grad W, plus keep∘(G A) of an adapter, which dx starts as: the dtype of grad [..., N], [..., K]."""
    if adapter is None:
        with _dequantized(operands, grad, forward=False) as W:
            return grad @ W
    dx = masked_low_rank(adapter.G, adapter.A, adapter.seed, adapter.p)  # [tokens, K]
    with _dequantized(operands, grad, forward=False) as W:
        dx.addmm_(_rows(grad), W)
    return reshaped(dx, (*grad.shape[:-1], dx.shape[1]))


class Workspace:
    """One buffer, on a device and of a dtype, that products take in turns."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self._lock = threading.Lock()
        self._buffer: Tensor | None = None
        self._last: torch.cuda.Stream | None = None  # the stream that used the buffer last

    @contextmanager
    def borrow(self, numel: int) -> Iterator[Tensor]:
        """The buffer's first ``numel`` elements, flat; inside the body it is the caller's, on the current stream."""
        with self._lock:
            if self._buffer is None or self._buffer.numel() < numel:
                self._buffer = self._last = None  # the old one goes first: both at once may not fit
                self._buffer = torch.empty(numel, dtype=self.dtype, device=self.device)
            self._order(self._buffer)
            yield self._buffer[:numel]

    def _order(self, buffer: Tensor) -> None:
        """Let the current stream wait for the last one."""
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.device)
        if stream == self._last:
            return
        if self._last is not None:
            stream.wait_stream(self._last)
        buffer.record_stream(stream)
        self._last = stream


_workspaces: dict[tuple[torch.device, torch.dtype], Workspace] = {}


@contextmanager
def _dequantized(operands: Packed, like: Tensor, forward: bool) -> Iterator[Tensor]:
    """The weight in the dtype of a tensor, [N, K], for the length of the body."""
    kept = dense_cache.weight(operands, like.dtype, forward, dequantize)
    if kept is not None:
        yield kept
        return
    shape = operands[5]
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        yield dequantize(*operands, like.dtype)
        return
    key = like.device, like.dtype
    workspace = _workspaces.get(key) or _workspaces.setdefault(key, Workspace(*key))  # atomic: threads get the same one
    with workspace.borrow(math.prod(shape)) as buffer:
        yield dequantize(*operands, like.dtype, out=buffer.view(tuple(shape)))


def _rows(x: Tensor) -> Tensor:
    """[..., K] -> [tokens, K]."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
