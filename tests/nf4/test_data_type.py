"""Data types against formulas in float64: the rules for a scale, the encodings, what a weight in one can do."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from qloralab import DATA_TYPES, DataType, QuantizedTensor, linear, quantize, quantize_
from qloralab.nf4 import ops, tensor
from qloralab.nf4.blockwise import nearest
from qloralab.nf4.codebook import codebook_values, normal_float
from qloralab.nf4.data_type import ENCODINGS, RULES, Encoding, data_type, quantize_blocks, squared_error
from qloralab.nf4.double_quant import dequantize_scales, quantize_scales
from qloralab.nf4.files.errors import FormatError
from qloralab.nf4.linear import QuantizedLinear

NAMES = tuple(DATA_TYPES)
OWN = tuple(name for name in NAMES if not DATA_TYPES[name].is_plain)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
own = pytest.mark.parametrize("name", OWN)


def errors(weight: Tensor, kind: str | DataType, block_size: int) -> Tensor:
    """The squared error of each block: float64 [blocks]."""
    return (
        (quantize(weight, kind).dequantize(torch.float32).double() - weight.double())
        .view(-1, block_size)
        .square()
        .sum(1)
    )


# What is plain has the bits that it always had


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("name", ["nf4", "fp4", "int4", "nf3", "bof4"])
def test_a_plain_data_type_is_made_by_the_operators(name, double_quant):
    weight = torch.randn(65, 66)
    kind = data_type(name, double_quant=double_quant)
    assert kind.is_plain
    q, values = quantize(weight, kind), codebook_values(name)
    packed, scales = ops.quantize_blockwise(weight, values, 64)
    if double_quant:
        scales, absmax2, offset = ops.quantize_scales(scales)
        assert q.absmax2 is not None
        assert q.offset is not None
        assert torch.equal(q.absmax2, absmax2)
        assert torch.equal(q.offset, offset)
    assert torch.equal(q.packed, packed)
    assert torch.equal(q.scales, scales)
    assert (q.scale_bits, q.codebook) == (None, name)
    assert torch.equal(q.packed, quantize(weight, name, 64, double_quant).packed)


@pytest.mark.parametrize("encoding", ["float32", "double"])
def test_the_definition_agrees_with_the_operators(encoding):
    weight = torch.randn(33, 65)
    kind = DataType("mine", "nf4", encoding=encoding)
    packed, scales, values = quantize_blocks(weight, kind)
    q = quantize(weight, kind)
    assert torch.equal(packed, q.packed)
    assert torch.equal(scales, q.absmax())
    assert torch.equal(values, normal_float(4))


# The rules


@pytest.mark.parametrize("codebook", ["nf4", "int4", "fp4"])
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_least_squares_is_never_worse_than_absmax(codebook, size):
    weight = torch.randn(400, 64) * size
    weight[:20] = weight[:20].sign() * size
    weight[20:40, 1:] = 0
    weight[40] = torch.tensor([1.0, *[0.7] * 63]) * size
    best, plain = (errors(weight, DataType("x", codebook, scale=scale), 64) for scale in ("least_squares", "absmax"))
    assert (best <= plain).all()
    assert best.sum() < 0.9 * plain.sum()


def test_four_over_six_is_never_worse_than_six():
    weight = torch.randn(500, 16)
    weight[0] = 0
    four, six = (errors(weight, DataType("x", "e2m1", 16, scale=rule), 16) for rule in ("four_over_six", "largest"))
    assert (four <= six).all()
    assert four.sum() < 0.9 * six.sum()
    assert errors(weight, "nvfp4-4over6", 16).sum() < 0.9 * errors(weight, "nvfp4", 16).sum()


def test_a_signed_scale_is_the_largest_weight_itself():
    weight = torch.randn(50, 64)
    q = quantize(weight, "bof4-s", double_quant=False)
    largest = weight.gather(1, weight.abs().argmax(1, keepdim=True))[:, 0]
    assert torch.equal(q.scales, largest)
    assert (q.scales < 0).any()
    assert torch.equal(q.dequantize().gather(1, weight.abs().argmax(1, keepdim=True))[:, 0], largest)


def test_of_equal_proposals_the_first_is_kept():
    def twice(blocks: Tensor, values: Tensor) -> Tensor:
        largest = blocks.abs().amax(1)
        return torch.stack([largest, -largest, 2 * largest])

    weight = torch.tensor([[1.0, -1.0] * 16, [-0.5, 0.5] * 16])  # exact under the first and the second
    q = quantize(weight, DataType("x", "nf4", 32, scale=twice))
    assert q.scales.tolist() == [1.0, 0.5]
    assert torch.equal(q.dequantize(), weight)


def test_a_number_half_way_goes_to_the_lower_value():
    """In units of the codebook also under a negative scale: E2M1's 2.5 lies between 2 and 3."""
    assert quantize(torch.tensor([6.0, 2.5, -2.5, 0.25]), "mxfp4").dequantize().tolist() == [6.0, 2.0, -3.0, 0.0]


# The encodings


def test_e2m1_has_the_numbers_of_the_standard():
    values = codebook_values("e2m1")
    assert torch.equal(values[:8] * 8, E2M1)
    assert torch.equal(values[8:], 0 - values[:8])
    assert not values[8].signbit()


def test_mxfp4_is_the_formula_of_the_standard():
    """OCP MX 1.0, 6.3: X = 2**(floor(log2 max|w|) - 2); an element is the nearest of w / X, saturating at 6."""
    weight = torch.randn(300, 32) * 2.0 ** torch.randint(-60, 60, (300, 1))
    weight[0] = weight[0].sign() * 4.0
    weight[1] = weight[1].sign() * np.nextafter(np.float32(8), np.float32(0))
    q = quantize(weight, "mxfp4")
    exact = weight.double()
    X = 2.0 ** (torch.floor(torch.log2(exact.abs().amax(1))) - 2)
    assert torch.equal(q.scales.double(), 8 * X)
    grid = torch.cat([-E2M1.flip(0), E2M1]).double()
    distance = (exact[:, :, None] / X[:, None, None] - grid).abs()
    assert torch.equal(q.dequantize().double(), grid[distance.argmin(-1)] * X[:, None] + 0.0)


def test_every_mantissa_has_the_scale_of_its_power_of_two():
    largest = (torch.arange(1 << 22, 1 << 23, 5).int() | 0x3F800000).view(torch.float32)  # [1.5, 2), and below
    largest = torch.cat([largest, largest.view(torch.int32).sub(1 << 22).view(torch.float32)])
    unit = codebook_values("e2m1").abs().max()
    assert (ENCODINGS["e8m0"].decoded((largest / unit)[None], codebook_values("e2m1")) == 2).all()


def e4m3() -> Tensor:
    """Every number of E4M3 from 0 up, float64."""
    return torch.tensor(
        [m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)][:-1],
        dtype=torch.float64,
    )


def test_nvfp4_is_its_formula():
    """A tensor scale max|w| / (6 * 448), the scale of a block the nearest of E4M3 to its max|w| / 6, over that."""
    weight = torch.randn(64, 48)
    q = quantize(weight, "nvfp4")
    exact = weight.double().view(-1, 16)
    of_tensor = exact.abs().max() / (6 * 448)
    wanted, numbers = exact.abs().amax(1) / 6 / of_tensor, e4m3()
    assert numbers[-1] == 448
    scale = numbers[(wanted[:, None] - numbers).abs().argmin(1)] * of_tensor
    grid = torch.cat([-E2M1.flip(0), E2M1]).double()
    expected = grid[(exact[:, :, None] / scale[:, None, None] - grid).abs().argmin(-1)] * scale[:, None]
    assert torch.allclose(q.absmax().double(), 8 * scale, rtol=3e-7, atol=0)
    assert torch.allclose(q.dequantize().double().view(-1, 16), expected, rtol=3e-7, atol=0)


def test_a_scale_that_encodes_to_zero_makes_zeros():
    weight = torch.randn(4, 16)
    weight[1] *= 1e-6  # E4M3 ends at 2**-9 / 448 of the largest
    q = quantize(weight, "nvfp4")
    assert q.scales[1] == 0
    assert not q.dequantize()[1].any()
    assert not q.dequantize()[1].signbit().any()


def test_double_quantization_of_signed_scales():
    scales = (torch.rand(1000) + 2) * torch.randn(1000).sign()
    scales[7] = 0
    found = ENCODINGS["double_signed"].decoded(scales[None], torch.ones(1))[0]
    assert torch.equal(found.sign(), scales.sign())
    residual = (scales.abs() - scales.abs().double().mean().float()).split(256)
    for part, one in zip(residual, (found - scales).abs().split(256), strict=True):
        assert one.max() <= part.abs().max() / 126 * (1 + 1e-4)
    unsigned = scales.abs()
    other = (dequantize_scales(*quantize_scales(unsigned)) - unsigned).square().mean()
    assert 2 < (found - scales).square().mean() / other < 3  # what the bit of the sign costs
    weight = torch.randn(4000, 64)
    encoded, exact = (errors(weight, data_type("bof4-s", double_quant=double), 64).sum() for double in (True, False))
    assert exact < encoded < 1.002 * exact


def test_one_offset_would_not_serve_signed_scales():
    weight = torch.randn(1000, 64)
    split, offset = (
        DataType("x", "bof4-s", scale="signed", encoding=ENCODINGS[name]) for name in ("double_signed", "double")
    )
    assert errors(weight, split, 64).sum() < errors(weight, offset, 64).sum()


def test_bits_per_parameter():
    weight = torch.randn(4096, 256)
    ideal = {name: quantize(weight, name).ideal_bits_per_parameter for name in ("bof4-s", "mxfp4", "nvfp4", "kmeans4")}
    assert ideal == {"bof4-s": 4 + 8.125 / 64, "mxfp4": 4.25, "nvfp4": 4.5, "kmeans4": 4 + 8.125 / 64}
    assert round(ideal["bof4-s"], 3) == 4.127
    assert quantize(weight, "any4").ideal_bits_per_parameter == 4 + 8.125 / 128 + 16 * 16 / 256
    assert quantize(weight, "nf3").ideal_bits_per_parameter == pytest.approx(3.127, abs=1e-3)
    assert quantize(weight, "mxfp4").bits_per_parameter == 5


# k-means


def test_a_fitted_codebook_has_less_error_than_nf4():
    weight = torch.distributions.Laplace(0, 1).sample((64, 256)).float()
    weight[:32] = torch.rand(32, 256) - 0.5
    found = {
        name: errors(weight, DataType("x", name, encoding="float32"), 64).sum()
        for name in ("kmeans", "kmeans_rows", "nf4")
    }
    assert found["kmeans_rows"] < found["kmeans"] < found["nf4"]


@pytest.mark.parametrize("shape", [(3, 5), (1, 7), (2, 3, 5), (9,), (), (3, 0), (0,)], ids=str)
def test_a_codebook_for_each_row_of_any_shape(shape):
    weight = torch.randn(shape)
    q = quantize(weight, "any4", double_quant=False)
    per_row = len(shape) > 1 and weight.numel()
    assert q.values.shape == ((shape[0], 16) if per_row else (16,))
    assert q.dequantize().shape == weight.shape
    if per_row:
        values = q.values.repeat_interleave(weight[0].numel(), 0)
        codes = q.codes().flatten().long()[:, None]
        scales = q.absmax().repeat_interleave(128)[: weight.numel()]
        assert torch.equal((values.gather(1, codes)[:, 0] * scales).view(shape) + 0.0, q.dequantize())


# Every data type


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_every_data_type_quantizes(name, dtype):
    weight = torch.randn(33, 31).to(dtype)
    weight[3:9] = 0
    q = quantize(weight, name)
    assert (q.dtype, q.codebook, q.shape) == (dtype, name, weight.shape)
    back = q.dequantize()
    assert back.dtype == dtype
    bound = 0.35 if name in ("nf2", "fp4_e3m0") else 0.12
    assert (back.double() - weight.double()).square().mean() < bound * weight.double().square().mean()
    zero = torch.zeros(5, 31)
    assert not quantize(zero, name).dequantize().any()
    assert not quantize(zero, name).dequantize().signbit().any()


@own
def test_nan_and_infinity_are_refused_by_name(name):
    for bad in (math.nan, math.inf, -math.inf):
        weight = torch.randn(4, 40)
        weight[2, 3] = bad
        with pytest.raises(ValueError, match=rf"h\.0\[2, 3\] is {bad}; a weight with NaN or infinity"):
            quantize(weight, name, name="h.0")


@own
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-20, 1e20, 1e37])
def test_weights_of_any_size(name, size):
    weight = torch.randn(8, 64) * size
    back = quantize(weight, name).dequantize()
    assert back.isfinite().all()
    if size > 1e-38:
        relative = (back.double() / size - weight.double() / size).square().mean()
        assert relative < 0.03


def test_what_would_be_infinite_is_refused():
    weight = torch.full((1, 32), 65504.0, dtype=torch.float16)
    rule = lambda blocks, values: blocks.abs().amax(1)[None] * 1.5  # noqa: E731
    with pytest.raises(
        ValueError, match=r"h: weights near the end of the range of torch\.float16 would be infinite in big"
    ):
        quantize(weight, DataType("big", (-1.0, -0.5, 0.0, 1.0), 32, scale=rule), name="h")
    assert quantize(weight, "mxfp4").dequantize().isfinite().all()


@own
def test_the_last_block_may_be_short(name):
    weight = torch.randn(1, 200)
    size = DATA_TYPES[name].block_size
    whole = 200 // size * size
    q = quantize(weight, name)
    assert len(q.absmax()) == -(-200 // size)
    if DATA_TYPES[name].codebook not in ("kmeans", "kmeans_rows") and not DATA_TYPES[name].double_quant:
        part = quantize(torch.cat([weight[:, whole:], weight.new_zeros(1, size - 200 + whole)], 1), name)
        if not name.startswith("nvfp4"):  # whose tensor scale is that of all blocks
            assert torch.equal(part.dequantize()[:, : 200 - whole], q.dequantize()[:, whole:])


@own
def test_a_file_holds_it(name):
    weight = torch.randn(10, 33)
    q = quantize(weight, name)
    stored = q.stored("w")
    assert any(key.startswith(f"w.quant_state.qloralab__{name}") for key in stored)
    again = QuantizedTensor.from_bitsandbytes(stored, "w")
    assert torch.equal(again.dequantize(), q.dequantize())
    assert (again.scale_bits, again.codebook, again.block_size) == (q.scale_bits, name, q.block_size)
    assert again.ideal_bits_per_parameter == q.ideal_bits_per_parameter
    with pytest.raises(ValueError, match=f"w is {name}; bitsandbytes knows nf4 and fp4 only"):
        q.to_bitsandbytes("w")


def test_nf4_in_blocks_of_16_is_not_that_of_bitsandbytes():
    q = quantize(torch.randn(4, 32), "nf4", 16)
    with pytest.raises(ValueError, match="w is nf4 with scales of its own; bitsandbytes knows"):
        q.to_bitsandbytes("w")
    stored = q.stored("w")
    assert "w.quant_state.qloralab__nf4" in stored
    assert torch.equal(QuantizedTensor.from_bitsandbytes(stored, "w").dequantize(), q.dequantize())
    stored["w.quant_state.bitsandbytes__nf4"] = stored.pop("w.quant_state.qloralab__nf4")
    with pytest.raises(FormatError, match="'scale_bits': is no field of bitsandbytes"):
        QuantizedTensor.from_bitsandbytes(stored, "w")


def _spoil(stored: dict[str, Tensor], what: str) -> None:
    payload = bytes(stored["w.quant_state.qloralab__bof4-s"].tolist()).decode()
    changes = {
        "scale_bits": ("8.125", '"8"'), "negative": ("8.125", "-1"), "name": ("bof4-s", "bof5-s"),
        "block": ('"blocksize": 64', '"blocksize": 8'), "nested": ("8.125", '8, "nested_offset": 0.1'),
    }  # fmt: skip
    if what in changes:
        payload = payload.replace(*changes[what])
        stored["w.quant_state.qloralab__bof4-s"] = torch.tensor(list(payload.encode()), dtype=torch.uint8)
    elif what == "scale":
        stored["w.absmax"][0] = math.nan
    elif what == "value":
        stored["w.quant_map"][0] = 3.0
    elif what == "rows":
        stored["w.quant_map"] = stored["w.quant_map"].expand(7, 16).contiguous()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("scale_bits", "scale_bits': is '8'; expected how many bits a scale takes"),
        ("negative", "scale_bits': is -1"),
        ("name", "quant_type': is 'bof5-s', which is not what the name of its tensor says"),
        ("block", "blocksize': is 8; expected a power of two from 16 to 4096"),
        ("nested", "scale_bits': is there beside nested_offset"),
        ("scale", "w.absmax.* holds a scale that is NaN or infinite"),
        ("value", r"w.quant_map.* outside \[-2, 2\]"),
        ("rows", r"w.quant_map.* is \[7, 16\]; expected \[4 to 256\], or as many for each row"),
    ],
)
def test_a_spoiled_file_is_refused(what, message):
    stored = {name: part.clone() for name, part in quantize(torch.randn(10, 33), "bof4-s").stored("w").items()}
    _spoil(stored, what)
    with pytest.raises(FormatError, match=message):
        QuantizedTensor.from_bitsandbytes(stored, "w")


@own
def test_on_the_meta_device(name):
    weight = torch.randn(10, 33)
    q, described = quantize(weight, name), quantize(weight.to("meta"), name)
    for part, other in zip(q.operands().tensors, described.operands().tensors, strict=True):
        assert (part is None) == (other is None)
        if part is not None:
            assert other is not None
            assert (other.device.type, other.dtype, other.shape) == ("meta", part.dtype, part.shape)


@own
def test_a_layer_multiplies_saves_and_copies(name):
    model = torch.nn.Sequential(torch.nn.Linear(64, 24), torch.nn.Linear(24, 8))
    x = torch.randn(5, 64, requires_grad=True)
    quantize_(model, name, compute_dtype=torch.float32)
    layer = model[0]
    assert isinstance(layer, QuantizedLinear)
    W = layer.weight.dequantize()
    y = layer(x)
    assert layer.bias is not None
    assert torch.allclose(y, x @ W.T + layer.bias, atol=1e-5)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(grad, W.sum(0).expand(5, 64), atol=1e-5)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    fresh = quantize_(
        torch.nn.Sequential(torch.nn.Linear(64, 24), torch.nn.Linear(24, 8)), name, compute_dtype=torch.float32
    )
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    scales = layer.weight.scales.clone()
    model.to(torch.bfloat16)
    assert torch.equal(layer.weight.scales, scales)


@pytest.mark.parametrize("name", ["bof4-s", "any4", "nvfp4"])
def test_a_compiled_layer_is_the_layer(name):
    layer = quantize_(torch.nn.Sequential(torch.nn.Linear(64, 24)), name, compute_dtype=torch.float32)
    x = torch.randn(5, 64)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_take_a_negative_scale(dtype):
    """The dequantized weight, and products with one token and with many."""
    from qloralab.kernels import dispatch

    q = quantize(torch.randn(96, 128), "bof4-s")
    assert (q.scales < 0).any()
    x = torch.randn(20, 128).to(dtype)
    fast, one = linear(x, q), linear(x[:1], q)
    back = q.dequantize(dtype)
    with dispatch.use("reference"):
        assert torch.equal(back, q.dequantize(dtype))
        assert not back[back == 0].signbit().any()
        assert torch.allclose(fast, linear(x, q), rtol=0.02, atol=0.05 if dtype == torch.bfloat16 else 1e-4)
        assert torch.allclose(one, linear(x[:1], q), rtol=0.02, atol=0.05 if dtype == torch.bfloat16 else 1e-4)


def test_what_no_kernel_serves_is_said_once(monkeypatch):
    monkeypatch.setattr(tensor, "_told", set())
    said: list[str] = []
    monkeypatch.setattr(tensor._log, "warning", lambda text, *values: said.append(text % values))
    for name in ("nvfp4", "nvfp4", "nf4", "mxfp4"):
        quantize(torch.randn(4, 64), name)
    assert said == ["nvfp4: no kernel has it; products run in plain PyTorch"]


# As a value


def test_the_pieces_of_ones_own():
    def middle(blocks: Tensor, values: Tensor) -> Tensor:
        return blocks.abs().median(1).values[None] * 2

    half = Encoding(16, lambda scales, values: scales.half().float())
    kind = DataType("mine", torch.linspace(-1, 1, 8), 32, scale=middle, encoding=half)
    weight = torch.randn(40, 64)
    q = quantize(weight, kind)
    expected = (weight.view(-1, 32).abs().median(1).values * 2).half().float()
    assert torch.equal(q.scales, expected)
    assert q.ideal_bits_per_parameter == 3 + 16 / 32
    assert kind.settings() == {
        "name": "mine", "codebook": kind.codebook, "block_size": 32, "scale": "middle", "encoding": "Encoding"
    }  # fmt: skip
    assert hash(kind) == hash(copy.copy(kind))
    x = weight.view(-1, 32) / expected[:, None]
    assert torch.equal(q.codes().view(-1, 32), nearest(x, torch.linspace(-1, 1, 8)).int())


def test_the_errors_of_a_block_are_sums():
    blocks, scales, values = torch.randn(7, 32), torch.rand(7) + 1, normal_float(4)
    exact = values[((blocks / scales[:, None])[:, :, None] - values).abs().argmin(-1)] * scales[:, None] - blocks
    assert torch.allclose(squared_error(blocks, scales, values), exact.double().square().sum(1), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", "nf4", 24), "block_size is 24; it must be one of 16, 32"),
        (("x", "nf4", 64, "largest?"), r"x: scale is 'largest\?'; it must be one of absmax, largest"),
        (("x", "nf4", 64, "absmax", "e5m2"), "x: encoding is 'e5m2'; it must be one of float32, double"),
        (("a b", "nf4"), "a data type is called 'a b'; a name has letters"),
        (("", "nf4"), "a data type is called ''"),
        (("x", "nf9"), "unknown codebook 'nf9'; known: nf4"),
        (("x", "kmeans", 64, "least_squares"), "x: kmeans is fitted after the scale, which is absmax or signed"),
        (("x", "nf4", 64, "signed", "double"), "x: one offset does not fit scales with a sign"),
        (("x", [0.0, 1.0]), r"a codebook is float32 \[4 to 256\]"),
    ],
)
def test_what_is_no_data_type_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataType(*arguments)


def test_another_block_size_and_encoding():
    assert data_type("nvfp4", 32).block_size == 32
    assert data_type("bof4-s", double_quant=False).encoding == "float32"
    assert data_type(data_type("bof4-s", double_quant=False), double_quant=True).encoding == "double_signed"
    assert data_type("kmeans4", double_quant=True).encoding == "double"
    with pytest.raises(ValueError, match="mxfp4 encodes its scales as e8m0; leave double_quant out"):
        data_type("mxfp4", double_quant=True)
    with pytest.raises(ValueError, match="mine encodes its scales as Encoding"):
        data_type(DataType("mine", "nf4", encoding=Encoding(8, ENCODINGS["e8m0"].decoded)), double_quant=False)
    assert set(RULES) == {"absmax", "largest", "signed", "least_squares", "four_over_six"}
