"""The bitsandbytes layout: written as bitsandbytes writes it, read by it and from it; anything else is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from qloralab.nf4.files import bitsandbytes_layout as layout
from qloralab.nf4.files.errors import FormatError
from qloralab.nf4.tensor import QuantizedTensor, quantize

KEY = "h.0.w.quant_state.bitsandbytes__nf4"
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
double_quants = pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
# Rows of whole blocks, and of no multiple of 16: elsewhere bitsandbytes misreads scales on some CPUs.
shapes = pytest.mark.parametrize(("shape", "block_size"), [((65, 128), 64), ((32, 256), 32), ((9, 65), 64)], ids=str)


storages = pytest.mark.parametrize("storage", layout.STORAGE, ids=str)
codebooks = pytest.mark.parametrize("codebook", layout.KNOWN)


def theirs(
    dtype: torch.dtype, double_quant: bool, shape=(65, 128), block_size=64, codebook="nf4", storage=torch.uint8
) -> tuple[Tensor, bnb.QuantState]:
    return bnb.quantize_4bit(
        torch.randn(shape).to(dtype),
        blocksize=block_size,
        quant_type=codebook,
        compress_statistics=double_quant,
        quant_storage=storage,
    )


def with_prefix(packed: Tensor, state: bnb.QuantState, prefix: str) -> dict[str, Tensor]:
    return {prefix: packed} | {f"{prefix}.{name}": part for name, part in state.as_dict(packed=True).items()}


def assert_same_bytes(written: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    assert written.keys() == tensors.keys()
    for name, part in tensors.items():
        assert (written[name].dtype, written[name].shape) == (part.dtype, part.shape), name
        as_bytes = [one.reshape(-1).view(torch.uint8).numpy().tobytes() for one in (written[name], part)]
        assert as_bytes[0] == as_bytes[1], name


@storages
@codebooks
def test_codes_are_stored_as_any_dtype(storage, codebook):
    tensors = with_prefix(*theirs(torch.bfloat16, True, codebook=codebook, storage=storage), prefix="h.0.w")
    assert tensors["h.0.w"].dtype == storage
    q = QuantizedTensor.from_bitsandbytes(tensors, "h.0.w")
    assert (q.packed.dtype, q.packed.shape) == (torch.uint8, (65 * 64, 1))
    assert_same_bytes(q.to_bitsandbytes("h.0.w", storage), tensors)


def test_codes_that_do_not_fill_the_storage_are_refused():
    with pytest.raises(ValueError, match=r"^h\.0\.w: 33 bytes of codes are no whole number of torch.bfloat16; store"):
        quantize(torch.randn(65)).to_bitsandbytes("h.0.w", torch.bfloat16)
    with pytest.raises(ValueError, match=r"^h\.0\.w: codes are not stored as torch.int64; one of uint8, int8, float16"):
        quantize(torch.randn(64)).to_bitsandbytes("h.0.w", torch.int64)


@double_quants
@storages
@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4", "nf3", "nf8"])
@pytest.mark.parametrize("shape", [(64, 65), (0,), (3, 5, 7, 16)], ids=str)
def test_the_layout_is_known_before_the_weight_is_quantized(shape, double_quant, codebook, storage):
    weight = torch.randn(shape) * 1e-38 - 1e-38  # an offset with as many characters as there can be
    q = quantize(weight, codebook, 32, double_quant)
    found = q.stored("h.0.w", storage)
    described = layout.describe("h.0.w", shape, torch.float32, codebook, 32, double_quant, storage)
    assert list(described) == sorted(found, key=list(described).index)
    payload = list(described)[-1]
    assert {name: (part.dtype, tuple(part.shape)) for name, part in found.items() if name != payload} == {
        name: what for name, what in described.items() if name != payload
    }
    assert "quant_state" in payload
    assert 0 <= described[payload][1][0] - len(found[payload]) <= (24 if double_quant else 0)


@double_quants
@pytest.mark.parametrize("codebook", [*layout._OURS])
@pytest.mark.parametrize("shape", [(64, 65), (33,)], ids=str)
def test_codebooks_of_our_own_round_trip_and_bitsandbytes_refuses_them(codebook, shape, double_quant):
    values = torch.linspace(-1, 1, 16) ** 3 if codebook == "custom" else codebook
    q = quantize(torch.randn(shape), values, double_quant=double_quant)
    with pytest.raises(ValueError, match=rf"^w is {codebook}; bitsandbytes knows nf4 and fp4 only"):
        q.to_bitsandbytes("w")
    tensors = q.stored("w")
    assert f"w.quant_state.qloralab__{codebook}" in tensors
    again = QuantizedTensor.from_bitsandbytes(tensors, "w")
    assert (again.codebook, again.bits) == (codebook, q.bits)
    assert torch.equal(again.dequantize(), q.dequantize())
    del tensors["w"]
    with pytest.raises(ValueError, match="exactly one `quant_state`"):
        bnb.QuantState.from_dict({n.removeprefix("w."): t for n, t in tensors.items()}, torch.device("cpu"))


def test_codes_beyond_the_codebook_are_refused():
    tensors = quantize(torch.randn(64), "nf3").stored("w")
    tensors["w"] = tensors["w"].clone()
    tensors["w"][5] = 8
    with pytest.raises(FormatError, match=r"'w': holds a code above 7"):
        QuantizedTensor.from_bitsandbytes(tensors, "w")


@pytest.mark.parametrize(
    "spoil",
    [lambda v: v.flip(0), lambda v: v * 1.5, lambda v: v / 0, lambda v: v.double(), lambda v: v[:3]],
    ids=["descending", "beyond-1", "nan", "float64", "short"],
)
def test_a_custom_codebook_in_a_file_is_checked(spoil):
    tensors = quantize(torch.randn(64), torch.linspace(-1, 1, 16)).stored("w")
    tensors["w.quant_map"] = spoil(tensors["w.quant_map"])
    with pytest.raises(FormatError) as caught:
        QuantizedTensor.from_bitsandbytes(tensors, "w")
    assert caught.value.tensor == "w.quant_map"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1e-3"])
@double_quants
def test_scales_that_no_writer_produces_are_refused(value, double_quant):
    tensors = quantize(torch.randn(64, 64), double_quant=double_quant).to_bitsandbytes("w")
    name = "w.nested_absmax" if double_quant else "w.absmax"
    tensors[name] = tensors[name].clone()
    tensors[name][-1] = float(value)
    with pytest.raises(FormatError, match=rf"'{name}': holds a scale that is NaN, infinite or negative"):
        QuantizedTensor.from_bitsandbytes(tensors, "w")


def test_weights_are_told_by_their_payload():
    tensors = quantize(torch.randn(64)).to_bitsandbytes("a.w") | quantize(torch.randn(64), "fp4").to_bitsandbytes("b")
    assert layout.weights([*tensors, "a.bias", "norm.weight"]) == ["a.w", "b"]


def test_the_text_is_the_documented_one():
    q = quantize(torch.randn(128, 128, dtype=torch.bfloat16))
    assert q.offset is not None
    assert bytes(q.to_bitsandbytes("h.0.w")[KEY].tolist()).decode() == (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 128], '
        f'"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": {q.offset.item()!r}}}'
    )
    q = quantize(torch.randn(3, 5), double_quant=False, block_size=4096)
    assert bytes(q.to_bitsandbytes("h.0.w")[KEY].tolist()).decode() == (
        '{"quant_type": "nf4", "blocksize": 4096, "dtype": "float32", "shape": [3, 5]}'
    )


@dtypes
@double_quants
@codebooks
@shapes
def test_bitsandbytes_opens_ours(dtype, double_quant, shape, block_size, codebook):
    q = quantize(torch.randn(shape).to(dtype), codebook, double_quant=double_quant, block_size=block_size)
    tensors = q.to_bitsandbytes("h.0.w")
    packed = tensors.pop("h.0.w")
    suffixed = {name.removeprefix("h.0.w."): part for name, part in tensors.items()}
    state = bnb.QuantState.from_dict(suffixed, torch.device("cpu"))
    back = bnb.dequantize_4bit(packed, state)
    assert back.dtype == dtype
    assert torch.equal(back, q.dequantize())


@dtypes
@double_quants
@codebooks
@shapes
def test_we_open_bitsandbytes_and_write_its_bytes(dtype, double_quant, shape, block_size, codebook):
    packed, state = theirs(dtype, double_quant, shape, block_size, codebook)
    tensors = with_prefix(packed, state, "h.0.w")
    q = QuantizedTensor.from_bitsandbytes(tensors, "h.0.w")
    assert (q.shape, q.dtype, q.block_size, q.double_quant) == (shape, dtype, block_size, double_quant)
    assert q.codebook == codebook
    assert torch.equal(q.dequantize(), bnb.dequantize_4bit(packed, state))
    assert_same_bytes(q.to_bitsandbytes("h.0.w"), tensors)


@double_quants
@pytest.mark.parametrize("shape", [(), (0,), (1,), (63,), (3, 0, 5), (3, 5, 7)], ids=str)
def test_any_shape_round_trips(shape, double_quant):
    q = quantize(torch.randn(shape), double_quant=double_quant)
    again = QuantizedTensor.from_bitsandbytes(q.to_bitsandbytes())
    assert again.shape == q.shape
    assert again.double_quant == double_quant
    assert torch.equal(again.absmax(), q.absmax())
    assert torch.equal(again.dequantize(), q.dequantize())


def test_other_tensors_of_the_checkpoint_are_left_alone():
    one, two = quantize(torch.randn(2, 64)), quantize(torch.randn(3, 64))
    tensors = one.to_bitsandbytes("a.w") | two.to_bitsandbytes("a.w2") | {"a.bias": torch.ones(2)}
    assert torch.equal(QuantizedTensor.from_bitsandbytes(tensors, "a.w").dequantize(), one.dequantize())
    assert set(layout.names(tensors, "a.w")) == set(one.to_bitsandbytes("a.w"))


def field(**fields: Any) -> Callable[[dict[str, Tensor]], None]:
    """Sets fields of the JSON text; deletes those that are None."""

    def change(tensors: dict[str, Tensor]) -> None:
        state = json.loads(bytes(tensors[KEY].tolist())) | fields
        text(json.dumps({name: value for name, value in state.items() if value is not None}))(tensors)

    return change


def text(content: str | bytes) -> Callable[[dict[str, Tensor]], None]:
    content = content.encode() if isinstance(content, str) else content
    return lambda tensors: tensors.update({KEY: torch.tensor(list(content), dtype=torch.uint8)})


def tensor(suffix: str, change: Callable[[Tensor], Tensor] | None) -> Callable[[dict[str, Tensor]], None]:
    """Changes a tensor; deletes it when there is no change given."""

    def apply(tensors: dict[str, Tensor]) -> None:
        old = tensors.pop("h.0.w" + suffix)
        if change is not None:
            tensors["h.0.w" + suffix] = change(old)

    return apply


def bumped(part: Tensor) -> Tensor:
    part = part.clone()
    part[3] += 2.0**-20
    return part


def renamed(tensors: dict[str, Tensor]) -> None:
    tensors[KEY.replace("nf4", "fp4")] = tensors.pop(KEY)


# How a checkpoint is spoiled -> the tensor, the field that the error names.
MALFORMED = {
    "no-weight": (tensor("", None), "", None),
    "no-absmax": (tensor(".absmax", None), ".absmax", None),
    "no-quant_map": (tensor(".quant_map", None), ".quant_map", None),
    "no-nested_absmax": (tensor(".nested_absmax", None), ".nested_absmax", None),
    "no-nested_quant_map": (tensor(".nested_quant_map", None), ".nested_quant_map", None),
    "no-quant_state": (tensor(".quant_state.bitsandbytes__nf4", None), "", None),
    "two-quant_states": (lambda t: t.update({KEY.replace("nf4", "fp4"): t[KEY]}), "", None),
    "weight-too-short": (tensor("", lambda part: part[:-1]), "", None),
    "weight-flat": (tensor("", lambda part: part.flatten()), "", None),
    "weight-int16": (tensor("", lambda part: part.flatten().view(torch.int16)[:, None]), "", None),
    "weight-bf16-flat": (tensor("", lambda part: part.flatten().view(torch.bfloat16)), "", None),
    "absmax-too-long": (tensor(".absmax", lambda part: torch.cat([part, part[:1]])), ".absmax", None),
    "absmax-float": (tensor(".absmax", lambda part: part.float()), ".absmax", None),
    "absmax-not-nested": (field(nested_offset=None), ".absmax", None),
    "quant_map-fp16": (tensor(".quant_map", lambda part: part.half()), ".quant_map", None),
    "quant_map-short": (tensor(".quant_map", lambda part: part[:15]), ".quant_map", None),
    "quant_map-other": (tensor(".quant_map", bumped), ".quant_map", None),
    "nested_absmax-long": (tensor(".nested_absmax", lambda part: part.repeat(2)), ".nested_absmax", None),
    "nested_absmax-infinite-with-offset": (
        lambda t: (tensor(".nested_absmax", lambda part: part * 0 + 3e38)(t), field(nested_offset=3e38)(t)),
        ".nested_absmax",
        None,
    ),
    "nested_quant_map-other": (tensor(".nested_quant_map", bumped), ".nested_quant_map", None),
    "text-float": (tensor(KEY.removeprefix("h.0.w"), lambda part: part.float()), KEY, None),
    "text-2d": (tensor(KEY.removeprefix("h.0.w"), lambda part: part[:, None]), KEY, None),
    "text-long": (text(json.dumps({"quant_type": "nf4" * 30_000})), KEY, None),
    "text-cut": (text('{"quant_type": "nf'), KEY, None),
    "text-under-another-name": (renamed, KEY.replace("nf4", "fp4"), "quant_type"),
    "one-tensor-too-many": (lambda t: t.update({"h.0.w.nested_offset": torch.zeros(1)}), ".nested_offset", None),
    "quant_type-missing": (field(quant_type=None), KEY, "quant_type"),
    "quant_type-fp4": (field(quant_type="fp4"), KEY, "quant_type"),
    "quant_type-list": (field(quant_type=["nf4"]), KEY, "quant_type"),
    "blocksize-missing": (field(blocksize=None), KEY, "blocksize"),
    "blocksize-63": (field(blocksize=63), KEY, "blocksize"),
    "blocksize-text": (field(blocksize="64"), KEY, "blocksize"),
    "blocksize-float": (field(blocksize=64.0), KEY, "blocksize"),
    "blocksize-other": (field(blocksize=128), ".absmax", None),
    "dtype-missing": (field(dtype=None), KEY, "dtype"),
    "dtype-float64": (field(dtype="float64"), KEY, "dtype"),
    "shape-missing": (field(shape=None), KEY, "shape"),
    "shape-number": (field(shape=4096), KEY, "shape"),
    "shape-negative": (field(shape=[-64, -64]), KEY, "shape"),
    "shape-float": (field(shape=[64.0, 64]), KEY, "shape"),
    "shape-bool": (field(shape=[True, 64]), KEY, "shape"),
    "shape-of-65-sizes": (field(shape=[64, 64] + [1] * 63), KEY, "shape"),
    "shape-huge": (field(shape=[2**62, 2**62]), KEY, "shape"),
    "shape-other": (field(shape=[64, 65]), "", None),
    "nested_blocksize-missing": (field(nested_blocksize=None), KEY, "nested_blocksize"),
    "nested_blocksize-128": (field(nested_blocksize=128), KEY, "nested_blocksize"),
    "nested_dtype-float16": (field(nested_dtype="float16"), KEY, "nested_dtype"),
    "nested_offset-text": (field(nested_offset="1"), KEY, "nested_offset"),
    "nested_offset-bool": (field(nested_offset=True), KEY, "nested_offset"),
    "nested_offset-negative": (field(nested_offset=-0.01), KEY, "nested_offset"),
    "nested_offset-nan": (field(nested_offset=float("nan")), KEY, "nested_offset"),
    "nested_offset-inf": (field(nested_offset=float("inf")), KEY, "nested_offset"),
    "nested_offset-float64": (field(nested_offset=1e39), KEY, "nested_offset"),
    "nested_offset-400-digits": (field(nested_offset=10**400), KEY, "nested_offset"),
}


@pytest.mark.parametrize(("spoil", "name", "field_name"), MALFORMED.values(), ids=MALFORMED.keys())
def test_what_does_not_fit_is_refused_by_name(spoil, name, field_name):
    tensors = quantize(torch.randn(64, 64)).to_bitsandbytes("h.0.w")
    QuantizedTensor.from_bitsandbytes(tensors, "h.0.w")  # good before it is spoiled
    spoil(tensors)
    full_name = name if name.startswith("h.") else f"h.0.w{name}"
    with pytest.raises(FormatError) as caught:
        QuantizedTensor.from_bitsandbytes(tensors, "h.0.w")
    assert (caught.value.tensor, caught.value.field) == (full_name, field_name)
    assert repr(full_name) in str(caught.value)


def test_float_scales_are_expected_without_double_quantization():
    tensors = quantize(torch.randn(64, 64), double_quant=False).to_bitsandbytes("h.0.w")
    tensors["h.0.w.absmax"] = tensors["h.0.w.absmax"].byte()
    with pytest.raises(FormatError, match=r"'h\.0\.w\.absmax': is torch.uint8 \[64\]; expected torch.float32 \[64\]"):
        QuantizedTensor.from_bitsandbytes(tensors, "h.0.w")
