"""``qloralab doctor``: what this machine has, which implementation serves each operator and why, and a short self-test.

The self-test runs every operator that a faster implementation serves beside its reference, on the same random numbers:

* ``quantize`` and ``dequantize`` have the reference's bits;
* products (``linear``, its gradient, the adapted layer) add up in another order, and the update of AdamW multiplies in
  another: their root-mean-square error against float64 is at most twice that of the reference.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qloralab.kernels import dispatch, report
from qloralab.lora.config import LoraConfig
from qloralab.lora.layer import LoRALinear
from qloralab.nf4 import processor
from qloralab.nf4.linear import QuantizedLinear
from qloralab.nf4.tensor import linear, quantize
from qloralab.optim.paged_adamw import PagedAdamW

from .compute import check_environment, run_device
from .errors import UserError
from .train.run_directory import versions

_N, _K, _TOKENS = 192, 320, 24


def doctor(out: Path | None, console: Console) -> bool:
    """Look, test, show.

    Args:
        out: a JSON file to write, or None.
        console: for the tables.

    Returns:
        whether every test passed.

    Raises:
        UserError: an environment variable asks for what cannot be had; or out cannot be written.
    """
    check_environment()
    found = {"machine": machine(), "operators": report.implementations(run_device().type), "tests": list(self_test())}
    _show(found, console)
    if out:
        try:
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error.strerror}") from None
    return all(test["passed"] for test in found["tests"])


def machine() -> dict[str, str]:
    """Versions, processor, compilers and GPU, each as one line."""
    dtype, why = processor.compute_dtype(run_device())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        **versions(),
        "instruction sets": ", ".join(processor.distinct_isas()),
        "computes in": f"{str(dtype).removeprefix('torch.')}: {why}",
        "C compiler": _version("cc", "gcc", "clang"),
        "C++ compiler": _version("g++", "c++", "clang++"),
        "GPU": gpu,
    }


def _version(*names: str) -> str:
    """The first line that the first compiler that is there says of itself."""
    for name in names:
        if path := shutil.which(name):
            said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
            return said.splitlines()[0] if said else path
    return "none: the operators run in plain PyTorch"


def self_test() -> Iterator[dict[str, Any]]:
    """Each operator beside its reference: dictionaries with test, passed, found and seconds."""
    for name, run, bound in (
        ("quantize: bits", _codes, None),
        ("dequantize: bits", _weights, None),
        ("linear: error", _product, 2.0),
        ("gradient of the input: error", _gradient, 2.0),
        ("adapted layer: error", _adapted, 2.0),
        ("AdamW: error", _update, 2.0),
    ):
        start = time.perf_counter()
        ours, expected, exact = _both(run)
        if bound is None:
            passed = all(one.equal(other) for one, other in zip(ours, expected, strict=True))
            found = "equal" if passed else "differ"
        else:
            ratio = _error(ours, exact) / max(_error(expected, exact), 1e-300)
            passed, found = ratio <= bound, f"{ratio:.2f} of the reference's"
        yield {"test": name, "passed": passed, "found": found, "seconds": round(time.perf_counter() - start, 3)}


_Results = list[Tensor]


def _both(run: Callable[[torch.dtype], _Results]) -> tuple[_Results, _Results, _Results]:
    """What is chosen here, the reference, and float64."""
    dtype = processor.compute_dtype(run_device()).dtype
    ours = run(dtype)
    with dispatch.use("reference"):
        return ours, run(dtype), run(torch.float64)


def _error(found: _Results, exact: _Results) -> float:
    return sum(float((one.double() - other).square().sum()) for one, other in zip(found, exact, strict=True)) ** 0.5


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(run_device())


def _codes(dtype: torch.dtype) -> _Results:
    q = quantize(_random(_N, _K))
    return [part for part in q.operands().tensors if part is not None]


def _weights(dtype: torch.dtype) -> _Results:
    return [quantize(_random(_N, _K)).dequantize(dtype).view(torch.uint8)]


def _product(dtype: torch.dtype) -> _Results:
    weight, x = quantize(_random(_N, _K)), _random(_TOKENS, _K)
    if dtype == torch.float64:
        return [x.to(_low()).double() @ weight.dequantize(_low()).double().T]
    return [linear(x.to(dtype), weight)]


def _gradient(dtype: torch.dtype) -> _Results:
    weight, grad = quantize(_random(_N, _K)), _random(_TOKENS, _N)
    if dtype == torch.float64:
        return [grad.to(_low()).double() @ weight.dequantize(_low()).double()]
    x = torch.zeros(_TOKENS, _K, dtype=dtype, device=grad.device, requires_grad=True)
    linear(x, weight).backward(grad.to(dtype))
    assert x.grad is not None
    return [x.grad]


def _adapted(dtype: torch.dtype) -> _Results:
    weight, x = quantize(_random(_N, _K)), _random(_TOKENS, _K).to(_low())
    layer = LoRALinear(QuantizedLinear(weight, compute_dtype=_low()), LoraConfig(r=8, lora_alpha=16)).to(x.device)
    with torch.no_grad():
        layer.lora_A.copy_(_random(8, _K) / 8)
        layer.lora_B.copy_(_random(_N, 8) / 8)
        if dtype == torch.float64:
            base = x.double() @ weight.dequantize(_low()).double().T
            return [base + 2 * (x.double() @ layer.lora_A.double().T) @ layer.lora_B.double().T]
        return [layer(x)]


def _update(dtype: torch.dtype) -> _Results:
    exact = dtype == torch.float64
    parameter = torch.nn.Parameter(_random(_N, _K).to(torch.float64 if exact else torch.float32))
    optimizer = (torch.optim.AdamW if exact else PagedAdamW)([parameter], lr=1e-3, weight_decay=0.0)
    for step in range(3):
        parameter.grad = (_random(_N, _K) * (step + 1)).to(parameter.dtype)
        optimizer.step()
    return [parameter.detach()]


def _low() -> torch.dtype:
    return processor.compute_dtype(run_device()).dtype


def _show(found: dict[str, Any], console: Console) -> None:
    facts = Table(box=box.SIMPLE, show_header=False)
    for name, value in found["machine"].items():
        facts.add_row(name, value)
    console.print(facts)
    served = Table("operator", "implementation", "why", box=box.SIMPLE)
    for row in found["operators"]:
        served.add_row(row["operator"], row["implementation"], row["why"])
    console.print(served)
    tests = Table("self-test", "", "found", box=box.SIMPLE)
    for test in found["tests"]:
        tests.add_row(test["test"], "passed" if test["passed"] else "FAILED", test["found"])
    console.print(tests)
