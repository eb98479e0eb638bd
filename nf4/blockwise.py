"""Blockwise quantization: the definition, in plain PyTorch, float32.

The weights are flattened in row-major order and cut into blocks of ``block_size`` consecutive elements; a block may
cross rows, and the last one may be short. Each block keeps one float32 scale, the largest magnitude in it, and each
weight becomes the index of the codebook value nearest to ``weight / scale``::

    absmax[b] = max |w[b, :]|                                    float32 [blocks]
    code[b, i] = nearest(w[b, i] * (1 / absmax[b]))              4 bits
    w'[b, i]  = values[code[b, i]] * absmax[b]                   float32, then one rounding to the output's dtype

Two 4-bit codes share a byte, the first of them in the high nibble. An odd count is completed by the code of 0. Codes of
any other width take a byte each.

Every implementation of these operations follows the same policy, bit for bit:

* A number on a threshold (the float32 midpoint of two values) goes to the lower value.
* The quotient is the product with the float32 reciprocal, as in bitsandbytes; where the scale or its reciprocal is no
  normal float32 (below 2**-126, above 2**126) it is the true quotient.
* A block of zeros has scale 0 and the code of 0 throughout, and dequantizes to +0.0.
* NaN and infinity are refused.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .codebook import decision_table

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny  # 2**-126


def quantize_blockwise(weight: Tensor, values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize a tensor to a codebook.

    Args:
        weight: float32, bfloat16 or float16, any shape, finite (the caller checks: a NaN or infinite scale tells).
        values: the codebook, float32 [2**bits].
        block_size: elements that share a scale.

    Returns:
        packed: uint8 [(numel + 1) // 2, 1], two codes a byte, the first in the high nibble; [numel, 1] where a code has
            other than 4 bits.
        absmax: float32 [blocks], the scale of each block.
    """
    blocks = in_blocks(weight.float().flatten(), block_size)  # [blocks, block_size]
    absmax = blocks.abs().amax(dim=1)
    codes = nearest(divide(blocks, absmax[:, None]), values).flatten()[: weight.numel()]
    return (pack(codes, values) if is_packed(values) else codes[:, None]), absmax


def dequantize_blockwise(packed: Tensor, absmax: Tensor, values: Tensor, block_size: int, numel: int) -> Tensor:
    """The float32 weights that the codes and scales stand for.

    Args:
        packed, absmax, block_size: as for ``quantize_blockwise``.
        values: the codebook, float32 [2**bits]; or [rows, 2**bits], one for each row of the weight.
        numel: how many weights there are.

    Returns:
        float32 [numel].
    """
    if values.dim() == 2:  # a codebook for each row
        codes = unpack(packed, numel) if is_packed(values) else packed.flatten()
        weights = values.gather(1, codes.view(len(values), -1).long()).flatten()
        return (in_blocks(weights, block_size) * absmax[:, None]).add_(0.0).flatten()[:numel]
    per_byte = 2 if is_packed(values) else 1
    bytes_ = pad(packed.flatten(), (0, len(absmax) * block_size // per_byte - len(packed)))
    if is_packed(values):
        pairs = torch.cartesian_prod(values, values)  # [256, 2]: a byte, as the values of its high and its low nibble
        both = pairs.view(torch.int64).flatten()  # moved as one 8-byte word
        weights = both.index_select(0, bytes_.int()).view(torch.float32)
    else:
        weights = values.index_select(0, bytes_.int())
    # Adding 0 turns -0.0 into +0.0: a decoded second-level scale can be negative where the true one is 0.
    return weights.view(len(absmax), block_size).mul_(absmax[:, None]).add_(0.0).flatten()[:numel]


def nearest(x: Tensor, values: Tensor) -> Tensor:
    """The code of the nearest value of a codebook, uint8 in the shape of x; of two equally near ones the lower."""
    thresholds, codes = decision_table(values)
    below = torch.bucketize(x, thresholds, out_int32=True)
    return codes.index_select(0, below.flatten()).view(x.shape)


def is_packed(values: Tensor) -> bool:
    """Whether the codes of a codebook lie two to a byte: those of 4 bits do."""
    return values.shape[-1] == 16


def packed_bytes(numel: int, values: Tensor) -> int:
    """How many bytes the codes of numel weights take."""
    return (numel + 1) // 2 if is_packed(values) else numel


def pack(codes: Tensor, values: Tensor) -> Tensor:
    """Pack 4-bit codes, uint8 [n], into bytes, uint8 [(n + 1) // 2, 1]; the first of two goes into the high nibble."""
    if len(codes) % 2:
        codes = torch.cat([codes, nearest(values.new_zeros(1), values[-1] if values.dim() == 2 else values)])
    high, low = codes.view(-1, 2).unbind(1)
    return (high << 4 | low)[:, None]


def unpack(packed: Tensor, numel: int) -> Tensor:
    """The inverse of ``pack``: uint8 [(numel + 1) // 2, 1] -> uint8 [numel]."""
    packed = packed.flatten()
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:numel]


def in_blocks(x: Tensor, block_size: int) -> Tensor:
    """[n] -> [blocks, block_size]; zeros complete the last block, and change neither its scale nor its codes."""
    return pad(x, (0, -len(x) % block_size)).view(-(-len(x) // block_size), block_size)


def divide(x: Tensor, absmax: Tensor) -> Tensor:
    """x / absmax as the policy above has it: by the reciprocal where that is normal, 0 where absmax is 0."""
    reciprocal = 1 / absmax
    exact = (absmax.abs() < _SMALLEST_NORMAL) | (reciprocal.abs() < _SMALLEST_NORMAL)  # signed scales: data_type.py
    quotient = torch.where(exact, x / absmax, x * reciprocal)
    return quotient.masked_fill_(absmax == 0, 0.0)
