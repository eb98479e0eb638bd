"""Who does the work in ``benchmarks/cpu.py``.

====================  =================================================================================
ours                  the public API: ``ql.quantize``, ``QuantizedTensor.dequantize``, ``ql.linear``
reference             the same in plain PyTorch, as ``QLORALAB_CPU=reference`` has it
bitsandbytes          ``quantize_4bit``, ``dequantize_4bit``; its ``Linear4bit`` in training mode, which
                      dequantizes the weight and multiplies
bitsandbytes, eval    its ``Linear4bit`` in evaluation mode: on a processor with AVX512-BF16 it rearranges
                      the weight once (not timed) and multiplies by the packed weight
bf16                  PyTorch with the weight in bfloat16: ``F.linear`` and its backward; beside
                      dequantize it copies the weight, which writes what a dequantization has to write
====================  =================================================================================

The input gradient is the backward of each library's own layer, through autograd, its forward not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import qloralab as ql
from benchmarks.cpu_problem import BLOCK_SIZE, OPERATIONS, Problem
from benchmarks.peer import dequantize_4bit, has_avx512bf16, quantize_4bit
from benchmarks.timing import Run
from qloralab.kernels import dispatch

ROUNDED_ONCE = 0.002  # the output to bfloat16 moves each number by at most 2**-9 of itself; float32 sums add 1e-6
SCALES_ROUNDED = 2**-8  # the scales to bfloat16 besides, and each weight after that


@dataclass(frozen=True)
class Provider:
    """One way to do some of the operations.

    Attributes:
        name: in records and tables.
        runs: of a problem, the functions to call in rotation.
        operations: that it has.
        dense: whether its weight is in bfloat16, not packed.
        exact: whether quantize is documented to give the codes and scales of the definition.
        tolerance: of its products, the root-mean-square error against float64 over that of the answer.
        fewest: repetitions.
    """

    name: str
    runs: Callable[[Problem], Sequence[Run]]
    operations: tuple[str, ...] = OPERATIONS
    dense: bool = False
    exact: bool = True
    tolerance: float = ROUNDED_ONCE
    fewest: int = 15


def _ours(problem: Problem) -> list[Run]:
    weight, x = problem.weight, problem.input
    match problem.operation:
        case "dequantize":
            return [part.dequantize for part in weight.packed]
        case "quantize":
            return [partial(ql.quantize, part, block_size=BLOCK_SIZE) for part in weight.originals]
        case "linear":
            return [partial(ql.linear, x, part) for part in weight.packed]
        case _:
            return [_backward(partial(ql.linear, weight=part), problem) for part in weight.packed]


def _reference(problem: Problem) -> list[Run]:
    def plain(run: Run) -> object:
        with dispatch.use("reference"):
            return run()

    return [partial(plain, run) for run in _ours(problem)]


def _bitsandbytes(problem: Problem) -> list[Run]:
    weight, x = problem.weight, problem.input
    match problem.operation:
        case "dequantize":
            held: list[Any] = [layer.weight for layer in weight.training_layers]
            return [partial(dequantize_4bit, part.data, part.quant_state) for part in held]
        case "quantize":
            quantize = partial(quantize_4bit, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4")
            return [partial(quantize, part) for part in weight.originals]
        case "linear":
            return [partial(layer, x) for layer in weight.training_layers]
        case _:
            return [_backward(layer, problem) for layer in weight.training_layers]


def _bitsandbytes_eval(problem: Problem) -> list[Run]:
    return [partial(layer, problem.input) for layer in problem.weight.evaluation_layers]


def _bf16(problem: Problem) -> list[Run]:
    weight, x = problem.weight, problem.input
    match problem.operation:
        case "dequantize":
            return [part.clone for part in weight.dense]
        case "linear":
            return [partial(F.linear, x, part) for part in weight.dense]
        case _:
            return [_backward(partial(F.linear, weight=part), problem) for part in weight.dense]


def _backward(layer: Callable[[Tensor], Tensor], problem: Problem) -> Run:
    """The backward of a layer, again and again from one forward."""
    M, K = problem.M or 0, problem.weight.shape[1]
    x = torch.zeros(M, K, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    return lambda: torch.autograd.grad(y, x, problem.input, retain_graph=True)[0]


PROVIDERS = [
    Provider("ours", _ours),
    Provider("reference", _reference, fewest=3),
    Provider("bitsandbytes", _bitsandbytes, exact=False),
    Provider("bf16", _bf16, ("dequantize", "linear", "input gradient"), dense=True),
]
if has_avx512bf16():
    PROVIDERS.append(
        Provider("bitsandbytes, eval", _bitsandbytes_eval, ("linear",), exact=False, tolerance=SCALES_ROUNDED)
    )
