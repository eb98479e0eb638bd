"""The look-up of 16 values in registers: eight codes become eight bfloat16 in 19 instructions, without memory.

**The instruction.** ``PRMT d, a, b, s`` picks bytes. The registers a and b hold eight bytes, numbered 0 to 7 from the
low end of a; each of the four low nibbles of s chooses one of them for a byte of d. Bit 3 of a nibble asks for the sign
instead: 0x00 or 0xff, eight copies of the top bit of the chosen byte. So one instruction looks four 3-bit codes up in a
table of eight bytes, and the codes need no unpacking: four nibbles in a row are the selector.

**Sixteen entries of two bytes.** A bfloat16 is a high byte (sign, 7 bits of the exponent) and a low one (the last bit
of the exponent, the mantissa): two planes of 16 bytes. Each plane is two tables of eight::

    plane(s) = PRMT(A, s) ^ PRMT(B, s ^ 0x8888)

For a code q < 8 the first term is ``A[q]`` and the second the sign of ``B[q]``; for q >= 8 they are the sign of
``A[q - 8]`` and ``B[q - 8]``. Where the entries q and q + 8 have the same top bit in the plane, A and B exist: B gets
the top bit 0, and what the sign of A flips in ``B[q]`` is flipped beforehand.

**The order of the codes.** So the kernels number the codes their own way: entries q and q + 8 agree in the sign and in
the last bit of the exponent. That takes an even number of entries in each of the four groups. A zero may have either
sign, and the whole codebook may be multiplied by a factor, if the scales are divided by it. The factor also decides how
well the entries fit into bfloat16: `table` takes the best one that gives even groups. For NF4 and normally distributed
weights the error of the table falls from 1.4e-3 to 1.0e-3 (root mean square, relative).

**The count**, for a word of eight codes: 8 PRMT look up, 4 LOP3 combine, 4 PRMT join the planes into pairs, 1 LOP3 and
2 SHF prepare the selectors: 19, or 2.375 per weight. PRMT, LOP3 and SHF share a unit of half the issue rate, which is
what limits it. The eight words of the table are arguments of the kernel: as constants in the code they are loaded anew
at each use.

**The pairs.** A word is a half of a 4 x 4 unit of weights (``packing.py``); a half-word holds a 2 x 2 square. The last
two PRMT join its weights along k (forward) or along n (transposed): they are all that differs.

``decode`` runs as inline assembly. The interpreter of Triton has none: there the sixteen entries are computed from the
same eight words, by shifts, and gathered. What the interpreter leaves out, the assembly itself, the tests run in an
emulator of its instructions.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import INTERPRETED, operand

TABLE_ARGUMENTS = tuple(f"t{i}" for i in range(8))

_FACTORS = 1 << 13  # candidates in [1, 2)


@dataclass(frozen=True)
class Table:
    """A codebook as the kernels look it up."""

    factor: float  # what the codebook is multiplied by; the scales are divided by it
    values: tuple[float, ...]  # 16 bfloat16 numbers, by the kernels' code
    order: tuple[int, ...]  # the codebook's own code, by the kernels' code
    words: tuple[int, ...]  # t0 to t7 of ``decode``, int32: A and B of the high bytes, then of the low, two words each


def table(values: Tensor) -> Table:
    """The table of a codebook.

    Args:
        values: float32 [16], in the order of the codes, finite.

    Returns:
        the one whose entries are nearest to the codebook's, of those with even groups (see above).

    Raises:
        ValueError: there are not 16 values, or no factor and no sign of a zero makes the groups even.
    """
    return _table(tuple(values.float().tolist()))


@functools.cache
def _table(numbers: tuple[float, ...]) -> Table:
    if len(numbers) != 16:
        raise ValueError(f"the look-up takes 16 values, not {len(numbers)}")
    values = torch.tensor(numbers, dtype=torch.float32, device="cpu")
    factors = 1 + torch.arange(_FACTORS, dtype=torch.float32, device="cpu") / _FACTORS
    entries = (values * factors[:, None]).bfloat16()  # [factors, 16]
    errors = (entries.double() / factors[:, None].double() - values.double()).square().sum(1)
    zeros = [code for code, value in enumerate(numbers) if value == 0]
    best: tuple[float, int, list[int]] | None = None
    for negative in range(len(zeros) + 1):
        signed = entries.clone()
        signed[:, zeros] = torch.tensor(
            [-0.0] * negative + [0.0] * (len(zeros) - negative), dtype=torch.bfloat16, device="cpu"
        )
        bits = signed.view(torch.int16).int() & 0xFFFF
        groups = bits >> 15 << 1 | bits >> 7 & 1
        even = torch.stack([(groups == group).sum(1) % 2 == 0 for group in range(4)]).all(0)
        if not even.any():
            continue
        row = int(errors.masked_fill(~even, torch.inf).argmin())
        if best is None or float(errors[row]) < best[0]:
            best = float(errors[row]), row, bits[row].tolist()
    if best is None:
        raise ValueError("the codebook has no order for the look-up: its signs do not pair")
    _, row, by_code = best
    order = _order(by_code)
    planes = [[by_code[code] >> shift & 0xFF for code in order] for shift in (8, 0)]
    return Table(
        factor=float(factors[row]),
        values=tuple(float(entries[row, code]) for code in order),
        order=tuple(order),
        words=tuple(word for plane in planes for half in _halves(plane) for word in half),
    )


def _order(bits: list[int]) -> list[int]:
    """The codes of 16 bfloat16, so that q and q + 8 have the same sign and the same last bit of the exponent."""
    codes = sorted(range(16), key=lambda code: (bits[code] >> 15, bits[code] >> 7 & 1, code))
    return codes[0::2] + codes[1::2]


def _halves(plane: list[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """A and B of a plane of 16 bytes."""
    first, second = plane[:8], [b ^ (0xFF if a >> 7 else 0) for a, b in zip(plane[:8], plane[8:], strict=True)]
    return _words(first), _words(second)


def _words(entries: list[int]) -> tuple[int, int]:
    """Eight bytes as two int32, the first byte lowest."""
    low, high = (int.from_bytes(bytes(part), "little", signed=True) for part in (entries[:4], entries[4:]))
    return low, high


def assembly(transposed: bool) -> str:
    """The PTX of ``decode`` and ``decode_transposed``: two words in, eight pairs of bfloat16 out.

    Output register 4j + 2e + q holds the pair e of the half q (low, high) of the word j. With pack=2 an argument is two
    registers: the words as $8 and $9, transposed the scales as $10 and $11, then each word of the table as two
    equal registers, of which the first is used.
    """
    tables = 12 if transposed else 10
    high_a, high_b, low_a, low_b = ((f"${tables + 4 * i}", f"${tables + 4 * i + 2}") for i in range(4))
    joins = ("0x6240", "0x7351") if transposed else ("0x5140", "0x7362")
    lines = [".reg .b32 s, r, h, l, g;"]
    for j, q in ((0, 0), (0, 1), (1, 0), (1, 1)):
        if q == 0:
            lines += [f"mov.b32 s, ${8 + j};", "xor.b32 r, s, 0x88888888;"]
        else:
            lines += ["shr.u32 s, s, 16;", "shr.u32 r, r, 16;"]
        for plane, a, b in (("h", high_a, high_b), ("l", low_a, low_b)):
            lines += [
                f"prmt.b32 {plane}, {a[0]}, {a[1]}, s;",
                f"prmt.b32 g, {b[0]}, {b[1]}, r;",
                f"xor.b32 {plane}, {plane}, g;",
            ]
        for e in (0, 1):
            pair = f"${4 * j + 2 * e + q}"
            lines += [f"prmt.b32 {pair}, l, h, {joins[e]};"]
            if transposed:  # a product with -0 added: sm_80 has no bfloat16 multiplication by itself
                lines += [f"fma.rn.bf16x2 {pair}, {pair}, ${10 + j}, z;"]
    if transposed:
        lines[0] = ".reg .b32 s, r, h, l, g, z;\nmov.b32 z, 0x80008000;"
    return "{ " + "\n".join(lines) + " }"


_ALONG_K = tl.constexpr(assembly(transposed=False))
_ALONG_N = tl.constexpr(assembly(transposed=True))
_8_TO_18 = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 18))  # &: written before the last input is read
_8_TO_20 = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 20))


@triton.jit
def decode(words, t0, t1, t2, t3, t4, t5, t6, t7):
    """Words of eight codes, int32 [..., p:2] -> bfloat16 [..., kp:2, p:2, i:2, q:2]; float32 in the interpreter.

    The two words must lie in consecutive registers of one thread: the last dimension is that of the words in the
    argument and that of a pair in the result.
    """
    if INTERPRETED:
        o0, o1, o2, o3, o4, o5, o6, o7 = _pairs(  # pyright: ignore[reportGeneralTypeIssues]
            words, t0, t1, t2, t3, t4, t5, t6, t7, 8, 4
        )
    else:
        o0, o1, o2, o3, o4, o5, o6, o7 = tl.inline_asm_elementwise(
            _ALONG_K,  # pyright: ignore[reportArgumentType]
            _8_TO_18,  # pyright: ignore[reportArgumentType]
            [words, t0, t1, t2, t3, t4, t5, t6, t7],
            dtype=(tl.bfloat16,) * 8,
            is_pure=True,
            pack=2,
        )
    return _joined(o0, o1, o2, o3, o4, o5, o6, o7)


@triton.jit
def decode_transposed(words, scales, t0, t1, t2, t3, t4, t5, t6, t7):
    """Words int32 [..., p:2] -> bfloat16 [..., i:2, p:2, kp:2, q:2], times the scales of their rows.

    scales is int32 [..., p:2], two bfloat16 each: those of the rows i = 0 (low half) and 1. Else as ``decode``; the
    product is rounded to bfloat16.
    """
    if INTERPRETED:
        o0, o1, o2, o3, o4, o5, o6, o7 = _pairs(  # pyright: ignore[reportGeneralTypeIssues]
            words, t0, t1, t2, t3, t4, t5, t6, t7, 4, 8
        )
        s0, s1 = tl.split(scales)
        s0 = tl.join((s0 << 16).to(tl.float32, bitcast=True), (s0 & -65536).to(tl.float32, bitcast=True))
        s1 = tl.join((s1 << 16).to(tl.float32, bitcast=True), (s1 & -65536).to(tl.float32, bitcast=True))
        o0, o1, o2, o3 = _times(o0, s0), _times(o1, s0), _times(o2, s0), _times(o3, s0)
        o4, o5, o6, o7 = _times(o4, s1), _times(o5, s1), _times(o6, s1), _times(o7, s1)
    else:
        o0, o1, o2, o3, o4, o5, o6, o7 = tl.inline_asm_elementwise(
            _ALONG_N,  # pyright: ignore[reportArgumentType]
            _8_TO_20,  # pyright: ignore[reportArgumentType]
            [words, scales, t0, t1, t2, t3, t4, t5, t6, t7],
            dtype=(tl.bfloat16,) * 8,
            is_pure=True,
            pack=2,
        )
    return _joined(o0, o1, o2, o3, o4, o5, o6, o7)


@triton.jit
def _times(pair, scale):
    return operand(pair * scale, tl.bfloat16)


@triton.jit
def _joined(o0, o1, o2, o3, o4, o5, o6, o7):
    low = tl.join(tl.join(o0, o4), tl.join(o2, o6))  # [..., word, pair] of the low halves
    high = tl.join(tl.join(o1, o5), tl.join(o3, o7))
    return tl.join(low, high)


@triton.jit
def _pairs(words, t0, t1, t2, t3, t4, t5, t6, t7, NEXT_PAIR: tl.constexpr, NEXT: tl.constexpr):
    code = tl.arange(0, 16)
    high = _byte(code, t0, t1, t2, t3)
    low = _byte(code, t4, t5, t6, t7)
    entries = ((high << 24) | (low << 16)).to(tl.float32, bitcast=True)
    first, second = tl.split(words)
    return (
        _pair(entries, first, NEXT),
        _pair(entries, first >> 16, NEXT),
        _pair(entries, first >> NEXT_PAIR, NEXT),
        _pair(entries, first >> (16 + NEXT_PAIR), NEXT),
        _pair(entries, second, NEXT),
        _pair(entries, second >> 16, NEXT),
        _pair(entries, second >> NEXT_PAIR, NEXT),
        _pair(entries, second >> (16 + NEXT_PAIR), NEXT),
    )


@triton.jit
def _pair(entries, word, NEXT: tl.constexpr):
    codes = tl.join(word & 15, (word >> NEXT) & 15)
    return tl.reshape(tl.gather(entries, tl.ravel(codes), 0), codes.shape)


@triton.jit
def _byte(code, a0, a1, b0, b1):
    shift = (code & 3) * 8
    a = (tl.where((code & 4) == 0, a0, a1) >> shift) & 0xFF
    b = (tl.where((code & 4) == 0, b0, b1) >> shift) & 0xFF
    first = code < 8
    return tl.where(first, a, (a >> 7) * 0xFF) ^ tl.where(first, (b >> 7) * 0xFF, b)
