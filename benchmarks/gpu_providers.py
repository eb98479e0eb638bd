"""Who does the work in ``benchmarks/gpu.py``.

===============  ====================================================================================================
ours             nf4's operators as they are registered for CUDA, held to the two-pass product
ours, fused      the fused kernels, from tiles made before
bf16             the weight in bfloat16: cuBLAS; beside dequantize, a copy of the weight
bitsandbytes     ``quantize_4bit``, ``dequantize_4bit``, ``matmul_4bit`` without a gradient; for the input gradient what
                 the backward of its ``MatMul4Bit`` does, ``dequantize_4bit`` and a product
unsloth          ``fast_dequantize``; ``fast_gemv`` for one row, otherwise ``fast_dequantize`` and a product, as its
                 ``fast_linear_forward`` has it. It launches on the stream that was current when it was imported, so it
                 is not captured
===============  ====================================================================================================

An adapted layer is `LoRALinear`, bitsandbytes' layer with PEFT's around it, and for bf16 the layer without an adapter,
its input gradient included: what QLoRA adds to a frozen layer. It goes backward through autograd. Other gradients are
called as functions. All hold the same codes and scales.
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
from benchmarks.gpu_problem import BLOCK_SIZE, OPERATIONS, RANK, SCALING, Problem, definition_of_dequantize
from benchmarks.timing import Run
from qloralab.kernels.gpu import choice

ONCE = 0.003  # rounding the output to bfloat16 makes 0.0017; cuBLAS may add partial sums in bfloat16
FUSED = 0.005  # the weights, too, are rounded to bfloat16 once more: 0.0026 at most (``linear.py``)
ADAPTED = 0.01  # of an adapted layer: h, G and the adapter's matrices are rounded to bfloat16 as well
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
        tolerance = self.tolerance if products else self.table
        return problem.check(weight, max(tolerance, ADAPTED) if problem.adapted else tolerance)


def _ours(problem: Problem) -> list[Run]:
    weight, x, ops = problem.weight, problem.input, torch.ops.qloralab
    if problem.adapted:
        return _adapted(problem, "two-pass")
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
    if problem.adapted:
        return _adapted(problem, "fused")
    tiled = weight.copies("tiles", partial(packing.tile, *weight.quantized.operands()), problem.copies)
    if problem.operation == "linear":
        return [partial(linear.linear, x, part) for part in tiled]
    return [partial(linear_grad_input.linear_grad_input, x, part) for part in tiled]


def _adapted(problem: Problem, kernel: str) -> list[Run]:
    from qloralab.lora.config import LoraConfig
    from qloralab.lora.layer import LoRALinear
    from qloralab.nf4.linear import QuantizedLinear

    def layer() -> LoRALinear:
        config = LoraConfig(r=RANK, lora_alpha=SCALING * RANK, lora_dropout=0.0)
        made = LoRALinear(QuantizedLinear(problem.weight.quantized.clone()), config)
        made.lora_A, made.lora_B = map(torch.nn.Parameter, problem.adapter)
        return made

    layers = problem.weight.copies("adapted", layer, problem.copies)
    both_ways = _both_ways(problem)

    def run(layer: LoRALinear) -> tuple[torch.Tensor, ...]:
        with choice.use(kernel):
            return both_ways(layer, layer.lora_A, layer.lora_B)

    return [partial(run, layer) for layer in layers]


def _both_ways(problem: Problem) -> Callable[..., tuple[torch.Tensor, ...]]:
    """(module, A, B) -> y and the gradients of x, A and B. Gradients are enabled only here."""
    x, grad = problem.input.detach().requires_grad_(), problem.output_gradient

    def run(module: Callable[[torch.Tensor], torch.Tensor], *adapter: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            y = module(x)
            return y.detach(), *torch.autograd.grad(y, [x, *adapter], grad)

    return run


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
        case _ if problem.adapted:
            return [partial(_frozen, x, problem.output_gradient, part) for part in dense]
        case _:
            return [partial(torch.matmul, x, part) for part in dense]


def _frozen(x: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return F.linear(x, weight), grad @ weight


def _bitsandbytes(problem: Problem) -> list[Run]:
    from bitsandbytes.autograd._functions import matmul_4bit
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight, x = problem.weight, problem.input
    if problem.operation == "quantize":
        originals = weight.copies("original", weight.original.clone, problem.copies)
        make = partial(quantize_4bit, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4")
        return [partial(make, part) for part in originals]
    if problem.adapted:
        layers = weight.copies("PEFT", partial(_peft_layer, problem), problem.copies)
        return [partial(_peft_run, _both_ways(problem), layer) for layer in layers]
    held = weight.copies("bitsandbytes", partial(parameter, weight.quantized), problem.copies)
    match problem.operation:
        case "dequantize":
            return [partial(dequantize_4bit, part.data, part.quant_state) for part in held]
        case "linear":
            return [partial(matmul_4bit, x, part.data, quant_state=part.quant_state) for part in held]
        case _:
            return [partial(_dequantized_product, x, part, dequantize_4bit) for part in held]


def _peft_layer(problem: Problem) -> Any:
    """PEFT's adapter on bitsandbytes' layer, with the numbers of the problem's."""
    from bitsandbytes.nn.modules import Linear4bit
    from peft import LoraConfig, get_peft_model

    N, K = problem.weight.shape
    with torch.device("meta"):
        base = Linear4bit(K, N, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    base.weight = parameter(problem.weight.quantized)
    config = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), lora_dropout=0.0, target_modules=["0"])
    layer: Any = get_peft_model(torch.nn.Sequential(base), config).base_model.model[0]  # pyright: ignore
    for part, value in zip((layer.lora_A, layer.lora_B), problem.adapter, strict=True):
        part["default"].to(value.device).weight.data.copy_(value)
    return layer


def _peft_run(both_ways: Callable[..., tuple[torch.Tensor, ...]], layer: Any) -> tuple[torch.Tensor, ...]:
    """Under autocast, as people train with it: without, the adapter's products are in float32."""
    with torch.autocast(layer.weight.device.type, torch.bfloat16, cache_enabled=False):
        return both_ways(layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight)


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
    Provider(
        "ours, fused", _fused, operations=("linear", "input gradient", *OPERATIONS[-2:]), tolerance=FUSED, triton=True
    ),
    Provider("bf16", _bf16, operations=("dequantize", "linear", "input gradient", *OPERATIONS[-2:]), dense=True),
    Provider(
        "bitsandbytes", _bitsandbytes, _bitsandbytes_weight, tolerance=PEER, table=0.002, package="bitsandbytes"
    ),
    Provider(
        "unsloth", _unsloth, operations=("dequantize", "linear", "input gradient"), tolerance=PEER, table=0.002,
        package="unsloth", graph=False,
    ),
]  # fmt: skip
