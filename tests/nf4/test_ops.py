"""The operators: their registration, their gradients, what they keep, and that forward and backward agree."""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qloralab.lora import ops as lora_ops
from qloralab.nf4 import ops
from qloralab.nf4.codebook import normal_float
from qloralab.nf4.packed import DTYPES
from qloralab.nf4.tensor import QuantizedTensor, linear, quantize

from .weights import assert_near, biases, double_quants

low_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])

N, K = 33, 65  # odd, and blocks cross rows
SEED = torch.tensor(7)
# Root-mean-square error of the product relative to that of the float64 one. float32: 65 terms, a rounding of 6e-8
# each. bfloat16: one rounding of the result, 2**-9 / sqrt(3) = 1.1e-3 rms at most; the sum is in float32.
TOLERANCE = {torch.float32: 5e-7, torch.bfloat16: 2e-3}


def weight_of(shape=(N, K), double_quant: bool = True) -> QuantizedTensor:
    return quantize(torch.randn(shape), double_quant=double_quant)


def adapter_of(rank: int = 5) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r], float32, trainable."""
    return torch.randn(rank, K, requires_grad=True), torch.randn(N, rank, requires_grad=True)


def views(*shape: int) -> list[Tensor]:
    """Tensors of some sizes in other memory layouts."""
    return [
        torch.randn(shape),
        torch.randn(shape[::-1]).permute(*range(len(shape))[::-1]),
        torch.ones(()).expand(shape),
    ]


def of_quantize() -> Iterator[tuple[Any, ...]]:
    for dtype in DTYPES:
        for weight in (torch.randn(0), torch.randn(1), torch.randn(65), torch.randn(20_000), torch.randn(9, 7).t()):
            yield weight.to(dtype), normal_float(4), 64


def of_dequantize() -> Iterator[tuple[Any, ...]]:
    for shape, dtype, double_quant in itertools.product([(N, K), (0, K), (1,), (3, 5, 7)], DTYPES[:2], [False, True]):
        yield *weight_of(shape, double_quant).operands(), dtype


def of_linear() -> Iterator[tuple[Any, ...]]:
    for x, dtype, double_quant in itertools.product(
        [torch.randn(K), *views(2, 3, K), *views(4, K)], DTYPES[:2], [False, True]
    ):
        bias = torch.randn(N, dtype=dtype, requires_grad=True) if double_quant else None
        yield x.detach().to(dtype).requires_grad_(), *weight_of(double_quant=double_quant).operands(), bias


def of_linear_grad_input() -> Iterator[tuple[Any, ...]]:
    for grad, dtype, double_quant in itertools.product([torch.randn(3, N), *views(2, 3, N)], DTYPES[:2], [False, True]):
        yield grad.detach().to(dtype).requires_grad_(), *weight_of(double_quant=double_quant).operands()


PLAIN_AND_DROPOUT = [(torch.float32, 0.0), (torch.bfloat16, 0.3)]


def of_dropout() -> Iterator[tuple[Any, ...]]:
    for x, (dtype, p) in itertools.product([torch.randn(K), torch.randn(2, 0, K), *views(4, K)], PLAIN_AND_DROPOUT):
        yield x.detach().to(dtype).requires_grad_(), SEED, p


def of_adapted_linear() -> Iterator[tuple[Any, ...]]:
    for x, (dtype, p), bias in itertools.product(
        [torch.randn(K), torch.randn(0, K), *views(2, 3, K)[:2]], PLAIN_AND_DROPOUT, [False, True]
    ):
        b = torch.randn(N, dtype=dtype, requires_grad=True) if bias else None
        weight = weight_of(double_quant=bias).operands()
        yield x.detach().to(dtype).requires_grad_(), *weight, b, *adapter_of(), 2.0, p, SEED


def of_adapted_linear_backward() -> Iterator[tuple[Any, ...]]:
    for rows, (dtype, p), needs_input in itertools.product([(), (2, 3), (0,)], PLAIN_AND_DROPOUT, [False, True]):
        x, h = torch.randn(*rows, K, dtype=dtype), torch.randn(math.prod(rows), 5, dtype=dtype)
        adapter = (*(t.detach() for t in adapter_of()), 2.0, p, SEED, needs_input)
        for grad in (torch.randn(*rows, N, dtype=dtype), torch.ones((), dtype=dtype).expand(*rows, N)):
            yield grad, x, h, *weight_of(double_quant=needs_input).operands(), *adapter


# Of every operator, what it is given.
GIVEN = {
    ops.quantize_blockwise: of_quantize,
    ops.quantize_scales: lambda: ((torch.randn(n).abs(),) for n in (0, 1, 65, 20_000)),
    ops.dequantize: of_dequantize,
    ops.linear: of_linear,
    ops.linear_grad_input: of_linear_grad_input,
    lora_ops.dropout: of_dropout,
    lora_ops.adapted_linear: of_adapted_linear,
    lora_ops.adapted_linear_backward: of_adapted_linear_backward,
}


@pytest.mark.parametrize("operator", GIVEN, ids=lambda operator: operator._name)
def test_opcheck(operator):
    """Schema, fake, autograd, and autograd under ``torch.compile`` with shapes that change."""
    for arguments in GIVEN[operator]():
        torch.library.opcheck(operator, arguments)


def test_slabs_change_nothing(monkeypatch):
    weight, arguments = torch.randn(70, 65), (normal_float(4), 64)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "_SLAB", 1000)
        found = ops.quantize_blockwise.reference(weight, *arguments)
    for part, expected in zip(found, ops.quantize_blockwise.reference(weight, *arguments), strict=True):
        assert torch.equal(part, expected)


class Called(TorchDispatchMode):
    """Notes the operators of the namespace ``qloralab`` that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "qloralab":
            self.names.append(func._schema.name.removeprefix("qloralab::"))
        return func(*args, **(kwargs or {}))


INNER = {
    ops.linear: "dequantize",
    ops.linear_grad_input: "dequantize",
    lora_ops.adapted_linear: "linear",
    lora_ops.adapted_linear_backward: "linear_grad_input",
}


@pytest.mark.parametrize(("operator", "inner"), INNER.items(), ids=lambda it: getattr(it, "_name", it))
def test_a_reference_calls_the_operator_that_it_contains_and_changes_nothing(operator, inner):
    """So a faster inner operator serves the outer one."""
    *_, given = GIVEN[operator]()
    before = [part.clone() if isinstance(part, Tensor) else part for part in given]
    with Called() as called, torch.no_grad():
        operator.reference(*given)
    assert called.names == [inner]
    for part, copy in zip(given, before, strict=True):
        assert torch.equal(part, copy) if isinstance(part, Tensor) else part == copy


@low_dtypes
@double_quants
@biases
@pytest.mark.parametrize("rows", [(), (1,), (0,), (63,), (2, 3), (2, 0), (2, 3, 5)], ids=str)
def test_forward_and_gradients_against_float64(dtype, double_quant, bias, rows):
    weight = weight_of(double_quant=double_quant)
    x = torch.randn(*rows, K).to(dtype).requires_grad_()
    b = torch.randn(N).to(dtype).requires_grad_() if bias else None
    grad = torch.randn(*rows, N).to(dtype)
    y = linear(x, weight, b)
    y.backward(grad)

    x64, b64 = (None if t is None else t.detach().double().requires_grad_() for t in (x, b))
    y64 = F.linear(x64, weight.dequantize(dtype).double(), b64)  # pyright: ignore[reportArgumentType]
    y64.backward(grad.double())

    assert y.dtype == dtype
    assert_near(y.detach(), y64.detach(), TOLERANCE[dtype])
    for found, exact in [(x, x64), (b, b64)]:
        if found is not None and exact is not None:
            assert found.grad is not None
            assert exact.grad is not None
            assert found.grad.dtype == dtype
            assert_near(found.grad, exact.grad, TOLERANCE[dtype])


@double_quants
@biases
def test_first_and_second_derivatives_numerically(double_quant, bias):
    weight = weight_of((5, 7), double_quant)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, dtype=torch.float64, requires_grad=True) if bias else None
    inputs = (x,) if b is None else (x, b)
    assert torch.autograd.gradcheck(lambda x, b=None: linear(x, weight, b), inputs)
    assert torch.autograd.gradgradcheck(lambda x, b=None: linear(x, weight, b), inputs)
    g = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: ops.linear_grad_input(g, *weight.operands()), (g,))


@pytest.mark.parametrize("origin", [torch.float32, torch.bfloat16, torch.float16], ids=["of-f32", "of-bf16", "of-f16"])
@low_dtypes
@double_quants
def test_forward_and_backward_see_the_same_bits(origin, dtype, double_quant):
    # The identity reads the weight out of each direction: a sum of one number and zeros is exact.
    weight = quantize(torch.randn(N, K).to(origin), double_quant=double_quant)
    forward = linear(torch.eye(K, dtype=dtype), weight).t()
    x = torch.zeros(N, K, dtype=dtype, requires_grad=True)
    linear(x, weight).backward(torch.eye(N, dtype=dtype))
    assert x.grad is not None
    assert torch.equal(forward, weight.dequantize(dtype))
    assert torch.equal(x.grad, forward)


@low_dtypes
@double_quants
def test_backward_keeps_the_packed_weight_only(dtype, double_quant):
    weight = weight_of((256, 512), double_quant)
    saved: dict[int, int] = {}

    def note(part: Tensor) -> Tensor:
        saved[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        return part

    x = torch.randn(3, 512, dtype=dtype, requires_grad=True)
    b = torch.randn(256, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda part: part):
        y = linear(x, weight, b)
    assert sum(saved.values()) == weight.nbytes + weight.values.nbytes
    y.sum().backward()
    assert x.grad is not None


def test_gradients_only_where_asked_for():
    weight, x, b = weight_of(), torch.randn(3, K), torch.randn(N)
    assert not linear(x, weight, b).requires_grad
    y = linear(x, weight, b.requires_grad_())
    y.sum().backward()
    assert x.grad is None
    assert b.grad is not None
    assert b.grad.tolist() == [3.0] * N


@pytest.mark.parametrize("shape", [(0, 64), (5, 0)], ids=["no-outputs", "no-inputs"])
def test_an_empty_weight(shape):
    weight = weight_of(shape)
    x = torch.randn(3, shape[1], requires_grad=True)
    b = torch.ones(shape[0], requires_grad=True)
    y = linear(x, weight, b)
    assert torch.equal(y, torch.ones(3, shape[0]))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))  # pyright: ignore[reportArgumentType]
    assert torch.equal(b.grad, torch.full((shape[0],), 3.0))  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiles_with_inductor():
    weight = weight_of()

    def function(x, b, A, B):
        y = linear(x * 2, weight, b).relu()
        return y + lora_ops.adapted_linear(x, *weight.operands(), b, A, B, 2.0, 0.3, SEED)[0].relu()

    results, inputs = [], (torch.randn(4, K), torch.randn(N), *adapter_of())
    torch._dynamo.reset()
    for run in (torch.compile(function, backend="inductor", fullgraph=True), function):
        leaves = [leaf.detach().clone().requires_grad_() for leaf in inputs]
        y = run(*leaves)
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results, strict=True):
        assert_near(found, expected.double(), TOLERANCE[torch.float32])


def test_a_call_without_a_gradient_is_the_operator():
    q, x = quantize(torch.randn(96, 128)), torch.randn(3, 128)
    y = ops.linear(x, *q.operands(), None)
    assert not y.requires_grad
    assert torch.equal(y, torch.ops.qloralab.linear(x, *q.operands(), None))
    assert not y.is_inference()  # it may be used where a gradient is wanted later
    w = torch.randn(96, requires_grad=True)
    (y * w).sum().backward()
    assert torch.equal(w.grad, y.sum(0))  # pyright: ignore[reportArgumentType]


def test_a_call_under_a_transform_is_refused_as_the_operator_is():
    q, x = quantize(torch.randn(96, 128)), torch.randn(3, 128)
    with pytest.raises(RuntimeError, match="functorch transforms"):  # and is no gradient of zeros
        torch.func.grad(lambda x: ops.linear(x, *q.operands(), None).sum())(x)


# Every operator that has a derivative, as a function of its first argument, of K elements a row; and that row's length.
OF_X: dict[str, tuple[Any, int]] = {
    "linear": (lambda q, x, b: ops.linear(x, *q.operands(), b), K),
    "linear_grad_input": (lambda q, x, b: ops.linear_grad_input(x, *q.operands()), N),
    "dropout": (lambda q, x, b: lora_ops.dropout(x, SEED, 0.3), K),
    "adapted_linear": (
        lambda q, x, b: lora_ops.adapted_linear(
            x, *q.operands(), b, *(t.detach() for t in adapter_of()), 2.0, 0.3, SEED
        )[0],
        K,
    ),
}
of_x = pytest.mark.parametrize("operator", OF_X)


@of_x
@pytest.mark.parametrize("rows", [(), (3,), (2, 3)], ids=str)
def test_a_result_may_be_changed_in_place(operator, rows):
    """As that of nn.Linear may, by nn.ReLU(inplace=True)."""
    function, width = OF_X[operator]
    q, x, b, gradients = weight_of(), torch.randn(*rows, width), torch.randn(N), []
    for relu in (Tensor.relu_, Tensor.relu):
        torch.manual_seed(0)  # of the adapter
        leaf = x.clone().requires_grad_()
        relu(function(q, leaf, b)).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")  # torch's own, of forward mode
@of_x
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("how", ["object", "torch.ops"])
def test_forward_mode_is_refused_and_no_tangent_is_dropped(operator, requires_grad, how, monkeypatch):
    function, width = OF_X[operator]
    if how == "torch.ops":
        monkeypatch.setattr(
            ops if hasattr(ops, operator) else lora_ops, operator, getattr(torch.ops.qloralab, operator)
        )
    q, x, b = weight_of(), torch.randn(3, width, requires_grad=requires_grad), torch.randn(N)
    refused = rf"qloralab::{operator} has no forward-mode derivative"
    with pytest.raises(NotImplementedError, match=refused):
        torch.func.jvp(lambda x: function(q, x, b), (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=refused):
            function(q, forward_ad.make_dual(x, torch.ones_like(x)), b)
        assert torch.equal(function(q, torch.zeros(3, width), b * 0), torch.zeros_like(function(q, x, b)))  # no tangent


@of_x
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_what_would_be_truncated_is_refused(operator, dtype):
    function, width = OF_X[operator]
    with pytest.raises(TypeError, match=rf"floating-point (dtype|tensor).*{dtype}|{dtype}; a floating-point"):
        function(weight_of(), torch.ones(3, width, dtype=dtype), None)


ALONE = """
import sys
import torch
from qloralab.lora import ops as lora_ops
from qloralab.nf4 import ops
from qloralab.nf4.codebook import normal_float
W, x, A = torch.randn(8, 64), torch.randn(3, 64), torch.randn(2, 64)
packed, absmax = ops.quantize_blockwise(W, normal_float(4), 64)
weight = packed, absmax, None, None, normal_float(4), (8, 64), 64
y, _ = lora_ops.adapted_linear(x, *weight, None, A, torch.zeros(8, 2), 1.0, 0.0, torch.tensor(0))
torch.testing.assert_close(y, x @ ops.dequantize(*weight, torch.float32).T)
print([name for name in sys.modules if name.startswith("qloralab.kernels")])
"""


def test_the_definition_works_without_the_kernels():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
