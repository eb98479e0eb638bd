"""Moments in 8 bits (Dettmers et al., arXiv 2110.02861): a code for each element, and a float32 scale for 256 of them.

A moment is ``map[code] * absmax``, with the signed or the unsigned dynamic map (``nf4/codebook.py``): 2.03 bytes for an
element of AdamW, where float32 moments take 8. An update is that of 32 bits between two conversions::

    m        = map[code] * absmax                               float32, one rounding
    p, m    <- the formula of the rule, rounded to float32 after each operation
    absmax[b] = max |m[b, :]|
    code[b, i] = nearest(m[b, i] * (1 / absmax[b]))

p is updated with the new moments as they are before they become codes. Ties, scales whose reciprocal is no normal
float32, and blocks of zeros follow the policy of ``nf4/blockwise.py``. A block with absmax 0 decodes to 0 whatever its
codes are, so moments begin as zeros throughout. A segment begins with a block, and its last block may be short. All
implementations have the same bits.

**NaN and infinity** in a gradient show in p of that element at once. They also show in the scale, of which 256 elements
have one: from the next update on, the moments of the whole block are NaN or infinite, and so is p of AdamW.

**bitsandbytes** has the same maps, blocks and scales, and differs in this:

* Its CUDA kernel of AdamW multiplies by ``1 - lr * weight_decay`` after the update, its CPU path and this before.
* Where the nearest code of m has the other sign than m, or is 0, it takes the next code on the side of m. Here a small
  m may become 0.
* Its division and powers are approximate on GPUs, and it rounds p to the parameter's dtype twice.
* It keeps parameters with less than 4,096 elements in 32 bits. Here that is the optimizer's choice.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from qloralab.nf4.blockwise import divide, in_blocks, nearest
from qloralab.nf4.codebook import dynamic_map, thresholds

BLOCK_SIZE = 256


def quantize_moment(moment: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The codes, uint8 [n], and scales, float32 [ceil(n / 256)], of a moment, float32 [n]."""
    blocks = in_blocks(moment, BLOCK_SIZE)
    absmax = blocks.abs().amax(dim=1)
    codes = nearest(divide(blocks, absmax[:, None]), dynamic_map(signed).to(moment.device))
    return codes.flatten()[: len(moment)], absmax


def dequantize_moment(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The moment, float32 [n], that the results of `quantize_moment` stand for."""
    values = dynamic_map(signed).to(codes.device).index_select(0, codes.int())
    return (in_blocks(values, BLOCK_SIZE) * absmax[:, None]).flatten()[: len(codes)]


@functools.cache
def moment_tables() -> tuple[Tensor, Tensor, Tensor]:
    """The tables with which C and Triton convert moments: row 0 for the signed map, row 1 for the unsigned one.

    The code of a number q is how many of the 255 thresholds are below it. The first bits of a float32 (for the signed
    map, the sign, the exponent and 6 bits of the mantissa; for the unsigned one, the exponent and 7 bits) tell it but
    for one threshold: no two thresholds are so close that they part numbers with these bits in common. So a table of
    2**15 entries says how many thresholds are certainly below, and one comparison with the next one decides. Only the
    exponents from -22 to 0 have thresholds, so moments in use touch 3 KB of the table.

    Returns:
        values: float32 [2, 256], the maps.
        thresholds: float32 [2, 256]; the last is infinity.
        below: uint8 [2, 2**15], by the bits of q without the last 17, or 16, and the sign of the unsigned: how many
            thresholds are below all such q. NaN is above all.
    """
    maps = [dynamic_map(signed) for signed in (True, False)]
    limits = [pad(thresholds(values), (0, 1), value=math.inf) for values in maps]
    below = []
    for shift, some in zip((17, 16), limits, strict=True):
        first = torch.arange(2**15, device="cpu")
        ends = torch.stack([first << shift, (first + 1 << shift) - 1])
        numbers = ends.to(torch.int32).view(torch.float32)  # the smallest and the largest magnitude
        below.append(torch.bucketize(numbers.amin(dim=0), some).masked_fill(numbers.isnan().any(dim=0), 255))
    return torch.stack(maps), torch.stack(limits), torch.stack(below).to(torch.uint8)
