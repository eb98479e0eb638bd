"""Who does the work in a benchmark of operators, and the gate before the clock: a wrong result is never timed.

A provider is a function of a case (``case.py``). It returns the functions to call in rotation, one for each copy of the
case's weight, each of which returns the result; or None for a case that it does not take. ``--provider module:NAME``
adds one that this folder does not know.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import qloralab as ql
from qloralab.lora.layer import LoRALinear
from qloralab.nf4.linear import QuantizedLinear

from .case import OPERATIONS, SCALING, SEED, Case, WrongResultError, check, definition_of_dequantize
from .clock import Run, Timer, interleave, quantiles

PRODUCTS = ("linear", "input gradient", "adapted layer")


@dataclass(frozen=True)
class Provider:
    """One way to do some of the operations.

    Attributes:
        name: in records and tables.
        runs: of a case, the functions to call in rotation, or None.
        operations: that it has.
        dtype: of its products, x and result.
        dense: whether its weight is not packed; then it has no adapter either.
        tolerance: of its products in bfloat16, the root-mean-square error against float64 over that of the answer.
        adapted: the same of an adapted layer; None: of three roundings.
        table: the same of dequantize; 0 asks for the definition's bits.
        codes: what the error of quantize may have beyond the definition's; 0 asks for the definition's bits.
        finish: of what quantize returns, the dequantized weight.
        fewest: samples.
        most_rows: of its products; more are skipped, because PyTorch emulates them.
        tokens: the most rows that it is meant for.
        package: that it needs.
        needs_gpu: whether it runs on a GPU only.
        graph: whether a CUDA graph may capture it.
        inside: makes the context in which it is called; entered and left while no clock runs.
    """

    name: str
    runs: Callable[[Case], Sequence[Run] | None]
    operations: Sequence[str] = OPERATIONS
    dtype: torch.dtype = torch.bfloat16
    dense: bool = False
    tolerance: float = 0.002  # rounding to bfloat16 moves each number by at most 2**-9 of itself; float32 sums add 1e-6
    adapted: float | None = None
    table: float = 0.0
    codes: float = 0.0
    finish: Callable[[Any], Tensor] = definition_of_dequantize
    fewest: int = 15
    most_rows: float = math.inf
    tokens: float = math.inf
    package: str | None = None
    needs_gpu: bool = False
    graph: bool = True
    inside: Callable[[], AbstractContextManager[object]] = nullcontext

    def does(self, operation: str, M: int | None) -> bool:
        """Whether it takes part in an operation on so many rows."""
        return operation in self.operations and (M or 0) <= self.tokens

    def missing(self) -> str | None:
        """Why it cannot take part, or None."""
        if self.needs_gpu and not torch.cuda.is_available():
            return "it needs a GPU"
        return f"{self.package} is not installed" if self.package and find_spec(self.package) is None else None


def from_user(name: str, **options: Any) -> Provider:
    """The provider of ``--provider module:NAME``, held to the same check as ours.

    Args:
        name: of the function; the module is looked for in the working directory too.
        options: of the provider.

    Raises:
        SystemExit: there is no such function.
    """
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return Provider(name, getattr(importlib.import_module(module), function), codes=0.001, **options)
    except (ImportError, AttributeError, ValueError) as error:
        raise SystemExit(f"--provider {name}: a function is named module:NAME; {error}") from error
    finally:
        sys.path.pop(0)


@dataclass
class Outcome:
    """What became of a provider at a case.

    Attributes:
        status: ok, wrong, failed, skipped or missing.
        why: it is not ok.
        error: of its result, see ``check``.
        copies: that it rotates over.
        timer: of it, where it is ok.
        samples: milliseconds a call.
    """

    status: str
    why: str | None = None
    error: float | None = None
    copies: int | None = None
    timer: Timer | None = field(default=None, repr=False)
    samples: Sequence[float] = ()

    @property
    def ms(self) -> dict[str, float] | None:
        """The quantiles of the samples, or None."""
        return quantiles(self.samples) if self.samples else None


def compare(
    cases: Mapping[str, Case],
    providers: Sequence[Provider],
    prepare: Callable[[Sequence[Run], bool], Timer],
    before: Callable[[], object] = lambda: None,
    check: Callable[[Case, Provider, Any], float] = check,
    **limits: Any,
) -> Mapping[str, Outcome]:
    """Check each provider, and time in turns those that are right.

    Args:
        cases: by provider, the case that it is given.
        providers: to compare.
        prepare: makes a timer of runs, and of whether a graph may be tried: ``clock.host`` or ``clock.cuda``.
        before: called between the checks and the clock.
        check: of a result; ``case.check``, or its like.
        limits: of ``interleave``.

    Returns:
        by name, what became of each provider that takes the case.
    """
    found = {provider.name: _gate(cases[provider.name], provider, prepare, check) for provider in providers}
    outcomes = {name: outcome for name, outcome in found.items() if outcome}
    timers = {name: outcome.timer for name, outcome in outcomes.items() if outcome.timer}
    before()
    try:
        samples = interleave(timers, fewest={provider.name: provider.fewest for provider in providers}, **limits)
    except Exception as error:
        for name in timers:
            outcomes[name] = Outcome("failed", text(error))
    else:
        for name, some in samples.items():
            outcomes[name].samples = some
    return outcomes


def _gate(
    case: Case,
    provider: Provider,
    prepare: Callable[[Sequence[Run], bool], Timer],
    check: Callable[[Case, Provider, Any], float],
) -> Outcome | None:
    if missing := provider.missing():
        return Outcome("missing", missing)
    if (case.M or 0) > provider.most_rows:
        return Outcome("skipped", f"PyTorch emulates this product; timed up to M = {provider.most_rows}")
    try:
        with torch.no_grad(), provider.inside():
            runs = provider.runs(case)
            if runs is None:
                return None
            torch.manual_seed(SEED)
            error = check(case, provider, runs[0]())
            timer = prepare(runs, provider.graph and not case.operation.endswith("eager"))
    except WrongResultError as wrong:
        return Outcome("wrong", str(wrong))
    except Exception as failure:
        return Outcome("failed", text(failure))

    def sample() -> float:
        with provider.inside():
            return timer.sample()

    return Outcome("ok", None, error, len(runs), replace(timer, sample=sample))


def text(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def adapted_layer(weight: ql.QuantizedTensor, case: Case) -> LoRALinear:
    """A layer of ours in training mode, with the adapter of the case."""
    config = ql.LoraConfig(r=case.rank, lora_alpha=SCALING * case.rank, lora_dropout=case.dropout)
    made = LoRALinear(QuantizedLinear(weight, compute_dtype=case.dtype), config)
    made.lora_A, made.lora_B = (nn.Parameter(part.clone()) for part in case.adapter)
    return made


def both_ways(layer: Callable[[Tensor], Tensor], case: Case, parameters: Sequence[Tensor] = ()) -> Run:
    """Forward and backward of a layer: the output, the gradients of the input and of the parameters."""
    x = case.x.detach().requires_grad_()

    def run() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            y = layer(x)
            return y.detach(), *torch.autograd.grad(y, (x, *parameters), case.gradient)

    return run
