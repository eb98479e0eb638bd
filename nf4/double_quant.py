"""Double quantization: the scales are quantized too (QLoRA, arXiv 2305.14314, section 3).

At one float32 scale per 64 weights, the scales cost 0.5 bits per weight. They are quantized in turn, to 8 bits in
blocks of 256. Scales are positive and alike, so their mean is subtracted first and the signed 8-bit map serves::

    offset     = mean(absmax)                                     float32, over the whole tensor
    absmax2[c] = max |absmax[c, :] - offset|                      float32 [ceil(blocks / 256)]
    code[c, i] = nearest((absmax[c, i] - offset) * (1 / absmax2[c]))
    absmax'    = map[code] * absmax2 + offset                     float32, two roundings: the product, then the sum

The cost falls to 8/64 + 32/(64 * 256) = 0.127 bits per weight, 4.127 with the code itself.

The steps are those of bitsandbytes. The mean is summed in float64, so that no order of summation shows in it, and the
nearest code is exact, where bitsandbytes uses a look-up table on CPUs. The weakness is shared: the offset is one for
the whole tensor, so a block whose weights are far smaller than those around it can get a scale that is wrong by a
large factor, even negative.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from .blockwise import divide, in_blocks, nearest
from .codebook import dynamic_map
from .packed import SCALES_PER_BLOCK, Packed

_MAP = dynamic_map()


def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the scales of a tensor to 8 bits.

    Args:
        absmax: float32 [blocks], finite.

    Returns:
        codes: uint8 [blocks], indices into ``dynamic_map()``.
        absmax2: float32 [ceil(blocks / 256)].
        offset: float32 [], the mean of absmax (0 when there is none).
    """
    offset = absmax.double().mean().float() if len(absmax) else absmax.new_zeros(())
    residual = in_blocks(absmax - offset, SCALES_PER_BLOCK)
    absmax2 = residual.abs().amax(dim=1)
    codes = nearest(divide(residual, absmax2[:, None]), _MAP.to(absmax.device))
    return codes.flatten()[: len(absmax)], absmax2, offset


def dequantize_scales(codes: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    """The scales that the 8-bit codes stand for, float32 [blocks]; the inverse of ``quantize_scales``."""
    values = _MAP.to(codes.device).index_select(0, codes.int())
    blocks = pad(values, (0, -len(codes) % SCALES_PER_BLOCK)).view(len(absmax2), SCALES_PER_BLOCK)
    return ((blocks * absmax2[:, None]).flatten() + offset)[: len(codes)]


def absmax(weight: Packed) -> Tensor:
    """The scales of a weight, decoded where they are quantized: float32 [blocks]."""
    if weight.absmax2 is None or weight.offset is None:
        return weight.scales
    return dequantize_scales(weight.scales, weight.absmax2, weight.offset)
