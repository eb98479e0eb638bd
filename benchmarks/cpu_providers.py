"""Who does the work in ``benchmarks/cpu.py``.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qloralab as ql
from benchmarks import peer
from benchmarks.cpu_problem import ADAPTER, BLOCK_SIZE, COMPUTE, EMULATED, OPERATIONS, Problem
from benchmarks.peer import dequantize_4bit, has_avx512bf16, quantize_4bit
from benchmarks.timing import Run
from qloralab.kernels import dispatch
from qloralab.lora.layer import LoRALinear
from qloralab.nf4.linear import QuantizedLinear

ROUNDED_ONCE = 0.002  # the output to bfloat16 moves each number by at most 2**-9 of itself; float32 sums add 1e-6
PRODUCTS = ("linear", "input gradient", "adapted layer")
EMULATED_ROWS = 16  # at most, where PyTorch emulates a product in bfloat16
SCALES_ROUNDED = 2**-8  # the scales to bfloat16 besides, and each weight after that


@dataclass(frozen=True)
class Provider:
    """One way to do some of the operations.

    Attributes:
        name: in records and tables.
        runs: of a problem, the functions to call in rotation.
        operations: that it has.
        dtype: of its products, x and result.
        dense: whether its weight is not packed; then it has no adapter either.
        exact: whether quantize is documented to give the codes and scales of the definition.
        tolerance: of its products in bfloat16, the root-mean-square error against float64 over that of the answer.
        fewest: repetitions.
        most_rows: of its products.
    """

    name: str
    runs: Callable[[Problem], Sequence[Run]]
    operations: tuple[str, ...] = OPERATIONS
    dtype: torch.dtype = torch.bfloat16
    dense: bool = False
    exact: bool = True
    tolerance: float = ROUNDED_ONCE
    fewest: int = 15
    most_rows: float = math.inf


def _ours(problem: Problem) -> list[Run]:
    weight = problem.weight
    match problem.operation:
        case "dequantize":
            return [part.dequantize for part in weight.packed]
        case "quantize":
            return [partial(ql.quantize, part, block_size=BLOCK_SIZE) for part in weight.originals]
        case "linear":
            return [partial(ql.linear, problem.x, part) for part in weight.packed]
        case "input gradient":
            return [_backward(partial(ql.linear, weight=part), problem) for part in weight.packed]
        case _:
            layers = [_adapted(part, problem) for part in weight.packed]
            return [_both_ways(one, problem, (one.lora_A, one.lora_B)) for one in layers]


def _adapted(weight: ql.QuantizedTensor, problem: Problem) -> LoRALinear:
    """A layer in training mode, with the adapter of the problem."""
    made = LoRALinear(QuantizedLinear(weight, compute_dtype=problem.dtype), ADAPTER)
    made.lora_A, made.lora_B = (nn.Parameter(part.clone()) for part in problem.weight.adapter)
    return made


def _reference(problem: Problem) -> list[Run]:
    def plain(run: Run) -> object:
        with dispatch.use("reference"):
            return run()

    return [partial(plain, run) for run in _ours(problem)]


def _bitsandbytes(problem: Problem) -> list[Run]:
    weight = problem.weight
    match problem.operation:
        case "dequantize":
            held: list[Any] = [peer.layer(part).weight for part in weight.packed]
            return [partial(dequantize_4bit, part.data, part.quant_state) for part in held]
        case "quantize":
            quantize = partial(quantize_4bit, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4")
            return [partial(quantize, part) for part in weight.originals]
        case "linear":
            return [partial(one, problem.x) for one in weight.training_layers]
        case _:
            return [_backward(one, problem) for one in weight.training_layers]


def _bitsandbytes_eval(problem: Problem) -> list[Run]:
    return [partial(one, problem.x) for one in problem.weight.evaluation_layers]


def _dense(problem: Problem) -> list[Run]:
    weights = problem.weight.dense(problem.dtype)
    match problem.operation:
        case "dequantize":
            return [part.clone for part in weights]
        case "linear":
            return [partial(F.linear, problem.x, part) for part in weights]
        case "input gradient":
            return [_backward(partial(F.linear, weight=part), problem) for part in weights]
        case _:
            return [_both_ways(partial(F.linear, weight=part), problem) for part in weights]


def _backward(layer: Callable[[Tensor], Tensor], problem: Problem) -> Run:
    """The backward of a layer, again and again from one forward."""
    x = torch.zeros_like(problem.x, requires_grad=True)
    y = layer(x)
    return lambda: torch.autograd.grad(y, x, problem.gradient, retain_graph=True)[0]


def _both_ways(layer: Callable[[Tensor], Tensor], problem: Problem, parameters: Sequence[Tensor] = ()) -> Run:
    """Forward and backward of a layer: the output, the gradients of the input and of the parameters."""
    x = problem.x.clone().requires_grad_()

    def run() -> tuple[Tensor, ...]:
        y = layer(x)
        return y.detach(), *torch.autograd.grad(y, (x, *parameters), problem.gradient)

    return run


PROVIDERS = [
    Provider("ours", _ours),
    Provider("ours, f32", _ours, PRODUCTS, torch.float32),
    Provider("reference", _reference, dtype=COMPUTE, fewest=3),
    Provider(
        "bitsandbytes", _bitsandbytes, ("dequantize", "quantize", "linear", "input gradient"), COMPUTE, exact=False
    ),
    Provider("bf16", _dense, ("dequantize", *PRODUCTS), dense=True, most_rows=EMULATED_ROWS if EMULATED else math.inf),
    Provider("f32", _dense, PRODUCTS, torch.float32, dense=True),
]
if has_avx512bf16() and not EMULATED:
    PROVIDERS.append(
        Provider("bitsandbytes, eval", _bitsandbytes_eval, ("linear",), exact=False, tolerance=SCALES_ROUNDED)
    )
