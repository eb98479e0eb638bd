"""The adapter: the formula and its gradients in float64, what it keeps for backward, and PEFT's layer beside it."""

from __future__ import annotations

import copy
import math
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qloralab.lora.config import LoraConfig
from qloralab.lora.dropout import rate
from qloralab.lora.layer import LoRALinear
from qloralab.nf4.linear import QuantizedLinear
from qloralab.nf4.tensor import quantize

from ..nf4.weights import assert_near

K, N, R = 65, 63, 7  # inputs, outputs, rank
P = 0.3
# Root-mean-square error relative to float64, for the same A and B. float32 sums of up to 130 terms stay within a few
# of its 6e-8; bfloat16 rounds the output and the middle (2**-9 at most, half of it on average) and each step of
# backward once.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3}

bases = pytest.mark.parametrize("base", ["dense", "quantized"])
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["f32", "bf16"])
dropouts = pytest.mark.parametrize("p", [0.0, P], ids=["plain", "dropout"])


def base_layer(base: str, dtype: torch.dtype, bias: bool = True) -> Any:
    dense = nn.Linear(K, N, bias=bias, dtype=dtype).requires_grad_(False)
    return dense if base == "dense" else QuantizedLinear(quantize(dense.weight), dense.bias, dtype)


def adapted(base: str, dtype: torch.dtype, p: float = 0.0, bias: bool = True) -> Any:
    """A layer whose A and B are exact in bfloat16 and add about as much as the base."""
    layer = LoRALinear(base_layer(base, dtype, bias), LoraConfig(R, 2 * R, lora_dropout=p))
    with torch.no_grad():
        layer.lora_A.copy_((torch.randn(R, K) / math.sqrt(K)).bfloat16())
        layer.lora_B.copy_((torch.randn(N, R) / math.sqrt(R)).bfloat16())
    return layer


def dropout_mask(shape: tuple[int, ...], p: float, seed: int) -> Tensor:
    """What an adapter of an identity does to ones: float64 `shape`, 0 where dropped, 1 where kept."""
    base = nn.Linear(K, K, bias=False)
    layer = LoRALinear(base, LoraConfig(K, K, lora_dropout=p))
    with torch.no_grad():
        base.weight.zero_()
        layer.lora_A.copy_(torch.eye(K))
        layer.lora_B.copy_(torch.eye(K))
        torch.manual_seed(seed)
        return (layer(torch.ones(shape)) > 0).double()


def gradients(layer: Any, x: Tensor, run) -> list[Tensor]:
    torch.manual_seed(3)
    inputs = [x.clone().requires_grad_(), layer.lora_A, layer.lora_B]
    return list(torch.autograd.grad(run(inputs[0]).float().square().sum(), inputs))


@pytest.mark.parametrize("shape", [(1, K), (5, K), (2, 3, K), (2, 1, 3, K), (K,), (0, K)], ids=str)
@bases
@dtypes
@dropouts
def test_output_and_gradients_are_those_of_the_formula(base, dtype, p, shape):
    layer = adapted(base, dtype, p)
    x: Any = torch.randn(shape, dtype=dtype, requires_grad=True)
    dy = torch.randn(*shape[:-1], N, dtype=dtype)
    mask = dropout_mask(shape, p, seed=3)
    assert not p or not mask.numel() or 0 < mask.mean() < 1

    exact: list[Any] = [t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B)]
    x64, A, B = exact
    weight, b = layer.base_layer.weight, layer.bias.detach().double()
    W = (weight.detach() if isinstance(weight, Tensor) else weight.dequantize(dtype)).double()
    y64 = x64 @ W.T + b + 2 * (x64 * mask / (1 - rate(p))) @ A.T @ B.T
    y64.backward(dy.double())

    torch.manual_seed(3)
    y = layer(x)
    y.backward(dy)
    assert y.dtype == x.dtype == x.grad.dtype
    assert y.shape == y64.shape
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32
    found = {"y": y, "dx": x.grad, "dA": layer.lora_A.grad, "dB": layer.lora_B.grad}
    expected = {"y": y64.detach(), "dx": x64.grad, "dA": A.grad, "dB": B.grad}
    for name in found:
        assert_near(found[name].detach(), expected[name], TOLERANCE[dtype], name)
    assert [n for n, q in layer.named_parameters() if q.grad is not None] == ["lora_A", "lora_B"]


@bases
@dropouts
def test_an_input_without_gradient(base, p):
    layer = adapted(base, torch.float32, p)
    again = copy.deepcopy(layer)
    x = torch.randn(5, K)
    torch.manual_seed(3)
    layer(x).square().sum().backward()
    torch.manual_seed(3)
    again(x.clone().requires_grad_()).square().sum().backward()
    assert torch.equal(layer.lora_A.grad, again.lora_A.grad)
    assert torch.equal(layer.lora_B.grad, again.lora_B.grad)


@dropouts
def test_a_strided_input(p):
    layer = adapted("dense", torch.float32, p)
    x = torch.randn(K, 5, 2)
    strided = gradients(layer, x, lambda x: layer(x.permute(2, 1, 0)))
    packed = gradients(layer, x, lambda x: layer(x.permute(2, 1, 0).contiguous()))
    for a, b in zip(strided, packed, strict=True):
        assert_near(a, b.double(), TOLERANCE[torch.float32])


@bases
@dtypes
@dropouts
def test_it_starts_as_the_base(base, dtype, p):
    layer = LoRALinear(base_layer(base, dtype), LoraConfig(R, 2 * R, lora_dropout=p))
    x = torch.randn(9, K, dtype=dtype)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert not layer.lora_B.any()


@pytest.mark.parametrize("width", [64, 1000])
def test_a_starts_kaiming_uniform(width):
    layer = LoRALinear(nn.Linear(width, 64, dtype=torch.bfloat16), LoraConfig(64, 1))
    bound = 1 / math.sqrt(width)  # gain sqrt(2 / (1 + 5)) times sqrt(3 / width)
    assert layer.lora_A.dtype == torch.float32
    assert 0.99 * bound < layer.lora_A.abs().max().item() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert abs(layer.lora_A.mean().item()) < 5 * bound / math.sqrt(3 * 64 * width)


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(("N", "R"), [(N, R), (1, 16), (N, 70)], ids=str)
def test_it_equals_peft(rslora, bias, N, R):
    """Also where the rank is larger than the layer, as for a gate of one output."""
    config = LoraConfig(R, 3, use_rslora=rslora)
    dense = nn.Linear(K, N, bias=bias)
    ours: Any = LoRALinear(copy.deepcopy(dense), config)
    theirs: Any = peft.get_peft_model(  # pyright: ignore[reportCallIssue]
        nn.Sequential(dense),  # pyright: ignore[reportArgumentType]
        peft.LoraConfig(r=R, lora_alpha=3, use_rslora=rslora, target_modules=["0"]),
    )
    with torch.no_grad():
        ours.lora_B.normal_()
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(ours.lora_A if "lora_A" in name else ours.lora_B)
    x = torch.randn(2, 9, K)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    grads = {name.split(".")[-3]: q.grad for name, q in theirs.named_parameters() if q.grad is not None}
    assert_near(ours(x).detach(), theirs(x).detach().double(), TOLERANCE[torch.float32])
    for name in ("lora_A", "lora_B"):
        assert_near(getattr(ours, name).grad, grads[name].double(), TOLERANCE[torch.float32], name)


@dropouts
@pytest.mark.parametrize("x_grad", [False, True], ids=["x-frozen", "x-trains"])
def test_backward_keeps_the_input_itself_and_nothing_of_its_size(p, x_grad):
    """Neither a float32 copy of x, nor a dropped-out one. Of a quantized base, test_ops.py shows it."""
    tokens = 64
    layer = adapted("dense", torch.bfloat16, p)
    x = torch.randn(tokens, K, dtype=torch.bfloat16, requires_grad=x_grad)
    own = {t.data_ptr() for t in (x, *layer.parameters())}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = layer(x)
    others = {t.data_ptr(): t for t in kept if t.numel() and t.data_ptr() not in own}
    limit = 2 * R * (K + N + tokens) + 8  # A, B and h in bfloat16, the seed
    assert x.data_ptr() in {t.data_ptr() for t in kept}
    assert sum(t.untyped_storage().nbytes() for t in others.values()) <= limit
    dense = {x.numel(), K * N}
    assert not [t.shape for t in others.values() if t.is_floating_point() and t.numel() in dense]
    y.sum().backward()


@bases
def test_dropout_is_that_of_the_seed_and_of_training(base):
    layer = adapted(base, torch.float32, P)
    x = torch.randn(9, K)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    assert torch.equal(layer.eval()(x), layer(x))
    plain = LoRALinear(layer.base_layer, LoraConfig(R, 2 * R))
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(plain.train()(x), layer(x))


@bases
@dtypes
@dropouts
def test_gradient_checkpointing_changes_nothing(base, dtype, p):
    layer = adapted(base, dtype, p)
    x = torch.randn(2, 9, K, dtype=dtype)
    plain = gradients(layer, x, layer)
    again = gradients(layer, x, lambda x: checkpoint(layer, x, use_reentrant=False))
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


# Dynamo makes an instance of torch's own class while it traces any autograd function (torch 2.13).
@pytest.mark.filterwarnings("ignore:.*torch.autograd.function.Function.* should not be instantiated:DeprecationWarning")
@bases
@dtypes
@dropouts
def test_it_compiles_without_a_graph_break(base, dtype, p):
    layer = adapted(base, dtype, p)
    x = torch.randn(2, 9, K, dtype=dtype)
    torch._dynamo.reset()  # it refuses the ninth variant of one function
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, layer):
        torch.manual_seed(3)
        results.append(run(x).detach())
    assert_near(results[0], results[1].double(), TOLERANCE[dtype])
    for a, b in zip(gradients(layer, x, compiled), gradients(layer, x, layer), strict=True):
        assert_near(a, b.double(), TOLERANCE[dtype])


def test_a_quantized_base_takes_any_floating_point_input():
    layer = adapted("quantized", torch.bfloat16)
    x = torch.randn(5, K, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert_near(y.detach(), layer(x.bfloat16()).detach().double(), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_a_quantized_layer_truncates_nothing(dtype):
    layer = adapted("quantized", torch.bfloat16)
    for run in (layer, layer.base_layer):
        with pytest.raises(TypeError, match=rf"x is {dtype}; a floating-point tensor is needed"):
            run(torch.ones(5, K).to(dtype))


@pytest.mark.parametrize(("shape", "said"), [((3, K - 1), "3, 64"), ((K + 1,), "66"), ((), "")], ids=str)
@dropouts
def test_an_input_of_another_width_is_refused(p, shape, said):
    layer = adapted("quantized", torch.float32, p)
    with pytest.raises(ValueError, match=rf"x is \[{said}\]; the layer takes \[\.\.\., 65\]"):
        layer(torch.randn(shape))


@bases
def test_it_looks_like_the_layer_it_wraps_and_its_weight_is_not_multiplied_by(base):
    """Else the adapter would be passed by without a word."""
    layer = LoRALinear(base_layer(base, torch.bfloat16), LoraConfig(R, 2 * R), name="h.up")
    assert (layer.in_features, layer.out_features) == (K, N)
    assert layer.bias is layer.base_layer.bias
    assert "r=7, scaling=2, dropout=0" in repr(layer)
    weight: Any = layer.weight
    assert (weight.dtype, weight.device, weight.shape) == (torch.bfloat16, torch.device("cpu"), (N, K))
    if base == "quantized":
        assert not isinstance(weight, Tensor)
        return
    assert isinstance(weight, Tensor)
    assert (weight.size(), weight.numel(), weight.is_floating_point()) == ((N, K), N * K, True)
    for use in (
        lambda: torch.ones(3, K, dtype=torch.bfloat16) @ weight.T,
        lambda: nn.functional.linear(torch.ones(3, K, dtype=torch.bfloat16), weight),
        lambda: weight.float(),
        lambda: weight.data,
        lambda: weight.mul_(2),
    ):
        with pytest.raises(RuntimeError, match=r"^h\.up has an adapter, and its weight is used without it"):
            use()
