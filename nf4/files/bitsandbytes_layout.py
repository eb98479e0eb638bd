"""The layout of a 4-bit weight in bitsandbytes checkpoints (``Linear4bit``'s state dict, versions 0.41 to 0.50).

For a weight called ``w``, with the scales quantized too::

    w                                   uint8    [(numel + 1) // 2, 1]   two codes a byte, the first in the high nibble
    w.absmax                            uint8    [blocks]                float32 when the scales are not quantized
    w.nested_absmax                     float32  [ceil(blocks / 256)]    the three nested tensors only when they are
    w.nested_quant_map                  float32  [256]                   the dynamic map
    w.quant_map                         float32  [16]                    the codebook
    w.quant_state.bitsandbytes__nf4     uint8    [bytes]                 the payload: JSON in UTF-8, below

    {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 128],
     "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.052005767822265625}

The bytes of the codes may be stored as another dtype (``quant_storage``), so that a sharding that knows one dtype
only takes them along: bfloat16 [bytes / 2, 1], float32 [bytes / 4, 1], and so on. The payload does not tell; the
tensor does.

bitsandbytes knows the codebooks nf4 and fp4. The others have the same layout here, with ``qloralab__NAME`` at the end
of the payload's name: bitsandbytes refuses them by name instead of misreading them.

A data type whose scales have an encoding of its own (``nf4/data_type.py``) has ``"scale_bits"`` in its payload: what a
scale takes there. ``w.absmax`` holds the float32 numbers that they decode to, negative ones among them, and
``w.quant_map`` any values in [-2, 2], float32 [rows, 16] where each row has its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..blockwise import is_packed, packed_bytes
from ..codebook import CODEBOOKS, CUSTOM, codebook_values, custom, dynamic_map
from ..packed import BLOCK_SIZES, SCALES_PER_BLOCK, Packed
from .errors import FormatError
from .json_file import parse_object
from .safetensors_reader import MAX_DIMS, Description, are_sizes

KNOWN = ("nf4", "fp4")  # to bitsandbytes
STORAGE = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OURS = (*(name for name in CODEBOOKS if name not in KNOWN), CUSTOM)
_WRITERS = {"bitsandbytes": KNOWN, "qloralab": _OURS}
_QUANT_STATE = ".quant_state."
_LONGEST = -1.1754943508222875e-38  # no float32 takes more characters
_MAX_PAYLOAD = 1 << 16  # bytes; of one with a shape of so many sizes it would have 2,000

Layout = dict[str, Description]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as files have it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def to_state_dict(
    weight: Packed,
    dtype: torch.dtype,
    codebook: str,
    prefix: str,
    storage: torch.dtype = torch.uint8,
    scale_bits: float | None = None,
) -> dict[str, Tensor]:
    """The tensors of the layout above, by full name.

    Args:
        weight: any codebook.
        dtype: of the weight that was quantized.
        codebook: name of the codebook.
        prefix: full name of the weight.
        storage: one of ``STORAGE``, for the codes.
        scale_bits: of a data type whose scales have an encoding of its own; see above.

    Raises:
        ValueError: the bytes of the codes do not fill a whole number of elements of storage, or it is none of them.
    """
    _check_storage(weight.packed.nbytes, storage, prefix)
    codes = weight.packed if storage == torch.uint8 else weight.packed.flatten().view(storage)[:, None]
    tensors, offset = [codes, weight.scales, weight.values], None
    if weight.absmax2 is not None and weight.offset is not None:
        tensors += [weight.absmax2, dynamic_map().to(weight.packed.device)]
        offset = weight.offset.item()
    payload = _payload(codebook, weight.block_size, dtype, weight.shape, offset, scale_bits)
    tensors.append(torch.tensor(list(payload), dtype=torch.uint8, device="cpu").to(weight.packed.device))
    names_ = _names(prefix, codebook, offset is not None, scale_bits is not None)
    return dict(zip(names_, tensors, strict=True))


def describe(
    prefix: str,
    shape: Iterable[int],
    dtype: torch.dtype,
    codebook: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    storage: torch.dtype = torch.uint8,
) -> Layout:
    """What ``to_state_dict`` will give for a weight that is not quantized yet.

    Args:
        prefix: full name of the weight.
        shape, dtype: of the weight.
        codebook, block_size, double_quant: as ``quantize`` takes them.
        storage: see ``to_state_dict``.

    Returns:
        dtype and shape of each tensor by its full name. The last one is the payload, whose length is an upper bound.

    Raises:
        ValueError: see ``to_state_dict``.
    """
    shape, values = tuple(shape), codebook_values(codebook, block_size)
    numel = math.prod(shape)
    bytes_ = packed_bytes(numel, values)
    _check_storage(bytes_, storage, prefix)
    payload = _payload(codebook, block_size, dtype, shape, _LONGEST if double_quant else None)
    parts = [
        (storage, (bytes_ // storage.itemsize, 1)),
        *_describe_scales(numel, tuple(values.shape), block_size, double_quant),
        (torch.uint8, (len(payload),)),
    ]
    return dict(zip(_names(prefix, codebook, double_quant), parts, strict=True))


def from_state_dict(tensors: Mapping[str, Tensor], prefix: str) -> tuple[Packed, torch.dtype, str, float | None]:
    """A weight, the dtype of what was quantized, the name of its codebook or data type and the bits of a scale that has
    an encoding of its own, from the layout above; all are checked.

    Raises:
        FormatError: a tensor or field is missing, has the wrong dtype or size, or a value that no writer produces.
    """
    key = _find_payload(tensors, prefix)
    state = _read_payload(tensors[key], key)
    codebook, nested = state["quant_type"], "nested_offset" in state
    numel, blocks = math.prod(state["shape"]), -(-math.prod(state["shape"]) // state["blocksize"])
    names_ = _names(prefix, codebook, nested, "scale_bits" in state)
    _, absmax, quant_map, *second = names_[:-1]

    scale_bits = state.get("scale_bits")
    values = _codebook(tensors, quant_map, state)
    packed = _codes(tensors, prefix, numel, values)
    described = _describe_scales(numel, tuple(values.shape), state["blocksize"], nested)
    found = {name: _tensor(tensors, name, *what) for name, what in zip(names_[1:-1], described, strict=True)}
    absmax2 = offset = None
    if nested:
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=packed.device)
        absmax2 = found[second[0]]
        _check_scales(absmax2, second[0])
        if blocks and absmax2.amax().double() + offset.double() > torch.finfo(torch.float32).max:
            raise FormatError("makes a scale infinite, with the offset", tensor=second[0])
        _check_same(found[second[1]], dynamic_map(), second[1], "the 8-bit dynamic map")
    else:
        _check_scales(found[absmax], absmax, signed=scale_bits is not None)
    for other in names(tensors, prefix):
        if other not in names_:
            raise FormatError("does not belong to a weight with this payload", tensor=other)
    shape, block_size = torch.Size(state["shape"]), state["blocksize"]
    weight = Packed(packed, found[absmax], absmax2, offset, values, shape, block_size)
    return weight, _DTYPES[state["dtype"]], codebook, scale_bits


def names(tensors: Iterable[str], prefix: str) -> list[str]:
    """Those of some names of tensors that belong to the weight ``prefix``."""
    return [name for name in tensors if name == prefix or name.startswith(f"{prefix}.")]


def weights(tensors: Iterable[str]) -> list[str]:
    """The full names of the 4-bit weights among some names of tensors: those that have a payload."""
    found = (name.partition(_QUANT_STATE) for name in tensors)
    return list(dict.fromkeys(prefix for prefix, separator, _ in found if separator))


def _names(prefix: str, codebook: str, nested: bool, ours: bool = False) -> list[str]:
    """The full names of the tensors of a weight: the codes first, the payload last.

    Args:
        prefix, codebook: of the weight.
        nested: whether the scales are quantized too.
        ours: whether they have an encoding that bitsandbytes does not know, whatever the name of the codebook is.
    """
    second = [".nested_absmax", ".nested_quant_map"] if nested else []
    writer = "bitsandbytes" if codebook in KNOWN and not ours else "qloralab"
    return [prefix + end for end in ("", ".absmax", ".quant_map", *second, f"{_QUANT_STATE}{writer}__{codebook}")]


def _describe_scales(numel: int, values: tuple[int, ...], block_size: int, nested: bool) -> list[Description]:
    """What stands between the codes and the payload."""
    blocks = -(-numel // block_size)
    second = [(torch.float32, (-(-blocks // SCALES_PER_BLOCK),)), (torch.float32, (256,))] if nested else []
    return [(torch.uint8 if nested else torch.float32, (blocks,)), (torch.float32, values), *second]


def _payload(
    codebook: str,
    block_size: int,
    dtype: torch.dtype,
    shape: Iterable[int],
    offset: float | None,
    scale_bits: float | None = None,
) -> bytes:
    state: dict[str, Any] = {
        "quant_type": codebook, "blocksize": block_size, "dtype": dtype_name(dtype), "shape": list(shape)
    }  # fmt: skip
    if scale_bits is not None:
        state["scale_bits"] = scale_bits
    if offset is not None:
        state |= {"nested_blocksize": SCALES_PER_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(state).encode()


def _check_storage(bytes_: int, storage: torch.dtype, name: str) -> None:
    if storage not in STORAGE:
        known = ", ".join(map(dtype_name, STORAGE))
        raise ValueError(f"{name}: codes are not stored as {storage}; one of {known}")
    if bytes_ % storage.itemsize:
        raise ValueError(f"{name}: {bytes_} bytes of codes are no whole number of {storage}; store them as torch.uint8")


def _find_payload(tensors: Mapping[str, Tensor], prefix: str) -> str:
    starts = tuple(f"{prefix}{_QUANT_STATE}{writer}__" for writer in _WRITERS)
    found = [name for name in tensors if name.startswith(starts)]
    if len(found) != 1:
        raise FormatError(f"{len(found)} tensors are named {starts[0]}*; a 4-bit weight has exactly one", tensor=prefix)
    return found[0]


def _read_payload(payload: Tensor, name: str) -> dict[str, Any]:
    if payload.dtype != torch.uint8 or payload.dim() != 1 or len(payload) > _MAX_PAYLOAD:
        found = f"{payload.dtype} {list(payload.shape)}"
        raise FormatError(f"is {found}; the JSON text is uint8 [bytes], {_MAX_PAYLOAD} at most", tensor=name)
    state = parse_object(bytes(payload.tolist()), tensor=name)

    def check(field: str, kind: type | tuple[type, ...], valid: Callable[[Any], bool], expected: str) -> None:
        if field not in state:
            raise FormatError("is missing", tensor=name, field=field)
        value = state[field]
        if not isinstance(value, kind) or isinstance(value, bool) or not valid(value):
            raise FormatError(f"is {value!r:.60}; expected {expected}", tensor=name, field=field)

    writer, _, codebook = name.rpartition(".")[2].partition("__")
    known = _WRITERS.get(writer, _OURS)
    if "scale_bits" in state:
        if writer != "qloralab":
            raise FormatError("is no field of bitsandbytes", tensor=name, field="scale_bits")
        check("scale_bits", (int, float), lambda value: 0 <= value <= 64, "how many bits a scale takes")
        check("quant_type", str, bool, "the name of a data type")
        if "nested_offset" in state:
            raise FormatError(
                "is there beside nested_offset; scales have one encoding", tensor=name, field="scale_bits"
            )
    else:
        check("quant_type", str, lambda value: value in known, f"one of {', '.join(known)}")
    if state["quant_type"] != codebook:
        message = f"is {state['quant_type']!r}, which is not what the name of its tensor says"
        raise FormatError(message, tensor=name, field="quant_type")
    smallest = 16 if "scale_bits" in state else BLOCK_SIZES[0]
    check("blocksize", int, lambda value: value in (smallest, *BLOCK_SIZES), f"a power of two from {smallest} to 4096")
    check("dtype", str, lambda value: value in _DTYPES, f"one of {', '.join(_DTYPES)}")
    check("shape", list, _is_shape, "a list of sizes")
    if "nested_offset" in state:
        check("nested_blocksize", int, lambda value: value == SCALES_PER_BLOCK, str(SCALES_PER_BLOCK))
        check("nested_dtype", str, lambda value: value == "float32", "float32")
        largest = torch.finfo(torch.float32).max
        check("nested_offset", (int, float), lambda value: 0 <= value <= largest, "a finite float32, 0 or more")
    return state


def _is_shape(value: list) -> bool:
    return len(value) <= MAX_DIMS and are_sizes(value) and math.prod(value) < 2**63


def _check_scales(found: Tensor, name: str, signed: bool = False) -> None:
    if not ((found.abs() if signed else found) < math.inf).all() or (not signed and (found < 0).any()):
        which = "NaN or infinite" if signed else "NaN, infinite or negative"
        raise FormatError(f"holds a scale that is {which}", tensor=name)


def _codebook(tensors: Mapping[str, Tensor], name: str, state: Mapping[str, Any]) -> Tensor:
    """The values, checked against those of the codebook, where it is one with a name."""
    codebook, shape = state["quant_type"], state["shape"]
    if "scale_bits" in state:
        found = tuple(tensors[name].shape) if name in tensors else (16,)
        rows = found[:-1] in ((), tuple(shape[:1]) if len(shape) > 1 else ())
        if not rows or not 4 <= found[-1] <= 256:
            expected = "[4 to 256], or as many for each row of the weight"
            raise FormatError(f"is {list(found)}; expected {expected}", tensor=name)
        values = _tensor(tensors, name, torch.float32, found)
        if not (values.abs() <= 2).all():  # int4 has -8 / 7
            raise FormatError("holds a value that is NaN or outside [-2, 2]", tensor=name)
        return values
    if codebook == CUSTOM:
        values = _tensor(tensors, name, torch.float32, (tensors[name].numel() if name in tensors else 16,))
        try:
            return custom(values)
        except ValueError as error:
            raise FormatError(str(error), tensor=name) from None
    expected = codebook_values(codebook, state["blocksize"])
    values = _tensor(tensors, name, torch.float32, tuple(expected.shape))
    _check_same(values, expected, name, f"the {codebook} codebook")
    return values


def _codes(tensors: Mapping[str, Tensor], name: str, numel: int, values: Tensor) -> Tensor:
    """The packed codes as uint8, whatever their bytes are stored as."""
    if name not in tensors:
        raise FormatError("is missing", tensor=name)
    stored = tensors[name]
    bytes_ = packed_bytes(numel, values)
    if stored.dtype not in STORAGE or stored.nbytes != bytes_ or tuple(stored.shape) != (stored.numel(), 1):
        expected = f"{numel} weights take {bytes_} bytes, in a column of uint8 or of another dtype"
        raise FormatError(f"is {stored.dtype} {list(stored.shape)}; {expected}", tensor=name)
    packed = stored if stored.dtype == torch.uint8 else stored.flatten().view(torch.uint8)[:, None]
    if not is_packed(values) and numel and int(packed.max()) >= values.shape[-1]:
        raise FormatError(f"holds a code above {values.shape[-1] - 1}", tensor=name)
    return packed


def _tensor(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if name not in tensors:
        raise FormatError("is missing", tensor=name)
    tensor = tensors[name]
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise FormatError(f"is {tensor.dtype} {list(tensor.shape)}; expected {dtype} {list(shape)}", tensor=name)
    return tensor


def _check_same(found: Tensor, expected: Tensor, name: str, what: str) -> None:
    if not torch.equal(found.cpu(), expected):
        raise FormatError(f"is not {what}", tensor=name)
