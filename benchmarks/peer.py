"""bitsandbytes, as the benchmarks use it: its functions, and its layer around a weight of ours."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch

import qloralab as ql

# When imported it asks for Hugging Face's package `kernels`, to fetch a binary; it is measured as it is installed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from bitsandbytes.functional import dequantize_4bit, has_avx512bf16, quantize_4bit  # noqa: E402
from bitsandbytes.nn.modules import Linear4bit, Params4bit  # noqa: E402

__all__ = ["Linear4bit", "dequantize_4bit", "has_avx512bf16", "layer", "quantize_4bit"]


def layer(weight: ql.QuantizedTensor, dtype: torch.dtype = torch.bfloat16) -> Linear4bit:
    """A ``Linear4bit`` of its own with the codes and scales of a weight.

    Args:
        weight: [N, K], on the CPU.
        dtype: to compute in, and to dequantize to.
    """
    N, K = weight.shape
    with torch.device("meta"):  # its weight is replaced
        made = Linear4bit(K, N, bias=False, compute_dtype=dtype, quant_type=weight.codebook)
    copy = dataclasses.replace(weight.map(torch.clone), dtype=dtype)
    tensors: dict[str, Any] = copy.to_bitsandbytes("weight")
    data = tensors.pop("weight")
    stats = {name.removeprefix("weight."): part for name, part in tensors.items()}
    made.weight = Params4bit.from_prequantized(data, stats, device="cpu", module=made)
    return made
