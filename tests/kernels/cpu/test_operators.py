"""The operators on CPUs: which C function takes a call, that its results are right, and what is left to the reference.

The C functions are tested in files of their own. Here calls come as users make them: views, other dtypes, shapes
that do not fit, autocast, ``torch.compile``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.profiler import profile

import qloralab as ql
from qloralab.kernels import dispatch
from qloralab.kernels.cpu import operators
from qloralab.kernels.cpu.library import FEW_TOKENS, Library
from qloralab.kernels.cpu.operators import LARGE, ONE_PASS
from qloralab.lora import ops as lora_ops
from qloralab.lora.dropout import keep_mask, rate
from qloralab.nf4 import ops, processor
from qloralab.nf4.codebook import normal_float
from qloralab.nf4.packed import DTYPES
from qloralab.nf4.processor import distinct_isas

pytestmark = pytest.mark.compiler

N, K, R = 33, 65, 5  # odd, and blocks cross rows
SCALING, P, SEED = 1.5, 0.3, torch.tensor(20230523)
NF4 = normal_float(4)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
x_shapes = pytest.mark.parametrize("rows", [(), (1,), (0,), (8,), (9,), (20,), (2, 3), (2, 0, 3), (2, 3, 5)], ids=str)

# Root-mean-square error relative to float64. float32: whole numbers, exact. 16 bits: torch may round the product before
# it adds the bias: twice at most 2**-8 / sqrt(3) for bfloat16, 2**-11 / sqrt(3) for float16.
PANELS = {torch.float32: 0.0, torch.bfloat16: 3e-3, torch.float16: 4e-4}
# The same, adapted: the reference rounds h or G, each of two terms, and their sum, see lora/ops.py. With one token
# there are few numbers to average over.
ADAPTED = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def native() -> Iterator[None]:
    """A call that cannot be compiled fails here."""
    with dispatch.use("native"):
        yield


# The library's functions, and how many arguments those of the adapter have when there is none.
FUNCTIONS = ("quantize", "quantize_scales", "dequantize", "dropout", "linear_few")
PRODUCTS = {"adapted_linear": 4, "adapted_linear_backward": 3}


def fits(name: str, *args: Any) -> bool:
    """Whether the C may read what the weight and the tensors say is there."""
    if name == "dequantize":
        weight, rows, columns, _ = args
        return rows.stop <= weight.rows and columns.stop <= weight.columns
    if name == "adapted_linear_backward":
        weight, grad, *_ = args
        return grad.shape[1:] == (weight.rows,)
    if name in ("linear_few", "adapted_linear"):
        weight, x, _, y, *_ = args
        return x.shape[-1:] == (weight.columns,) and y.shape == (*x.shape[:-1], weight.rows)
    return True


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the library's functions, as they are called; without an adapter, "product" or "product_backward".

    A call whose tensors do not fit the weight fails before it reads memory that is not there.
    """
    made: list[str] = []

    def recording(name: str) -> Callable[..., None]:
        method = getattr(Library, name)

        def call(self: Library, *args: Any, **kwargs: Any) -> None:
            alone = len(args) == PRODUCTS.get(name) and not kwargs
            made.append(name.replace("adapted_linear", "product") if alone else name)
            assert fits(name, *args)
            method(self, *args, **kwargs)

        return call

    for name in (*FUNCTIONS, *PRODUCTS):
        monkeypatch.setattr(Library, name, recording(name))
    return made


@pytest.fixture
def panels(monkeypatch) -> None:
    """bfloat16 by panels, as on a machine that multiplies it on a matrix unit, and panels of a few rows."""
    monkeypatch.setattr(operators, "has_matrix_unit", lambda: True)
    monkeypatch.setattr(operators, "emulates", lambda x: False)
    monkeypatch.setattr(operators, "PANEL_BYTES", 1600)


@pytest.fixture(params=[*distinct_isas(), "panels"])
def path(request: pytest.FixtureRequest, monkeypatch) -> Iterator[str]:
    """The ways to multiply by many tokens: by the library of each instruction set, and by panels."""
    if request.param == "panels":
        request.getfixturevalue("panels")
        yield request.param
        return
    monkeypatch.setattr(operators, "has_matrix_unit", lambda: False)
    with dispatch.use("native", isa=request.param):
        yield request.param


def by_panels(path: str, dtype: torch.dtype) -> bool:
    return path == "panels" and dtype == torch.bfloat16


def whole(*shape: int, dtype: torch.dtype = torch.float32, most: int = 3) -> Tensor:
    return torch.randint(-most, most + 1, shape).to(dtype)


def normal_weight(shape=(N, K), **options: Any):
    return ql.quantize(torch.randn(shape) / shape[-1] ** 0.5, **options).operands()


def adapter(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r], trainable."""
    A, B = torch.randn(R, K) / K**0.5, torch.randn(N, R) / R**0.5
    return A.to(dtype).requires_grad_(), B.to(dtype).requires_grad_()


def error(found: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference, relative to that of the exact values; NaN for NaN."""
    assert found.shape == exact.shape
    difference = (found.double() - exact).norm()
    return (difference / exact.norm()).item() if difference else 0.0


@pytest.mark.parametrize("shape", [(N, K), (LARGE // 1024, 1024)], ids=["small", "large"])
@pytest.mark.parametrize("tokens", [1, ONE_PASS, ONE_PASS + 1, FEW_TOKENS, FEW_TOKENS + 1])
@dtypes
def test_the_number_of_tokens_chooses_the_function(path, dtype, tokens, shape, calls):
    library = dispatch.native()
    assert library is not None
    weight, x = normal_weight(shape), torch.randn(tokens, shape[1]).to(dtype)
    calls.clear()
    ops.linear(x, *weight, None)
    twice = dtype == torch.bfloat16 and library.has_bf16_product and shape[0] * shape[1] >= LARGE
    many = {"dequantize"} if by_panels(path, dtype) else {"product"}
    assert set(calls) == ({"linear_few"} if tokens <= (FEW_TOKENS if twice else ONE_PASS) else many)


@dtypes
def test_an_adapted_layer_is_one_call_each_way(path, dtype, calls):
    weight, x = normal_weight(), torch.randn(20, K, dtype=dtype, requires_grad=True)
    calls.clear()
    lora_ops.adapted_linear(x, *weight, None, *adapter(), SCALING, P, SEED)[0].sum().backward()
    if by_panels(path, dtype):
        assert set(calls) == {"dequantize"}
    else:
        assert calls == ["adapted_linear", "adapted_linear_backward"]


@pytest.mark.parametrize("rows", [(), (2, 3), (2, 12)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_result_may_be_changed_in_place(path, dtype, rows):
    """As that of nn.Linear may, by nn.ReLU(inplace=True)."""
    weight, (A, B) = normal_weight(), adapter()
    bias, x = torch.randn(N).to(dtype), torch.randn(*rows, K).to(dtype)
    for function in (
        lambda x: ops.linear(x, *weight, bias),
        lambda x: ops.linear_grad_input(x[..., :N], *weight),
        lambda x: lora_ops.dropout(x, SEED, P),
        lambda x: lora_ops.adapted_linear(x, *weight, bias, A, B, SCALING, P, SEED)[0],
    ):
        gradients = []
        for relu in (Tensor.relu_, Tensor.relu):
            leaf = x.clone().requires_grad_()
            relu(function(leaf)).sum().backward()
            gradients.append(leaf.grad)
        assert torch.equal(*gradients)


@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_torch_multiplies_nothing_that_it_would_emulate(tokens, dtype, monkeypatch):
    """Not in the operators, not in the reference, which takes unusual weights."""
    monkeypatch.setattr(processor, "compute_dtype", lambda device: processor.ComputeDtype(torch.float32, "a test"))
    weight, (A, B) = normal_weight(), adapter()
    usual, unusual = weight, weight._replace(values=strided(weight.values))
    taken: set[str] = set()
    for operands in (usual, unusual):
        for choice in ("native", "reference"):
            x = torch.randn(tokens, K, dtype=dtype, requires_grad=True)
            with dispatch.use(choice), profile(record_shapes=True) as profiler:
                y, _ = lora_ops.adapted_linear(x, *operands, None, A, B, SCALING, P, SEED)
                (y + ops.linear(x, *operands, None)).sum().backward()
            events: Any = profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
            taken |= {kind for e in events if e.name() in ("aten::mm", "aten::addmm") for kind in e.dtypes() if kind}
    assert {"float"} <= taken <= {"float", "Scalar"}


def test_quantizing_calls_the_library_for_both_levels(calls):
    weight = ql.quantize(torch.randn(9, 70))
    weight.dequantize()
    lora_ops.dropout(torch.randn(4), SEED, P)
    assert calls == ["quantize", "quantize_scales", "dequantize", "dropout"]


def test_the_reference_is_the_reference(calls):
    with dispatch.use("reference"):
        x = torch.randn(9, K, dtype=torch.bfloat16, requires_grad=True)
        weight = normal_weight()
        ops.linear(x, *weight, None).sum().backward()
        lora_ops.adapted_linear(x, *weight, None, *adapter(), SCALING, P, SEED)[0].sum().backward()
    assert calls == []


@dtypes
@pytest.mark.parametrize("shape", [(), (1,), (0,), (1001,), (63, 65), (3, 0, 5), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
def test_quantize_and_dequantize_give_the_bits_of_the_reference(dtype, shape, double_quant):
    x = torch.randn(shape).to(dtype)
    found = ql.quantize(x, double_quant=double_quant)
    again = [found.dequantize(other) for other in DTYPES]
    with dispatch.use("reference"):
        expected = ql.quantize(x, double_quant=double_quant)
        for one, other in zip(again, DTYPES, strict=True):
            assert torch.equal(one, expected.dequantize(other))
    for one, other in zip(found.operands()[:5], expected.operands()[:5], strict=True):
        assert (one is other is None) or torch.equal(one, other)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "view", [lambda w: w.t(), lambda w: w[:, ::2], lambda w: w[:1].expand(40, 48)], ids=["t", "step", "expand"]
)
def test_a_view_is_quantized_in_its_own_order(view):
    x = view(torch.randn(40, 48))
    one, other = (
        ops.quantize_blockwise(x, NF4, 64),
        ops.quantize_blockwise(x.clone(memory_format=torch.contiguous_format), NF4, 64),
    )
    assert all(map(torch.equal, one, other))
    scales = torch.rand(600)[::2]
    assert all(map(torch.equal, ops.quantize_scales(scales), ops.quantize_scales(scales.clone())))


@x_shapes
@dtypes
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_linear_and_its_gradient(path, rows, dtype, bias, whole_weight):
    for block_size, double_quant in [(32, True), (64, False), (4096, True)]:
        weight = whole_weight((N, K), block_size, double_quant)
        x, grad = whole(*rows, K, dtype=dtype).requires_grad_(), whole(*rows, N, dtype=dtype)
        b = whole(N, dtype=dtype, most=100).requires_grad_() if bias else None
        y = ops.linear(x, *weight, b)
        y.backward(grad)
        assert y.dtype == dtype
        assert x.grad is not None
        W = ops.dequantize.reference(*weight, dtype).double()
        exact, exact_dx = x.detach().double() @ W.T + (0 if b is None else b.detach().double()), grad.double() @ W
        if not by_panels(path, dtype):
            assert torch.equal(y, exact.to(dtype))
            assert torch.equal(x.grad, exact_dx.to(dtype))
        assert error(y.detach(), exact) <= PANELS[dtype]
        assert error(x.grad, exact_dx) <= PANELS[dtype]
        if b is not None:
            assert b.grad is not None
            assert error(b.grad, grad.double().view(-1, N).sum(0)) <= PANELS[dtype]


@x_shapes
@dtypes
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("p", [0.0, P], ids=["plain", "dropout"])
def test_adapted_linear_and_its_gradients(path, rows, dtype, bias, p):
    weight, (A, B) = normal_weight(), adapter()
    x, grad = torch.randn(*rows, K).to(dtype).requires_grad_(), torch.randn(*rows, N).to(dtype)
    b = torch.randn(N).to(dtype).requires_grad_() if bias else None
    leaves = [leaf for leaf in (x, A, B, b) if leaf is not None]
    y, h = lora_ops.adapted_linear(x, *weight, b, A, B, SCALING, p, SEED)
    found = torch.autograd.grad(y, leaves, grad)
    assert (y.dtype, h.dtype) == (dtype, dtype)
    assert h.shape == (math.prod(rows), R)
    assert [one.dtype for one in found] == [leaf.dtype for leaf in leaves]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    x64, A64, B64, *b64 = exact
    W, keep = ops.dequantize.reference(*weight, dtype).double(), keep_mask(SEED, math.prod(rows), K, p).view(*rows, K)
    y64 = x64 @ W.T + SCALING / (1 - rate(p)) * (x64 * keep) @ A64.T @ B64.T + sum(b64)
    assert error(y.detach(), y64.detach()) <= ADAPTED[dtype]
    for name, one, other in zip("xABb", found, torch.autograd.grad(y64, exact, grad.double()), strict=False):
        assert error(one, other) <= ADAPTED[dtype], name


def test_panels_are_whole_and_cover(monkeypatch):
    for length in (0, 1, 63, 64, 65, 1000):
        for bytes_each in (0, 1, 700, 4096, 70_000, 8 << 20):
            found = operators._panels(length, bytes_each)
            assert [index for panel in found for index in panel] == list(range(length))
            assert all(len(panel) * bytes_each <= operators.PANEL_BYTES or len(panel) == 1 for panel in found)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, :1].expand(x.shape),
        lambda x: x[:1].expand(x.shape),
        lambda x: x.flip(0)[::2],
        lambda x: x.mT.contiguous().mT,
    ],
    ids=["transposed", "expanded", "repeated", "step", "columns"],
)
@pytest.mark.parametrize("size", [3, 4], ids=["9 tokens", "16 tokens"])
@dtypes
def test_strides_do_not_matter(path, view, size, dtype):
    weight, (A, B), bias = normal_weight(), adapter(), torch.randn(2 * N).to(dtype)[::2]
    A, B = A.t().contiguous().t(), B.t().contiguous().t()
    x, grad = view(torch.randn(size, size, K).to(dtype)), view(torch.randn(size, size, N).to(dtype))

    def run(own: Callable[[Tensor], Tensor]) -> list[Tensor]:
        a, b, v, g, s = own(A), own(B), own(x), own(grad), own(bias)
        y, h = lora_ops.adapted_linear(v, *weight, s, a, b, SCALING, P, SEED)
        gradients = lora_ops.adapted_linear_backward(
            g, v, h.t().contiguous().t(), *weight, a, b, SCALING, P, SEED, True
        )
        plain = ops.linear(v, *weight, s), ops.linear_grad_input(g, *weight), lora_ops.dropout(v, SEED, P)
        return [y, h, *gradients, *plain]

    results = ("y", "h", "dx", "dA", "dB", "linear", "linear_grad_input", "dropout")
    bare = run(lambda t: t.clone(memory_format=torch.contiguous_format))
    for name, one, other in zip(results, run(lambda t: t), bare, strict=True):
        if not by_panels(path, dtype) or name == "dropout":
            assert torch.equal(one, other), name
        assert error(one, other.double()) <= ADAPTED[dtype], name  # torch's own sums depend on strides


def strided(t: Tensor) -> Tensor:
    """The same numbers, with room between them."""
    return torch.stack([t, t], dim=-1)[..., 0]


PLAIN = {"double_quant": False}
# What is changed of a weight: its operands by name, and options of `quantize`.
UNUSUAL: dict[str, tuple[dict[str, Callable[[Any], Any]], dict[str, Any]]] = {
    "packed with strides": ({"packed": strided}, {}),
    "scales with strides": ({"scales": strided}, {}),
    "absmax2 with strides": ({"absmax2": strided}, {"block_size": 32}),
    "codebook with strides": ({"values": strided}, {}),
    "packed as int32": ({"packed": Tensor.int}, {}),
    "scales as float16": ({"scales": Tensor.half}, PLAIN),
    "scales as bfloat16": ({"scales": Tensor.bfloat16}, PLAIN),
    "codebook as float64": ({"values": Tensor.double}, {}),
    "absmax2 as float64": ({"absmax2": Tensor.double}, {}),
    "offset as float64": ({"offset": Tensor.double}, {}),
    "codes as scales": ({"absmax2": lambda _: None}, {}),
    "no offset": ({"offset": lambda _: None}, {}),
    "offset of two": ({"offset": lambda offset: offset.repeat(2)}, {}),
    "blocks of 48": ({"block_size": lambda _: 48}, {}),
    "a second level of what has none": (
        {"absmax2": lambda _: torch.ones(1), "offset": lambda _: torch.ones(())},
        PLAIN,
    ),
    "blocks of 8192": ({"scales": lambda _: torch.ones(2), "block_size": lambda _: 8192}, PLAIN),
    "packed cut short": ({"packed": lambda packed: packed[:-7]}, {}),
    "scales cut short": ({"scales": lambda scales: scales[:-1]}, {}),
    "absmax2 missing": ({"absmax2": lambda absmax2: absmax2[:0]}, {}),
    "too many scales": ({"scales": lambda scales: torch.cat([scales, scales])}, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("what", UNUSUAL)
def test_an_unusual_weight_is_left_to_the_reference(what, dtype, monkeypatch):
    """The C takes pointers and trusts them: it must not see these. Results and complaints are the reference's."""
    changes, options = UNUSUAL[what]
    usual = normal_weight((96, 96), **options)
    operands = usual._replace(**{name: change(getattr(usual, name)) for name, change in changes.items()})
    for name in ("dequantize", "linear_few", "adapted_linear", "adapted_linear_backward"):
        monkeypatch.setattr(Library, name, not_for_the_library)
    for call in [
        lambda: ops.dequantize(*operands, dtype),
        lambda: ops.linear(torch.ones(20, 96, dtype=dtype), *operands, None),
        lambda: ops.linear(torch.ones(2, 96, dtype=dtype), *operands, None),
        lambda: ops.linear_grad_input(torch.ones(20, 96, dtype=dtype), *operands),
    ]:
        assert same_outcome(call)


def not_for_the_library(*args: Any) -> None:
    """Fails before the C does, which may end the process."""
    raise AssertionError(f"the C was given {args}")


def same_outcome(call: Callable[[], Any]) -> bool:
    """Whether the call gives the same bits, or the same error, in C and in the reference."""
    found, expected = outcome(call), outcome_of_the_reference(call)
    assert type(found) is type(expected), (found, expected)
    if isinstance(found, Tensor):
        return torch.equal(found.nan_to_num(), expected.nan_to_num())
    return found == expected


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return f"{type(error).__name__}: {error}"


def outcome_of_the_reference(call: Callable[[], Any]) -> Any:
    with dispatch.use("reference"):
        return outcome(call)


@pytest.mark.parametrize("what", ["block size 2", "block size 8192", "3 bits", "codebook in float64", "float64"])
def test_what_no_c_is_for_is_left_to_the_reference(what, calls):
    dtype = torch.float64 if what == "float64" else torch.float32
    block_size = int(what.split()[-1]) if "size" in what else 64
    values = {"3 bits": normal_float(3), "codebook in float64": NF4.double()}.get(what, NF4)
    weight, x = torch.randn(40, 96).to(dtype), torch.randn(3, 96, dtype=dtype, requires_grad=True)
    packed, scales = found = ops.quantize_blockwise(weight, values, block_size)
    assert all(map(torch.equal, found, ops.quantize_blockwise.reference(weight, values, block_size)))
    operands = packed, scales, None, None, values, weight.shape, block_size
    assert same_outcome(lambda: ops.dequantize(*operands, dtype))
    A, B = torch.randn(R, 96, dtype=dtype), torch.randn(40, R, dtype=dtype)
    y, _ = lora_ops.adapted_linear(x, *operands, None, A, B, SCALING, P, SEED)
    y.sum().backward()
    assert y.dtype == dtype
    if what == "float64":
        lora_ops.dropout(x, SEED, P)
    assert calls == []


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("tokens", [3, 20])
def test_an_adapter_that_was_cast_still_works(path, low, tokens):
    """model.bfloat16() converts A and B too."""
    weight, (A, B) = normal_weight(), adapter(low)
    x, grad = torch.randn(tokens, K).bfloat16().requires_grad_(), torch.randn(tokens, N).bfloat16()
    y, _ = lora_ops.adapted_linear(x, *weight, None, A, B, SCALING, P, SEED)
    found = torch.autograd.grad(y, [x, A, B], grad)
    wide = [t.detach().float().requires_grad_() for t in (A, B)]
    y32, _ = lora_ops.adapted_linear(x, *weight, None, *wide, SCALING, P, SEED)
    assert error(y.detach(), y32.detach().double()) <= 2 * ADAPTED[torch.bfloat16]
    for one, leaf, other in zip(found, [x, A, B], torch.autograd.grad(y32, [x, *wide], grad), strict=True):
        assert one.dtype == leaf.dtype
        assert error(one, other.double()) <= 2 * ADAPTED[torch.bfloat16]


# What does not fit the weight, by name: a shape, or another dtype. The others are those of `tokens` rows.
NOT_FITTING: list[tuple[str, Any]] = [
    *(("x", shape) for shape in [(1, K - 1), (20, K + 1), (20, 0), (0, K + 1), (2, 3, K - 1)]),
    *(("bias", what) for what in [(N - 1,), (N + 1,), torch.float64]),
    *(("A", shape) for shape in [(R, K - 1), (R, K + 1), (K, R)]),
    *(("B", shape) for shape in [(N, R + 1), (N - 1, R), (R, N)]),
    *(("grad", shape) for shape in [(20, N - 1), (20, N + 1), (19, N), (20,), (N,)]),
    *(("weight", shape) for shape in [(3, 5, 7), (1, 5, 1), (3, 5, 0)]),
]


@pytest.mark.parametrize(("name", "what"), NOT_FITTING, ids=str)
@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_what_does_not_fit_is_refused(path, name, what, tokens, dtype, calls):
    n, k = (3, 5) if name == "weight" else (N, K)
    shapes = {"x": (tokens, k), "grad": (tokens, n), "bias": (n,), "A": (R, k), "B": (n, R), "weight": (n, k)}
    shapes |= {name: what} if isinstance(what, tuple) else {}
    x, grad, bias = (torch.zeros(shapes[one], dtype=dtype) for one in ("x", "grad", "bias"))
    bias = bias if isinstance(what, tuple) else bias.to(what)
    A, B, weight = torch.zeros(shapes["A"]), torch.zeros(shapes["B"]), normal_weight(shapes["weight"])
    h = torch.zeros(tokens, len(A), dtype=dtype)
    calls.clear()
    adapted: Any = (*weight, A, B, SCALING, P, SEED)
    products: dict[str, tuple[str, Callable[[], Any]]] = {
        "linear": ("x bias weight", lambda: ops.linear(x, *weight, bias)),
        "linear_grad_input": ("x weight", lambda: ops.linear_grad_input(grad if name == "weight" else x, *weight)),
        "adapted_linear": ("x bias A B weight", lambda: lora_ops.adapted_linear(x, *weight, bias, *adapted[7:])),
        "its backward": ("A B grad", lambda: lora_ops.adapted_linear_backward(grad, x, h, *adapted, True)),
    }
    for names, call in products.values():
        if name in names.split():
            with pytest.raises((RuntimeError, ValueError, IndexError), match=r"size|shape|type|expanded|match|[dD]im"):
                call()
    # The reference asks for the weight; that of an adapted product asks for the plain products, which do fit.
    plain = {"linear_few", "product", "product_backward"} if name in ("A", "B", "grad") else set()
    assert set(calls) <= {"dequantize"} | plain


@pytest.mark.parametrize("tokens", [3, 20])
def test_opcheck_by_panels(panels, tokens):
    """The other ways have it beside the definition."""
    check, (x, grad, h) = torch.library.opcheck, (torch.randn(tokens, n).bfloat16() for n in (K, N, R))
    weight, (A, B), bias = normal_weight(), adapter(), torch.randn(N).bfloat16().requires_grad_()
    check(ops.linear, (x.clone().requires_grad_(), *weight, bias))
    check(ops.linear_grad_input, (grad.clone().requires_grad_(), *weight))
    check(lora_ops.adapted_linear, (x.clone().requires_grad_(), *weight, bias, A, B, SCALING, P, SEED))
    low = A.detach(), B.detach()
    check(lora_ops.adapted_linear_backward, (grad, x, h, *weight, *low, SCALING, P, SEED, True))


@pytest.mark.parametrize("tokens", [3, 20])
@dtypes
def test_autocast_changes_nothing(path, tokens, dtype):
    weight, (A, B), bias = normal_weight(), adapter(), torch.randn(N).to(dtype)
    x, grad = torch.randn(tokens, K).to(dtype).requires_grad_(), torch.randn(tokens, N).to(dtype)

    def run() -> list[Tensor]:
        plain = ops.linear(x, *weight, bias)
        y, _ = lora_ops.adapted_linear(x, *weight, bias, A, B, SCALING, P, SEED)
        return [plain, *torch.autograd.grad(plain, [x], grad), y, *torch.autograd.grad(y, [x, A, B], grad)]

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        found = run()
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def largest_allocation(run: Callable[[], object]) -> int:
    """The bytes of the largest piece of memory that torch allocates on the CPU meanwhile."""
    with profile(profile_memory=True) as profiler:
        run()
    events: Any = profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_no_copy_of_the_whole_weight_is_made(path, dtype, monkeypatch):
    """Forward and backward of a layer whose weight is 9.4 MB in bfloat16."""
    monkeypatch.setattr(operators, "PANEL_BYTES", 4 << 20)
    n, k, tokens = 2304, 2048, 16
    weight = normal_weight((n, k))
    x = torch.randn(tokens, k).to(dtype).requires_grad_()
    A, B = torch.randn(R, k, requires_grad=True), torch.randn(n, R, requires_grad=True)

    def step() -> None:
        y, _ = lora_ops.adapted_linear(x, *weight, None, A, B, SCALING, P, SEED)
        (y + ops.linear(x, *weight, None)).sum().backward()

    assert largest_allocation(step) <= 4 << 20
    with dispatch.use("reference"):
        assert largest_allocation(step) >= n * k * dtype.itemsize  # what it would look like
