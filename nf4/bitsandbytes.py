"""The layout of a 4-bit weight in bitsandbytes checkpoints (``Linear4bit``'s state dict, versions 0.41 to 0.50).

For a weight called ``w``, with the scales quantized too::

    w                                   uint8    [(numel + 1) // 2, 1]   two codes a byte, the first in the high nibble
    w.absmax                            uint8    [blocks]                float32 when the scales are not quantized
    w.nested_absmax                     float32  [ceil(blocks / 256)]    the three nested tensors only when they are
    w.nested_quant_map                  float32  [256]                   the dynamic map
    w.quant_map                         float32  [16]                    the codebook
    w.quant_state.bitsandbytes__nf4     uint8    [bytes]                 JSON in UTF-8, below

    {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 128],
     "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.052005767822265625}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import double
from .blockwise import BLOCK_SIZES
from .codebook import CODEBOOKS, codebook_values, dynamic_map
from .errors import FormatError

if TYPE_CHECKING:
    from .tensor import QuantizedTensor

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def to_state_dict(weight: QuantizedTensor, prefix: str) -> dict[str, Tensor]:
    """The tensors of the layout above, by full name."""
    state: dict[str, Any] = {
        "quant_type": weight.codebook,
        "blocksize": weight.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    tensors = {prefix: weight.packed, f"{prefix}.absmax": weight.scales, f"{prefix}.quant_map": weight.values}
    if weight.absmax2 is not None and weight.offset is not None:
        state |= {
            "nested_blocksize": double.BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": weight.offset.item(),
        }
        tensors[f"{prefix}.nested_absmax"] = weight.absmax2
        tensors[f"{prefix}.nested_quant_map"] = dynamic_map().to(weight.device)
    payload = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device="cpu")
    tensors[f"{prefix}.quant_state.bitsandbytes__{weight.codebook}"] = payload.to(weight.device)
    return tensors


def from_state_dict(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """The fields of a ``QuantizedTensor``, read from the layout above and checked against each other.

    Raises:
        FormatError: a tensor or field is missing, has the wrong dtype or size, or a value that no writer produces.
    """
    key = _payload_name(tensors, prefix)
    state = _read_payload(tensors[key], key)
    codebook = _field(state, key, "quant_type", str, lambda v: v in CODEBOOKS, f"one of {', '.join(CODEBOOKS)}")
    block_size = _field(state, key, "blocksize", int, lambda v: v in BLOCK_SIZES, "a power of two from 32 to 4096")
    if not key.endswith(f"bitsandbytes__{codebook}"):
        raise FormatError(
            f"is {codebook!r}, which is not what the name of its tensor says", tensor=key, field="quant_type"
        )
    dtype = _field(state, key, "dtype", str, lambda v: v in _DTYPES, f"one of {', '.join(_DTYPES)}")
    dims = _field(state, key, "shape", list, _is_shape, "a list of sizes")
    numel = math.prod(dims)
    blocks = -(-numel // block_size)
    nested = "nested_offset" in state

    packed = _tensor(tensors, prefix, torch.uint8, ((numel + 1) // 2, 1))
    scales = _tensor(tensors, f"{prefix}.absmax", torch.uint8 if nested else torch.float32, (blocks,))
    values = _tensor(tensors, f"{prefix}.quant_map", torch.float32, (16,))
    _same(values, codebook_values(codebook), f"{prefix}.quant_map", f"the {codebook} codebook")
    absmax2 = offset = None
    if nested:
        _field(state, key, "nested_blocksize", int, lambda v: v == double.BLOCK_SIZE, str(double.BLOCK_SIZE))
        _field(state, key, "nested_dtype", str, lambda v: v == "float32", "float32")
        number = _field(state, key, "nested_offset", (int, float), _is_float32, "a finite float32")
        offset = torch.tensor(number, dtype=torch.float32, device=packed.device)
        absmax2 = _tensor(tensors, f"{prefix}.nested_absmax", torch.float32, (-(-blocks // double.BLOCK_SIZE),))
        quant_map = _tensor(tensors, f"{prefix}.nested_quant_map", torch.float32, (256,))
        _same(quant_map, dynamic_map(), f"{prefix}.nested_quant_map", "the 8-bit dynamic map")
    expected = {prefix, key, f"{prefix}.absmax", f"{prefix}.quant_map"}
    if nested:
        expected |= {f"{prefix}.nested_absmax", f"{prefix}.nested_quant_map"}
    for name in names(tensors, prefix):
        if name not in expected:
            raise FormatError("does not belong to a weight with this payload", tensor=name)
    return {
        "packed": packed,
        "scales": scales,
        "absmax2": absmax2,
        "offset": offset,
        "values": values,
        "shape": torch.Size(dims),
        "dtype": _DTYPES[dtype],
        "codebook": codebook,
        "block_size": block_size,
    }


def names(tensors: Mapping[str, Tensor], prefix: str) -> list[str]:
    """The names in ``tensors`` that belong to the weight ``prefix``."""
    return [name for name in tensors if name == prefix or name.startswith(f"{prefix}.")]


def _payload_name(tensors: Mapping[str, Tensor], prefix: str) -> str:
    start = f"{prefix}.quant_state.bitsandbytes__"
    found = [name for name in tensors if name.startswith(start)]
    if len(found) != 1:
        raise FormatError(f"{len(found)} tensors are named {start}*; a 4-bit weight has exactly one", tensor=prefix)
    return found[0]


def _read_payload(payload: Tensor, name: str) -> dict[str, Any]:
    if payload.dtype != torch.uint8 or payload.dim() != 1:
        raise FormatError(f"is {payload.dtype} {list(payload.shape)}; the JSON text is uint8 [bytes]", tensor=name)
    try:
        state = json.loads(bytes(payload.tolist()))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise FormatError(f"is not JSON: {error}", tensor=name) from None
    if not isinstance(state, dict):
        raise FormatError(f"holds a JSON {type(state).__name__}, not an object", tensor=name)
    return state


def _field(state: dict, tensor: str, field: str, kind: type | tuple[type, ...], valid, expected: str) -> Any:
    if field not in state:
        raise FormatError("is missing", tensor=tensor, field=field)
    value = state[field]
    if not isinstance(value, kind) or isinstance(value, bool) or not valid(value):
        raise FormatError(f"is {value!r:.60}; expected {expected}", tensor=tensor, field=field)
    return value


def _is_shape(value: list) -> bool:
    return all(type(size) is int and 0 <= size < 2**63 for size in value) and math.prod(value) < 2**63


def _is_float32(value: float) -> bool:
    return abs(value) <= torch.finfo(torch.float32).max  # false for NaN


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
