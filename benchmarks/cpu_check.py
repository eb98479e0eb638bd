"""The check that a provider of ``benchmarks/cpu.py`` has to pass before it is timed.

===============  ===================================================================================================
products         root-mean-square error against float64, over that of the answer, within a tolerance
dequantize       the definition's values, each of them
quantize         the definition's codes and scales, bit for bit, where that is documented (ours); of bitsandbytes, whose
                 second-level codes are those of a look-up table, an error as small as the definition's
===============  ===================================================================================================

**In bfloat16** sums are added up in float32 and rounded once; that is the provider's tolerance. Beside an adapter three
roundings follow each other: A or B, the small product between, the result. Being independent, they add up by their
squares.

**In float32** the additions round. The products of a sum are independent here and of mean zero, so after i of n the sum
is sqrt(i) times as large as one of them. Adding the next rounds it by at most 2**-24 of that, and the n roundings,
independent too, add up to 2**-24 * sqrt(1 + 2 + ... + n), which is 2**-24 * sqrt(n / 2) of the whole sum: 2.7e-6 for
4096. Any other order adds smaller sums. A product in bfloat16 is off by 1.7e-3, one in TF32 by 2e-4.
"""

from __future__ import annotations

import math
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
        result: a tensor, several of an adapted layer, or what the provider's quantize returns.

    Returns:
        the root-mean-square error over the root mean square of the right answer, the largest where that has several
        parts. Of quantize, the error that the codes and scales make.

    Raises:
        WrongResultError: the result is not the operation's.
    """
    if problem.operation == "quantize":
        return _quantized(problem, provider, result)
    parts = result if isinstance(result, tuple) else (result,)
    right = problem.dense if provider.dense else problem.expected
    dtypes = (problem.dtype, problem.dtype, torch.float32, torch.float32)  # of an adapter's gradients float32
    tolerances = _tolerances(problem, provider)
    errors = []
    for part, expected, dtype, tolerance in zip(parts, right, dtypes, tolerances, strict=False):
        if part.shape != expected.shape or part.dtype != dtype:
            raise WrongResultError(f"{part.dtype} {list(part.shape)}, not {dtype} {list(expected.shape)}")
        errors.append(_within(part, expected, tolerance))
    if len(parts) != len(right):
        raise WrongResultError(f"{len(parts)} results, not {len(right)}")
    return max(errors)


def _tolerances(problem: Problem, provider: Provider) -> tuple[float, ...]:
    if problem.operation == "dequantize":
        return (0.0,)
    if problem.dtype == torch.float32:
        return tuple(2**-24 * math.sqrt(n / 2) for n in problem.terms)
    roundings = 3 if problem.operation == "adapted layer" and not provider.dense else 1
    return (provider.tolerance * math.sqrt(roundings),) * 4


def _quantized(problem: Problem, provider: Provider, result: Any) -> float:
    if isinstance(result, ql.QuantizedTensor):
        for part in ("packed", "scales", "absmax2", "offset") if provider.exact else ():
            if not torch.equal(getattr(result, part), getattr(problem.weight.quantized, part)):
                raise WrongResultError(f"{part} is not the definition's")
        weight = definition_of_dequantize(result).to(result.dtype)
    else:
        weight = dequantize_4bit(*result)
    (original,) = problem.expected
    return _within(weight, original, REQUANTIZED * relative_error(problem.weight.dequantized(), original))


def _within(result: Tensor, expected: Tensor, tolerance: float) -> float:
    error = relative_error(result, expected)
    if not error <= tolerance:  # NaN is not
        raise WrongResultError(f"error {error:.2g}, {tolerance:.2g} allowed")
    return error


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Root-mean-square error over the root mean square of what is expected, float64."""
    return float(torch.linalg.vector_norm(result.double() - expected) / torch.linalg.vector_norm(expected))
