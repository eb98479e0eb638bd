"""A data type as a value: a codebook, a rule for the scale of a block, an encoding of the scales, and a block size.

Quantizing a block of weights w to the values v of a codebook asks three questions, and a data type is the answers:

* **Which scale?** A rule proposes one scale or several. Of several, the one with the least squared error
  ``sum((w - scale * v[code])**2)`` is kept, block by block.
* **How is the scale stored?** An encoding rounds it. Where it rounds each scale by itself, the proposals are rounded
  before one is kept, and the codes are found with the scale that will multiply them. Double quantization looks at all
  scales of the tensor, so it comes last, and the codes are found with the exact scale, as in bitsandbytes.
* **Which value?** The nearest, ties to the lower one (``blockwise.py``).

=================  =====================================================================================================
rule               proposes
=================  =====================================================================================================
absmax             ``max |w|``: for codebooks that reach from -1 to 1
largest            ``max |w|`` over the largest magnitude of the codebook: no weight is cut off
signed             the weight of largest magnitude itself, with its sign (BOF4-S, arXiv 2505.06653)
least_squares      two scales: absmax, and the best of 9 multiples of ``largest``, improved by Lloyd's iteration
four_over_six      two scales: the largest weight falls on 6, or on 4, of E2M1 (arXiv 2512.02010)
=================  =====================================================================================================

=================  ============  =======================================================================================
encoding           bits a scale  is
=================  ============  =======================================================================================
float32            32            as it is
double             8.125         double quantization (``double_quant.py``)
double_signed      8.125         double quantization of scales with a sign (below)
e4m3               8             an 8-bit float times one float32 of the tensor, the largest at 448 (NVFP4)
e4m3_384           8             the same with the largest at 384, so that 4/6 of it is a number of E4M3 too
e8m0               8             a power of two: the exponent of ``max |w|`` less that of the largest value (OCP MX 1.0)
=================  ============  =======================================================================================

C and Triton have the formats of bitsandbytes: a scale in float32, or doubly quantized with an offset. The result of any
other encoding is held as the float32 scales that it decodes to, so kernels multiply by it too; what it would take in
memory is ``QuantizedTensor.ideal_bits_per_parameter``. Quantizing runs in plain PyTorch, and so does all of what
kernels do not know: other than 16 values, a codebook per row, blocks of 16.

A data type of one's own::

    two_bits = DataType("two_bits", (-1.0, -1 / 3, 1 / 3, 1.0), scale="least_squares", block_size=32)
    qloralab.quantize(weight, two_bits)

``scale`` and ``encoding`` may be functions of one's own as well: see ``Rule`` and ``Encoding``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .blockwise import divide, in_blocks, is_packed, nearest, pack
from .codebook import CODEBOOKS, CUSTOM, FITTED, OTHERS, Codebook, codebook_values, custom
from .double_quant import dequantize_scales, quantize_scales
from .kmeans import kmeans, nearest_of_rows
from .packed import BLOCK_SIZES, SCALES_PER_BLOCK

ANY_BLOCK_SIZE = (16, *BLOCK_SIZES)
_SLAB = 1 << 18  # weights whose scales are searched at a time

# blocks float32 [blocks, block_size], values float32 [n] -> proposed scales, float32 [proposals, blocks]; each block by
# itself, because a large weight comes in parts
Rule = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How scales are stored.

    Attributes:
        bits: of a scale, as a mean.
        decoded: ``decoded(scales, values)``, both float32, [proposals, blocks] and [n]: the scales as they come back.
        alone: whether a scale is rounded without regard to which proposals are kept. If not, ``decoded`` is called
            with those that were kept, [1, blocks].
    """

    bits: float
    decoded: Callable[[Tensor, Tensor], Tensor]
    alone: bool = True


@dataclasses.dataclass(frozen=True)
class DataType:
    """A data type; see above.

    Attributes:
        name: letters, digits, "_" and "-", as a file keeps it.
        codebook: name of a codebook; "kmeans" or "kmeans_rows", fitted to each weight or to each of its rows; or 4 to
            256 values, ascending, in [-1, 1].
        block_size: consecutive weights that share a scale: a power of two from 16 to 4096.
        scale: a rule of the table, or one's own.
        encoding: one of the table, or one's own.

    Raises:
        ValueError, TypeError: no such codebook, rule, encoding or block size.
    """

    name: str
    codebook: Codebook
    block_size: int = 64
    scale: str | Rule = "absmax"
    encoding: str | Encoding = "float32"

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        for what, value, known in (("scale", self.scale, RULES), ("encoding", self.encoding, ENCODINGS)):
            if isinstance(value, str) and value not in known:
                raise ValueError(f"{self.name}: {what} is {value!r}; it must be one of {', '.join(known)}")
        if self.scale == "signed" and self.encoding == "double":
            raise ValueError(
                f"{self.name}: one offset does not fit scales with a sign; their encoding is double_signed"
            )
        if not self.name or not set(self.name) <= _LETTERS:
            raise ValueError(f"a data type is called {self.name!r}; a name has letters, digits, '_' and '-' only")
        if isinstance(self.codebook, str):
            known = (*CODEBOOKS, *OTHERS, *FITTED)
            if self.codebook not in known:
                raise ValueError(f"unknown codebook {self.codebook!r}; known: {', '.join(known)}")
            if self.codebook in FITTED and self.scale not in ("absmax", "signed"):
                raise ValueError(f"{self.name}: {self.codebook} is fitted after the scale, which is absmax or signed")
        else:
            object.__setattr__(self, "codebook", tuple(float(value) for value in custom(self.codebook)))

    @property
    def values(self) -> Tensor | None:
        """The codebook, float32 [n]; None for one that is fitted to each weight."""
        if self.codebook in FITTED:
            return None
        return (
            codebook_values(self.codebook, self.block_size) if isinstance(self.codebook, str) else custom(self.codebook)
        )

    @property
    def is_plain(self) -> bool:
        """Whether ``quantize`` and ``double_quant`` of bitsandbytes make it: the operators do then, in C and Triton."""
        return (
            self.scale == "absmax"
            and self.encoding in ("float32", "double")
            and self.codebook not in (*OTHERS, *FITTED)
            and self.block_size in BLOCK_SIZES
        )

    @property
    def double_quant(self) -> bool:
        """Whether the scales are quantized as those of bitsandbytes are, or those with a sign in their way."""
        return self.encoding in ("double", "double_signed")

    @property
    def scale_encoding(self) -> Encoding:
        """The encoding itself, also where ``encoding`` is the name of one."""
        return ENCODINGS[self.encoding] if isinstance(self.encoding, str) else self.encoding

    def settings(self) -> dict[str, Any]:
        """As JSON keeps it; a function of one's own by its name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value if isinstance(value, str | int | tuple) else _name(value) for name, value in values.items()}


def _name(value: object) -> str:
    """What to call a rule or an encoding: its name in the table, or that of one's own."""
    return value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)


def data_type(
    what: str | DataType | Codebook, block_size: int | None = None, double_quant: bool | None = None
) -> DataType:
    """A data type from its name, itself, or the values of a codebook, with another block size or encoding where given.

    Args:
        what: one of ``DATA_TYPES``, a ``DataType``, or values.
        block_size: by default the data type's own.
        double_quant: whether scales are doubly quantized or float32; by default the data type's own encoding.

    Raises:
        ValueError, TypeError: there is no such data type or block size, or its scales have an encoding of their own.
    """
    if isinstance(what, str):
        if what not in DATA_TYPES:
            raise ValueError(f"unknown data type {what!r}; known: {', '.join(DATA_TYPES)}")
        found = DATA_TYPES[what]
    else:
        found = what if isinstance(what, DataType) else DataType(CUSTOM, what, encoding="double")
    if block_size is not None:
        check_block_size(block_size)
        found = dataclasses.replace(found, block_size=block_size)
    if double_quant is not None:
        if found.encoding not in ("float32", "double", "double_signed"):
            raise ValueError(f"{found.name} encodes its scales as {_name(found.encoding)}; leave double_quant out")
        double = "double_signed" if found.scale == "signed" else "double"
        found = dataclasses.replace(found, encoding=double if double_quant else "float32")
    return found


def check_block_size(block_size: object) -> None:
    """Raise ValueError for what is no block size."""
    if type(block_size) is not int or block_size not in ANY_BLOCK_SIZE:
        raise ValueError(f"block_size is {block_size!r}; it must be one of {', '.join(map(str, ANY_BLOCK_SIZE))}")


def quantize_blocks(weight: Tensor, data_type: DataType) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a tensor to any data type: the definition, in plain PyTorch.

    Args:
        weight: float32, bfloat16 or float16, any shape, finite (the caller checks).

    Returns:
        packed: uint8, as ``blockwise.quantize_blockwise`` has it.
        scales: float32 [blocks], as their encoding gives them back.
        values: float32 [n]; [rows, n] where each row of the weight has its own, the values of ``weight.flatten(1)``.
    """
    flat = weight.float().flatten()
    blocks = in_blocks(flat, data_type.block_size)  # [blocks, block_size]
    encoding = data_type.scale_encoding
    rule = RULES[data_type.scale] if isinstance(data_type.scale, str) else data_type.scale
    values = data_type.values
    shared = flat.new_ones(1) if values is None else values.to(weight.device)
    slab = max(_SLAB // data_type.block_size, 1)
    proposals = torch.cat([rule(some, shared) for some in blocks.split(slab)], dim=1)
    if encoding.alone:
        proposals = encoding.decoded(proposals, shared)
    scales = _least_error(blocks, proposals, shared)
    stored = scales if encoding.alone else encoding.decoded(scales[None], shared)[0]
    x = divide(blocks, scales[:, None]).flatten()[: len(flat)]
    if values is None:
        rows = codebook_rows(weight, data_type)
        x = x.view(rows or 1, -1 if len(flat) else 0)
        importance = divide(scales, scales.abs().max()).square() if len(flat) else scales  # of the largest scale: 1
        importance = importance[:, None].expand_as(blocks).flatten()[: len(flat)].view_as(x)
        fitted = kmeans(x, importance)
        codes = nearest_of_rows(x, fitted).flatten()
        shared = fitted if rows else fitted[0]
    else:
        codes = nearest(x, shared)
    return (pack(codes, shared) if is_packed(shared) else codes[:, None]), stored, shared


def codebook_rows(weight: Tensor, data_type: DataType) -> int:
    """How many codebooks a weight gets, one for each row; 0 where there is one for the tensor."""
    return len(weight) if data_type.codebook == "kmeans_rows" and weight.dim() > 1 and weight.numel() else 0


def _least_error(blocks: Tensor, proposals: Tensor, values: Tensor) -> Tensor:
    """Of the proposals [n, blocks] the one with the least squared error, block by block; the first of equal ones."""
    if len(proposals) == 1:
        return proposals[0]
    kept, slab = [], max(_SLAB // blocks.shape[1], 1)
    for some, scales in zip(blocks.split(slab), proposals.split(slab, dim=1), strict=True):
        errors = torch.stack([squared_error(some, scale, values) for scale in scales]).nan_to_num(torch.inf)
        kept.append(scales.gather(0, errors.argmin(0)[None])[0])
    return torch.cat(kept)


def squared_error(blocks: Tensor, scales: Tensor, values: Tensor) -> Tensor:
    """The squared error of each block with a scale: float64 [blocks], for the squares of all that float32 holds."""
    codes = nearest(divide(blocks, scales[:, None]), values)
    return (_chosen(values, codes) * scales[:, None] - blocks).double().square().sum(dim=1)


def _chosen(values: Tensor, codes: Tensor) -> Tensor:
    return values.index_select(0, codes.flatten().int()).view(codes.shape)


def _absmax(blocks: Tensor, values: Tensor) -> Tensor:
    return blocks.abs().amax(dim=1)[None]


def _largest(blocks: Tensor, values: Tensor) -> Tensor:
    return _absmax(blocks, values) / values.abs().max()


def _signed(blocks: Tensor, values: Tensor) -> Tensor:
    return blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True)).T


def _least_squares(blocks: Tensor, values: Tensor) -> Tensor:
    # values[codes] * blocks must not overflow: the blocks are divided by powers of two, which rounds nothing
    absmax = _absmax(blocks, values)[0]
    power = torch.ldexp(torch.ones_like(absmax), torch.frexp(absmax).exponent.clamp(-126, 127))
    blocks = blocks / power[:, None]
    proposals = _largest(blocks, values) * torch.linspace(0.6, 1.2, 9, device=blocks.device)[:, None]
    scales = _least_error(blocks, proposals, values)
    for _ in range(4):  # Lloyd's iteration: the codes for a scale, the scale for the codes
        found = _chosen(values, nearest(divide(blocks, scales[:, None]), values))
        square = found.square().sum(dim=1)
        scales = torch.where(square > 0, (found * blocks).sum(dim=1) / square, scales)
    return torch.stack([absmax, scales * power])


def _four_over_six(blocks: Tensor, values: Tensor) -> Tensor:
    six = _largest(blocks, values)
    return torch.cat([six, six * 1.5])


RULES: dict[str, Rule] = {
    "absmax": _absmax,
    "largest": _largest,
    "signed": _signed,
    "least_squares": _least_squares,
    "four_over_six": _four_over_six,
}


def _float32(scales: Tensor, values: Tensor) -> Tensor:
    return scales


def _double(scales: Tensor, values: Tensor) -> Tensor:
    return dequantize_scales(*quantize_scales(scales[0]))[None]


def _double_signed(scales: Tensor, values: Tensor) -> Tensor:
    """Double quantization of scales with a sign, [1, blocks].

    The scales of BOF4-S are spread around two means, m and -m, so one offset serves none of them. Of a byte, one bit
    holds the sign, and 7 bits the magnitude: less its mean over the tensor, in blocks of 256, evenly spaced::

        a       = |s| - mean(|s|)
        level   = round(63 * a / max |a|)                    -63 to 63; the 128th level is a scale of 0
        s'      = sign(s) * (level / 63 * max |a| + mean(|s|))

    So no scale is off by more than max |a| / 126. The sign costs a bit: the squared error of the scales is about 2.5
    times that of unsigned ones. That of the weights rises by about a thousandth.
    """
    scales = scales[0]
    magnitude = scales.abs()
    offset = magnitude.double().mean().float()
    blocks = in_blocks(magnitude - offset, SCALES_PER_BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    level = (63 * divide(blocks, largest)).round() / 63
    decoded = (level * largest).flatten()[: len(scales)] + offset
    return torch.where(scales == 0, 0.0, decoded.clamp_min(0.0)).copysign(scales)[None]


def _e4m3(largest: float) -> Callable[[Tensor, Tensor], Tensor]:
    def decoded(scales: Tensor, values: Tensor) -> Tensor:
        of_tensor = scales.abs().amax() / largest if scales.numel() else scales.new_zeros(())
        within = divide(scales, of_tensor).clamp(-448, 448)
        return within.to(torch.float8_e4m3fn).float() * of_tensor

    return decoded


def _e8m0(scales: Tensor, values: Tensor) -> Tensor:
    largest = values.abs().max()
    exponent = torch.frexp(scales * largest).exponent - torch.frexp(largest).exponent
    power = torch.ldexp(torch.ones_like(scales), exponent.clamp_min(-127))  # the least that E8M0 has
    return torch.where(scales == 0, 0.0, power)


_NESTED = 8 + 32 / SCALES_PER_BLOCK
ENCODINGS = {
    "float32": Encoding(32, _float32),
    "double": Encoding(_NESTED, _double, alone=False),
    "double_signed": Encoding(_NESTED, _double_signed, alone=False),
    "e4m3": Encoding(8, _e4m3(448.0)),
    "e4m3_384": Encoding(8, _e4m3(384.0)),
    "e8m0": Encoding(8, _e8m0),
}

_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
_OTHERS = (
    DataType("bof4-s", "bof4-s", scale="signed", encoding="double_signed"),
    DataType("nf4-ls", "nf4", scale="least_squares", encoding="double"),
    DataType("int4-ls", "int4", scale="least_squares", encoding="double"),
    DataType("kmeans4", "kmeans", encoding="double"),
    DataType("any4", "kmeans_rows", block_size=128, encoding="double"),
    DataType("mxfp4", "e2m1", block_size=32, scale="largest", encoding="e8m0"),
    DataType("nvfp4", "e2m1", block_size=16, scale="largest", encoding="e4m3"),
    DataType("nvfp4-4over6", "e2m1", block_size=16, scale="four_over_six", encoding="e4m3_384"),
)
DATA_TYPES = {
    **{name: DataType(name, name, encoding="double") for name in CODEBOOKS},
    **{one.name: one for one in _OTHERS},
}
