"""Adapters that begin with a part of the weight: PiSSA and LoftQ, on the quantizer that the run uses.

``inject_`` starts from the quantized weight Q(W), whose error is there from the first step. Both methods here put a
part of W into the adapter before they quantize, so that less of it is lost::

    PiSSA  (arXiv 2404.02948)    s B A = the r largest singular triples of W        base = Q(W - s B A)
    LoftQ  (arXiv 2311.08659)    s B A = those of W - Q, alternating with           base = Q = Q(W - s B A)

LoftQ begins with B A = 0. PiSSA trains the directions in which W is largest, LoftQ those in which the quantizer is
worst. Q is the whole quantizer, double quantization and rounding to the weight's dtype included; PEFT's LoftQ leaves
double quantization out; what its adapters could have taken up of it is little (``docs/initialisation.md``).

The base is another one than Q(W), so an adapter from here is of no use without it: save both. An adapter's file then
says nothing of how it started, and PEFT opens it beside that base as any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qloralab.nf4.codebook import Codebook
from qloralab.nf4.data_type import DataType
from qloralab.nf4.model import choose, refuse_adapters, summary
from qloralab.nf4.tensor import quantize

from .config import LoraConfig
from .inject import adapters

METHODS = ("loftq", "pissa")


@dataclass(frozen=True)
class Start:
    """How one adapter begins.

    Attributes:
        A, B: float32 [r, in] and [out, r].
        errors: norm(W - Q - s B A) / norm(W), Frobenius, after each iteration; the first is W - Q's without an adapter.
    """

    A: Tensor
    B: Tensor
    errors: tuple[float, ...]


def residual_(
    model: nn.Module,
    config: LoraConfig,
    method: str = "loftq",
    codebook: Codebook | DataType = "nf4",
    block_size: int | None = None,
    double_quant: bool | None = None,
    iterations: int = 5,
    skip: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Start]:
    """Take from each weight that gets an adapter what the adapter begins with, in place.

    The weights are then W - s B A. ``quantize_`` with the same arguments, ``inject_`` with the same config and
    ``start_`` follow, in this order.

    Args:
        model: dense; its layers as ``inject_`` with this config would take them.
        config: of the adapters.
        method: "loftq" or "pissa".
        codebook, block_size, double_quant, skip: as ``quantize_`` will be given them.
        iterations: of LoftQ; PiSSA takes one.
        progress: called after each weight with how many are done and how many there are.

    Returns:
        how each adapter begins, by the full path of its layer.

    Raises:
        ValueError: no such method, a layer without a dense weight, adapters that are there already, or a target that
            matches nothing. The model is unchanged then.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
    refuse_adapters(model, "take their start from the dense model")
    names, left = choose(model, skip)
    if not names:
        raise ValueError(f"the model has no linear layer to adapt{summary(left)}")
    targets = config.select(names, left)
    for name in targets:
        if not isinstance(model.get_submodule(name), nn.Linear):
            raise ValueError(f"{name} is quantized already; an adapter begins with a part of the dense weight")
    starts: dict[str, Start] = {}
    of_weight: dict[int, Start] = {}  # layers that share a weight share its start
    for done, name in enumerate(targets, 1):
        weight = model.get_parameter(f"{name}.weight")
        if id(weight) not in of_weight:
            start, rest = _split(weight, config, method, (codebook, block_size, double_quant), iterations)
            with torch.no_grad():
                weight.copy_(rest)
            of_weight[id(weight)] = start
        starts[name] = of_weight[id(weight)]
        if progress:
            progress(done, len(targets))
    return starts


def start_(model: nn.Module, starts: dict[str, Start]) -> None:
    """Let the adapters of a model begin as ``residual_`` found, in place. Beside a layer that was skipped, and so stays
    dense, an adapter begins as ``inject_`` made it: there is no error to take up.

    Raises:
        ValueError: a layer that gave a part of its weight has no adapter, or one of another rank. The model is
            unchanged then.
    """
    found = adapters(model)
    if not starts.keys() <= found.keys():
        raise ValueError("a layer gave a part of its weight and has no adapter; use one config for both")
    for name, start in starts.items():
        if found[name].lora_A.shape != start.A.shape:
            raise ValueError(f"{name}: the adapter has rank {len(found[name].lora_A)}, its start {len(start.A)}")
    with torch.no_grad():
        for name, start in starts.items():
            found[name].lora_A.copy_(start.A)
            found[name].lora_B.copy_(start.B)


@torch.no_grad()
def _split(
    weight: Tensor,
    config: LoraConfig,
    method: str,
    options: tuple[Codebook | DataType, int | None, bool | None],
    iterations: int,
) -> tuple[Start, Tensor]:
    """How the adapter of a weight [out, in] begins, and what is left for the base: in the weight's dtype."""
    W = weight.float()

    def quantized(rest: Tensor) -> Tensor:
        return quantize(rest, *options).dequantize(torch.float32)

    Q = quantized(weight)
    errors, rest, product = [_relative(W - Q, W)], weight, torch.zeros_like(W)
    A, B = W.new_zeros(config.r, W.shape[1]), W.new_zeros(W.shape[0], config.r)
    for _ in range(1 if method == "pissa" else iterations):
        if method == "pissa":
            A, B = _factors(W, config)
            product = config.scaling * B @ A
        rest = (W - product).to(weight.dtype)
        Q = quantized(rest)
        if method == "loftq":
            A, B = _factors(W - Q, config)
            product = config.scaling * B @ A
        errors.append(_relative(W - Q - product, W))
    return Start(A, B, tuple(errors)), rest


def _factors(matrix: Tensor, config: LoraConfig) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r], of equal norms, with s B A the nearest matrix of rank r (Eckart and Young, 1936)."""
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    found = min(config.r, len(S))  # a matrix may have fewer singular values than the adapter has rows
    root = (S[:found] / config.scaling).sqrt()
    A, B = matrix.new_zeros(config.r, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], config.r)
    A[:found], B[:, :found] = root[:, None] * V[:found], U[:, :found] * root
    return A, B


def _relative(difference: Tensor, to: Tensor) -> float:
    norm = float(to.norm())
    return float(difference.norm()) / norm if norm else math.nan
