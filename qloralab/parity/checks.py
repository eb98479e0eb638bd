"""What is compared with bitsandbytes, quantity by quantity; each function adds to rows.

Our side is what the library runs: ``quantize``, ``QuantizedTensor``, ``linear``. Where a step takes the result of the
step before it, it takes that of bitsandbytes, so that one difference is counted once: weights are dequantized from its
codes and scales, scales are decoded from its second-level codes, offset and scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qloralab.nf4 import ops
from qloralab.nf4.blockwise import divide, in_blocks, nearest, unpack
from qloralab.nf4.codebook import codebook_values, dynamic_map
from qloralab.nf4.packed import SCALES_PER_BLOCK
from qloralab.nf4.tensor import QuantizedTensor, linear, quantize

from . import peer
from .rows import OFFSET_ULPS, PRODUCT_FACTORS, Row, Rows
from .tensors import Sample, short

CODEBOOKS = ("nf4", "fp4")
STORAGES = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INTEGERS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
_TINY, _HUGE = 2.0**-126, 2.0**126
_ROUNDING = 2.0**-23  # of a quotient


def compare_codebooks(rows: Rows) -> None:
    """The values of both codebooks, and of the map of the second-level codes."""
    theirs = {name: peer.functional().get_4bit_type(name, device="cpu") for name in CODEBOOKS}
    theirs["8-bit map"] = peer.functional().create_dynamic_map()
    for name, values in theirs.items():
        ours = dynamic_map() if name == "8-bit map" else codebook_values(name)
        _add_bits(rows.row("codebooks", name), name, ours, values.float())


def compare_weight(rows: Rows, sample: Sample, codebook: str) -> None:
    """Codes, scales, and the weights they stand for, with the scales as they are and quantized too."""
    packed, state = peer.quantize(sample.weight, codebook, sample.block_size)
    ours = quantize(sample.weight, codebook, sample.block_size, double_quant=False)
    where = f"{codebook} {short(sample.weight.dtype)}"
    quantity = "codes, extremes" if sample.has_extremes or sample.tail else "codes"
    _compare_codes(rows.row(quantity, where), sample, ours, packed)
    _compare_scales(rows.row("scales", short(sample.weight.dtype)), sample, ours.scales, state.absmax)
    _compare_dequantized(rows, where, sample, packed, state)
    nested = peer.nested(state)
    if codebook == CODEBOOKS[0]:  # the scales do not depend on it
        _compare_second_level(rows, short(sample.weight.dtype), sample, state.absmax, packed, nested)
    _compare_dequantized(rows, where, sample, packed, nested)


def _compare_codes(row: Row, sample: Sample, ours: QuantizedTensor, packed: Tensor) -> None:
    numel = sample.weight.numel()
    if torch.equal(ours.packed, packed):
        row.add(sample, numel)
        return
    a, b = unpack(ours.packed, 2 * len(packed)), unpack(packed, 2 * len(packed))  # an odd count's last code with them
    at = (a != b).nonzero().flatten()
    a, b = a[at].long(), b[at].long()
    weight = torch.nn.functional.pad(sample.weight.float().flatten(), (0, numel % 2))[at].double()
    scale = ours.scales.double().repeat_interleave(sample.block_size)[at.clamp(max=numel - 1)]
    quotient = torch.where(scale == 0, 0, weight / scale)
    values = ours.values.double()
    steps = (_rank(ours.values)[a] - _rank(ours.values)[b]).abs()
    zero = (a == _first(values == 0)) & (values[b] == 0)
    on_edge = (quotient - (values[a] + values[b]) / 2).abs() <= _ROUNDING
    tail = ~zero & (at >= numel - sample.tail) & (steps == 1) & on_edge
    extreme = ~zero & ~tail & (scale > 0) & ((scale < _TINY) | (scale > _HUGE))
    best = (values - quotient[extreme, None]).abs().amin(dim=1)
    extreme[extreme.clone()] = (values[a] - quotient).abs()[extreme] <= best + _ROUNDING
    covered = zero | tail | extreme
    allowed = {"second zero": int(zero.sum()), "quotient": int(tail.sum()), "extreme scale": int(extreme.sum())}
    i = _first(~covered)
    first = f"[{int(at[i])}]: {int(a[i])} for {int(b[i])}"
    row.add(sample, numel, len(at), allowed, first, float(steps.max()))


def _compare_scales(row: Row, sample: Sample, ours: Tensor, theirs: Tensor) -> None:
    allowed = {}
    if sample.tail and ours[-1] == 0 and theirs[-1] == torch.tensor(1e-38):
        allowed["zero tail"] = 1
    _add_bits(row, sample, ours, theirs, allowed)


def _compare_dequantized(rows: Rows, where: str, sample: Sample, packed: Tensor, state: Any) -> None:
    read = _read(packed, state)
    theirs = peer.dequantize(packed, state).reshape(sample.weight.shape)
    ours = read.dequantize()
    row = rows.row(_weights(sample, read.double_quant), where)
    if torch.equal(_bits(ours), _bits(theirs)):
        row.add(sample, ours.numel())
        return
    differing = _bits(ours) != _bits(theirs)
    zero = differing & (ours == 0) & ~ours.signbit() & (theirs == 0)
    flushed = differing & (ours != 0) & (theirs == 0) & (ours.float().abs() < _TINY)
    rest = differing & ~zero & ~flushed
    allowed = {"negative zero": int(zero.sum())}
    if torch.equal(_bits(ours), _bits(_oracle(packed, read))):
        allowed["flushed"] = int(flushed.sum())
        allowed["split rows"] = 0 if sample.has_whole_rows else int(rest.sum())
    apart = (ours.double() - theirs.double()).abs() / sample.weight.abs().max().double()
    i = _first(rest if rest.any() else differing)
    first = f"[{i}]: {ours.flatten()[i]:.3g} for {theirs.flatten()[i]:.3g}"
    row.add(sample, ours.numel(), int(differing.sum()), allowed, first, float(apart.max()))


def _weights(sample: Sample, double_quant: bool) -> str:
    """The quantity that dequantized weights are counted in."""
    if not sample.has_whole_rows:
        return "weights, split rows"
    if sample.has_extremes or sample.tail:
        return "weights, extremes"
    return "weights, 8-bit scales" if double_quant else "weights"


def _compare_second_level(rows: Rows, where: str, sample: Sample, absmax: Tensor, packed: Tensor, nested: Any) -> None:
    read = _read(packed, nested)
    decoded = peer.functional().dequantize_blockwise(nested.absmax, nested.state2) + nested.offset
    _add_bits(rows.row("decoded scales", where), sample, read.absmax(), decoded)
    _compare_second_level_codes(rows.row("second-level codes", where), sample, absmax - nested.offset, nested)

    _, absmax2, offset = ops.quantize_scales(absmax)
    mean = absmax.double().mean()
    apart = (offset.double() - nested.offset.double()).abs()
    in_ulps = int(_ulps(offset, nested.offset))
    fits = in_ulps <= OFFSET_ULPS and bool((offset - mean).abs() <= (nested.offset - mean).abs())
    _add_bits(
        rows.row("second-level offset", where), sample, offset[None], nested.offset.reshape(1),
        {"mean": int(fits and in_ulps > 0)},
    )  # fmt: skip
    bound = apart + torch.finfo(torch.float32).eps * absmax2.double()
    shifted = (absmax2 != nested.state2.absmax) & ((absmax2.double() - nested.state2.absmax).abs() <= bound)
    _add_bits(
        rows.row("second-level scales", where), sample, absmax2, nested.state2.absmax, {"shifted": int(shifted.sum())}
    )


def _compare_second_level_codes(row: Row, sample: Sample, residual: Tensor, nested: Any) -> None:
    """The codes that we choose for their residuals under their scales, by what they stand for in float64."""
    absmax2 = nested.state2.absmax
    ours = nearest(divide(in_blocks(residual, SCALES_PER_BLOCK), absmax2[:, None]), dynamic_map())
    ours, theirs = ours.flatten()[: len(residual)].long(), nested.absmax.long()
    at = (ours != theirs).nonzero().flatten()
    if not len(at):
        row.add(sample, len(residual))
        return
    scale, values = absmax2.double()[at // SCALES_PER_BLOCK], dynamic_map().double()
    a, b = ours[at], theirs[at]
    off_a, off_b = ((values[codes] * scale - residual[at].double()).abs() for codes in (a, b))
    closer = off_a <= off_b + _ROUNDING * scale
    i = _first(~closer)
    first = f"[{int(at[i])}]: {int(a[i])} for {int(b[i])}"
    row.add(
        sample, len(residual), len(at), {"look-up": int(closer.sum())}, first, float((a - b).abs().max()),
        closer=int((off_a < off_b).sum()), farther=int((off_a > off_b).sum()),
    )  # fmt: skip


def compare_products(rows: Rows, sample: Sample, codebook: str, tokens: int, seed: int) -> None:
    """x W' and grad W on the same codes and scales, both against float64.

    Args:
        sample: a matrix [N, K] with whole rows; its dtype is that of the product.
        tokens: rows of x.
        seed: of x and grad.
    """
    packed, state = peer.quantize(sample.weight, codebook, sample.block_size, double_quant=True)
    N, K = sample.weight.shape
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, K, generator=g).to(sample.weight.dtype)
    grad = torch.randn(tokens, N, generator=g).to(sample.weight.dtype)
    read = _read(packed, state)
    (y, dx), (theirs_y, theirs_dx) = _product(x, read, grad), peer.product(x, packed, state, grad)
    exact = _oracle(packed, read).double()
    where = f"{codebook} {short(x.dtype)}"
    case = f"{sample}, {tokens} tokens,"
    _add_errors(rows.row("forward", where), case, y, theirs_y, x.double() @ exact.T)
    _add_errors(rows.row("input gradient", where), case, dx, theirs_dx, grad.double() @ exact)


def compare_backward_weights(rows: Rows, sample: Sample, codebook: str, compute_dtype: torch.dtype) -> None:
    """The weight that the backward multiplies with, seen by a gradient that is the identity.

    Args:
        sample: a matrix [N, K] with whole rows.
        compute_dtype: of the product; another one than the weight's.
    """
    packed, state = peer.quantize(sample.weight, codebook, sample.block_size)
    N, K = sample.weight.shape
    x, identity = torch.eye(N, K, dtype=compute_dtype), torch.eye(N, dtype=compute_dtype)
    read = _read(packed, state)
    ours, theirs = _product(x, read, identity)[1], peer.product(x, packed, state, identity)[1]
    differing = ours != theirs
    covered = int(differing.sum()) if torch.equal(ours, _oracle(packed, read, compute_dtype)) else 0
    apart = (ours.double() - theirs.double()).abs().max() / sample.weight.abs().max().double()
    i = _first(differing.flatten())
    first = f"[{i}]: {ours.flatten()[i]:.6g} for {theirs.flatten()[i]:.6g}"
    row = rows.row("weights in backward", f"{codebook} {short(sample.weight.dtype)}, products {short(compute_dtype)}")
    row.add(sample, ours.numel(), int(differing.sum()), {"two weights": covered}, first, float(apart))


def _product(x: Tensor, weight: QuantizedTensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Our x W' and grad W."""
    leaf = x.clone().requires_grad_()
    y = linear(leaf, weight)
    y.backward(grad)
    assert leaf.grad is not None
    return y.detach(), leaf.grad


def _read(packed: Tensor, state: Any) -> QuantizedTensor:
    """Their codes and scales, as we read them."""
    return QuantizedTensor.from_bitsandbytes(peer.tensors(packed, state))


def _oracle(packed: Tensor, read: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    return peer.oracle(packed, read.absmax(), read.values, read.block_size, read.shape, dtype or read.dtype)


def compare_files(rows: Rows, sample: Sample, codebook: str) -> None:
    """The bytes of a layer's state dict in every storage dtype: theirs, and theirs read and written by us.

    Args:
        sample: a matrix [N, K], blocks of 64, a multiple of 16 weights.
    """
    row = rows.row("files", f"{codebook} {short(sample.weight.dtype)}")
    for double_quant in (False, True):
        for storage in STORAGES:
            theirs = peer.state_dict(sample.weight, codebook, double_quant, storage)
            case = f"{sample}, {'double' if double_quant else 'single'}, in {short(storage)}"
            bias = {"bias": theirs.pop("bias")}
            read = QuantizedTensor.from_bitsandbytes({**theirs, **bias}, "weight")
            _add_bytes(row, case, read.to_bitsandbytes("weight", storage), theirs)
            if not double_quant and codebook == "nf4":  # nothing in it depends on the order of a sum
                own = quantize(sample.weight, codebook, 64, double_quant)
                _add_bytes(row, f"{case}, quantized by us", own.to_bitsandbytes("weight", storage), theirs)


def _add_bytes(row: Row, case: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    compared = differing = 0
    first = None
    for name in dict.fromkeys([*theirs, *ours]):
        a, b = ours.get(name), theirs.get(name)
        size = max(part.nbytes for part in (a, b) if part is not None)
        compared += size
        if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
            differing += size
            first = first or f"{name} is {_kind(a)} for {_kind(b)}"
            continue
        apart = _raw(a) != _raw(b)
        differing += int(apart.sum())
        if apart.any():
            first = first or f"{name}, byte {_first(apart)}"
    row.add(case, compared, differing, first=first)


def _kind(part: Tensor | None) -> str:
    return "missing" if part is None else f"{short(part.dtype)} {list(part.shape)}"


def _raw(part: Tensor) -> Tensor:
    return part.detach().contiguous().flatten().view(torch.uint8)


def _add_bits(row: Row, case: object, ours: Tensor, theirs: Tensor, allowed: dict[str, int] | None = None) -> None:
    """Compare float32 numbers in every bit."""
    if torch.equal(_bits(ours), _bits(theirs)):
        row.add(case, ours.numel())
        return
    differing = _bits(ours) != _bits(theirs)
    i = _first(differing)
    first = f"[{i}]: {float(ours[i]):.9g} for {float(theirs[i]):.9g}"
    row.add(case, ours.numel(), int(differing.sum()), allowed, first, float(_ulps(ours, theirs).max()))


def _add_errors(row: Row, case: str, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """Compare two sums by their errors."""
    a, b = (float((y.double() - exact).norm() / exact.norm()) for y in (ours, theirs))
    differing = int((_bits(ours) != _bits(theirs)).sum())
    ratio = a / b if b else (1.0 if a == 0 else float("inf"))
    covered = differing if ratio <= PRODUCT_FACTORS[ours.dtype] else 0
    first = f"errors {a:.2e}, {b:.2e}" if differing else None
    row.add(case, ours.numel(), differing, {"summation": covered}, first, ratio, our_error=a, their_error=b)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(_INTEGERS[x.element_size()])


def _ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many float32 numbers lie from a to b: int64."""
    return (_ordered(a) - _ordered(b)).abs()


def _ordered(x: Tensor) -> Tensor:
    """Float32 numbers as int64 in the same order, neighbours one apart."""
    bits = x.contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _rank(values: Tensor) -> Tensor:
    """The rank of each code's value among the different values, ascending: int64 [16]."""
    return values.unique(return_inverse=True)[1]


def _first(mask: Tensor) -> int:
    """The index of the first True, 0 where there is none."""
    return int(mask.flatten().int().argmax())
