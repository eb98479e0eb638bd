"""The check that a provider of ``benchmarks/cpu.py`` has to pass before it is timed.

===============  ===================================================================================================
products         root-mean-square error against float64 within the provider's tolerance
dequantize       the definition's values, each of them
quantize         the definition's codes and scales, bit for bit, where that is documented (ours); of bitsandbytes, whose
                 second-level codes are those of a look-up table, an error as small as the definition's
===============  ===================================================================================================
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import qloralab as ql
from benchmarks.cpu_problem import Problem, definition_of_dequantize
from benchmarks.cpu_providers import Provider
from benchmarks.peer import dequantize_4bit

REQUANTIZED = 1.001  # times the error of the definition: room for second-level codes beside the nearest


class WrongResultError(Exception):
    """A result is not the operation's; the message says by how much."""


def check(problem: Problem, provider: Provider, result: Any) -> float:
    """Compare a result with the right one.

    Args:
        problem: that was given.
        provider: who answered.
        result: a tensor, or what the provider's quantize returns.

    Returns:
        the root-mean-square error over the root mean square of the right answer. Of quantize, the error that the codes
        and scales make.

    Raises:
        WrongResultError: the result is not the operation's.
    """
    if problem.operation == "quantize":
        return _quantized(problem, provider, result)
    if result.shape != problem.expected.shape or result.dtype != torch.bfloat16:
        raise WrongResultError(f"{result.dtype} {list(result.shape)}, not bfloat16 {list(problem.expected.shape)}")
    return _within(result, problem.expected, 0.0 if problem.operation == "dequantize" else provider.tolerance)


def _quantized(problem: Problem, provider: Provider, result: Any) -> float:
    if isinstance(result, ql.QuantizedTensor):
        for part in ("packed", "scales", "absmax2", "offset") if provider.exact else ():
            if not torch.equal(getattr(result, part), getattr(problem.weight.quantized, part)):
                raise WrongResultError(f"{part} is not the definition's")
        weight = definition_of_dequantize(result)
    else:
        weight = dequantize_4bit(*result)
    least = relative_error(problem.weight.dequantized, problem.expected)
    return _within(weight, problem.expected, REQUANTIZED * least)


def _within(result: Tensor, expected: Tensor, tolerance: float) -> float:
    error = relative_error(result, expected)
    if not error <= tolerance:  # NaN is not
        raise WrongResultError(f"error {error:.2g}, {tolerance:.2g} allowed")
    return error


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Root-mean-square error over the root mean square of what is expected, float64."""
    return float(torch.linalg.vector_norm(result.double() - expected) / torch.linalg.vector_norm(expected))
