"""A weight in 4 bits: ``quantize`` makes it, ``QuantizedTensor`` holds it, ``linear`` multiplies by it."""

from __future__ import annotations

import dataclasses
import logging
import pickle
from collections.abc import Callable, Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import ops
from .blockwise import is_packed, packed_bytes, unpack
from .codebook import CUSTOM, Codebook
from .data_type import DataType, codebook_rows, data_type, quantize_blocks
from .double_quant import absmax, dequantize_scales
from .files import bitsandbytes_layout
from .packed import DTYPES, Packed

_log = logging.getLogger("qloralab")
_told: set[str] = set()


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor:
    """A tensor of 4-bit codes with blockwise scales. Immutable; made by ``quantize`` or ``from_bitsandbytes``.

    It is no ``torch.Tensor``, so nothing takes it for one by mistake. Devices, copies and shared memory work as with
    tensors; files hold it as the tensors of ``to_bitsandbytes``, never as a pickle, which would tie them to this class.

    Attributes:
        packed, scales, absmax2, offset, values, shape, block_size: see ``Packed``.
        dtype: of the weight that was quantized; ``dequantize`` returns it.
        codebook: name of the data type, or of the codebook; "custom" for values that the user gave.
        scale_bits: what a scale takes in the data type's encoding, where ``scales`` holds the float32 number that it
            decodes to; None where ``scales`` and what belongs to it are the encoding.
    """

    packed: Tensor
    scales: Tensor
    absmax2: Tensor | None
    offset: Tensor | None
    values: Tensor
    shape: torch.Size
    dtype: torch.dtype
    codebook: str
    block_size: int
    scale_bits: float | None = None

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in full: the float32 product of value and scale, rounded once to dtype, by default that of the
        original weight."""
        return ops.dequantize(*self.operands(), dtype or self.dtype)

    def absmax(self) -> Tensor:
        """The scales, decoded: float32 [blocks]."""
        return absmax(self.operands())

    def codes(self) -> Tensor:
        """The codes: int32, the shape of the weight. ``values[codes()]`` is the weight without its scales, where there
        is one codebook."""
        codes = unpack(self.packed, self.numel()) if is_packed(self.values) else self.packed.flatten()
        return codes.int().view(self.shape)

    def operands(self) -> Packed:
        """The weight as the operators take it."""
        return Packed(self.packed, self.scales, self.absmax2, self.offset, self.values, self.shape, self.block_size)

    @property
    def double_quant(self) -> bool:
        """Whether the scales are quantized too."""
        return self.absmax2 is not None

    @property
    def kind(self) -> str:
        """The codebook, in words that tell nf4 with an encoding of its own for the scales from the nf4 of files."""
        own = self.scale_bits is not None and self.codebook in bitsandbytes_layout.KNOWN
        return f"{self.codebook} with scales of its own" if own else self.codebook

    @property
    def bits(self) -> int:
        """Of a code: 2 to 8."""
        return (self.values.shape[-1] - 1).bit_length()

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes held, the scales of both levels included; the codebook only where each row has its own."""
        parts = self.operands().tensors[: 5 if self.values.dim() == 2 else 4]
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def bits_per_parameter(self) -> float:
        """Bits held per weight; 4.127 in the limit for blocks of 64 with double quantization, 4.5 without."""
        return 8 * self.nbytes / max(self.shape.numel(), 1)

    @property
    def ideal_bits_per_parameter(self) -> float:
        """The same were codes packed without a gap, scales kept in their encoding and the codebooks of rows in float16:
        3.127 for "nf3", of which 8.127 are held, a byte for a code; 4.25 for "mxfp4", of which 5 are."""
        rest = 8 * (self.nbytes - self.packed.nbytes)
        if self.scale_bits is not None:
            rest = self.scale_bits * len(self.scales) + (16 * self.values.numel() if self.values.dim() == 2 else 0)
        return (rest + self.bits * self.numel()) / max(self.numel(), 1)

    def numel(self) -> int:
        return self.shape.numel()

    def map(self, function: Callable[[Tensor], Tensor]) -> QuantizedTensor:
        """The same weight with a function (a move to a device, say) applied to each tensor it holds.

        The function sees float32 tensors as int32, so that one that converts floating-point tensors, as
        ``module.bfloat16()`` does, changes no bit.
        """

        def carry(part: Tensor) -> Tensor:
            return function(part) if part.dtype == torch.uint8 else function(part.view(torch.int32)).view(torch.float32)

        parts = zip(Packed._fields, self.operands().tensors, strict=False)
        return dataclasses.replace(self, **{name: carry(part) for name, part in parts if part is not None})

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> QuantizedTensor:
        """The same weight on another device.

        Raises:
            TypeError: device is a dtype: codes are not converted.
        """
        if isinstance(device, torch.dtype):
            raise TypeError(
                f"a QuantizedTensor holds codes and is not converted; dequantize({device}) gives the weight"
            )
        return self.map(lambda part: part.to(device, non_blocking=non_blocking))

    def clone(self) -> QuantizedTensor:
        """A copy in memory of its own."""
        return self.map(torch.clone)

    def pin_memory(self) -> QuantizedTensor:
        """A copy in page-locked memory, from which a GPU reads faster and without waiting."""
        return self.map(Tensor.pin_memory)

    def share_memory_(self) -> QuantizedTensor:
        """Move it, in place, to memory that child processes share."""
        self.map(Tensor.share_memory_)
        return self

    def to_bitsandbytes(self, prefix: str = "weight", storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
        """The tensors of a bitsandbytes checkpoint, by their names there; see ``files/bitsandbytes_layout.py``.

        Args:
            prefix: full name of the weight.
            storage: dtype that the bytes of the codes are stored as, ``quant_storage`` of bitsandbytes.

        Raises:
            ValueError: bitsandbytes does not know the codebook, or the bytes do not fill elements of storage.
        """
        if self.kind not in bitsandbytes_layout.KNOWN:
            raise ValueError(
                f"{prefix} is {self.kind}; bitsandbytes knows {' and '.join(bitsandbytes_layout.KNOWN)} only"
            )
        return self.stored(prefix, storage)

    def stored(self, prefix: str, storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
        """The same for any codebook; bitsandbytes refuses by name the tensors of one that it does not know."""
        return bitsandbytes_layout.to_state_dict(
            self.operands(), self.dtype, self.codebook, prefix, storage, self.scale_bits
        )

    @classmethod
    def from_bitsandbytes(cls, tensors: Mapping[str, Tensor], prefix: str = "weight") -> QuantizedTensor:
        """Read one weight from the tensors of a bitsandbytes checkpoint.

        Args:
            tensors: of the checkpoint, by name; others than those of this weight are ignored.
            prefix: full name of the weight.

        Raises:
            FormatError: the tensors are missing or do not fit each other.
        """
        weight, dtype, codebook, scale_bits = bitsandbytes_layout.from_state_dict(tensors, prefix)
        return cls(**weight._asdict(), dtype=dtype, codebook=codebook, scale_bits=scale_bits)

    def __copy__(self) -> QuantizedTensor:
        return self  # nothing of it can be changed

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedTensor:
        return self.clone()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise pickle.PicklingError(
            "a QuantizedTensor is not pickled: a file would depend on this class and run code when it is opened. Save "
            "to_bitsandbytes(), or the state_dict() of the module that holds it, as safetensors or by torch.save"
        )

    def __repr__(self) -> str:
        second = ", double_quant" if self.double_quant else ""
        held = self.scale_bits is None and is_packed(self.values)
        ideal = "" if held else f" ({self.ideal_bits_per_parameter:.3f} ideal)"
        return (
            f"QuantizedTensor({list(self.shape)}, {self.codebook}, block_size={self.block_size}{second}, "
            f"{self.bits_per_parameter:.3f} bits per parameter{ideal}, from {self.dtype}, device={str(self.device)!r})"
        )


def _send(weight: QuantizedTensor) -> tuple[type[QuantizedTensor], tuple[Any, ...]]:
    return QuantizedTensor, tuple(getattr(weight, field.name) for field in dataclasses.fields(weight))


# To another process it goes as its tensors do, through shared memory (torch.multiprocessing).
ForkingPickler.register(QuantizedTensor, _send)


def quantize(
    weight: Tensor,
    codebook: Codebook | DataType = "nf4",
    block_size: int | None = None,
    double_quant: bool | None = None,
    name: str = "weight",
) -> QuantizedTensor:
    """Quantize a tensor (QLoRA, section 3), on its device: to 4 bits, or to those of another data type.

    That no kernel serves what is made is logged once for each data type, by the logger "qloralab".

    Args:
        weight: float32, bfloat16 or float16, any shape and stride; any number of elements.
        codebook: "nf4"; another data type, by its name (``qloralab.DATA_TYPES``) or as a ``DataType``; or a codebook of
            one's own: a float32 tensor or a list of 4 to 256 ascending values in [-1, 1], each 0 or at least 2**-24 in
            magnitude. Other than 16 values take a byte a code.
        block_size: consecutive elements that share a scale: a power of two from 16 to 4096. By default the data type's
            own, which is 64 but for those that say otherwise.
        double_quant: quantize the scales too, to 8 bits in blocks of 256. By default so, but for data types whose
            scales have another encoding.
        name: of the tensor, for error messages.

    Raises:
        TypeError: weight is float64, complex, an integer or no tensor; codebook is no data type, name or numbers.
        ValueError: weight holds a NaN or an infinity (the message gives the first index); an option has no such
            value; or a scale that is quantized too would be infinite in the weight's dtype, because the weights reach
            to the end of its range.
    """
    if not isinstance(weight, Tensor) or weight.dtype not in DTYPES:
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{name} is {kind}; only float32, bfloat16 and float16 tensors are quantized")
    kind, weight = data_type(codebook, block_size, double_quant), weight.detach()
    made = _quantize_plain(weight, kind, name) if kind.is_plain else _quantize_any(weight, kind, name)
    if weight.numel() and not made.operands().is_regular(torch.float32) and kind.name not in _told:
        _told.add(kind.name)
        _log.warning("%s: no kernel has it; products run in plain PyTorch", kind.name)
    return made


def _quantize_plain(weight: Tensor, kind: DataType, name: str) -> QuantizedTensor:
    """By the operators, which C and Triton serve."""
    assert kind.values is not None
    values = kind.values.to(weight.device)
    packed, scales = ops.quantize_blockwise(weight, values, kind.block_size)
    if scales.numel() and not weight.is_meta and not scales.amax() < float("inf"):  # nor is NaN
        _raise_not_finite(weight, name)
    absmax2 = offset = None
    if kind.double_quant:
        scales, absmax2, offset = ops.quantize_scales(scales)
        _check_decoded(scales, absmax2, offset, weight.dtype, name)
    codebook = kind.codebook if isinstance(kind.codebook, str) else CUSTOM
    return QuantizedTensor(
        packed, scales, absmax2, offset, values, weight.shape, weight.dtype, codebook, kind.block_size
    )


def _quantize_any(weight: Tensor, kind: DataType, name: str) -> QuantizedTensor:
    """By the definition of ``data_type.py``."""
    if weight.is_meta:
        packed, scales, values = _described(weight, kind)
    else:
        if not weight.isfinite().all():
            _raise_not_finite(weight, name)
        packed, scales, values = quantize_blocks(weight, kind)
    made = QuantizedTensor(
        packed, scales, None, None, values, weight.shape, weight.dtype, kind.name, kind.block_size,
        kind.scale_encoding.bits,
    )  # fmt: skip
    if not weight.is_meta and not made.dequantize().isfinite().all():
        raise ValueError(
            f"{name}: weights near the end of the range of {weight.dtype} would be infinite in {kind.name}"
        )
    return made


def _described(weight: Tensor, kind: DataType) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and values of a weight on the meta device, which has only a shape."""
    rows, values = codebook_rows(weight, kind), kind.values
    values = weight.new_empty((rows, 16) if rows else (16,), dtype=torch.float32) if values is None else values
    packed = weight.new_empty((packed_bytes(weight.numel(), values), 1), dtype=torch.uint8)
    scales = weight.new_empty(-(-weight.numel() // kind.block_size), dtype=torch.float32)
    return packed, scales, values.to(weight.device)


def _check_decoded(codes: Tensor, absmax2: Tensor, offset: Tensor, dtype: torch.dtype, name: str) -> None:
    """Decoded scales are off by up to a hundredth: one near the end of the dtype's range may be past it."""
    if not len(codes) or codes.is_meta or absmax2.amax() + offset <= torch.finfo(dtype).max:
        return
    if not dequantize_scales(codes, absmax2, offset).to(dtype).isfinite().all():
        raise ValueError(
            f"{name}: a scale, quantized and decoded, would be infinite in {dtype}, whose range ends near the largest "
            "weight; pass double_quant=False"
        )


def _raise_not_finite(weight: Tensor, name: str) -> None:
    first = int(weight.isfinite().logical_not().flatten().int().argmax())
    index = ", ".join(str(int(i)) for i in torch.unravel_index(torch.tensor(first, device="cpu"), weight.shape))
    value = weight.flatten()[first].item()
    raise ValueError(f"{name}[{index}] is {value}; a weight with NaN or infinity cannot be quantized")


def linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """x @ W.T + bias with a weight in 4 bits, dequantized to the dtype of x (QLoRA, equation 5, without the adapter).

    Args:
        x: float32, bfloat16 or float16 [..., K].
        weight: [N, K].
        bias: the dtype of x, [N], or None.

    Returns:
        the dtype of x, [..., N]. Differentiable in x and bias; backward uses the bits of the forward.

    Raises:
        TypeError: x is no floating-point tensor.
        ValueError: the shapes do not fit.
    """
    x = converted(x, x.dtype)
    if len(weight.shape) != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"linear: x {list(x.shape)} does not fit a weight {list(weight.shape)}; x is [..., K] and W is [N, K]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: bias {list(bias.shape)} does not fit a weight {list(weight.shape)}")
    return ops.linear(x, *weight.operands(), bias)


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the dtype of a product; TypeError for one whose dtype would truncate what comes out."""
    if not x.is_floating_point():
        raise TypeError(f"linear: x is {x.dtype}; a floating-point tensor is needed")
    return x if x.dtype == dtype else x.to(dtype)
