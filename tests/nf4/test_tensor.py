"""What goes into the container, what it holds, what comes out and what is refused; and where a tensor would be: moves,
copies, pickles, shared memory, torch.compile, printing."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from torch import Tensor

from qloralab.nf4 import blockwise
from qloralab.nf4.codebook import normal_float
from qloralab.nf4.double_quant import dequantize_scales, quantize_scales
from qloralab.nf4.packed import DTYPES
from qloralab.nf4.tensor import QuantizedTensor, linear, quantize

from .weights import assert_same_bits, double_quants, dtypes, parts, pointers

NF4 = normal_float(4)
SHAPES = ((0,), (3, 0), (), (1,), (63,), (65,), (1000,), (7, 9), (3, 5, 7), (2, 64))
CODEBOOKS = {name: name for name in ("nf4", "fp4", "int4", "nf3", "nf8")} | {"own": torch.linspace(-1, 1, 16)}
codebooks = pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS)


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@double_quants
def test_it_holds_the_reference_and_gives_it_back(shape, dtype, double_quant):
    weight = torch.nn.Parameter(torch.randn(shape).to(dtype))
    before = weight.detach().clone()
    q = quantize(weight, double_quant=double_quant)
    packed, absmax = blockwise.quantize_blockwise(before, NF4, 64)
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
    assert not any(part.requires_grad for part in [*parts(q).values(), q.dequantize()])
    assert torch.equal(weight, before)


def test_zeros_are_plus_zero_under_a_negative_decoded_scale():
    weight = torch.ones(257, 64)
    weight[0], weight[1] = 0, 6
    q = quantize(weight)
    assert q.absmax()[0] < 0
    for dtype in DTYPES:
        first = q.dequantize(dtype)[0]
        assert (first == 0).all()
        assert not first.signbit().any()


@double_quants
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.device("meta")], ids=str)
def test_torchs_defaults_do_not_matter(default, double_quant):
    weight = torch.randn(100, 100)
    expected, before = quantize(weight, double_quant=double_quant), torch.get_default_dtype()
    try:
        if isinstance(default, torch.dtype):
            torch.set_default_dtype(default)
        with torch.device(default if isinstance(default, torch.device) else "cpu"):
            found = quantize(weight, double_quant=double_quant)
            back = found.dequantize()
            again = QuantizedTensor.from_bitsandbytes(found.to_bitsandbytes())
            with pytest.raises(ValueError, match=r"weight\[99, 99\] is nan"):
                quantize(torch.where(torch.arange(10_000, device="cpu").view(100, 100) < 9_999, weight, torch.nan))
    finally:
        torch.set_default_dtype(before)
    assert_same_bits(found, expected)
    assert_same_bits(again, expected)
    assert torch.equal(back, expected.dequantize())


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


@dtypes
def test_a_scale_that_would_decode_to_infinity_is_refused(dtype):
    # The residual of the full blocks is about half of that of the zero ones: it is rounded to its 8 bits, up or down.
    refused = 0
    for zeros in [0, *range(80, 90)]:  # without zeros, the one scale of all blocks is the offset
        weight = torch.full((256, 64), torch.finfo(dtype).max, dtype=dtype)
        weight[:zeros] = 0
        single = quantize(weight, double_quant=False)
        assert torch.equal(single.dequantize(), weight)
        try:
            assert quantize(weight, name="up").dequantize().isfinite().all()
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"up: a scale, quantized and decoded, would be infinite in {dtype}")  # noqa: PT017
            codes, absmax2, offset = quantize_scales(single.scales)
            unchecked = dataclasses.replace(single, scales=codes, absmax2=absmax2, offset=offset)
            assert not unchecked.dequantize().isfinite().all()
            assert zeros
    assert 0 < refused < 10


def test_nbytes_counts_every_level():
    assert quantize(torch.ones(1000), double_quant=False).nbytes == 500 + 16 * 4
    assert quantize(torch.ones(1000)).nbytes == 500 + 16 + 4 + 4
    assert quantize(torch.ones(257, 64)).nbytes == 257 * 32 + 257 + 2 * 4 + 4
    assert quantize(torch.ones(64, 64)).bits_per_parameter == 8 * (2048 + 64 + 4 + 4) / 4096
    assert quantize(torch.ones(0), double_quant=False).bits_per_parameter == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"double_quant": False}, "nf4, block_size=64, 4.500 bits per parameter"),
        ({"codebook": "fp4", "block_size": 32}, "fp4, block_size=32, double_quant, 4.256 bits per parameter"),
        ({"codebook": "nf3"}, "nf3, block_size=64, double_quant, 8.129 bits per parameter (3.129 ideal)"),
        ({"codebook": CODEBOOKS["own"]}, "custom, block_size=64, double_quant, 4.129 bits per parameter"),
    ],
    ids=["nf4", "fp4", "nf3", "own"],
)
def test_repr_says_what_is_held(options, text):
    q = quantize(torch.ones(128, 128, dtype=torch.float16), **options)
    assert repr(q) == f"QuantizedTensor([128, 128], {text}, from torch.float16, device='cpu')"
    assert repr(q.to("meta")) == repr(q).replace("'cpu'", "'meta'")


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        quantize(torch.ones(64)).block_size = 32  # pyright: ignore[reportAttributeAccessIssue]


@codebooks
@double_quants
def test_on_the_meta_device_it_has_shapes_and_no_numbers(codebook, double_quant):
    q = quantize(torch.randn(65, 66, dtype=torch.bfloat16), codebook, double_quant=double_quant)
    moved = q.to("meta")
    assert moved.device == torch.device("meta")
    assert {name: (part.device.type, part.dtype, part.shape) for name, part in parts(moved).items()} == {
        name: ("meta", part.dtype, part.shape) for name, part in parts(q).items()
    }
    assert (moved.nbytes, moved.bits_per_parameter, moved.bits) == (q.nbytes, q.bits_per_parameter, q.bits)
    assert (moved.absmax().shape, moved.absmax().dtype) == (q.absmax().shape, torch.float32)
    assert (moved.dequantize().shape, moved.dequantize().dtype) == ((65, 66), torch.bfloat16)
    assert linear(torch.ones(3, 66, device="meta"), moved).shape == (3, 65)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")], ids=["text", "device"])
def test_a_move_to_where_it_is_copies_nothing(device):
    q = quantize(torch.randn(65, 66))
    assert pointers(parts(q.to(device))) == pointers(parts(q))


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8], ids=str)
def test_a_conversion_is_refused_with_advice(dtype):
    with pytest.raises(TypeError, match=rf"not converted; dequantize\({dtype}\)"):
        quantize(torch.randn(64)).to(dtype)


@pytest.mark.gpu
@codebooks
@double_quants
def test_to_a_gpu_and_back_by_pinned_memory(codebook, double_quant):
    q = quantize(torch.randn(65, 66), codebook, double_quant=double_quant)
    pinned = q.pin_memory()
    assert all(part.is_pinned() for part in parts(pinned).values())
    assert not any(part.is_pinned() for part in parts(q).values())
    moved = pinned.to("cuda", non_blocking=True)
    assert moved.device.type == "cuda"
    assert torch.equal(moved.dequantize().cpu(), q.dequantize())
    assert_same_bits(moved.to("cpu"), q)


@codebooks
@double_quants
@pytest.mark.parametrize("duplicate", [copy.deepcopy, QuantizedTensor.clone], ids=["deepcopy", "clone"])
def test_a_deep_copy_has_memory_of_its_own(duplicate, codebook, double_quant):
    q = quantize(torch.randn(65, 66), codebook, double_quant=double_quant)
    twin = duplicate(q)
    assert_same_bits(twin, q)
    assert not pointers(parts(twin)) & pointers(parts(q))


def test_a_copy_is_the_same_and_nothing_else_equals_it():
    q = quantize(torch.randn(65, 66))
    first, second = copy.deepcopy([q, q])
    assert copy.copy(q) is q
    assert first is second
    assert first != q
    assert len({q, q, first}) == 2


@pytest.mark.parametrize("save", [pickle.dumps, lambda weight: torch.save({"w": [weight]}, io.BytesIO())])
def test_it_is_not_pickled(save):
    with pytest.raises(pickle.PicklingError, match=r"not pickled.*to_bitsandbytes\(\).*state_dict\(\)"):
        save(quantize(torch.randn(64)))


@codebooks
@double_quants
def test_sharing_moves_every_part_and_changes_no_bit(codebook, double_quant):
    q = quantize(torch.randn(65, 66), codebook, double_quant=double_quant)
    before = copy.deepcopy(q)
    assert not any(part.is_shared() for part in parts(q).values())
    assert q.share_memory_() is q
    assert all(part.is_shared() for part in parts(q).values())
    assert_same_bits(q, before)


@codebooks
@double_quants
def test_it_is_compiled_in_one_piece(codebook, double_quant):
    q = quantize(torch.randn(33, 66), codebook, double_quant=double_quant)
    x, bias = torch.randn(3, 66, requires_grad=True), torch.randn(33, requires_grad=True)

    def use(x: Tensor, q: QuantizedTensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return linear(x, q, bias), q.dequantize(torch.bfloat16), q.absmax()

    torch._dynamo.reset()
    found, expected = torch.compile(use, fullgraph=True, backend="aot_eager")(x, q, bias), use(x, q, bias)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    dy = torch.randn(3, 33)
    for ours, theirs in zip(*(torch.autograd.grad(y[0], (x, bias), dy) for y in (found, expected)), strict=True):
        assert torch.equal(ours, theirs)


def test_one_compilation_serves_weights_alike():
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 66)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            q = quantize(torch.randn(33, 66))
            assert torch.equal(compiled(x, q), linear(x, q))


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
