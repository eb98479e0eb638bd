"""Which kernel serves which case on CUDA. The functions are called directly, on the interpreter's CPU tensors."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import qloralab as ql
from qloralab.benchmarks import gpu_canaries
from qloralab.benchmarks.gpu_canaries import Canary, Guard, canaries, verdict
from qloralab.kernels import report
from qloralab.kernels.gpu import adapter, choice, grad_B, operators, self_check, two_pass
from qloralab.lora import ops as lora_ops
from qloralab.lora.dropout import keep_mask, rate
from qloralab.nf4 import ops
from qloralab.nf4.codebook import codebook_values
from qloralab.nf4.packed import DTYPES

ROOT = Path(__file__).resolve().parents[3]
NAMES = tuple(operators.KERNELS)
# Called with several unpacked tuples, whose lengths a type checker does not follow.
adapted_linear: Any = operators.adapted_linear
adapted_linear_backward: Any = operators.adapted_linear_backward
dequantized: Any = ops.dequantize.reference
definition_of_linear: Any = lora_ops.adapted_linear.reference
definition_of_backward: Any = lora_ops.adapted_linear_backward.reference


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(self_check.VARIABLE, raising=False)
    monkeypatch.setattr(self_check, "_passed", {})
    monkeypatch.setattr(self_check, "_serving", {})
    monkeypatch.setattr(self_check, "_warned", set())
    monkeypatch.setattr(two_pass, "_workspaces", {})


@pytest.fixture
def served(monkeypatch) -> list[str]:
    """The names of the kernels that were launched, in order."""
    launched: list[str] = []
    find = self_check._launcher

    def launcher(name: str):
        launch = find(name)

        @functools.wraps(launch)
        def noted(*args, **kwargs):
            launched.append(name)
            return launch(*args, **kwargs)

        return noted

    def dequantize(*args, **kwargs):
        launched.append("dequantize")
        return find("dequantize")(*args, **kwargs)

    monkeypatch.setattr(self_check, "_failure", lambda *_: "")
    monkeypatch.setattr(self_check, "_launcher", launcher)
    monkeypatch.setattr(two_pass, "dequantize", dequantize)
    for module, name in ((adapter, "project"), (adapter, "grad_A"), (grad_B, "grad_B"), (two_pass, "masked_low_rank")):
        monkeypatch.setattr(module, name, launcher(name))
    return launched


def weight(device: str, shape=(63, 65), **options) -> ql.QuantizedTensor:
    return ql.quantize(torch.randn(shape), **options).to(device)


def same(result, expected) -> bool:
    pairs = zip(result, expected, strict=True) if isinstance(expected, tuple) else [(result, expected)]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_is_served(dtype, device, served):
    w, values = torch.randn(33, 35, device=device).to(dtype), codebook_values("nf4").to(device)
    codes, absmax = operators.quantize_blockwise(w.T, values, 64)
    assert same((codes, absmax), ops.quantize_blockwise.reference(w.T.contiguous(), values, 64))
    assert same(operators.quantize_scales(absmax), ops.quantize_scales.reference(absmax))
    assert served == ["quantize_blockwise", "quantize_scales"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        ((2,), {}), ((), {"double_quant": False}), ((0,), {"block_size": 4096}), ((2, 3), {"codebook": "fp4"}),
        ((1, 0, 2), {"shape": (64, 128), "block_size": 128}), ((3,), {"shape": (1, 1), "block_size": 32}),
    ],
    ids=str,
)  # fmt: skip
def test_dequantize_and_the_products_are_served(dtype, tokens, options, device, served):
    operands = weight(device, **options).operands()
    N, K = operands.shape
    x, grad, bias = (torch.randn(*some, device=device).to(dtype) for some in ((*tokens, K), (*tokens, N), (N,)))
    W = ops.dequantize.reference(*operands, dtype)
    assert same(operators.dequantize(*operands, dtype), W)
    for b in (None, bias):
        assert same(operators.linear(x, *operands, b), torch.nn.functional.linear(x, W, b))
    assert same(operators.linear_grad_input(grad, *operands), grad @ W)
    assert served == ["dequantize"] * 4


def test_a_weight_of_one_dimension_is_dequantized(device, served):
    operands = weight(device, shape=(129,)).operands()
    assert same(operators.dequantize(*operands, torch.float32), ops.dequantize.reference(*operands, torch.float32))
    assert served == ["dequantize"]


ADAPTED = {
    "as it is": {},
    "no dropout": {"p": 0.0},
    "most is dropped": {"p": 0.999},
    "rank 1": {"r": 1},
    "rank 100": {"r": 100},
    "no tokens": {"tokens": (0,)},
    "a vector": {"tokens": ()},
    "float32 scales": {"double_quant": False},
}


def adapted(device, dtype=torch.bfloat16, tokens=(2, 9), r=8, p=0.1, **options) -> Any:
    """The arguments of both adapted operators: those of the forward, grad, and the weight's operands in between."""
    operands = weight(device, **options).operands()
    x, grad = (torch.randn(*tokens, size, device=device).to(dtype) for size in (65, 63))
    bias = torch.randn(63, device=device).to(dtype)
    A, B = torch.randn(r, 65, device=device) / 8, torch.randn(63, r, device=device) / 8
    return x, grad, operands, bias, (A, B, 1.5, p, torch.tensor(-77, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ADAPTED.values(), ids=ADAPTED)
def test_the_adapted_products_are_served(dtype, options, device, served):
    x, grad, operands, bias, rest = adapted(device, dtype, **options)
    y, h = adapted_linear(x, *operands, bias, *rest)
    gradients = adapted_linear_backward(grad, x, h, *operands, *rest, True)
    assert served == ["project", "dequantize", "grad_B", "grad_A", "masked_low_rank", "dequantize"]
    wide = x.double(), grad.double(), h.double(), bias.double()
    A, B = (matrix.to(dtype).double() for matrix in rest[:2])
    W = dequantized(*operands, dtype).double()
    scaling, p, seed = rest[2:]
    exact = definition(wide, W, A, B, scaling, p, seed)
    limit = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 2e-6}[dtype]
    for found, right, kind in zip((y, h, *gradients), exact, (dtype, dtype, dtype, None, None), strict=True):
        assert (found.dtype, found.shape) == (kind or torch.float32, right.shape)
        assert (found.double() - right).norm() <= limit * right.norm()


def definition(wide, W, A, B, scaling, p, seed):
    """y, h, dx, dA, dB in float64, by the formulas; dB is from the h that is given."""
    x, grad, h, bias = wide
    rows, g = x.reshape(-1, 65), grad.reshape(-1, 63)
    keep = keep_mask(seed, len(rows), 65, p)
    kept, factor = torch.where(keep, rows, 0), scaling / (1 - rate(p))
    G = factor * g @ B
    y = rows @ W.T + bias + factor * kept @ A.T @ B.T
    dx = g @ W + torch.where(keep, G @ A, 0)
    return y.view(*x.shape[:-1], 63), factor * kept @ A.T, dx.view(x.shape), G.T @ kept, g.T @ h


def test_the_input_gradient_is_left_out_where_it_is_not_needed(device, served):
    x, grad, operands, bias, rest = adapted(device)
    _, h = adapted_linear(x, *operands, bias, *rest)
    served.clear()
    with_it = adapted_linear_backward(grad, x, h, *operands, *rest, True)
    dx, dA, dB = adapted_linear_backward(grad, x, h, *operands, *rest, False)
    assert (dx.shape, dx.dtype) == ((0,), x.dtype)
    assert same((dA, dB), with_it[1:])
    assert served == ["grad_B", "grad_A", "masked_low_rank", "dequantize", "grad_B", "grad_A"]


def elsewhere(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


# What kernels take of the operands of an adapted product is tested on CPUs, but for these, by name.
SPOILED = [
    ("A", torch.Tensor.bfloat16), ("B", torch.Tensor.double), ("A", lambda A: A[:0]), ("seed", torch.Tensor.float),
    ("seed", lambda seed: seed.repeat(2)), ("packed", lambda packed: packed[:-1]),
    *((name, elsewhere) for name in ("seed", "A", "packed", "scales", "absmax2", "offset", "values")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change"), SPOILED, ids=[name for name, _ in SPOILED])
def test_no_kernel_sees_what_does_not_fit(name, change, device):
    x, _, operands, _, (A, B, _, _, seed) = adapted(device)
    assert operators._is_adapted(x, operands, A, B, seed)
    if name in operands._fields:
        assert operators._is_weight(operands, torch.bfloat16)
        operands = operands._replace(**{name: change(getattr(operands, name))})
        assert not operators._is_weight(operands, torch.bfloat16)
    others = {"A": A, "B": B, "seed": seed}
    others |= {name: change(others[name])} if name in others else {}
    if name == "A" and not len(others["A"]):
        others["B"] = B[:, :0]
    assert not operators._is_adapted(x, operands, **others)


def test_an_adapter_in_the_dtype_of_x_goes_to_the_reference(device, served):
    x, grad, operands, bias, (A, B, *rest) = adapted(device)
    arguments = A.bfloat16(), B.bfloat16(), *rest
    y, h = adapted_linear(x, *operands, bias, *arguments)
    assert same((y, h), definition_of_linear(x, *operands, bias, *arguments))
    result = adapted_linear_backward(grad, x, h, *operands, *arguments, True)
    assert same(result, definition_of_backward(grad, x, h, *operands, *arguments, True))
    assert {"project", "grad_A"}.isdisjoint(served)


def test_autocast_changes_no_product(device, served):
    x, grad, operands, bias, rest = adapted(device, torch.float32)

    def run() -> tuple[torch.Tensor, ...]:
        y, h = adapted_linear(x, *operands, bias, *rest)
        plain = operators.linear(x, *operands, bias), operators.linear_grad_input(grad, *operands)
        return y, h, *adapted_linear_backward(grad, x, h, *operands, *rest, True), *plain

    expected = run()
    with torch.autocast(device, dtype=torch.bfloat16):
        assert same(run(), expected)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_codes_of_other_widths_go_to_the_reference(bits, device, served):
    quantized = ql.quantize(torch.randn(8, 64), codebook=f"nf{bits}").to(device)
    operands = quantized.operands()
    x = torch.randn(2, 64, device=device)
    assert same(operators.dequantize(*operands, torch.float32), ops.dequantize.reference(*operands, torch.float32))
    assert operators.linear(x, *operands, None).shape == (2, 8)
    operators.quantize_blockwise(torch.randn(8, 64, device=device), quantized.values, 64)
    assert served == []


def test_nothing_to_do_goes_to_the_reference(device, served):
    values = codebook_values("nf4").to(device)
    codes, absmax = operators.quantize_blockwise(torch.empty(0, 64, device=device), values, 64)
    second = operators.quantize_scales(absmax)
    result = operators.dequantize(codes, *second, values, (0, 64), 64, torch.bfloat16)
    assert (result.shape, result.dtype) == ((0, 64), torch.bfloat16)
    assert served == []


def test_an_input_of_another_width_is_refused_in_words(device, served):
    quantized = weight(device)
    with pytest.raises(RuntimeError, match="shape"):
        operators.linear(torch.randn(2, 64, device=device), *quantized.operands(), None)
    with pytest.raises(RuntimeError, match="shape"):
        operators.linear_grad_input(torch.randn(2, 65, device=device), *quantized.operands())


def test_the_reference_serves_where_it_is_asked_for(device, served, monkeypatch):
    monkeypatch.setenv(self_check.VARIABLE, "reference")
    quantized = weight(device)
    assert same(operators.dequantize(*quantized.operands(), torch.bfloat16), quantized.dequantize(torch.bfloat16))
    operators.linear(torch.randn(2, 65, device=device), *quantized.operands(), None)
    assert served == []


def test_the_functions_are_registered_for_cuda():
    for name in NAMES:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qloralab::{name}", "CUDA"), name
        assert getattr(operators, name).__name__ == name


def rows(device: torch.device | None) -> dict[str, tuple[str, str]]:
    declared = [*NAMES, "dropout"]
    found = operators.report(declared, device)
    assert [row["operator"] for row in found] == declared
    assert all(set(row) == {"operator", "device", "implementation", "why"} for row in found)
    assert {row["device"] for row in found} == {"cuda"}
    return {row["operator"]: (row["implementation"], row["why"]) for row in found}


def test_the_report_says_what_serves(device):
    found = rows(torch.device(device))
    for name in ("quantize_blockwise", "quantize_scales", "dequantize"):
        assert found[name] == ("triton", "it agrees with the definition on this device, bit for bit")
    for name in ("linear", "linear_grad_input", "adapted_linear", "adapted_linear_backward"):
        assert found[name][0] == "two-pass"
        assert found[name][1].endswith("then cuBLAS; " + choice.summary(choice.device(torch.device(device))))
    assert found["adapted_linear"][1].startswith("Triton's dequantize, project, then cuBLAS; ")
    assert found["dropout"] == ("reference", "there is no Triton kernel for it")


@pytest.fixture
def sm_90(monkeypatch) -> None:
    monkeypatch.setattr(choice, "device", lambda _: choice.Device("sm_90", 132, "a card"))


@pytest.mark.usefixtures("sm_90")
def test_the_report_of_a_product_that_is_fused(device, monkeypatch):
    monkeypatch.setattr(self_check, "_failure", lambda *_: "")
    where = torch.device(device)
    way, why = rows(where)["linear"]
    assert way == "fused, two-pass"
    assert why.startswith("fused up to 256 tokens, 128 where the weight has few rows; else Triton's dequantize, then")
    monkeypatch.setattr(choice, "is_exact", lambda: True)
    assert rows(where)["linear"] == ("two-pass", "Triton's dequantize, then cuBLAS; never fused (QLORALAB_EXACT=1)")


@pytest.mark.usefixtures("sm_90")
def test_the_report_of_a_fused_kernel_that_fails(device, monkeypatch):
    monkeypatch.setattr(self_check, "_failure", lambda name, *_: "ptxas" if name == "linear_grad_input" else "")
    assert rows(torch.device(device))["linear"] == ("two-pass", "Triton's dequantize, then cuBLAS; not fused: ptxas")


@pytest.mark.parametrize(
    ("kernel", "asked", "implementation"),
    [("dequantize", "auto", "reference"), ("dequantize", "triton", "none"), ("grad_A", "auto", "reference")],
)
def test_the_report_of_a_kernel_that_fails(kernel, asked, implementation, device, monkeypatch, break_check):
    monkeypatch.setenv(self_check.VARIABLE, asked)
    break_check(kernel, "no such instruction")
    found = rows(torch.device(device))
    for name, kernels in operators.KERNELS.items():
        if kernel in kernels:
            assert found[name] == (implementation, "RuntimeError: no such instruction")
        else:
            assert found[name][0] in ("triton", "two-pass")


def test_the_report_where_the_reference_is_asked_for(device, monkeypatch):
    monkeypatch.setenv(self_check.VARIABLE, "reference")
    assert set(rows(torch.device(device)).values()) == {("reference", "it was asked for (QLORALAB_GPU=reference)")}
    assert self_check._passed == {}


def test_the_report_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = {(row["implementation"], row["why"]) for row in report.implementations("cuda")}
    assert found == {("none", "there is no GPU: torch.cuda.is_available() is False")}


def test_the_report_refuses_another_device():
    with pytest.raises(ValueError, match="cpu or cuda, not 'tpu'"):
        report.implementations("tpu")


def test_importing_and_working_on_the_cpu_does_not_import_triton():
    code = """
import sys, torch, qloralab as ql
import qloralab.checkpoint.models
from qloralab.kernels import report
from qloralab.kernels.gpu import choice, operators
ql.linear(torch.randn(2, 64), ql.quantize(torch.randn(8, 64)))
report.implementations()
choice.decide(8, 64, 2, choice.Device("sm_90", 132, "a card"))
print([name for name in sys.modules if name.split(".")[0] == "triton"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


SMALL = [
    dataclasses.replace(one, run=functools.partial(gpu_canaries._two_streams, shape=(64, 64), turns=3))
    if one.name.startswith("two")
    else one
    for one in canaries([(63, 65), (1, 1)], [(72, 128)])
]


@pytest.mark.parametrize("canary", SMALL, ids=lambda canary: canary.name)
def test_a_canary_holds(canary, device):
    assert verdict(canary, torch.device(device)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("canary", list(canaries()), ids=lambda canary: canary.name)
def test_a_canary_of_full_size_holds(canary):
    assert verdict(canary, torch.device("cuda")) is None


def test_a_canary_sees_a_wrong_bit(device, monkeypatch):
    from qloralab.kernels.gpu import dequantize as module

    right = module.dequantize

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        result.view(torch.int16)[-1, -1] ^= 1
        return result

    monkeypatch.setattr(module, "dequantize", wrong)
    canary = next(one for one in SMALL if one.name == "dequantize 63x65 bfloat16, 8-bit scales")
    assert verdict(canary, torch.device(device)) == "CanaryError: weights: 1 of 4,095 elements differ"


def test_a_canary_sees_a_wrong_product(device, monkeypatch):
    right = two_pass.linear
    monkeypatch.setattr(two_pass, "linear", lambda *args, **options: right(*args, **options) * 1.01)
    canary = next(one for one in SMALL if one.name == "linear 63x65")
    assert str(verdict(canary, torch.device(device))).startswith("CanaryError: error 0.01, 0.003 allowed")


@pytest.mark.parametrize(("place", "side"), [(-1, "before"), (64, "after")])
def test_a_canary_sees_what_is_written_beside_a_tensor(place, side, device):
    def beside(guard: Guard) -> None:
        guard.empty((4,), torch.float32)
        memory = guard.empty((64,), torch.uint8)
        memory.as_strided((1,), (1,), memory.storage_offset() + place).fill_(0)

    assert verdict(Canary("beside", beside), torch.device(device)) == (f"CanaryError: something wrote {side} tensor 1")


def test_a_canary_sees_a_workspace_that_two_products_share(device, monkeypatch):
    shared = torch.empty(64 * 64, dtype=torch.bfloat16, device=device)

    def dequantize(*args, out: torch.Tensor) -> torch.Tensor:
        out.copy_(ops.dequantize.reference(*args))  # the interpreter is for one thread only
        time.sleep(0.001)
        return out

    monkeypatch.setattr(two_pass, "dequantize", dequantize)
    monkeypatch.setattr(two_pass.Workspace, "borrow", lambda self, numel: nullcontext(shared[:numel]))
    canary = Canary("streams", functools.partial(gpu_canaries._two_streams, shape=(64, 64), turns=40))
    assert "products differ" in str(verdict(canary, torch.device(device)))
