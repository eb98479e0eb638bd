"""The container: what goes in, what it holds, what comes out, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from qloralab.nf4 import blockwise
from qloralab.nf4.codebook import normal_float
from qloralab.nf4.double_quant import dequantize_scales, quantize_scales
from qloralab.nf4.tensor import QuantizedTensor, linear, quantize

NF4 = normal_float(4)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((0,), (3, 0), (), (1,), (63,), (65,), (1000,), (7, 9), (3, 5, 7), (2, 64))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
double_quants = pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])


def parts(weight: QuantizedTensor) -> dict[str, Tensor]:
    named = {name: getattr(weight, name) for name in ("packed", "scales", "absmax2", "offset", "values")}
    return {name: part for name, part in named.items() if part is not None}


def assert_same_bits(a: QuantizedTensor, b: QuantizedTensor) -> None:
    assert parts(a).keys() == parts(b).keys()
    for name, part in parts(a).items():
        assert part.dtype == parts(b)[name].dtype, name
        assert part.numpy().tobytes() == parts(b)[name].numpy().tobytes(), name
    assert (a.shape, a.dtype, a.codebook, a.block_size) == (b.shape, b.dtype, b.codebook, b.block_size)


def double_quantized(weight: Tensor) -> QuantizedTensor:
    """``quantize(weight)`` without its checks."""
    q = quantize(weight, double_quant=False)
    codes, absmax2, offset = quantize_scales(q.scales)
    return dataclasses.replace(q, scales=codes, absmax2=absmax2, offset=offset)


def negative_scale() -> Tensor:
    """A weight [257, 64] whose first block is zero and whose first decoded scale is negative."""
    weight = torch.ones(257, 64)
    weight[0], weight[1] = 0, 6
    return weight


@dtypes
@shapes
@double_quants
def test_it_holds_the_reference_and_gives_it_back(shape, dtype, double_quant):
    weight = torch.randn(shape).to(dtype)
    q = quantize(weight, double_quant=double_quant)
    packed, absmax = blockwise.quantize_blockwise(weight, NF4, 64)
    assert torch.equal(q.packed, packed)
    if double_quant:
        codes, absmax2, offset = quantize_scales(absmax)
        assert torch.equal(q.scales, codes)
        assert q.absmax2 is not None
        assert torch.equal(q.absmax2, absmax2)
        assert q.offset == offset
        absmax = dequantize_scales(codes, absmax2, offset)
    else:
        assert q.absmax2 is q.offset is None
    assert torch.equal(q.absmax(), absmax)
    assert (q.shape, q.dtype, q.numel(), q.double_quant) == (weight.shape, dtype, weight.numel(), double_quant)
    expected = blockwise.dequantize_blockwise(packed, absmax, NF4, 64, weight.numel()).view(shape)
    assert q.dequantize().dtype == dtype
    assert torch.equal(q.dequantize(), expected.to(dtype))


@dtypes
@double_quants
def test_dequantize_rounds_the_float32_product_once(dtype, double_quant):
    q = quantize(torch.randn(64, 65), double_quant=double_quant)
    found = q.dequantize(dtype)
    assert found.dtype == dtype
    assert torch.equal(found, q.dequantize(torch.float32).to(dtype))
    if dtype == torch.bfloat16:  # the product of two bfloat16 numbers is another one, in a fifth of the cases or more
        codes = blockwise.unpack(q.packed, q.numel()).int()
        twice = NF4.bfloat16()[codes] * q.absmax().bfloat16().repeat_interleave(64)[: q.numel()]
        assert (twice != found.flatten()).float().mean() > 0.15


def test_rows_that_are_no_multiple_of_the_block_are_flattened():
    weight = torch.randn(7, 9, 5)
    assert_same_bits(quantize(weight), dataclasses.replace(quantize(weight.flatten()), shape=weight.shape))


@pytest.mark.parametrize(
    "view",
    [lambda w: w.t(), lambda w: w[:, ::2], lambda w: w[1:, 3:], lambda w: w[:1].expand(5, -1)],
    ids=["transposed", "strided", "offset", "expanded"],
)
def test_a_view_is_read_in_row_major_order(view):
    weight = view(torch.randn(65, 66))
    assert_same_bits(quantize(weight), quantize(weight.clone(memory_format=torch.contiguous_format)))


@double_quants
def test_same_weight_same_bits(double_quant):
    weight = torch.randn(100, 100)
    before = weight.clone()
    assert_same_bits(quantize(weight, double_quant=double_quant), quantize(weight, double_quant=double_quant))
    assert torch.equal(weight, before)


def test_zeros_are_plus_zero_under_a_negative_decoded_scale():
    q = quantize(negative_scale())
    assert q.absmax()[0] < 0
    for dtype in DTYPES:
        first = q.dequantize(dtype)[0]
        assert (first == 0).all()
        assert not first.signbit().any()


def test_a_parameter_is_quantized_without_a_graph():
    q = quantize(torch.nn.Parameter(torch.randn(8, 64)))
    assert not any(part.requires_grad for part in parts(q).values())
    assert not q.dequantize().requires_grad


@double_quants
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_default_dtype_does_not_matter(default, double_quant):
    weight = torch.randn(100, 100)
    expected = quantize(weight, double_quant=double_quant)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        again = quantize(weight, double_quant=double_quant)
        back = again.dequantize()
    finally:
        torch.set_default_dtype(before)
    assert_same_bits(again, expected)
    assert torch.equal(back, expected.dequantize())


def test_default_device_does_not_matter():
    weight = torch.randn(100, 100)
    with torch.device("meta"):
        q = quantize(weight)
        back = q.dequantize()
        state = q.to_bitsandbytes()
        again = QuantizedTensor.from_bitsandbytes(state)
    assert torch.equal(back, quantize(weight).dequantize())
    assert_same_bits(again, quantize(weight))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("index", [(0, 0), (2, 63), (4, 2)], ids=str)
@dtypes
def test_nan_and_infinity_are_refused_with_the_first_index(value, index, dtype):
    weight = torch.zeros(5, 64, dtype=dtype)
    weight[4, 3] = float("nan")
    weight[index] = float(value)
    with pytest.raises(ValueError, match=rf"^h\.0\.up\[{index[0]}, {index[1]}\] is {value};"):
        quantize(weight, name="h.0.up")


def test_nan_is_refused_in_any_number_of_dimensions():
    with pytest.raises(ValueError, match=r"weight\[\] is nan"):
        quantize(torch.tensor(float("nan")))
    weight = torch.ones(3, 5, 7)
    weight[1, 4, 6] = float("inf")
    with pytest.raises(ValueError, match=r"weight\[1, 4, 6\] is inf"):
        quantize(weight)
    with pytest.raises(ValueError, match=r"weight\[6, 4, 1\] is inf"):
        quantize(weight.permute(2, 1, 0))


def test_nan_is_refused_whatever_the_default_device():
    weight = torch.tensor([1.0, float("nan")])
    with torch.device("meta"), pytest.raises(ValueError, match=r"weight\[1\] is nan"):
        quantize(weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_other_dtypes_are_refused_by_name(dtype):
    with pytest.raises(TypeError, match=rf"^h\.0\.up is {dtype}; only float32, bfloat16 and float16"):
        quantize(torch.ones(64, dtype=dtype), name="h.0.up")


def test_what_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="weight is list"):
        quantize([1.0, 2.0])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("block_size", [0, 1, 8, 48, 63, 64.0, 8192, -64, "64", True])
def test_other_block_sizes_are_refused(block_size):
    with pytest.raises(ValueError, match=rf"block_size is {block_size!r}; it must be one of 16, 32, 64,.* 4096"):
        quantize(torch.ones(64), block_size=block_size)


def test_an_unknown_codebook_is_refused():
    with pytest.raises(ValueError, match=r"unknown data type 'fp5'; known: nf4, fp4, .*nvfp4"):
        quantize(torch.ones(64), codebook="fp5")


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
def test_a_scale_that_would_decode_to_infinity_is_refused(dtype):
    # The residual of the full blocks is about half of that of the zero ones: it is rounded to its 8 bits, up or down.
    refused = 0
    for zeros in range(80, 90):
        weight = torch.full((256, 64), torch.finfo(dtype).max, dtype=dtype)
        weight[:zeros] = 0
        try:
            assert quantize(weight, name="up").dequantize().isfinite().all()
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"up: a scale, quantized and decoded, would be infinite in {dtype}")  # noqa: PT017
            assert not double_quantized(weight).dequantize().isfinite().all()
        assert torch.equal(quantize(weight, double_quant=False).dequantize(), weight)
    assert 0 < refused < 10


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
def test_weights_at_the_end_of_the_range_that_decode_are_quantized(dtype):
    weight = torch.full((300, 64), torch.finfo(dtype).max, dtype=dtype)  # one scale for all, which is the offset
    assert torch.equal(quantize(weight).dequantize(), weight)


def test_nbytes_counts_every_level():
    assert quantize(torch.ones(1000), double_quant=False).nbytes == 500 + 16 * 4
    assert quantize(torch.ones(1000)).nbytes == 500 + 16 + 4 + 4
    assert quantize(torch.ones(257, 64)).nbytes == 257 * 32 + 257 + 2 * 4 + 4
    assert quantize(torch.ones(64, 64)).bits_per_parameter == 8 * (2048 + 64 + 4 + 4) / 4096
    assert quantize(torch.ones(0), double_quant=False).bits_per_parameter == 0


def test_repr_says_what_it_is():
    assert repr(quantize(torch.ones(2, 64), double_quant=False)) == (
        "QuantizedTensor([2, 64], nf4, block_size=64, 4.500 bits per parameter, from torch.float32, device='cpu')"
    )
    assert repr(quantize(torch.ones(128, 128, dtype=torch.bfloat16), block_size=32)) == (
        "QuantizedTensor([128, 128], nf4, block_size=32, double_quant, 4.256 bits per parameter, "
        "from torch.bfloat16, device='cpu')"
    )


@double_quants
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_map_keeps_every_bit_under_a_cast_of_floating_point_tensors(dtype, double_quant):
    q = quantize(torch.randn(65, 66), double_quant=double_quant)
    assert_same_bits(q.map(lambda part: part.to(dtype) if part.is_floating_point() else part), q)


@double_quants
def test_map_applies_to_every_tensor_and_leaves_the_original(double_quant):
    q = quantize(torch.randn(65, 66), double_quant=double_quant)
    copy = q.map(torch.clone)
    assert_same_bits(copy, q)
    for name, part in parts(copy).items():
        assert part.data_ptr() != parts(q)[name].data_ptr(), name


@double_quants
def test_to_moves_every_tensor(double_quant):
    q = quantize(torch.randn(65, 66), double_quant=double_quant)
    moved = q.to("meta")
    assert moved.device.type == "meta"
    assert {name: (part.device.type, part.dtype, part.shape) for name, part in parts(moved).items()} == {
        name: ("meta", part.dtype, part.shape) for name, part in parts(q).items()
    }
    assert_same_bits(q.to("cpu"), q)


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        quantize(torch.ones(64)).block_size = 32  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        ((2, 63), (3, 64), None, r"x \[2, 63\] does not fit a weight \[3, 64\]"),
        ((), (3, 64), None, r"x \[\] does not fit"),
        ((64,), (64,), None, r"weight \[64\]"),
        ((2, 64), (1, 3, 64), None, r"weight \[1, 3, 64\]"),
        ((2, 64), (3, 64), (64,), r"bias \[64\] does not fit a weight \[3, 64\]"),
        ((2, 64), (3, 64), (1,), r"bias \[1\] does not fit"),
    ],
    ids=["inputs", "scalar-x", "weight-1d", "weight-3d", "bias", "bias-broadcast"],
)
def test_linear_refuses_shapes_that_do_not_fit(x, weight, bias, message):
    with pytest.raises(ValueError, match=f"^linear: .*{message}"):
        linear(torch.ones(x), quantize(torch.ones(weight)), None if bias is None else torch.ones(bias))
