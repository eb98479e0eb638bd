"""An emulator in NumPy of the PTX instructions that the look-up consists of. It runs the kernels' own assembly.

Registers are arrays of uint32, one element for each thread. The instructions are those of NVIDIA's "PTX ISA"; of
``prmt`` the default mode, of ``fma.rn.bf16x2`` finite numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Register = NDArray[np.uint32]


def prmt(a: Register, b: Register, selector: Register) -> Register:
    """Each of the four low nibbles of selector chooses a byte of (a, b); with bit 3, eight copies of its top bit."""
    chosen_from = [a >> np.uint32(8 * i) & np.uint32(0xFF) for i in range(4)]
    chosen_from += [b >> np.uint32(8 * i) & np.uint32(0xFF) for i in range(4)]
    result = np.zeros_like(selector)
    for position in range(4):
        nibble = selector >> np.uint32(4 * position) & np.uint32(15)
        byte = np.choose(nibble & np.uint32(7), chosen_from)
        sign = np.where(byte & 0x80, 0xFF, 0)
        result |= np.where(nibble & 8, sign, byte).astype(np.uint32) << np.uint32(8 * position)
    return result


def lop3(a: Register, b: Register, c: Register, table: int) -> Register:
    """Any function of three bits, of each: bit 4 a + 2 b + c of the table."""
    result = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def fma_bf16x2(a: Register, b: Register, c: Register) -> Register:
    """a * b + c in both halves, rounded once to nearest, ties to even."""
    halves = []
    for shift in (0, 16):
        x, y, z = (_bf16(register >> np.uint32(shift)) for register in (a, b, c))
        # The product of two 8-bit significands is exact in float32, and so is this sum where c is a zero.
        assert not z.any(), "only a zero is added"
        halves.append(_rounded(x * y + z) << np.uint32(shift))
    return halves[0] | halves[1]


def run(ptx: str, registers: Mapping[str, Register]) -> dict[str, Register]:
    """Execute a block of PTX.

    Args:
        ptx: ``{ instruction; ... }``.
        registers: the inputs by name.

    Returns:
        all registers after it. A register that is read before it is written raises KeyError.
    """
    state = dict(registers)
    like = next(iter(state.values()))

    def value(operand: str) -> Register:
        if re.fullmatch(r"0x[0-9a-f]+|\d+", operand):
            return np.full_like(like, int(operand, 0))
        return state[operand]

    for line in filter(None, (part.strip() for part in ptx.strip("{} \n").split(";"))):
        opcode, operands = line.split(maxsplit=1)
        if opcode == ".reg":
            continue
        if unpacked := re.fullmatch(r"\{(\S+), (\S+)\}, (\S+)", operands):
            assert opcode == "mov.b32", line
            low, high, packed = unpacked.groups()
            state[low], state[high] = state[packed] & np.uint32(0xFFFF), state[packed] >> np.uint32(16)
            continue
        target, *sources = (name.strip() for name in operands.split(","))
        match opcode, [value(source) for source in sources]:
            case "mov.b32", [a]:
                state[target] = a
            case "and.b32", [a, b]:
                state[target] = a & b
            case "shr.u32", [a, b]:
                state[target] = a >> b
            case "shl.b32", [a, b]:
                state[target] = a << b
            case "lop3.b32", [a, b, c, table]:
                state[target] = lop3(a, b, c, int(table[0]))
            case "prmt.b32", [a, b, selector]:
                state[target] = prmt(a, b, selector)
            case "fma.rn.bf16x2", [a, b, c]:
                state[target] = fma_bf16x2(a, b, c)
            case _:
                raise ValueError(f"not emulated: {line}")
    return state


def _bf16(half: Register) -> NDArray[np.float32]:
    return (half << np.uint32(16)).view(np.float32)


def _rounded(x: NDArray[np.float32]) -> Register:
    bits = x.view(np.uint32)
    return (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
