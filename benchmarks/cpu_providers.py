"""Who does the work in ``cpu.py``.

====================  =================================================================================
ours                  the public API: ``ql.quantize``, ``QuantizedTensor.dequantize``, ``ql.linear``; a
                      ``QuantizedLinear`` in a ``LoRALinear``; x in bfloat16
ours, f32             the products with x in float32, as where bfloat16 is not in hardware
reference             the same in plain PyTorch, as ``QLORALAB_CPU=reference`` has it
bitsandbytes          ``quantize_4bit``, ``dequantize_4bit``; its ``Linear4bit`` in training mode, which
                      dequantizes the weight and multiplies
bitsandbytes, eval    its ``Linear4bit`` in evaluation mode: on a processor with AVX512-BF16 it rearranges
                      the weight once (not timed) and multiplies by the packed weight
bf16                  PyTorch with the weight in bfloat16: ``F.linear`` and its backward; beside
                      dequantize it copies the weight, which writes what a dequantization has to write
f32                   PyTorch with weight and x in float32
====================  =================================================================================

The reference and bitsandbytes multiply in the dtype that the processor multiplies in hardware. Where that is float32,
PyTorch's product in bfloat16 takes seconds for many rows; it is timed up to 16.

The input gradient is the backward of each library's own layer, through autograd, its forward not timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import qloralab as ql
from qloralab.kernels import dispatch
from qloralab.nf4 import processor

from . import peer
from .case import BLOCK_SIZE, OPERATIONS, Case
from .clock import Run
from .provider import PRODUCTS, Provider, adapted_layer, both_ways

COMPUTE = processor.compute_dtype("cpu").dtype  # in which this machine multiplies
EMULATED = processor.emulates(torch.empty(0, dtype=torch.bfloat16))  # PyTorch's products in bfloat16
DROPOUT = 0.05
SCALES_ROUNDED = 2**-8  # the scales to bfloat16 besides, and each weight after that


def _ours(case: Case) -> list[Run]:
    match case.operation:
        case "dequantize":
            return [part.dequantize for part in case.packed]
        case "quantize":
            return [partial(ql.quantize, part, block_size=BLOCK_SIZE) for part in case.originals]
        case "linear":
            return [partial(ql.linear, case.x, part) for part in case.packed]
        case "input gradient":
            return [_backward(partial(ql.linear, weight=part), case) for part in case.packed]
    layers = [adapted_layer(part, case) for part in case.packed]
    return [both_ways(layer, case, (layer.lora_A, layer.lora_B)) for layer in layers]


def _reference(case: Case) -> list[Run]:
    def plain(run: Run) -> object:
        with dispatch.use("reference"):
            return run()

    return [partial(plain, run) for run in _ours(case)]


def _bitsandbytes(case: Case) -> list[Run]:
    match case.operation:
        case "dequantize":
            held = [peer.parameter(part) for part in case.packed]
            return [partial(peer.dequantize_4bit, part.data, part.quant_state) for part in held]
        case "quantize":
            quantize = partial(peer.quantize_4bit, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4")
            return [partial(quantize, part) for part in case.originals]
    layers = case.form("Linear4bit", lambda: peer.layer(case.weight.quantized, COMPUTE).train())
    if case.operation == "linear":
        return [partial(layer, case.x) for layer in layers]
    return [_backward(layer, case) for layer in layers]


def _bitsandbytes_eval(case: Case) -> list[Run]:  # the first forward rearranges the weight
    layers = case.form("Linear4bit, eval", lambda: peer.layer(case.weight.quantized, COMPUTE).eval())
    return [partial(layer, case.x) for layer in layers]


def _dense(case: Case) -> list[Run]:
    match case.operation:
        case "dequantize":
            return [part.clone for part in case.dense]
        case "linear":
            return [partial(F.linear, case.x, part) for part in case.dense]
        case "input gradient":
            return [_backward(partial(F.linear, weight=part), case) for part in case.dense]
    return [both_ways(partial(F.linear, weight=part), case) for part in case.dense]


@torch.enable_grad()
def _backward(layer: Callable[[Tensor], Tensor], case: Case) -> Run:
    """The backward of a layer, again and again from one forward."""
    x = torch.zeros_like(case.x, requires_grad=True)
    y = layer(x)
    return lambda: torch.autograd.grad(y, x, case.gradient, retain_graph=True)[0]


OURS = ("dequantize", "quantize", *PRODUCTS)
PROVIDERS = [
    Provider("ours", _ours, OURS),
    Provider("ours, f32", _ours, PRODUCTS, torch.float32),
    Provider("reference", _reference, OURS, COMPUTE, fewest=3),
    Provider(
        "bitsandbytes", _bitsandbytes, OPERATIONS[:4], COMPUTE, codes=0.001, finish=lambda x: peer.dequantize_4bit(*x)
    ),
    Provider("bf16", _dense, ("dequantize", *PRODUCTS), dense=True, most_rows=16 if EMULATED else math.inf),
    Provider("f32", _dense, PRODUCTS, torch.float32, dense=True),
]
if peer.has_avx512bf16() and not EMULATED:
    PROVIDERS.append(Provider("bitsandbytes, eval", _bitsandbytes_eval, ("linear",), tolerance=SCALES_ROUNDED))
