"""The compiled C as Python functions of tensors: one method per exported function, pointers out of tensors, no checks.

The operators above (``operators.py``) see to dtypes, shapes and contiguity. The structure ``Weight`` is that of
``weight.h``.
"""

from __future__ import annotations

import ctypes
import functools
import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from qloralab.nf4.codebook import decision_table, dynamic_map, thresholds
from qloralab.nf4.packed import Packed
from qloralab.nf4.processor import cpu_features

from ..moment_codes import BLOCK_SIZE as MOMENTS_PER_BLOCK
from ..moment_codes import moment_tables
from . import pool
from .build import load

if TYPE_CHECKING:
    from ..rule import Segments

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.c")))
threads = torch.get_num_threads
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the enum of weight.h
FEW_TOKENS = 16  # the most that few_tokens.c takes
_ARITHMETICS, _DIRECTIONS = ("f32", "bf16"), ("forward", "backward")

_int, _long, _float, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class Weight(ctypes.Structure):
    """A packed weight, as weight.h has it."""

    _fields_ = (
        *((name, _pointer) for name in ("packed", "scales", "absmax2", "offset", "map", "values")),
        *((name, _long) for name in ("rows", "columns", "block_size")),
    )


class Layer(ctypes.Structure):
    """A layer and its operands, as tiles.h has them."""

    _fields_ = (
        *((name, _long) for name in ("tokens", "r")),
        ("type", _int),
        ("scale", _float),
        *((name, _long) for name in ("threshold", "seed")),
        *((name, _pointer) for name in ("x", "grad", "bias", "A", "B", "y", "h", "dx", "dA", "dB", "workspace")),
    )


class Chunk(ctypes.Structure):
    """The segments of a chunk, as update.h has them."""

    _fields_ = (
        ("count", _long),
        *((name, _pointer) for name in ("params", "grads", "moment0", "moment1", "scales0", "scales1")),
        *((name, _pointer) for name in ("numels", "ends", "types", "factors0", "factors1")),
        ("constants", _float * 6),
        *((name, _pointer) for name in ("values", "thresholds", "below")),
    )


_weight, _layer = map(ctypes.POINTER, (Weight, Layer))
_SIGNATURES = {
    "set_pool": (_pointer,),
    "quantize": (_pointer, _int, _long, _long, *[_pointer] * 4, _int),
    "quantize_scales": (_pointer, _long, _float, _pointer, _pointer, _pointer, _int),
    "dequantize": (_weight, _long, _long, _long, _long, _int, _pointer, _int),
    "dropout": (_pointer, _int, _long, _long, _long, _int, _float, _pointer, _int),
    "linear_few": (_weight, _int, _pointer, _long, _pointer, _pointer, _int),
    **{f"adapted_{one}_{direction}": (_weight, _layer, _int) for one in _ARITHMETICS for direction in _DIRECTIONS},
    **{f"adapted_{one}_workspace": (_long,) * 4 for one in _ARITHMETICS},
}


class Library:
    """The C functions of this folder, compiled for one instruction set.

    Attributes:
        isa: the instruction set, see ``build``.
        extra: more flags for the compiler.
        pool: the OpenMP runtime that the functions run on, or None: then they run on one thread.
        has_bf16_product: whether products of bfloat16 are taken in bfloat16: that needs AVX512-BF16. All others are
            taken in float32.
    """

    def __init__(self, isa: str = "native", extra: Sequence[str] = ()):
        self.isa, self.extra = isa, tuple(extra)
        self._c = load(SOURCES, isa, extra)
        self.pool = pool.find()
        self.has_bf16_product = bool(self._c.qloralab_has_bf16_product())
        self._updates: dict[str, Callable[[Segments, Any], None] | None] = {}
        for name, arguments in _SIGNATURES.items():
            if "bf16" not in name or self.has_bf16_product:
                function = getattr(self._c, f"qloralab_{name}")
                function.argtypes, function.restype = arguments, _long if "workspace" in name else None
        self._c.qloralab_set_pool(self.pool.parallel if self.pool else None)

    def quantize(self, x: Tensor, values: Tensor, block_size: int, packed: Tensor, absmax: Tensor) -> None:
        """x (contiguous) -> packed uint8 [(numel + 1) // 2, 1] and absmax float32 [blocks], with a codebook of 16."""
        limits, codes = decision_table(values)
        missing = 16 - len(codes)  # two codes have one value
        limits, codes = pad(limits, (0, missing), value=math.inf), pad(codes, (0, missing))
        pairs = None if torch.equal(codes, _IN_ORDER) else (codes[:, None] << 4 | codes).flatten()
        self._c.qloralab_quantize(
            x.data_ptr(), DTYPES[x.dtype], x.numel(), block_size, limits.data_ptr(), _address(pairs), packed.data_ptr(),
            absmax.data_ptr(), threads(),
        )  # fmt: skip

    def quantize_scales(self, absmax: Tensor, offset: float, codes: Tensor, absmax2: Tensor) -> None:
        """Absmax float32 [blocks] -> codes uint8 [blocks], absmax2 float32 [ceil(blocks / 256)]."""
        self._c.qloralab_quantize_scales(
            absmax.data_ptr(), len(absmax), offset, _THRESHOLDS.data_ptr(), codes.data_ptr(), absmax2.data_ptr(),
            threads(),
        )  # fmt: skip

    def dequantize(self, weight: Weight, rows: range, columns: range, out: Tensor) -> None:
        """The block of a weight -> out [rows, columns], float32, bfloat16 or float16."""
        self._c.qloralab_dequantize(
            weight, rows.start, len(rows), columns.start, len(columns), DTYPES[out.dtype], out.data_ptr(), threads()
        )

    def dropout(self, x: Tensor, seed: int, threshold: int, scale: float, out: Tensor) -> None:
        """x [rows, columns] -> out; see ``lora/ops.py``."""
        rows, columns = x.shape
        self._c.qloralab_dropout(
            x.data_ptr(), DTYPES[x.dtype], rows, columns, seed, threshold, scale, out.data_ptr(), threads()
        )

    def linear_few(self, weight: Weight, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """x [..., K] of at most ``FEW_TOKENS`` tokens, bias [N] -> y [..., N]; all of one dtype."""
        tokens = x.numel() // weight.columns
        self._c.qloralab_linear_few(
            weight, DTYPES[x.dtype], x.data_ptr(), tokens, _address(bias), y.data_ptr(), threads()
        )

    def adapted_linear(
        self,
        weight: Weight,
        x: Tensor,
        bias: Tensor | None,
        y: Tensor,
        A: Tensor | None = None,
        B: Tensor | None = None,
        h: Tensor | None = None,
        scale: float = 1.0,
        threshold: int = 0,
        seed: int = 0,
    ) -> None:
        """x [tokens, K] -> y [tokens, N] and h [tokens, r], of its dtype; without A and B, the base product alone."""
        self._multiply("forward", weight, x, (scale, threshold, seed), x=x, bias=bias, y=y, A=A, B=B, h=h)

    def adapted_linear_backward(
        self,
        weight: Weight,
        grad: Tensor,
        dx: Tensor | None,
        x: Tensor | None = None,
        h: Tensor | None = None,
        A: Tensor | None = None,
        B: Tensor | None = None,
        dA: Tensor | None = None,
        dB: Tensor | None = None,
        scale: float = 1.0,
        threshold: int = 0,
        seed: int = 0,
    ) -> None:
        """grad [tokens, N] -> dx [tokens, K] of its dtype, dA, dB; without A and B, dx = grad W alone."""
        operands = {"grad": grad, "dx": dx, "x": x, "h": h, "A": A, "B": B, "dA": dA, "dB": dB}
        self._multiply("backward", weight, grad, (scale, threshold, seed), **operands)

    def _multiply(
        self, direction: str, weight: Weight, rows: Tensor, of_h: tuple[float, int, int], **operands: Tensor | None
    ) -> None:
        """`rows` is the operand [tokens, …] that decides the dtype; `of_h` are its scale, threshold and seed."""
        r = 0 if operands["A"] is None else len(operands["A"])
        arithmetic = "bf16" if rows.dtype == torch.bfloat16 and self.has_bf16_product else "f32"
        operands["workspace"] = self._workspace(arithmetic, weight, len(rows), r)
        addresses = {name: _address(tensor) for name, tensor in operands.items()}
        layer = Layer(len(rows), r, DTYPES[rows.dtype], *of_h, **addresses)
        getattr(self._c, f"qloralab_adapted_{arithmetic}_{direction}")(weight, layer, threads())

    def _workspace(self, arithmetic: str, weight: Weight, tokens: int, r: int) -> Tensor:
        workspace = getattr(self._c, f"qloralab_adapted_{arithmetic}_workspace")
        return torch.empty(workspace(weight.rows, weight.columns, tokens, r), dtype=torch.uint8, device="cpu")

    def update(self, name: str) -> Callable[[Segments, Any], None] | None:
        """The update of ``update.h`` by a rule, in place, by the name of its kernel; None: there is no C for it."""
        if name not in self._updates:
            function: Any = getattr(self._c, f"qloralab_{name}", None)
            if function is not None:
                function.argtypes, function.restype = (ctypes.POINTER(Chunk), _int), None
            self._updates[name] = None if function is None else functools.partial(_update, function)
        return self._updates[name]


def weight_of(weight: Packed) -> Weight:
    """The operands of a weight, contiguous, as the C sees them. The tensors must outlive it.

    A weight that is no matrix is one row.
    """
    packed, scales, absmax2, offset, values, shape, block_size = weight
    rows, columns = shape if len(shape) == 2 else (1, math.prod(shape))
    return Weight(
        packed.data_ptr(), scales.data_ptr(), _address(absmax2), _address(offset), _MAP.data_ptr(), values.data_ptr(),
        rows, columns, block_size,
    )  # fmt: skip


def _update(function: Any, segments: Segments, rates: Any) -> None:
    """Call the C. The arrays that the structure points into live until it returns."""
    numels, scales = [param.numel() for param in segments.params], segments.scales
    lengths = numels if scales is None else [-(-n // MOMENTS_PER_BLOCK) for n in numels]
    known = {step: rates.factors(step) for step in set(segments.steps)}
    factors = zip(*(known[step] for step in segments.steps), strict=True)

    def two(arrays: Iterable[array]) -> list[array]:
        return [*arrays, array("q"), array("q")][:2]

    def addresses(lists: Sequence[Sequence[Tensor]]) -> Iterable[array]:
        return (array("q", [tensor.data_ptr() for tensor in some]) for some in lists)

    arrays = [
        *addresses([segments.params, segments.grads]),
        *two(addresses(segments.moments)),
        *two(addresses(scales or ())),
        array("q", numels),
        array("q", accumulate(lengths)),
        array("i", [DTYPES[param.dtype] for param in segments.params]),
        *two(array("f", some) for some in factors),
    ]
    tables = () if scales is None else [table.data_ptr() for table in moment_tables()]
    starts = [one.buffer_info()[0] for one in arrays]
    function(Chunk(len(numels), *starts, (_float * 6)(*rates.constants), *tables), threads())


@functools.cache
def has_matrix_unit() -> bool:
    """Whether the processor multiplies bfloat16 matrices in hardware (AMX), several times faster than AVX512 does."""
    return "amx_bf16" in cpu_features().split()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


_MAP = dynamic_map()
_THRESHOLDS = thresholds(_MAP)
_IN_ORDER = torch.arange(16, dtype=torch.uint8, device="cpu")
