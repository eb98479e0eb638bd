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
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..blockwise import is_packed, packed_bytes
from ..codebook import CODEBOOKS, CUSTOM, codebook_values, custom, dynamic_map
from ..packed import BLOCK_SIZES, SCALES_PER_BLOCK, Packed
from .errors import FormatError
from .json_file import parse_object

KNOWN = ("nf4", "fp4")  # to bitsandbytes
STORAGE = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OURS = (*(name for name in CODEBOOKS if name not in KNOWN), CUSTOM)
_QUANT_STATE = ".quant_state."
_LONGEST = -1.1754943508222875e-38  # no float32 takes more characters
_MAX_DIMS = 64  # torch's
_MAX_PAYLOAD = 1 << 16  # bytes; of one with a shape of so many sizes it would have 2,000

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def to_state_dict(
    weight: Packed, dtype: torch.dtype, codebook: str, prefix: str, storage: torch.dtype = torch.uint8
) -> dict[str, Tensor]:
    """The tensors of the layout above, by full name.

    Args:
        weight: any codebook.
        dtype: of the weight that was quantized.
        codebook: name of the codebook.
        prefix: full name of the weight.
        storage: one of ``STORAGE``, for the codes.

    Raises:
        ValueError: the bytes of the codes do not fill a whole number of elements of storage, or it is none of them.
    """
    _check_storage(weight.packed.nbytes, storage, prefix)
    tensors = {
        prefix: weight.packed.flatten().view(storage)[:, None] if storage != torch.uint8 else weight.packed,
        f"{prefix}.absmax": weight.scales,
        f"{prefix}.quant_map": weight.values,
    }
    offset = None
    if weight.absmax2 is not None and weight.offset is not None:
        offset = weight.offset.item()
        tensors[f"{prefix}.nested_absmax"] = weight.absmax2
        tensors[f"{prefix}.nested_quant_map"] = dynamic_map().to(weight.packed.device)
    payload = _payload(codebook, weight.block_size, dtype, weight.shape, offset)
    bytes_ = torch.tensor(list(payload), dtype=torch.uint8, device="cpu")
    tensors[_payload_name(prefix, codebook)] = bytes_.to(weight.packed.device)
    return tensors


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
    shape = tuple(shape)
    values = codebook_values(codebook)
    numel = math.prod(shape)
    blocks = -(-numel // block_size)
    bytes_ = packed_bytes(numel, values)
    _check_storage(bytes_, storage, prefix)
    layout: Layout = {
        prefix: (storage, (bytes_ // storage.itemsize, 1)),
        f"{prefix}.absmax": (torch.uint8 if double_quant else torch.float32, (blocks,)),
        f"{prefix}.quant_map": (torch.float32, tuple(values.shape)),
    }
    if double_quant:
        layout[f"{prefix}.nested_absmax"] = torch.float32, (-(-blocks // SCALES_PER_BLOCK),)
        layout[f"{prefix}.nested_quant_map"] = torch.float32, (256,)
    payload = _payload(codebook, block_size, dtype, shape, _LONGEST if double_quant else None)
    layout[_payload_name(prefix, codebook)] = torch.uint8, (len(payload),)
    return layout


def from_state_dict(tensors: Mapping[str, Tensor], prefix: str) -> tuple[Packed, torch.dtype, str]:
    """A weight, the dtype of what was quantized and the name of its codebook, from the layout above; all are checked.

    Raises:
        FormatError: a tensor or field is missing, has the wrong dtype or size, or a value that no writer produces.
    """
    key = _find_payload(tensors, prefix)
    state = _read_payload(tensors[key], key)
    writer, _, name = key.rpartition(".")[2].partition("__")
    known = KNOWN if writer == "bitsandbytes" else _OURS
    codebook = _field(state, key, "quant_type", str, lambda v: v in known, f"one of {', '.join(known)}")
    if name != codebook:
        raise FormatError(
            f"is {codebook!r}, which is not what the name of its tensor says", tensor=key, field="quant_type"
        )
    block_size = _field(state, key, "blocksize", int, lambda v: v in BLOCK_SIZES, "a power of two from 32 to 4096")
    dtype = _field(state, key, "dtype", str, lambda v: v in _DTYPES, f"one of {', '.join(_DTYPES)}")
    dims = _field(state, key, "shape", list, _is_shape, "a list of sizes")
    numel = math.prod(dims)
    blocks = -(-numel // block_size)
    nested = "nested_offset" in state

    values = _codebook(tensors, f"{prefix}.quant_map", codebook)
    packed = _codes(tensors, prefix, numel, values)
    scales = _tensor(tensors, f"{prefix}.absmax", torch.uint8 if nested else torch.float32, (blocks,))
    absmax2 = offset = None
    if nested:
        _field(state, key, "nested_blocksize", int, lambda v: v == SCALES_PER_BLOCK, str(SCALES_PER_BLOCK))
        _field(state, key, "nested_dtype", str, lambda v: v == "float32", "float32")
        number = _field(state, key, "nested_offset", (int, float), _is_scale, "a finite float32, 0 or more")
        offset = torch.tensor(number, dtype=torch.float32, device=packed.device)
        absmax2 = _tensor(tensors, f"{prefix}.nested_absmax", torch.float32, (-(-blocks // SCALES_PER_BLOCK),))
        _are_scales(absmax2, f"{prefix}.nested_absmax")
        if blocks and absmax2.amax().double() + offset.double() > torch.finfo(torch.float32).max:
            raise FormatError("makes a scale infinite, with the offset", tensor=f"{prefix}.nested_absmax")
        quant_map = _tensor(tensors, f"{prefix}.nested_quant_map", torch.float32, (256,))
        _same(quant_map, dynamic_map(), f"{prefix}.nested_quant_map", "the 8-bit dynamic map")
    else:
        _are_scales(scales, f"{prefix}.absmax")
    expected = {prefix, key, f"{prefix}.absmax", f"{prefix}.quant_map"}
    if nested:
        expected |= {f"{prefix}.nested_absmax", f"{prefix}.nested_quant_map"}
    for other in names(tensors, prefix):
        if other not in expected:
            raise FormatError("does not belong to a weight with this payload", tensor=other)
    weight = Packed(packed, scales, absmax2, offset, values, torch.Size(dims), block_size)
    return weight, _DTYPES[dtype], codebook


def names(tensors: Iterable[str], prefix: str) -> list[str]:
    """Those of some names of tensors that belong to the weight ``prefix``."""
    return [name for name in tensors if name == prefix or name.startswith(f"{prefix}.")]


def weights(tensors: Iterable[str]) -> list[str]:
    """The full names of the 4-bit weights among some names of tensors: those that have a payload."""
    found = (name.partition(_QUANT_STATE) for name in tensors)
    return list(dict.fromkeys(prefix for prefix, separator, _ in found if separator))


def _payload(codebook: str, block_size: int, dtype: torch.dtype, shape: Iterable[int], offset: float | None) -> bytes:
    state: dict[str, Any] = {
        "quant_type": codebook,
        "blocksize": block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    if offset is not None:
        state |= {"nested_blocksize": SCALES_PER_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(state).encode()


def _payload_name(prefix: str, codebook: str) -> str:
    return f"{prefix}{_QUANT_STATE}{'bitsandbytes' if codebook in KNOWN else 'qloralab'}__{codebook}"


def _check_storage(bytes_: int, storage: torch.dtype, name: str) -> None:
    if storage not in STORAGE:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in STORAGE)
        raise ValueError(f"{name}: codes are not stored as {storage}; one of {known}")
    if bytes_ % storage.itemsize:
        raise ValueError(f"{name}: {bytes_} bytes of codes are no whole number of {storage}; store them as torch.uint8")


def _find_payload(tensors: Mapping[str, Tensor], prefix: str) -> str:
    starts = tuple(f"{prefix}{_QUANT_STATE}{writer}__" for writer in ("bitsandbytes", "qloralab"))
    found = [name for name in tensors if name.startswith(starts)]
    if len(found) != 1:
        raise FormatError(f"{len(found)} tensors are named {starts[0]}*; a 4-bit weight has exactly one", tensor=prefix)
    return found[0]


def _read_payload(payload: Tensor, name: str) -> dict[str, Any]:
    if payload.dtype != torch.uint8 or payload.dim() != 1 or len(payload) > _MAX_PAYLOAD:
        raise FormatError(
            f"is {payload.dtype} {list(payload.shape)}; the JSON text is uint8 [bytes], {_MAX_PAYLOAD} at most",
            tensor=name,
        )
    return parse_object(bytes(payload.tolist()), tensor=name)


def _field(state: dict, tensor: str, field: str, kind: type | tuple[type, ...], valid, expected: str) -> Any:
    if field not in state:
        raise FormatError("is missing", tensor=tensor, field=field)
    value = state[field]
    if not isinstance(value, kind) or isinstance(value, bool) or not valid(value):
        raise FormatError(f"is {value!r:.60}; expected {expected}", tensor=tensor, field=field)
    return value


def _is_shape(value: list) -> bool:
    return (
        len(value) <= _MAX_DIMS
        and all(type(size) is int and 0 <= size < 2**63 for size in value)
        and math.prod(value) < 2**63
    )


def _is_scale(value: float) -> bool:
    return 0 <= value <= torch.finfo(torch.float32).max  # false for NaN


def _are_scales(found: Tensor, name: str) -> None:
    if not ((found >= 0) & (found < math.inf)).all():
        raise FormatError("holds a scale that is NaN, infinite or negative", tensor=name)


def _codebook(tensors: Mapping[str, Tensor], name: str, codebook: str) -> Tensor:
    if codebook == CUSTOM:
        values = _tensor(tensors, name, torch.float32, (tensors[name].numel() if name in tensors else 16,))
        try:
            return custom(values)
        except ValueError as error:
            raise FormatError(str(error), tensor=name) from None
    expected = codebook_values(codebook)
    values = _tensor(tensors, name, torch.float32, tuple(expected.shape))
    _same(values, expected, name, f"the {codebook} codebook")
    return values


def _codes(tensors: Mapping[str, Tensor], name: str, numel: int, values: Tensor) -> Tensor:
    """The packed codes as uint8, whatever their bytes are stored as."""
    if name not in tensors:
        raise FormatError("is missing", tensor=name)
    stored = tensors[name]
    bytes_ = packed_bytes(numel, values)
    if stored.dtype not in STORAGE or stored.nbytes != bytes_ or tuple(stored.shape) != (stored.numel(), 1):
        raise FormatError(
            f"is {stored.dtype} {list(stored.shape)}; {numel} weights take {bytes_} bytes, in a column of uint8 or of "
            "another dtype",
            tensor=name,
        )
    packed = stored if stored.dtype == torch.uint8 else stored.flatten().view(torch.uint8)[:, None]
    if not is_packed(values) and numel and int(packed.max()) >= len(values):
        raise FormatError(f"holds a code above {len(values) - 1}", tensor=name)
    return packed


def _tensor(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if name not in tensors:
        raise FormatError("is missing", tensor=name)
    tensor = tensors[name]
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise FormatError(f"is {tensor.dtype} {list(tensor.shape)}; expected {dtype} {list(shape)}", tensor=name)
    return tensor


def _same(found: Tensor, expected: Tensor, name: str, what: str) -> None:
    if not torch.equal(found.cpu(), expected):
        raise FormatError(f"is not {what}", tensor=name)
