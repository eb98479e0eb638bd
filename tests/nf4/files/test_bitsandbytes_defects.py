"""What bitsandbytes does to unusual weights, shown on this CPU, and what is done here instead.

One test for each case in which its backends differ from each other, or are wrong, but for those that
``qloralab parity`` observes (``parity/edges.py``; test_edges.py holds them on either side). What its CUDA kernels do is
read in their source, and stands in the docstrings. Not here: 2**31 weights and more, which its CUDA kernels refuse.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import modules
from torch import Tensor

from qloralab.nf4.blockwise import unpack
from qloralab.nf4.linear import QuantizedLinear
from qloralab.nf4.tensor import QuantizedTensor, linear, quantize
from qloralab.parity import peer

HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
Linear4bit: Any = modules.Linear4bit  # torch.Tensor subclasses with attributes that pyright cannot see
Params4bit: Any = modules.Params4bit
TINY = torch.finfo(torch.float32).tiny
halves = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])


@pytest.fixture(autouse=True)
def as_written():
    """bitsandbytes' PyTorch code runs uncompiled: the compiler takes longer than all the tests here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def theirs(weight: Tensor, **options: Any) -> tuple[Tensor, Any]:
    return bnb.quantize_4bit(weight, quant_type=options.pop("quant_type", "nf4"), **options)


def codes(packed: Tensor, numel: int) -> list[int]:
    return unpack(packed, numel).tolist()


def relative(a: Tensor, b: Tensor) -> float:
    """Root-mean-square difference over the root mean square of b."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def their_layer(weight: Tensor, double_quant: bool, compute_dtype: torch.dtype = torch.bfloat16) -> Any:
    N, K = weight.shape
    made = Linear4bit(K, N, False, compute_dtype, compress_statistics=double_quant, quant_type="nf4")
    made.weight = Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=double_quant, module=made
    ).to("cpu")
    return made


def on_avx512() -> None:
    if not HAS_AVX512:
        pytest.skip("what bitsandbytes does here it does on CPUs with AVX512; run on one to see it")


def on_avx512_bf16() -> None:
    if not bnb.has_avx512bf16():
        pytest.skip("what bitsandbytes does here it does on CPUs with AVX512-BF16; run on one to see it")


@halves
@pytest.mark.parametrize(
    ("value", "read", "lost"), [(torch.nan, torch.nan, 64), (torch.inf, torch.inf, 63), (-torch.inf, torch.inf, 63)]
)
def test_what_is_not_finite_is_refused_with_its_index(dtype, value, read, lost):
    """Its CPU path makes NaNs of the block, and +inf of both infinities; its CUDA kernels make -inf of both infinities,
    and the negative scale of a NaN, silently."""
    weight = torch.linspace(-1, 1, 256).view(2, 128).to(dtype)
    weight[1, 70] = value
    back = bnb.dequantize_4bit(*theirs(weight))
    assert torch.equal(back[1, 70].isnan(), torch.tensor(read).isnan())
    assert read != read or back[1, 70] == read
    assert back.isnan().sum() == lost
    with pytest.raises(ValueError, match=rf"h\.0\.w\[1, 70\] is {value}"):
        quantize(weight, name="h.0.w")


def test_bfloat16_weights_below_the_normal_range_are_kept():
    """The conversion to bfloat16 that its CPU path uses on AVX512-BF16 turns subnormal results into 0."""
    weight = torch.full((2, 64), TINY, dtype=torch.bfloat16) * torch.linspace(-1, 1, 64, dtype=torch.bfloat16)
    q = quantize(weight, double_quant=False)
    packed, state = theirs(weight)
    assert torch.equal(q.packed, packed)
    expected = peer.oracle(packed, state.absmax, state.code, 64, weight.shape, weight.dtype)
    assert torch.equal(q.dequantize(), expected)
    on_avx512_bf16()
    back = bnb.dequantize_4bit(packed, state)
    below = (expected != 0) & (expected.abs() < TINY)
    assert below.sum() > 100
    assert (back[below] == 0).all()


def test_a_scale_that_would_decode_to_infinity_is_refused():
    """In bitsandbytes the weights become infinite, silently."""
    weight = torch.zeros(3, 64, dtype=torch.float16)
    weight[1:] = torch.finfo(torch.float16).max
    assert bnb.dequantize_4bit(*theirs(weight, compress_statistics=True)).isinf().sum() == 128
    with pytest.raises(ValueError, match="double_quant=False"):
        quantize(weight)
    assert torch.equal(quantize(weight, double_quant=False).dequantize(), weight)


def test_an_odd_number_of_bytes_is_not_stored_as_wider_elements():
    """Its CPU path fails within PyTorch; its CUDA kernels, as read, allocate a byte too few."""
    weight = torch.linspace(-1, 1, 66)
    with pytest.raises(RuntimeError):
        theirs(weight, quant_storage=torch.bfloat16)
    q = quantize(weight)
    with pytest.raises(ValueError, match="bfloat16"):
        q.to_bitsandbytes("w", torch.bfloat16)
    assert QuantizedTensor.from_bitsandbytes(q.to_bitsandbytes("w"), "w").shape == (66,)


def test_fp4_has_one_code_for_zero():
    """Its CPU path gives numbers just above 0 the code 8, the sign bit alone; its CUDA kernels give them 0."""
    weight = torch.full((1, 64), 1e-6)
    weight[0, 0] = 1
    packed, _ = theirs(weight, quant_type="fp4")
    assert codes(packed, 64)[1:] == [8] * 63
    q = quantize(weight, "fp4", double_quant=False)
    assert codes(q.packed, 64)[1:] == [0] * 63


def test_second_level_codes_are_the_nearest():
    """Its CPU path looks them up in a table that is too coarse for some."""
    weight = torch.randn(4096, 1024)
    _, state = theirs(weight, compress_statistics=True)
    q = quantize(weight)
    assert q.absmax2 is not None
    assert q.offset is not None
    single = quantize(weight, double_quant=False).scales.double()
    values = q.to_bitsandbytes()["weight.nested_quant_map"].double()

    def off(scales: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
        """The distance to the residual, and the smallest that any code has."""
        normal = (single - offset.double()) / absmax2.double().repeat_interleave(256)
        best = (normal[:, None] - values).abs().amin(1)
        return (values[scales.long()] - normal).abs() - best

    assert off(q.scales, q.absmax2, q.offset).max() < 1e-6
    assert (off(state.absmax, state.state2.absmax, state.offset) > 1e-6).sum() > 20


@halves
@pytest.mark.parametrize(("K", "block_size"), [(16, 64), (48, 64), (96, 64), (64, 128), (192, 128), (48, 32)])
def test_rows_that_split_blocks_are_dequantized_right(dtype, K, block_size):
    """With AVX512 it takes the scales of other blocks where a row is no whole number of them, and 16 divides it."""
    weight = torch.randn(64, K).to(dtype)
    packed, state = theirs(weight, blocksize=block_size)
    tensors = {"w": packed} | {f"w.{name}": part for name, part in state.as_dict(packed=True).items()}
    expected = peer.oracle(packed, state.absmax, state.code, block_size, weight.shape, dtype)
    assert torch.equal(QuantizedTensor.from_bitsandbytes(tensors, "w").dequantize(), expected)
    on_avx512()
    wrong = bnb.dequantize_4bit(packed, state) != expected
    assert wrong.float().mean() > 0.5


def our_layer(weight: Tensor, double_quant: bool) -> QuantizedLinear:
    return QuantizedLinear(quantize(weight, double_quant=double_quant))


@pytest.mark.parametrize("double_quant", [False, True])
def test_evaluation_leaves_the_weight_as_it_is(double_quant):
    """With AVX512-BF16 its forward in evaluation repacks the weight in place; read afterwards, it is another one."""
    weight = torch.randn(64, 128, dtype=torch.bfloat16)
    x = torch.randn(2, 128, dtype=torch.bfloat16)
    ours = our_layer(weight, double_quant).eval()
    before = ours.weight.dequantize()
    ours(x)
    assert torch.equal(ours.weight.dequantize(), before)
    on_avx512_bf16()
    made = their_layer(weight, double_quant).eval()
    state = made.weight.quant_state
    before = bnb.dequantize_4bit(made.weight.data, state)
    assert relative(before, weight) < 0.12
    made(x)
    assert relative(bnb.dequantize_4bit(made.weight.data.view(-1, 1), state).view(64, 128), weight) > 1


def test_evaluation_leaves_the_file_as_it_is():
    """After such a forward its state dict holds the scales in bfloat16, in another shape; read again, 2 % are lost."""
    weight = torch.randn(64, 128, dtype=torch.bfloat16)
    x = torch.randn(2, 128, dtype=torch.bfloat16)
    ours = our_layer(weight, double_quant=False).eval()
    before = {name: part.clone() for name, part in ours.state_dict().items()}
    ours(x)
    after = ours.state_dict()
    assert all(torch.equal(after[name], part) for name, part in before.items())
    on_avx512_bf16()
    made = their_layer(weight, double_quant=False).eval()
    absmax = made.state_dict()["weight.absmax"]
    assert (absmax.dtype, absmax.shape) == (torch.float32, (128,))
    made(x)
    absmax = made.state_dict()["weight.absmax"]
    assert (absmax.dtype, absmax.shape) == (torch.bfloat16, (2, 64))


@pytest.mark.parametrize(
    ("shape", "error"), [((48, 128), AssertionError), ((64, 96), RuntimeError)], ids=["48x128", "64x96"]
)
def test_evaluation_takes_layers_of_every_size(shape, error):
    """Its forward in evaluation fails where 32 does not divide the rows, or the block size the columns."""
    weight = torch.randn(shape, dtype=torch.bfloat16)
    x = torch.randn(3, shape[1], dtype=torch.bfloat16)
    ours = our_layer(weight, double_quant=False).eval()
    exact = x.double() @ ours.weight.dequantize().double().T
    assert relative(ours(x), exact) < 2.0**-8
    on_avx512_bf16()
    with pytest.raises(error):
        their_layer(weight, double_quant=False).eval()(x)


def test_backward_uses_the_weight_of_the_forward():
    """Where the product is in another dtype than the weight was, its backward rounds the weight, its forward not."""
    weight = torch.randn(64, 128, dtype=torch.bfloat16)
    identity = torch.eye(64)
    packed, state = theirs(weight)
    forward = peer.product(torch.eye(128), packed, state, torch.eye(128, 64))[0].T
    backward = peer.product(torch.eye(64, 128), packed, state, identity)[1]
    assert (forward != backward).float().mean() > 0.5
    q = quantize(weight, double_quant=False)
    leaf = torch.eye(64, 128).requires_grad_()
    linear(leaf, q).backward(identity)
    assert torch.equal(linear(torch.eye(128), q).T, q.dequantize(torch.float32))
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, q.dequantize(torch.float32))
    assert torch.equal(forward, q.dequantize(torch.float32))
