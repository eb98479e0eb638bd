"""The AdamW update with moments of 8 bits (Dettmers et al., arXiv 2110.02861), in place.

A moment is kept as ``map[code] * absmax``: a code of 8 bits for each element, and a float32 scale for 256 of them. m
has the signed dynamic map, v the unsigned one (``nf4/codebook.py``). That is 2.03 bytes for an element, where float32
moments take 8. An update is that of ``adamw.py`` between two conversions::

    m, v      = map[code] * absmax                               float32, one rounding
    p, m, v  <- the formula of adamw.py, rounded to float32 after each operation
    absmax[b] = max |m[b, :]|                                    the same for v
    code[b, i] = nearest(m[b, i] * (1 / absmax[b]))

p is updated with the new m and v as they are before they become codes. Ties, scales whose reciprocal is no normal
float32, and blocks of zeros follow the policy of ``nf4/blockwise.py``. A block with absmax 0 decodes to 0 whatever its
codes are, so moments begin as zeros throughout.

A segment begins with a block, and its last block may be short: a parameter may be cut at multiples of 256. All
implementations have the same bits.

**NaN and infinity** in a gradient show in p of that element at once. They also show in the scale, of which 256 elements
have one: from the next update on, m and v of the whole block are NaN or infinite, and so is p.

**bitsandbytes** has the same maps, blocks and scales, and differs in this:

* Its CUDA kernel multiplies by ``1 - lr * weight_decay`` after the update, its CPU path and this before.
* Where the nearest code of m has the other sign than m, or is 0, it takes the next code on the side of m. Here a small
  m may become 0.
* Its division and powers are approximate on GPUs, and it rounds p to the parameter's dtype twice.
* It keeps parameters with less than 4,096 elements in 32 bits. Here that is the optimizer's choice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.functional import pad

from qloralab.nf4.blockwise import divide, in_blocks, nearest
from qloralab.nf4.codebook import dynamic_map, thresholds

from .adamw import Rates, adamw_rounded_, check_segments, fast_update

BLOCK_SIZE = 256


def adamw_8bit_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    absmaxes: Sequence[Tensor],
    absmax_sqs: Sequence[Tensor],
    steps: Sequence[int],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Update the segments of a chunk and their moments, in place.

    All tensors are contiguous, of one dimension, and on one device. Entry i of each list belongs to segment i, of any
    length n. No two segments overlap, and each begins a block.

    Args:
        params: p, float32, bfloat16 or float16 [n].
        grads: g, the dtype of p [n].
        exp_avgs, exp_avg_sqs: the codes of m and v, uint8 [n].
        absmaxes, absmax_sqs: their scales, float32 [ceil(n / 256)]; zeros before the first update.
        steps: the number of this update of the segment, from 1.
        lr, beta1, beta2, eps, weight_decay: as in ``torch.optim.AdamW``.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a tensor is not contiguous, not of one dimension, not of the length above or not on the device of
            the first one; a step is below 1; or the lists differ in length.
        BuildError: QLORALAB_CPU=native, and the C does not compile here.
        NotServedError: QLORALAB_GPU=triton, and the kernel does not serve.
    """
    states = {
        "exp_avgs": (exp_avgs, torch.uint8, 1),
        "exp_avg_sqs": (exp_avg_sqs, torch.uint8, 1),
        "absmaxes": (absmaxes, torch.float32, BLOCK_SIZE),
        "absmax_sqs": (absmax_sqs, torch.float32, BLOCK_SIZE),
    }
    check_segments(params, grads, steps, states)
    rates = Rates(lr, beta1, beta2, eps, weight_decay)
    adamw_8bit_unchecked_(params, grads, exp_avgs, exp_avg_sqs, absmaxes, absmax_sqs, steps, rates)


def adamw_8bit_unchecked_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    absmaxes: Sequence[Tensor],
    absmax_sqs: Sequence[Tensor],
    steps: Sequence[int],
    rates: Rates,
) -> None:
    """`adamw_8bit_` for a caller that has made sure of everything: what does not fit together is memory that is lost.

    Raises:
        BuildError, NotServedError: as for `adamw_8bit_`.
    """
    update = fast_update("adamw_8bit", params[0].device) if params else None
    if update is None:
        adamw_8bit_reference_(params, grads, exp_avgs, exp_avg_sqs, absmaxes, absmax_sqs, steps, rates)
    else:
        update(params, grads, exp_avgs, exp_avg_sqs, absmaxes, absmax_sqs, steps, rates)
        increment_version(params)


@torch.no_grad()
def adamw_8bit_reference_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    absmaxes: Sequence[Tensor],
    absmax_sqs: Sequence[Tensor],
    steps: Sequence[int],
    rates: Rates,
) -> None:
    """The same in plain PyTorch, on any device: the definition."""
    segments = zip(params, grads, exp_avgs, exp_avg_sqs, absmaxes, absmax_sqs, steps, strict=True)
    for param, grad, m_codes, v_codes, m_absmax, v_absmax, step in segments:
        m = dequantize_moment(m_codes, m_absmax, signed=True)
        v = dequantize_moment(v_codes, v_absmax, signed=False)
        adamw_rounded_(param, grad, m, v, step, rates)
        for moment, codes, absmax, signed in ((m, m_codes, m_absmax, True), (v, v_codes, v_absmax, False)):
            new_codes, new_absmax = quantize_moment(moment, signed)
            codes.copy_(new_codes)
            absmax.copy_(new_absmax)


def quantize_moment(moment: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The codes and scales of a moment.

    Args:
        moment: float32 [n].
        signed: True for m, False for v.

    Returns:
        codes: uint8 [n], indices into ``dynamic_map(signed)``.
        absmax: float32 [ceil(n / 256)].
    """
    blocks = in_blocks(moment, BLOCK_SIZE)
    absmax = blocks.abs().amax(dim=1)
    codes = nearest(divide(blocks, absmax[:, None]), dynamic_map(signed).to(moment.device))
    return codes.flatten()[: len(moment)], absmax


def dequantize_moment(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The moment that codes and scales stand for; the arguments are the results of `quantize_moment`.

    Returns:
        float32 [n].
    """
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
