"""bitsandbytes as the comparison uses it, and the oracle that says who is right where the two differ.

**What is called.** The functions ``quantize_4bit``, ``dequantize_4bit`` and ``matmul_4bit``, the last with an input
that requires a gradient: the path of training. An evaluation-mode forward of its ``Linear4bit`` is never run. On
processors with AVX512-BF16 it repacks the weight in place, and what ``dequantize_4bit`` reads afterwards is not the
weight. A ``Linear4bit`` serves here to write a state dict, and is not called.

**The oracle** knows neither library. It takes codes, scales and codebook as numbers and multiplies in float64, where
the product of two float32 numbers is exact; one rounding to float32 and one to the dtype of the weight follow. Those
are the roundings that both libraries document.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError

PACKAGE = "bitsandbytes"


@cache
def functional() -> Any:
    """The module ``bitsandbytes.functional``.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    return _imported("functional")


def _imported(module: str) -> Any:
    if importlib.util.find_spec(PACKAGE) is None:
        raise UserError(f"bitsandbytes is not installed; bring it with `pip install '{PACKAGE}>=0.49'`")
    # When imported it asks for Hugging Face's package `kernels`, to fetch a binary; it is compared as it is installed.
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    return importlib.import_module(f"{PACKAGE}.{module}")


def quantize(weight: Tensor, codebook: str, block_size: int, double_quant: bool = False) -> tuple[Tensor, Any]:
    """The packed codes and the ``QuantState`` that bitsandbytes makes of a weight."""
    return functional().quantize_4bit(
        weight, blocksize=block_size, quant_type=codebook, compress_statistics=double_quant
    )


def nested(state: Any) -> Any:
    """The state with its scales quantized too, as bitsandbytes does it: a ``QuantState`` like that of ``quantize``.

    Its own function quantizes them; to call ``quantize`` again would double the time of a comparison.
    """
    offset = state.absmax.mean()
    codes, second = functional().quantize_blockwise(state.absmax - offset, blocksize=256)
    return functional().QuantState(
        absmax=codes,
        shape=state.shape,
        dtype=state.dtype,
        blocksize=state.blocksize,
        code=state.code,
        quant_type=state.quant_type,
        offset=offset,
        state2=second,
    )


def dequantize(packed: Tensor, state: Any) -> Tensor:
    """The weight that bitsandbytes reads from codes and state, in the dtype of the state, whatever shape it gives."""
    return functional().dequantize_4bit(packed, state)


def product(x: Tensor, packed: Tensor, state: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    """x W' and grad W, as bitsandbytes computes them in training.

    Args:
        x: [tokens, K].
        packed, state: a weight [N, K].
        grad: of the output, [tokens, N], the dtype of x.
    """
    x = x.detach().clone().requires_grad_()
    y = _imported("autograd._functions").matmul_4bit(x, packed, quant_state=state)
    y.backward(grad)
    assert x.grad is not None
    return y.detach(), x.grad


def tensors(packed: Tensor, state: Any, prefix: str = "weight") -> dict[str, Tensor]:
    """What bitsandbytes writes for a weight, by name."""
    parts = state.as_dict(packed=True)
    return {prefix: packed} | {f"{prefix}.{name}": part for name, part in parts.items()}


def state_dict(weight: Tensor, codebook: str, double_quant: bool, storage: torch.dtype) -> dict[str, Tensor]:
    """The state dict of a ``Linear4bit`` that holds a weight [N, K] and a bias."""
    modules = _imported("nn.modules")
    N, K = weight.shape
    with torch.device("meta"):  # its weight is replaced
        layer = modules.Linear4bit(K, N, compress_statistics=double_quant, quant_type=codebook, quant_storage=storage)
    layer.weight = modules.Params4bit(
        weight.clone(),
        requires_grad=False,
        compress_statistics=double_quant,
        quant_type=codebook,
        quant_storage=storage,
        module=layer,
    ).to("cpu")
    layer.bias = nn.Parameter(torch.arange(N, dtype=weight.dtype), requires_grad=False)
    return layer.state_dict()


def oracle(packed: Tensor, absmax: Tensor, values: Tensor, block_size: int, shape: torch.Size, dtype: torch.dtype):
    """The weight that codes and scales stand for, by float64 arithmetic.

    Args:
        packed: uint8 [(numel + 1) // 2, 1], two codes a byte, the first in the high nibble.
        absmax: float32 [blocks].
        values: the codebook, float32 [16], in the order of the codes.
        block_size: consecutive weights that share a scale.
        shape, dtype: of the weight.

    Returns:
        dtype, shape.
    """
    numel = shape.numel()
    bytes_ = packed.numpy().reshape(-1)
    codes = np.stack([bytes_ >> 4, bytes_ & 15], axis=1).reshape(-1)[:numel]
    exact = values.numpy().astype(np.float64)[codes]
    exact *= np.repeat(absmax.numpy().astype(np.float64), block_size)[:numel]
    exact += 0.0  # a zero is +0.0, under a negative scale too
    with np.errstate(over="ignore"):
        rounded = exact.astype(np.float32)
    return torch.from_numpy(rounded).to(dtype).view(shape)
