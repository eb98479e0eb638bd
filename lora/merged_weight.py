"""The weight that base and adapter make together: ``W' + scaling * B A``, dense or quantized again."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from qloralab.nf4.product import addmm
from qloralab.nf4.tensor import QuantizedTensor, quantize


def merged_weight(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """W + scaling * B A in float32.

    Args:
        weight: [out, in], any floating-point dtype.
        A, B: [r, in] and [out, r].
        scaling: of their product.

    Returns:
        float32 [out, in], in memory of its own. Bits may differ between machines, as those of any product do.
    """
    return addmm(weight.float(), B.float(), A.float(), alpha=scaling)


def merged_quantized(
    base: QuantizedTensor, A: Tensor, B: Tensor, scaling: float, onto: Tensor | None = None
) -> QuantizedTensor:
    """The merged weight, quantized again as the base is: codebook, block size, double quantization.

    Where B is zero it is the base itself: double quantization takes the mean of the scales, and that of decoded scales
    is another one, so that ``quantize(base.dequantize())`` has the codes of the base and other scales.

    Args:
        base: [out, in], as ``quantize`` makes it with the name of a codebook.
        A, B: [r, in] and [out, r].
        scaling: of their product.
        onto: what the update is added to, [out, in]; by default what the base dequantizes to.

    Returns:
        [out, in], on the device of the base; said to come from the dtype that the base says.
    """
    if not B.any():
        return base
    merged = merged_weight(base.dequantize(torch.float32) if onto is None else onto, A, B, scaling)
    made = quantize(merged, base.codebook, base.block_size, base.double_quant, name="the merged weight")
    return dataclasses.replace(made, dtype=base.dtype)
