"""Read SASS, the machine code of NVIDIA GPUs, and count what a loop costs.

A multiprocessor issues 4 instructions for 32 threads each per clock, whatever they are. So a kernel that handles a
weight in n instructions handles no more than 128 / n weights per clock and multiprocessor, and when memory could bring
more, the kernel is bound by its instructions. **How it is counted:**

    instructions per weight  =  instructions in the main loop  /  weights that one thread handles in one iteration

* The text is ``nvdisasm -c``. NOP pads and is left out. Subroutines behind the kernel (the slow path of a division) are
  left out too: they are called for rare operands.
* The *main loop* is found in the control-flow graph. A branch whose target dominates it closes a loop; the loop is the
  target and what reaches the branch without passing it, out-of-line blocks included. Of the loops that load from
  global memory, those that hold no other such loop, and of these the one with most instructions, is the main loop.
* A kernel without such a loop counts whole.
* It is a count of the text: both sides of a branch inside the loop count, once.

A compiler may unroll a loop, and then its body handles the weights of several iterations. ``Counts.loaded`` says how
many bytes the counted instructions load: less than the weights occupy means that the weights are overstated.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

# Classes, and the opcodes (up to their first dot) of each. The first that matches the whole opcode is the one.
CLASSES: dict[str, str] = {
    "tensor": r"[A-Z]+MMA|UTC\w+|LDTM|STTM|LDT|STT",
    "global": r"LDG|STG|LD|ST|LDGSTS|ATOMG|ATOM|REDG|RED|UTMA\w+|UBLK\w+|CCTL\w*",
    "shared": r"LDS|LDSM|STS|STSM|ATOMS|USTS|ULDS",
    "local": r"LDL|STL",
    "shuffle": r"SHFL|VOTE|VOTEU|MATCH|REDUX|CREDUX",
    "float": r"[FHD](ADD|MUL|FMA|SETP|SET|MNMX|SEL|CHK|RND|SWZADD)\d?|FMNMX3|F2F|F2FP|F2I|F2IP|I2F|I2FP|I2IP|FRND|MUFU",
    "control": (
        r"BRA|BRX|BRXU|JMP|JMX|CALL|RET|EXIT|BSSY|BSYNC|BREAK|BMOV|WARPSYNC|YIELD|BAR|B2R|R2B|DEPBAR|LDGDEPBAR|ARRIVES|"
        r"WARPGROUP|WARPGROUPSET|SYNCS|MEMBAR|FENCE|ERRBAR|ELECT|NANOSLEEP|ACQBULK|PREEXIT|KILL|BPT|CGAERRBAR|UCGABAR\w*"
    ),
    "constant": r"LDC|ULDC|LDCU|S2R|S2UR|CS2UR",
    "integer": (
        r"U?(PRMT|LOP3|LOP|SHF|SHL|SHR|IMAD|IMUL|IADD3?|VIADD\w*|LEA|LEA3|ISETP|ISET|SEL|MOV|IABS|IMNMX3?|VIMNMX3?|BFE|"
        r"BREV|SGXT|FLO|POPC|PLOP3|R2P|P2R|P2UR|BMSK|I2I|IDP|IDP4A|ISCADD|VABSDIFF4?|PSETP|R2UR|CS2R)|UP2UR|UR2UP"
    ),
}
OTHER = "other"
_CLASS = [(name, re.compile(pattern)) for name, pattern in CLASSES.items()]

_LABEL = re.compile(r"^([.$]?[\w$.]+):$")
_INSTRUCTION = re.compile(r"^/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*([^;&?]*)")
_TARGET = re.compile(r"`\(([^)]+)\)")
_SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)", re.MULTILINE)
_BARRIER = re.compile(r"\bB\d+")
_LOADS = frozenset({"LDG", "LD", "LDGSTS"})
_LEAVE = frozenset({"BRA", "BRX", "JMP", "EXIT", "RET", "BSYNC"})  # what ends a basic block


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: in bytes, from the start of the kernel.
        opcode: with all its modifiers: ``"LDG.E.128"``.
        operands: as they are printed.
        predicate: that must hold for it to be executed, such as ``"!P0"``; None: it always is.
        labels: that stand before it.
    """

    address: int
    opcode: str
    operands: str
    predicate: str | None
    labels: tuple[str, ...]

    @property
    def name(self) -> str:
        """The opcode without its modifiers: ``"LDG"``."""
        return self.opcode.partition(".")[0]

    @property
    def kind(self) -> str:
        """Its class: one of `CLASSES`, or `OTHER`."""
        return next((name for name, pattern in _CLASS if pattern.fullmatch(self.name)), OTHER)

    @property
    def target(self) -> str | None:
        """The label that it names, if it names one."""
        found = _TARGET.search(self.operands)
        return found[1] if found else None

    @property
    def bits(self) -> int:
        """How wide an access to memory is: bits per thread, 32 where the opcode does not say."""
        widths = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
        return next((widths[part] for part in self.opcode.split(".") if part in widths), 32)

    @property
    def shared_bits(self) -> int:
        """What it stores from registers to shared memory: bits per thread."""
        if self.name == "STSM":  # of matrices of 32 bits per thread: one, or the number that the opcode ends with
            last = self.opcode.rpartition(".")[2]
            return 32 * int(last) if last in ("2", "4") else 32
        return self.bits if self.name == "STS" else 0

    @property
    def loads(self) -> bool:
        """Whether it reads global memory, into registers or, past them, into shared memory."""
        return self.name in _LOADS

    def __str__(self) -> str:
        guard = f"@{self.predicate} " if self.predicate else ""
        return f"{guard}{self.opcode} {self.operands}".rstrip()


@dataclass(frozen=True)
class Counts:
    """What the main loop consists of; the whole kernel, where it has none.

    Attributes:
        loop: the instructions, in the order of their addresses.
        is_loop: whether they are a loop.
        weights: that one thread handles in them.
        local: LDL and STL in all of the kernel.
    """

    loop: Sequence[Instruction]
    is_loop: bool
    weights: float
    local: int

    @property
    def per_weight(self) -> float:
        """Instructions per weight."""
        return len(self.loop) / self.weights

    @property
    def classes(self) -> Mapping[str, float]:
        """Instructions per weight of each class that occurs, the largest first."""
        counted = Counter(one.kind for one in self.loop)
        return {kind: number / self.weights for kind, number in counted.most_common()}

    @property
    def opcodes(self) -> Counter[str]:
        """How often each opcode occurs, without modifiers."""
        return Counter(one.name for one in self.loop)

    def loaded(self, bits: int = 0) -> float:
        """Bytes per weight that loads from global memory bring: those of at least so many bits, if all are executed."""
        return sum(one.bits / 8 for one in self.loop if one.loads and one.bits >= bits) / self.weights

    @property
    def staged(self) -> float:
        """Bytes per weight that are stored from registers to shared memory, if all stores are executed."""
        return sum(one.shared_bits / 8 for one in self.loop) / self.weights

    @property
    def widest_load(self) -> int:
        """Bits per thread of the widest load from global memory; 0: there is none."""
        return max((one.bits for one in self.loop if one.loads), default=0)


def count(sass: str, weights: float) -> Counts:
    """Count a kernel's main loop.

    Args:
        sass: the text of one kernel, as nvdisasm prints it.
        weights: that one thread handles in one iteration; in all, where there is no loop.

    Raises:
        ValueError: there is no instruction in the text.
    """
    instructions = parse(sass)
    loop = main_loop(instructions)
    local = sum(one.kind == "local" for one in instructions)
    return Counts(loop or instructions, bool(loop), weights, local)


def sections(sass: str) -> dict[str, str]:
    """The text of each kernel in a disassembled file, by its mangled name."""
    found = list(_SECTION.finditer(sass))
    edges = [*(one.start() for one in found), len(sass)]
    return {one[1]: sass[start:end] for one, (start, end) in zip(found, pairwise(edges), strict=True)}


def parse(sass: str) -> list[Instruction]:
    """The instructions of a kernel: without NOP, and without the subroutines behind it.

    Raises:
        ValueError: there is none.
    """
    found: list[Instruction] = []
    labels: list[str] = []
    for line in map(str.strip, sass.splitlines()):
        if label := _LABEL.match(line):
            if found and label[1].startswith("$"):  # $KERNEL$SUBROUTINE
                break
            labels.append(label[1])
        elif parts := _INSTRUCTION.match(line):
            address, predicate, opcode, operands = parts.groups()
            if opcode == "NOP":
                continue
            found.append(Instruction(int(address, 16), opcode, operands.strip(), predicate, tuple(labels)))
            labels = []
    if not found:
        raise ValueError("no instruction in the text")
    return found


def main_loop(instructions: Sequence[Instruction]) -> list[Instruction]:
    """The main loop, as the module says; empty, where no loop loads from global memory."""
    blocks, after = _flow(instructions)
    loading = []
    for body in _loops(after):
        inside = sorted(index for block in body for index in blocks[block])
        if any(instructions[index].loads for index in inside):
            loading.append(frozenset(inside))
    innermost = [loop for loop in loading if not any(other < loop for other in loading)]
    return [instructions[index] for index in sorted(max(innermost, key=len, default=()))]


def _flow(instructions: Sequence[Instruction]) -> tuple[list[range], list[set[int]]]:
    """The basic blocks, as ranges of indices, and the blocks that may follow each."""
    starts = {0, *(index for index, one in enumerate(instructions) if one.labels)}
    starts |= {index + 1 for index, one in enumerate(instructions) if one.name in _LEAVE}
    edges = sorted(starts | {len(instructions)})
    blocks = [range(start, end) for start, end in pairwise(edges)]
    block_of = {label: n for n, block in enumerate(blocks) for label in instructions[block[0]].labels}

    after: list[set[int]] = []
    meeting: dict[str, str] = {}  # where threads that parted meet again, by barrier register
    for n, block in enumerate(blocks):
        for index in block:
            one = instructions[index]
            if one.name == "BSSY" and one.target and (barrier := _BARRIER.search(one.operands)):
                meeting[barrier[0]] = one.target
        last = instructions[block[-1]]
        target = last.target if last.name in ("BRA", "BRX", "JMP") else None
        if last.name == "BSYNC" and (barrier := _BARRIER.search(last.operands)):
            target = meeting.get(barrier[0])
        follows = {block_of[target]} if target in block_of else set()
        if n + 1 < len(blocks) and not _always_leaves(last):
            follows.add(n + 1)
        after.append(follows)
    return blocks, after


def _always_leaves(one: Instruction) -> bool:
    """Whether the next instruction is never executed after this one: it may also be guarded by its first operand."""
    if one.predicate is not None or one.name not in _LEAVE:
        return False
    return one.name in ("EXIT", "RET", "BRX", "BSYNC") or one.operands.startswith("`")


def _loops(after: Sequence[set[int]]) -> list[set[int]]:
    """The natural loops of a graph that begins at block 0: its blocks, by the block that they begin with."""
    before: list[set[int]] = [set() for _ in after]
    for block, follows in enumerate(after):
        for other in follows:
            before[other].add(block)
    dominators = _dominators(after, before)
    loops: dict[int, set[int]] = {}
    for block, above in dominators.items():
        for head in after[block] & above:
            body = loops.setdefault(head, {head})
            rest = [block]
            while rest:
                one = rest.pop()
                if one not in body:
                    body.add(one)
                    rest.extend(before[one] & dominators.keys())
    return list(loops.values())


def _dominators(after: Sequence[set[int]], before: Sequence[set[int]]) -> dict[int, set[int]]:
    """For each block that can be reached from block 0, the blocks that every way to it passes, itself included."""
    reached, rest = {0}, [0]
    while rest:
        new = after[rest.pop()] - reached
        reached |= new
        rest.extend(new)
    found, last = {block: set(reached) if block else {0} for block in reached}, None
    while found != last:
        last = dict(found)
        for block in sorted(reached - {0}):
            found[block] = set.intersection(*(found[one] for one in before[block] if one in reached)) | {block}
    return found
