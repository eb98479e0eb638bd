"""Who does the work in ``gpu.py``.

===============  ====================================================================================================
ours             nf4's operators as they are registered for CUDA, held to the two-pass product
ours, fused      the fused kernels, in Triton
ours, few        the same for 1 to 16 tokens, in CUDA C++
bf16             the weight in bfloat16: cuBLAS; beside dequantize, a copy of the weight
bitsandbytes     ``quantize_4bit``, ``dequantize_4bit``, ``matmul_4bit`` without a gradient; for the input gradient what
                 the backward of its ``MatMul4Bit`` does, ``dequantize_4bit`` and a product
unsloth          ``fast_dequantize``; ``fast_gemv`` for one row, otherwise ``fast_dequantize`` and a product, as its
                 ``fast_linear_forward`` has it. It launches on the stream that was current when it was imported, so it
                 is not captured
===============  ====================================================================================================

An adapted layer is `LoRALinear`, bitsandbytes' layer with PEFT's around it, and for bf16 the layer without an adapter,
its input gradient included: what QLoRA adds to a frozen layer. It goes backward through autograd. Other gradients are
called as functions. All hold the same codes and scales. With dropout PEFT takes no part: it draws a mask of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qloralab as ql
from qloralab.kernels.gpu import choice

from .case import BLOCK_SIZE, OPERATIONS, SCALING, Case
from .clock import Run
from .provider import Provider, adapted_layer, both_ways

ONCE = 0.003  # rounding the output to bfloat16 makes 0.0017; cuBLAS may add partial sums in bfloat16
FUSED = 0.005  # the weights, too, are rounded to bfloat16 once more: 0.0024 at most (``linear.py``)
ADAPTED = 0.01  # of an adapted layer: h, G and the adapter's matrices are rounded to bfloat16 as well
PEER = 0.02  # peers round products or scales to bfloat16 too; this is to refuse nonsense
PEER_TABLE = 0.002


def _ours(case: Case) -> list[Run]:
    ops = torch.ops.qloralab
    match case.operation:
        case "dequantize":
            return [part.dequantize for part in case.packed]
        case "quantize":
            return [partial(_quantized, part, case.weight.quantized.values) for part in case.originals]
        case "linear":
            return [partial(ops.linear, case.x, *part.operands(), None) for part in case.packed]
        case "input gradient":
            return [partial(ops.linear_grad_input, case.gradient, *part.operands()) for part in case.packed]
    return _adapted(case)


def _quantized(weight: Tensor, values: Tensor) -> ql.QuantizedTensor:
    """``ql.quantize`` without its look at the scales for NaN, which waits for the device; its peer looks at nothing."""
    packed, absmax = torch.ops.qloralab.quantize_blockwise(weight, values, BLOCK_SIZE)
    codes, absmax2, offset = torch.ops.qloralab.quantize_scales(absmax)
    return ql.QuantizedTensor(
        packed, codes, absmax2, offset, values, weight.shape, weight.dtype, codebook="nf4", block_size=BLOCK_SIZE
    )


def _adapted(case: Case) -> list[Run]:
    layers = case.form(("adapted", case.rank, case.dropout), lambda: adapted_layer(case.weight.quantized.clone(), case))
    return [both_ways(one, case, (one.lora_A, one.lora_B)) for one in layers]


def _fused(case: Case) -> list[Run]:
    from qloralab.kernels.gpu import linear, linear_grad_input

    if case.adapted:
        return _adapted(case)
    if case.operation == "linear":
        return [partial(linear.linear, case.x, part.operands()) for part in case.packed]
    return [partial(linear_grad_input.linear_grad_input, case.gradient, part.operands()) for part in case.packed]


def _few_tokens(case: Case) -> list[Run] | None:
    from qloralab.kernels.gpu import few_tokens

    if case.M is None or case.M > few_tokens.MOST:
        return None
    return [partial(few_tokens.few_tokens, case.x, part.operands()) for part in case.packed]


def _bf16(case: Case) -> list[Run]:
    match case.operation:
        case "dequantize":
            return [part.clone for part in case.dense]
        case "linear":
            return [partial(F.linear, case.x, part) for part in case.dense]
        case "input gradient":
            return [partial(torch.matmul, case.gradient, part) for part in case.dense]
    return [partial(_frozen, case.x, case.gradient, part) for part in case.dense]


def _frozen(x: Tensor, gradient: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(x, weight), gradient @ weight


def _bitsandbytes(case: Case) -> list[Run] | None:
    from . import peer

    if case.adapted and case.dropout:
        return None  # PEFT draws a mask of its own: there is no right answer to hold it to
    if case.operation == "quantize":
        quantize = partial(peer.quantize_4bit, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4")
        return [partial(quantize, part) for part in case.originals]
    if case.adapted:
        return [_peft_run(layer, case) for layer in case.form(("PEFT", case.rank), partial(_peft_layer, case))]
    held = case.form("bitsandbytes", partial(peer.parameter, case.weight.quantized))
    match case.operation:
        case "dequantize":
            return [partial(peer.dequantize_4bit, part.data, part.quant_state) for part in held]
        case "linear":
            return [partial(peer.matmul_4bit, case.x, part.data, quant_state=part.quant_state) for part in held]
    return [partial(_dequantized_product, case.gradient, part, peer.dequantize_4bit) for part in held]


def _peft_layer(case: Case) -> Any:
    """PEFT's adapter on bitsandbytes' layer, with the numbers of the case's."""
    from peft import LoraConfig, get_peft_model

    from . import peer

    config = LoraConfig(r=case.rank, lora_alpha=int(SCALING * case.rank), lora_dropout=0.0, target_modules=["0"])
    base: Any = nn.Sequential(peer.layer(case.weight.quantized))
    layer: Any = get_peft_model(base, config).base_model.model[0]  # pyright: ignore
    for part, value in zip((layer.lora_A, layer.lora_B), case.adapter, strict=True):
        part["default"].to(value.device).weight.data.copy_(value)
    return layer


def _peft_run(layer: Any, case: Case) -> Run:
    """Under autocast, as people train with it: without, the adapter's products are in float32."""
    run = both_ways(layer, case, (layer.lora_A["default"].weight, layer.lora_B["default"].weight))
    return torch.autocast(case.x.device.type, torch.bfloat16, cache_enabled=False)(run)


def _bitsandbytes_weight(result: Any) -> Tensor:
    from . import peer

    return peer.dequantize_4bit(*result)


def _unsloth(case: Case) -> list[Run]:
    from unsloth.kernels.utils import fast_dequantize, fast_gemv  # pyright: ignore[reportMissingImports]

    from . import peer

    held = case.form("bitsandbytes", partial(peer.parameter, case.weight.quantized))
    match case.operation:
        case "dequantize":
            return [partial(fast_dequantize, part.data, part.quant_state) for part in held]
        case "linear" if case.M == 1:
            return [partial(_gemv, case.x, part, fast_gemv) for part in held]
        case "linear":
            return [partial(_dequantized_linear, case.x, part, fast_dequantize) for part in held]
    return [partial(_dequantized_product, case.gradient, part, fast_dequantize) for part in held]


def _gemv(x: Tensor, weight: Any, gemv: Callable[..., Tensor]) -> Tensor:
    return gemv(x[None], weight.data, weight.quant_state)[0]


def _dequantized_linear(x: Tensor, weight: Any, dequantize: Callable[..., Tensor]) -> Tensor:
    return F.linear(x, dequantize(weight.data, weight.quant_state))


def _dequantized_product(gradient: Tensor, weight: Any, dequantize: Callable[..., Tensor]) -> Tensor:
    return gradient @ dequantize(weight.data, weight.quant_state)


OPTIONS: dict[str, Any] = {"tolerance": ONCE, "adapted": ADAPTED, "fewest": 5}
PEERS = {**OPTIONS, "tolerance": PEER, "adapted": PEER, "table": PEER_TABLE, "codes": PEER_TABLE}
_BY_FUSED = {**OPTIONS, "tolerance": FUSED, "needs_gpu": True, "inside": partial(choice.use, "fused")}
_PRODUCTS, _LAYERS = ("linear", "input gradient"), OPERATIONS[-2:]
PROVIDERS = [
    Provider("ours", _ours, inside=partial(choice.use, "two-pass"), **OPTIONS),
    Provider("ours, fused", _fused, (*_PRODUCTS, *_LAYERS), **_BY_FUSED),
    Provider("ours, few", _few_tokens, ("linear",), **_BY_FUSED),
    Provider("bf16", _bf16, ("dequantize", *_PRODUCTS, *_LAYERS), dense=True, **OPTIONS),
    Provider("bitsandbytes", _bitsandbytes, finish=_bitsandbytes_weight, package="bitsandbytes", **PEERS),
    Provider("unsloth", _unsloth, ("dequantize", *_PRODUCTS), package="unsloth", graph=False, **PEERS),
]
