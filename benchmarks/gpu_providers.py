"""Who does the work in ``benchmarks/gpu.py``.

===============  ====================================================================================================
ours             nf4's operators as they are registered for CUDA, held to the two-pass product
ours, fused      the fused kernels, from tiles made before
ours, canonical  the kernels without tiles, for few tokens
bf16             the weight in bfloat16: cuBLAS; beside dequantize, a copy of the weight
bitsandbytes     ``quantize_4bit``, ``dequantize_4bit``, ``matmul_4bit`` without a gradient; for the input gradient what
                 the backward of its ``MatMul4Bit`` does, ``dequantize_4bit`` and a product
unsloth          ``fast_dequantize``; ``fast_gemv`` for one row, otherwise ``fast_dequantize`` and a product, as its
                 ``fast_linear_forward`` has it. It launches on the stream that was current when it was imported, so it
                 is not captured
===============  ====================================================================================================

Gradients are called as functions, not through autograd, whose backward runs on threads and streams of its own. All hold
the same codes and scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn import functional as F

import qloralab as ql
from benchmarks.gpu_problem import BLOCK_SIZE, OPERATIONS, Problem, definition_of_dequantize
from benchmarks.timing import Run
from qloralab.kernels.gpu.choice import FEW

ONCE = 0.003  # rounding the output to bfloat16 makes 0.0017; cuBLAS may add partial sums in bfloat16
FUSED = 0.005  # the weights, too, are rounded to bfloat16 once more: 0.0026 at most (``linear.py``)
PEER = 0.02  # peers round products or scales to bfloat16 too; this is to refuse nonsense


@dataclass(frozen=True)
class Provider:
    """One way to do some of the operations.

    Attributes:
        name: in records and tables.
        runs: of a problem, the functions to call in rotation.
        finish: of what quantize returns, the dequantized weight.
        operations: that it has.
        dense: whether its weight is in bfloat16, not packed.
        tolerance: of its products, see ``Problem.check``.
        table: the tolerance of dequantize and quantize; 0 asks for the definition's bits.
        package: that it needs.
        triton: whether it runs on a GPU only.
        graph: whether a CUDA graph may capture it.
        tokens: the most that it is meant for; None: any number.
    """

    name: str
    runs: Callable[[Problem], Sequence[Run]]
    finish: Callable[[Any], torch.Tensor] = definition_of_dequantize
    operations: tuple[str, ...] = OPERATIONS
    dense: bool = False
    tolerance: float = ONCE
    table: float = 0.0
    package: str | None = None
    triton: bool = False
    graph: bool = True
    tokens: int | None = None

    def does(self, operation: str, M: int | None) -> bool:
        """Whether it takes part in an operation on so many tokens."""
        return operation in self.operations and (self.tokens is None or M is None or self.tokens >= M)

    def missing(self) -> str | None:
        """Why it cannot take part, or None."""
        if self.triton and not torch.cuda.is_available():
            return "it needs a GPU"
        return f"{self.package} is not installed" if self.package and find_spec(self.package) is None else None

    def check(self, problem: Problem, result: Any) -> float:
        """``Problem.check`` of what one of ``runs`` returned."""
        products = problem.M is not None
        weight = self.finish(result) if problem.operation == "quantize" else result
        return problem.check(weight, self.tolerance if products else self.table)


def _ours(problem: Problem) -> list[Run]:
    weight, x, ops = problem.weight, problem.input, torch.ops.qloralab
    if problem.operation == "quantize":
        originals = weight.copies("original", weight.original.clone, problem.copies)
        return [partial(_quantized, part, weight.quantized.values) for part in originals]
    packed = weight.copies("packed", weight.quantized.clone, problem.copies)
    match problem.operation:
        case "dequantize":
            return [part.dequantize for part in packed]
        case "linear":
            return [partial(ops.linear, x, *part.operands(), None) for part in packed]
        case _:
            return [partial(ops.linear_grad_input, x, *part.operands()) for part in packed]


def _fused(problem: Problem) -> list[Run]:
    from qloralab.kernels.gpu import linear, linear_grad_input, packing

    weight, x = problem.weight, problem.input
    tiled = weight.copies("tiles", partial(packing.tile, *weight.quantized.operands()), problem.copies)
    if problem.operation == "linear":
        return [partial(linear.linear, x, part) for part in tiled]
    return [partial(linear_grad_input.linear_grad_input, x, part) for part in tiled]


def _canonical(problem: Problem) -> list[Run]:
    from qloralab.kernels.gpu import canonical

    x = problem.input
    packed = problem.weight.copies("packed", problem.weight.quantized.clone, problem.copies)
    product = canonical.linear if problem.operation == "linear" else canonical.linear_grad_input
    return [partial(product, x, part.operands()) for part in packed]


def _quantized(weight: torch.Tensor, values: torch.Tensor) -> ql.QuantizedTensor:
    """``ql.quantize`` without its look at the scales for NaN, which waits for the device; its peer looks at nothing."""
    packed, absmax = torch.ops.qloralab.quantize_blockwise(weight, values, BLOCK_SIZE)
    codes, absmax2, offset = torch.ops.qloralab.quantize_scales(absmax)
    return ql.QuantizedTensor(
        packed, codes, absmax2, offset, values, weight.shape, weight.dtype, codebook="nf4", block_size=BLOCK_SIZE
    )


def _bf16(problem: Problem) -> list[Run]:
    weight, x = problem.weight, problem.input
    dense = weight.copies("dense", weight.dequantized.clone, problem.copies)
    match problem.operation:
        case "dequantize":
            return [part.clone for part in dense]
        case "linear":
            return [partial(F.linear, x, part) for part in dense]
        case _:
            return [partial(torch.matmul, x, part) for part in dense]


def _bitsandbytes(problem: Problem) -> list[Run]:
    from bitsandbytes.autograd._functions import matmul_4bit
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight, x = problem.weight, problem.input
    if problem.operation == "quantize":
        originals = weight.copies("original", weight.original.clone, problem.copies)
        make = partial(quantize_4bit, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4")
        return [partial(make, part) for part in originals]
    held = weight.copies("bitsandbytes", partial(parameter, weight.quantized), problem.copies)
    match problem.operation:
        case "dequantize":
            return [partial(dequantize_4bit, part.data, part.quant_state) for part in held]
        case "linear":
            return [partial(matmul_4bit, x, part.data, quant_state=part.quant_state) for part in held]
        case _:
            return [partial(_dequantized_product, x, part, dequantize_4bit) for part in held]


def _bitsandbytes_weight(result: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(*result)


def _unsloth(problem: Problem) -> list[Run]:
    from unsloth.kernels.utils import fast_dequantize, fast_gemv  # pyright: ignore[reportMissingImports]

    weight, x = problem.weight, problem.input
    held = weight.copies("bitsandbytes", partial(parameter, weight.quantized), problem.copies)
    match problem.operation:
        case "dequantize":
            return [partial(fast_dequantize, part.data, part.quant_state) for part in held]
        case "linear" if problem.M == 1:
            return [partial(_gemv, x, part, fast_gemv) for part in held]
        case "linear":
            return [partial(_dequantized_linear, x, part, fast_dequantize) for part in held]
        case _:
            return [partial(_dequantized_product, x, part, fast_dequantize) for part in held]


def _gemv(x: torch.Tensor, weight: Any, gemv: Callable[..., torch.Tensor]) -> torch.Tensor:
    return gemv(x[None], weight.data, weight.quant_state)[0]


def _dequantized_linear(x: torch.Tensor, weight: Any, dequantize: Callable[..., torch.Tensor]) -> torch.Tensor:
    return F.linear(x, dequantize(weight.data, weight.quant_state))


def _dequantized_product(grad: torch.Tensor, weight: Any, dequantize: Callable[..., torch.Tensor]) -> torch.Tensor:
    return grad @ dequantize(weight.data, weight.quant_state)


def parameter(weight: ql.QuantizedTensor) -> Any:
    """bitsandbytes' parameter with copies of the codes and scales of a weight, on the weight's device."""
    from bitsandbytes.nn.modules import Params4bit

    tensors: dict[str, Any] = weight.clone().to_bitsandbytes("weight")
    data = tensors.pop("weight")
    stats = {name.removeprefix("weight."): part for name, part in tensors.items()}
    return Params4bit.from_prequantized(data, stats, device=str(weight.device))


PROVIDERS = [
    Provider("ours", _ours),
    Provider("ours, fused", _fused, operations=("linear", "input gradient"), tolerance=FUSED, triton=True),
    Provider("ours, canonical", _canonical, operations=("linear", "input gradient"), triton=True, tokens=FEW),
    Provider("bf16", _bf16, operations=("dequantize", "linear", "input gradient"), dense=True),
    Provider(
        "bitsandbytes", _bitsandbytes, _bitsandbytes_weight, tolerance=PEER, table=0.002, package="bitsandbytes"
    ),
    Provider(
        "unsloth", _unsloth, operations=("dequantize", "linear", "input gradient"), tolerance=PEER, table=0.002,
        package="unsloth", graph=False,
    ),
]  # fmt: skip
