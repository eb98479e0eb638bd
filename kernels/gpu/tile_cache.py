"""The fused products behind the operators: a weight is converted to tiles once, at its first product.

The operators take a weight in the canonical layout; ``linear.py`` and ``linear_grad_input.py`` read it in tiles
(``packing.py``). The tiles of a weight are kept as long as its ``packed`` tensor lives, 4.75 bits a weight beside the
4.13 of the canonical layout, which files, merging and the two-pass product still need. They are made again when
``packed`` was written to.

A product that ``choice.py`` wants fused is fused where x is bfloat16, both kernels have passed their check on the
device (``self_check.py``), and the weight can be tiled: K and the block size are multiples of 64, and the codebook has
16 values that ``lookup.py`` can order. All of that holds for both directions of a layer or for none. A weight that is
whole for the time of a product only (``nf4/sharded.py``) has no tiles, which would keep all of it.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qloralab.nf4.packed import Packed

from . import choice, packing, self_check
from .adapter_operands import LowRank, MaskedLowRank
from .linear import linear as _linear
from .linear_grad_input import linear_grad_input as _linear_grad_input

_lock = threading.Lock()
_tiles = WeakTensorKeyDictionary()  # packed -> (its version, TiledWeight, or None where it cannot be tiled)


def linear(x: Tensor, operands: Packed, bias: Tensor | None, adapter: LowRank | None = None) -> Tensor | None:
    """``linear.linear`` of x [..., K] and W as the operators of ``nf4/ops.py`` take it; or None: it is two-pass."""
    weight = _weight(x, operands)
    return None if weight is None else _linear(x, weight, bias, adapter=adapter)


def linear_grad_input(grad: Tensor, operands: Packed, adapter: MaskedLowRank | None = None) -> Tensor | None:
    """``linear_grad_input.linear_grad_input`` of grad [..., N], likewise."""
    weight = _weight(grad, operands)
    return None if weight is None else _linear_grad_input(grad, weight, adapter=adapter)


def tiles(operands: Packed) -> packing.TiledWeight | None:
    """The tiles of a weight, made at the first request; None where it cannot be tiled."""
    packed, *_, values, shape, block_size = operands
    with _lock:
        found = _tiles.get(packed)
        if found is None or found[0] != _version(packed):
            fits = packing.why_not(values, shape, block_size) is None
            found = _version(packed), packing.tile(*operands) if fits else None
            _tiles[packed] = found
        return found[1]


def _weight(x: Tensor, operands: Packed) -> packing.TiledWeight | None:
    (N, K), packed, M = operands.shape, operands.packed, math.prod(x.shape[:-1])
    if getattr(packed, "is_fleeting", False):
        return None
    if x.dtype != torch.bfloat16 or choice.decide(N, K, M, choice.device(x.device)).kernel != "fused":
        return None
    if x.is_cuda and torch.cuda.is_current_stream_capturing() and packed not in _tiles:
        return None  # converting and checking wait for the device
    for name in ("linear", "linear_grad_input"):
        if why := self_check.reason(name, x.device):
            self_check.warn_once(name, why, "Its products are two-pass: dequantized, then multiplied by cuBLAS.")
            return None
    return tiles(operands)


def _version(packed: Tensor) -> int:
    """How often a tensor was written to; inference tensors do not count."""
    return 0 if packed.is_inference() else packed._version
