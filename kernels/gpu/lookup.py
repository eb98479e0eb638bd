"""The look-up of 16 values in registers: eight codes become eight bfloat16 in 21 instructions, without memory.

**The instruction.** ``PRMT d, a, b, s`` picks bytes. The registers a and b hold eight bytes, numbered 0 to 7 from the
low end of a; each of the four low nibbles of s chooses one of them for a byte of d. So one instruction looks four 3-bit
codes up in a table of eight bytes, and the codes need no unpacking: four nibbles in a row are the selector.

**Sixteen entries of two bytes.** A bfloat16 is a high byte and a low one: two planes of 16 bytes, each of them two
tables of eight, A for the codes below 8 and B for the others. The fourth bit of a code chooses between the two::

    s = q & 0x7777                         the codes without it
    t = q >> 1 & 0x4444 | 0x3210           byte i of A's answer where it is 0, of B's where it is 1
    plane(q) = PRMT(PRMT(A, s), PRMT(B, s), t)

This takes any 16 values, in the order that they have in files, whatever their signs are.

**The count**, for a word of eight codes: 12 PRMT look up, 4 PRMT join the planes into pairs, 2 LOP3 and 3 SHF prepare
the selectors of both halves: 21, or 2.625 per weight. PRMT, LOP3 and SHF share a unit of half the issue rate, which is
what limits it. The eight words of the table, and 0x32103210, are arguments of the kernel: constants in the code are
loaded anew at each use, or take an instruction each.

**The factor.** The codebook may be multiplied by a factor if the scales are divided by it, and the factor decides how
well the entries fit into bfloat16: `table` takes the best of [1, 2). For NF4 and normally distributed weights the error
of the table falls from 1.4e-3 to 0.8e-3 (root mean square, relative).

**The pairs.** A multiplication wants two weights in a register: neighbours along k in the forward product, along n in
the backward one. Along k they are the nibbles of a byte, the first the high one, and the last two PRMT put them in
order. Along n they come out of two rows, and their codes are dealt out first, k by k; 4 instructions for 16 weights::

    even = row n >> 4 & 0x0f0f0f0f | row n + 1      & 0xf0f0f0f0
    odd  = row n      & 0x0f0f0f0f | row n + 1 << 4 & 0xf0f0f0f0

Each pair is multiplied by the pair of its scales, in bfloat16, rounded once: 0.5 per weight.

The look-up runs as inline assembly, a word (or two) of a thread at a time, each of its results a tensor of its own: no
layout can mix them up. The interpreter of Triton has no assembly: there the sixteen entries are gathered. What the
interpreter leaves out, the assembly itself, the tests run in an emulator of its instructions.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import INTERPRETED, operand

TABLE_ARGUMENTS = tuple(f"t{i}" for i in range(9))

_FACTORS = 1 << 13  # candidates in [1, 2)
_NATURAL = 0x32103210  # the selector that leaves the bytes where they are


@dataclass(frozen=True, eq=False)
class Table:
    """A codebook as the kernels look it up."""

    factor: float  # what the codebook is multiplied by; the scales are divided by it
    values: tuple[float, ...]  # 16 bfloat16 numbers, by code
    words: tuple[int, ...]  # t0 to t8 of ``decode``, int32: the 16 high bytes, the 16 low ones, and a selector


class _Known(NamedTuple):
    """The table of a tensor, as long as that lives."""

    values: weakref.ref[Tensor]
    version: int
    table: Table


_known: dict[int, _Known] = {}  # by the identity of the codebook


def table(values: Tensor) -> Table:
    """The table of a codebook. The first call with a tensor waits for its device; the next ones do not.

    Args:
        values: float32 [16], in the order of the codes.

    Returns:
        the one whose entries, divided by the factor, are nearest to the codebook's; the same object for equal ones.
    """
    found = known(values)
    if found is None:
        key, found = id(values), _table(tuple(values.float().tolist()))
        _known[key] = _Known(weakref.ref(values, lambda _: _known.pop(key, None)), version(values), found)
    return found


def known(values: Tensor) -> Table | None:
    """The table, where ``table`` need not wait for it."""
    found = _known.get(id(values))
    return found.table if found and found.values() is values and found.version == version(values) else None


def version(values: Tensor) -> int:
    """How often a tensor was written to; inference tensors do not count."""
    return 0 if values.is_inference() else values._version


@functools.cache
def _table(numbers: tuple[float, ...]) -> Table:
    values = torch.tensor(numbers, dtype=torch.float32, device="cpu")
    factors = 1 + torch.arange(_FACTORS, dtype=torch.float32, device="cpu") / _FACTORS
    entries = (values * factors[:, None]).bfloat16()  # [factors, 16]
    errors = (entries.double() / factors[:, None].double() - values.double()).square().sum(1)
    row = int(errors.argmin())
    bits = [number & 0xFFFF for number in entries[row].view(torch.int16).tolist()]
    planes = bytes([number >> 8 for number in bits] + [number & 0xFF for number in bits])
    words = [int.from_bytes(planes[i : i + 4], "little", signed=True) for i in range(0, 32, 4)]
    return Table(float(factors[row]), tuple(entries[row].tolist()), (*words, _NATURAL))


def _looked_up(word: str, tables: int, join: tuple[str, str], scales: tuple[str, str], outputs: list[str]) -> list[str]:
    """PTX: the eight codes of a word become four pairs, times the scales of its halves, two outputs for each pair."""
    t = [f"${tables + i}" for i in range(9)]
    lines = [f"and.b32 s, {word}, 0x77777777;", f"shr.u32 r, {word}, 1;", f"lop3.b32 r, r, 0x44444444, {t[8]}, 0xea;"]
    for half in (0, 1):
        if half:
            lines += ["shr.u32 s, s, 16;", "shr.u32 r, r, 16;"]
        for plane, (a0, a1, b0, b1) in (("h", t[:4]), ("l", t[4:8])):
            lines += [f"prmt.b32 f, {a0}, {a1}, s;", f"prmt.b32 g, {b0}, {b1}, s;", f"prmt.b32 {plane}, f, g, r;"]
        for e in (0, 1):
            first, second = outputs[4 * half + 2 * e : 4 * half + 2 * e + 2]
            lines += [f"prmt.b32 f, l, h, {join[e]};", f"fma.rn.bf16x2 f, f, {scales[half]}, z;"]
            lines += [f"mov.b32 {{{first}, {second}}}, f;"]
    return lines


def assembly(rows: int) -> str:
    """The PTX of ``decode`` (1 row) and ``decode_rows`` (2).

    Of one row: $0 to $7 are the weights, in the order of k; $8 the word, $9 its scale, twice; $10 to $18 the table.
    Of two: $0 to $15 are the weights, two rows for each k; $16 and $17 the words, $18 and $19 the scales of both rows,
    for the lower and the upper half of the words; $20 to $28 the table.

    The product is one with -0 added: sm_80 has no bfloat16 multiplication by itself.
    """
    lines = [".reg .b32 s, r, f, g, h, l, w, z;", "mov.b32 z, 0x80008000;"]
    if rows == 1:
        lines += _looked_up("$8", 10, ("0x4051", "0x6273"), ("$9", "$9"), [f"${i}" for i in range(8)])
    else:
        for odd in (0, 1):
            lines += (
                ["shl.b32 w, $17, 4;", "lop3.b32 w, $16, w, 0x0f0f0f0f, 0xe4;"]
                if odd
                else ["shr.u32 w, $16, 4;", "lop3.b32 w, w, $17, 0x0f0f0f0f, 0xe4;"]  # the first's low nibbles
            )
            outputs = [f"${4 * byte + 2 * odd + row}" for byte in range(4) for row in (0, 1)]
            lines += _looked_up("w", 20, ("0x5140", "0x7362"), ("$18", "$19"), outputs)
    return "{ " + "\n".join(lines) + " }"


_ONE_ROW = tl.constexpr(assembly(1))
_TWO_ROWS = tl.constexpr(assembly(2))
_8_TO_11 = tl.constexpr(",".join(["=&h"] * 8 + ["r"] * 11))  # &: written before the last input is read
_16_TO_13 = tl.constexpr(",".join(["=&h"] * 16 + ["r"] * 13))


@triton.jit
def decode(words, scales, t0, t1, t2, t3, t4, t5, t6, t7, t8):
    """Words of eight codes of a row -> bfloat16 [..., 2, 2, 2], by the bits of k; float32 in the interpreter.

    words and scales are int32 [...]; a scale is bfloat16, in both halves.
    """
    if INTERPRETED:
        return _row(words, scales << 16, scales << 16, t0, t1, t2, t3, t4, t5, t6, t7)
    given = [words, scales, t0, t1, t2, t3, t4, t5, t6, t7, t8]
    o = tl.inline_asm_elementwise(_ONE_ROW, _8_TO_11, given, (tl.bfloat16,) * 8, True, 1)  # pyright: ignore[reportArgumentType]
    o0, o1, o2, o3, o4, o5, o6, o7 = o
    return joined(o0, o1, o2, o3, o4, o5, o6, o7)


@triton.jit
def decode_rows(first, second, low, high, t0, t1, t2, t3, t4, t5, t6, t7, t8):
    """Words of two rows -> bfloat16 [..., 2, 2, 2, rows:2], by the bits of k, else as ``decode``.

    low and high are int32 [...]: the bfloat16 scales of the first row (in their low halves) and of the second, for the
    lower and the upper four codes of the words.
    """
    if INTERPRETED:
        a = _row(first, low << 16, high << 16, t0, t1, t2, t3, t4, t5, t6, t7)
        return tl.join(a, _row(second, low & -65536, high & -65536, t0, t1, t2, t3, t4, t5, t6, t7))
    given = [first, second, low, high, t0, t1, t2, t3, t4, t5, t6, t7, t8]
    o = tl.inline_asm_elementwise(_TWO_ROWS, _16_TO_13, given, (tl.bfloat16,) * 16, True, 1)  # pyright: ignore[reportArgumentType]
    a0, b0, a1, b1, a2, b2, a3, b3, a4, b4, a5, b5, a6, b6, a7, b7 = o
    return tl.join(joined(a0, a1, a2, a3, a4, a5, a6, a7), joined(b0, b1, b2, b3, b4, b5, b6, b7))


@triton.jit
def halves(first, second, upper):
    """The lower half-words of two int32 as one, or, where upper is 1 and not 0, the upper ones."""
    if INTERPRETED:
        return ((first >> (upper * 16)) & 0xFFFF) | ((second >> (upper * 16)) << 16)
    given = [first, second, upper * 0x2222 + 0x5410]
    return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", given, tl.int32, True, 1)  # pyright: ignore[reportArgumentType]


@triton.jit
def joined(o0, o1, o2, o3, o4, o5, o6, o7):
    """Eight tensors [...] -> [..., 2, 2, 2], by the bits of their numbers."""
    even = tl.join(tl.join(o0, o4), tl.join(o2, o6))
    odd = tl.join(tl.join(o1, o5), tl.join(o3, o7))
    return tl.join(even, odd)


@triton.jit
def _row(words, low, high, t0, t1, t2, t3, t4, t5, t6, t7):
    """The interpreter's: scales are the bits of float32."""
    bits = (_byte(t0, t1, t2, t3) << 24) | (_byte(t4, t5, t6, t7) << 16)
    k = tl.arange(0, 8)
    codes = (tl.expand_dims(words, -1) >> ((k ^ 1) * 4)) & 15
    scale = tl.where(k < 4, tl.expand_dims(low, -1), tl.expand_dims(high, -1)).to(tl.float32, bitcast=True)
    value = tl.reshape(tl.gather(bits.to(tl.float32, bitcast=True), tl.ravel(codes), 0), codes.shape)
    return tl.reshape(operand(value * scale, tl.bfloat16), (*words.shape, 2, 2, 2))


@triton.jit
def _byte(t0, t1, t2, t3):
    code = tl.arange(0, 16)
    words = tl.where(code < 8, tl.where(code < 4, t0, t1), tl.where(code < 12, t2, t3))
    return (words >> (code % 4 * 8)) & 0xFF
