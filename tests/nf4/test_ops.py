"""The operators: their registration, their gradients, what they keep, and that forward and backward agree."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qloralab.lora import ops as lora_ops
from qloralab.nf4 import ops
from qloralab.nf4.codebook import normal_float
from qloralab.nf4.tensor import QuantizedTensor, linear, quantize

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
double_quants = pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
biases = pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
dropouts = pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
dropouts_of_dtypes = pytest.mark.parametrize(
    ("dtype", "p"), [(torch.float32, 0.0), (torch.bfloat16, 0.3)], ids=["f32-plain", "bf16-dropout"]
)
x_shapes = pytest.mark.parametrize("rows", [(), (1,), (0,), (63,), (2, 3), (2, 0), (2, 3, 5)], ids=str)

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


def assert_near(found: Tensor, exact: Tensor, tolerance: float) -> None:
    assert found.shape == exact.shape
    assert found.isfinite().all()
    assert (found.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("n", [0, 1, 65, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_opcheck_quantize(n, dtype):
    weight = torch.randn(n).to(dtype)
    torch.library.opcheck(ops.quantize_blockwise, (weight, normal_float(4), 64))
    torch.library.opcheck(ops.quantize_blockwise, (torch.randn(9, 7).to(dtype).t(), normal_float(4), 32))  # a view
    torch.library.opcheck(ops.quantize_scales, (weight.float().abs(),))


@dtypes
@double_quants
def test_opcheck_dequantize(dtype, double_quant):
    for shape in [(N, K), (0, K), (1,), (3, 5, 7)]:
        torch.library.opcheck(ops.dequantize, (*weight_of(shape, double_quant).operands(), dtype))


@dtypes
@double_quants
@biases
def test_opcheck_linear(dtype, double_quant, bias):
    weight = weight_of(double_quant=double_quant)
    b = torch.randn(N, dtype=dtype, requires_grad=True) if bias else None
    for rows in [(3,), (), (2, 3)]:
        x = torch.randn(*rows, K, dtype=dtype, requires_grad=True)
        torch.library.opcheck(ops.linear, (x, *weight.operands(), b))


@dtypes
@double_quants
def test_opcheck_linear_grad_input(dtype, double_quant):
    weight = weight_of(double_quant=double_quant)
    for rows in [(3,), (2, 3)]:
        grad = torch.randn(*rows, N, dtype=dtype, requires_grad=True)
        torch.library.opcheck(ops.linear_grad_input, (grad, *weight.operands()))


@dtypes
@dropouts
def test_opcheck_dropout(dtype, p):
    for x in (torch.randn(3, K), torch.randn(K), torch.randn(K, 4).t(), torch.randn(2, 0, K)):
        torch.library.opcheck(lora_ops.dropout, (x.to(dtype).requires_grad_(), SEED, p))


@dropouts_of_dtypes
@biases
def test_opcheck_adapted_linear(dtype, bias, p):
    weight = weight_of(double_quant=bias).operands()
    b = torch.randn(N, dtype=dtype, requires_grad=True) if bias else None
    for x in (torch.randn(3, K), torch.randn(K), torch.randn(2, K, 3).transpose(1, 2), torch.randn(0, K)):
        leaf = x.to(dtype).requires_grad_()
        torch.library.opcheck(lora_ops.adapted_linear, (leaf, *weight, b, *adapter_of(), 2.0, p, SEED))


@dropouts_of_dtypes
@pytest.mark.parametrize("needs_input", [False, True], ids=["x-frozen", "x-trains"])
def test_opcheck_adapted_linear_backward(dtype, p, needs_input):
    weight, (A, B) = weight_of(double_quant=needs_input).operands(), adapter_of()
    for rows in [(), (2, 3), (0,)]:
        x, h = torch.randn(*rows, K, dtype=dtype), torch.randn(int(np.prod(rows)), 5, dtype=dtype)
        for grad in (torch.randn(*rows, N, dtype=dtype), torch.ones((), dtype=dtype).expand(*rows, N)):
            torch.library.opcheck(
                lora_ops.adapted_linear_backward,
                (grad, x, h, *weight, A.detach(), B.detach(), 2.0, p, SEED, needs_input),
            )


def test_opcheck_linear_of_views():
    for x in (torch.randn(2, K, 3).transpose(1, 2), torch.randn(1, 3, K).expand(2, 3, K), torch.randn(K, 4).t()):
        torch.library.opcheck(ops.linear, (x.requires_grad_(), *weight_of().operands(), None))
        torch.library.opcheck(ops.linear_grad_input, (x.detach()[..., :N].requires_grad_(), *weight_of().operands()))


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
    weight, bias, adapter = weight_of().operands(), torch.randn(N), (*adapter_of(), 2.0, 0.3, SEED)
    x, grad, h = torch.randn(3, K), torch.randn(3, N), torch.randn(3, 5)
    given: tuple[Any, ...] = {
        ops.linear: (x, *weight, bias),
        ops.linear_grad_input: (grad, *weight),
        lora_ops.adapted_linear: (x, *weight, bias, *adapter),
        lora_ops.adapted_linear_backward: (grad, x, h, *weight, *adapter, True),
    }[operator]
    before = [part.clone() if isinstance(part, Tensor) else part for part in given]
    with Called() as called, torch.no_grad():
        operator.reference(*given)
    assert called.names == [inner]
    for part, copy in zip(given, before, strict=True):
        assert torch.equal(part, copy) if isinstance(part, Tensor) else part == copy


@dtypes
@double_quants
@biases
@x_shapes
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


@dtypes
def test_double_backward_equals_the_dense_layer(dtype):
    weight = weight_of()

    def second(layer, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    x = torch.randn(3, K).to(dtype)
    found = second(lambda x: linear(x, weight), x)
    dense = weight.dequantize(dtype).double()
    # Six roundings of intermediate results, each of the size that TOLERANCE allows one.
    assert_near(found, second(lambda x: F.linear(x, dense), x.double()), 6 * TOLERANCE[dtype])


@pytest.mark.parametrize("origin", [torch.float32, torch.bfloat16, torch.float16], ids=["of-f32", "of-bf16", "of-f16"])
@dtypes
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


@dtypes
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


def test_same_input_same_bits():
    weight, x, g = weight_of((64, 1000)), torch.randn(63, 1000), torch.randn(63, 64)
    assert torch.equal(linear(x, weight), linear(x, weight))
    operands = weight.operands()
    assert torch.equal(ops.linear_grad_input(g, *operands), ops.linear_grad_input(g, *operands))


def test_the_error_of_the_product_is_that_of_the_weight():
    # bitsandbytes' bound: N(0, 1) inputs, weights N(0, 1) / sqrt(K), mean error under 0.115; NF4 has 0.09.
    weight, x = torch.randn(256, 512) / np.sqrt(512), torch.randn(64, 512)
    error = (linear(x, quantize(weight)) - x @ weight.t()).abs().mean().item()
    assert 0.05 < error < 0.115


def compiled_and_eager(backend: str, function: Any, *inputs: Tensor | None) -> list[list[Any]]:
    """The result and every gradient of a function, from ``torch.compile(fullgraph=True)`` and without it."""
    torch._dynamo.reset()  # it refuses the ninth variant of one function
    results = []
    for run in (torch.compile(function, backend=backend, fullgraph=True), function):
        leaves = [None if leaf is None else leaf.detach().clone().requires_grad_() for leaf in inputs]
        y = run(*leaves)
        y.square().sum().backward()
        results.append([y.detach()] + [leaf.grad for leaf in leaves if leaf is not None])
    return results


def assert_compiles(function: Any, *inputs: Tensor | None) -> None:
    compiled, eager = compiled_and_eager("aot_eager", function, *inputs)
    for found, expected in zip(compiled, eager, strict=True):
        assert torch.equal(found, expected)


@dtypes
@double_quants
@biases
def test_linear_compiles_to_one_graph_with_its_backward(dtype, double_quant, bias):
    weight = weight_of(double_quant=double_quant)
    b = torch.randn(N, dtype=dtype) if bias else None
    assert_compiles(lambda x, b: linear(x * 2, weight, b).relu(), torch.randn(3, K, dtype=dtype), b)


@dtypes
@biases
@dropouts
def test_adapted_linear_compiles_to_one_graph_with_its_backward(dtype, bias, p):
    weight = weight_of()
    b = torch.randn(N, dtype=dtype) if bias else None

    def function(x, b, A, B):
        return lora_ops.adapted_linear(x * 2, *weight.operands(), b, A, B, 2.0, p, SEED)[0].relu()

    assert_compiles(function, torch.randn(2, 3, K, dtype=dtype), b, *adapter_of())


@dtypes
def test_dropout_compiles_to_one_graph_with_its_backward(dtype):
    assert_compiles(lambda x: lora_ops.dropout(x * 2, SEED, 0.3).relu(), torch.randn(3, K, dtype=dtype))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiles_with_inductor():
    weight = weight_of()

    def function(x, b, A, B):
        y = linear(x * 2, weight, b).relu()
        return y + lora_ops.adapted_linear(x, *weight.operands(), b, A, B, 2.0, 0.3, SEED)[0].relu()

    inputs = torch.randn(4, K), torch.randn(N), *adapter_of()
    compiled, eager = compiled_and_eager("inductor", function, *inputs)
    for found, expected in zip(compiled, eager, strict=True):
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


@pytest.mark.parametrize("which", ["x", "bias"])
def test_a_call_with_a_gradient_has_one(which):
    q, x, bias = quantize(torch.randn(96, 128)), torch.randn(3, 128), torch.randn(96)
    {"x": x, "bias": bias}[which].requires_grad_()
    y = ops.linear(x, *q.operands(), bias)
    assert y.requires_grad
    with torch.no_grad():
        assert not ops.linear(x, *q.operands(), bias).requires_grad


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
