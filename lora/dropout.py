"""Dropout that draws one random number per dropped element, not per element.

Whether element i of n is dropped is a coin of probability p. The distances between dropped elements are then
geometric::

    P(distance > d) = (1 - p)**d        distance = 1 + floor(log(1 - u) / log(1 - p)),  u uniform in [0, 1)

so n coins come from about ``n * p`` uniform numbers. At p = 0.05 that is 20 times fewer, and a CPU draws them one
after the other: on one, ``torch.nn.functional.dropout`` of bfloat16 takes longer than the matrix product it stands
before. The positions, 4 bytes for each dropped element, also stand for the mask in backward.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def draw_positions(numel: int, p: float, device: torch.device) -> Tensor:
    """Positions to drop among ``numel`` elements, each with probability p, from the default generator of the device.

    Returns:
        int64 [k], ascending. Those past the end are ``numel``: their number depends on the draw, and a shape must not.
    """
    # The sum of k distances falls short of numel with a probability below 1e-14.
    k = math.ceil(numel * p + 8 * math.sqrt(numel * p) + 32)
    u = torch.rand(k, dtype=torch.float32, device=device)
    distance = torch.log1p(u.neg_()).div_(math.log1p(-p)).floor_().clamp_(max=float(numel))
    return distance.long().add_(1).cumsum(0).sub_(1).clamp_(max=numel)


def drop(x: Tensor, positions: Tensor, p: float) -> Tensor:
    """A copy of x with the elements at ``positions`` zeroed and the others divided by 1 - p.

    Args:
        x: floating point, any shape.
        positions: int64 [k], indices into the flattened x, or its numel.
        p: the probability the positions were drawn with.

    Returns:
        the dtype and shape of x.
    """
    padded = x.new_empty(x.numel() + 1)  # the last element takes the positions past the end
    out = padded[:-1].view(x.shape)
    torch.mul(x, 1 / (1 - p), out=out)
    padded.index_fill_(0, positions, 0)
    return out
