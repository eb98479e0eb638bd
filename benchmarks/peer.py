"""bitsandbytes, as the benchmarks use it: its functions, and its parameter and layer around a weight of ours."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch

import qloralab as ql

# When imported it asks for Hugging Face's package `kernels`, to fetch a binary; it is measured as it is installed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from bitsandbytes.autograd._functions import matmul_4bit  # noqa: E402
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16, quantize_4bit  # noqa: E402
from bitsandbytes.nn.modules import Linear4bit, Params4bit  # noqa: E402

__all__ = ["Linear4bit", "dequantize_4bit", "has_avx512bf16", "layer", "matmul_4bit", "parameter", "quantize_4bit"]


def parameter(weight: ql.QuantizedTensor, dtype: torch.dtype = torch.bfloat16, module: Any = None) -> Params4bit:
    """A parameter with copies of the codes and scales of a weight, on its device, that dequantizes to a dtype."""
    copy = dataclasses.replace(weight.clone(), dtype=dtype)
    tensors: dict[str, Any] = copy.to_bitsandbytes("weight")
    data = tensors.pop("weight")
    stats = {name.removeprefix("weight."): part for name, part in tensors.items()}
    return Params4bit.from_prequantized(data, stats, device=str(weight.device), module=module)


def layer(weight: ql.QuantizedTensor, dtype: torch.dtype = torch.bfloat16) -> Linear4bit:
    """A ``Linear4bit`` of its own with the codes and scales of a weight [N, K], that computes in a dtype."""
    N, K = weight.shape
    with torch.device("meta"):  # its weight is replaced
        made = Linear4bit(K, N, bias=False, compute_dtype=dtype, quant_type=weight.codebook)
    made.weight = parameter(weight, dtype, made)
    return made
