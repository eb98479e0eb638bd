"""SASS written by hand, whose loops and counts are known."""

from __future__ import annotations

import pytest

from qloralab.benchmarks.sass.reader import CLASSES, OTHER, Counts, Instruction, count, main_loop, parse, sections


def text(*lines: str) -> str:
    """Lines as nvdisasm prints them: what ends with a colon is a label, the rest are instructions."""
    shown, address = [], 0
    for line in lines:
        if line.endswith(":"):
            shown.append(line)
            continue
        guard, _, rest = line.rpartition("@")[2].partition(" ") if line.startswith("@") else ("", "", line)
        guard = f"@{guard}" if guard else ""
        shown.append(f"        /*{address:04x}*/             {guard:>6} {rest} ;")
        address += 16
    return "\n".join(shown)


def an_instruction(opcode: str, operands: str = "") -> Instruction:
    return Instruction(0, opcode, operands, None, ())


STREAM = (
    "S2R R0, SR_TID.X",
    ".L_x_0:",
    "@!P0 LDG.E.128 R4, desc[UR4][R2.64]",
    "PRMT R4, R4, R8, R9",
    "LOP3.LUT R4, R4, R5, RZ, 0x3c, !PT",
    "FMUL R4, R4, R6",
    "HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR8], R24",
    "NOP",
    "SHFL.BFLY PT, R4, R4, 0x1, 0x1f",
    "STS.64 [R1], R4",
    "@P1 BRA `(.L_x_0)",
    "STG.E.64 desc[UR4][R2.64], R4",
    "EXIT",
    ".L_x_1:",
    "BRA `(.L_x_1)",
    "NOP",
)


def test_count():
    counts = count(text(*STREAM), 4)
    assert counts.is_loop
    assert len(counts.loop) == 8
    assert counts.per_weight == 2
    assert counts.classes == {
        "integer": 0.5, "global": 0.25, "float": 0.25, "tensor": 0.25, "shuffle": 0.25, "shared": 0.25, "control": 0.25
    }  # fmt: skip
    assert counts.opcodes["PRMT"] == 1
    assert "STG" not in counts.opcodes
    assert (counts.loaded(), counts.widest_load, counts.staged, counts.local) == (4, 128, 2, 0)


def test_parse_reads_each_part():
    first, second, *_ = parse(text(*STREAM))
    assert first == Instruction(0, "S2R", "R0, SR_TID.X", None, ())
    assert second == Instruction(16, "LDG.E.128", "R4, desc[UR4][R2.64]", "!P0", (".L_x_0",))
    assert (second.name, second.kind, second.bits, second.loads) == ("LDG", "global", 128, True)
    assert str(second) == "@!P0 LDG.E.128 R4, desc[UR4][R2.64]"


def test_parse_reads_what_newer_disassemblers_print():
    line = (
        "        /*0250*/              @!UP3 LDG.E.ENL2.256 R16, R24, desc[UR10][R30.64]    &req={1} &wr=0x2  ?trans4;"
    )
    (found,) = parse(line)
    assert found == Instruction(0x250, "LDG.E.ENL2.256", "R16, R24, desc[UR10][R30.64]", "!UP3", ())
    assert found.bits == 256
    (found,) = parse("        /*07d0*/              @!P1 BRA `(.L_x_1)         ?trans5;")
    assert found.target == ".L_x_1"


def test_a_kernel_without_a_loop_counts_whole():
    counts = count(text("LDG.E R0, [R2]", "STG.E [R2], R0", "EXIT", ".L_x_0:", "BRA `(.L_x_0)", "NOP"), 2)
    assert not counts.is_loop
    assert counts.per_weight == 2  # with the endless loop that pads each kernel


QUIET = [".L_x_8:", "FADD R0, R0, R1", "LDS R3, [R4]", "@P0 BRA `(.L_x_8)"]
LOAD, STEP, BACK = "LDG.E R0, [R2]", "FADD R0, R0, R0", "@P1 BRA `(.L_x_0)"
NEXT = [".L_x_9:", LOAD, STEP, "@P0 BRA `(.L_x_9)", "EXIT"]
ASIDE = [STEP, "BSYNC B1"]
LOOPS = {
    "a loop that loads nothing is none": ([*QUIET, "EXIT"], []),
    "beside such a loop the one that loads counts": ([*QUIET, ".L_x_0:", LOAD, BACK, "EXIT"], [LOAD, BACK]),
    "of nested loops the inner one counts": (
        [".L_x_0:", LOAD, ".L_x_1:", "LDGSTS.E.128 [R1], [R2.64]", "@P0 BRA `(.L_x_1)", STEP, BACK, "EXIT"],
        ["LDGSTS.E.128 [R1], [R2.64]", "@P0 BRA `(.L_x_1)"],
    ),
    "of loops side by side the longest counts": ([".L_x_0:", LOAD, STEP, STEP, BACK, *NEXT], [LOAD, STEP, STEP, BACK]),
    # The way back from behind the end goes to the middle of the loop, and closes none.
    "a block out of line belongs to its loop": (
        ["MOV R0, R1", ".L_x_0:", LOAD, "@P0 BRA `(.L_x_2)", ".L_x_1:", STEP, BACK, "STG.E [R2], R0", "EXIT",
         ".L_x_2:", "MUFU.RCP R0, R0", "BRA `(.L_x_1)"],
        [LOAD, "@P0 BRA `(.L_x_2)", STEP, BACK, "MUFU.RCP R0, R0", "BRA `(.L_x_1)"],
    ),
    # BSYNC jumps: the block behind the end reaches the loop by no branch.
    "threads that part meet where the barrier says": (
        [".L_x_0:", "BSSY B1, `(.L_x_1)", LOAD, "@P0 BRA `(.L_x_2)", "BSYNC B1", ".L_x_1:", BACK, "EXIT",
         ".L_x_2:", *ASIDE, ".L_x_3:", "BRA `(.L_x_3)"],
        ["BSSY B1, `(.L_x_1)", LOAD, "@P0 BRA `(.L_x_2)", "BSYNC B1", BACK, *ASIDE],
    ),
    "a branch without condition does not fall through": (
        [".L_x_0:", LOAD, "BRA `(.L_x_0)", *NEXT], [LOAD, "BRA `(.L_x_0)"]
    ),
} | {
    f"a branch with a condition also falls through, {branch}": ([".L_x_0:", LOAD, branch, *NEXT], [LOAD, STEP, NEXT[3]])
    for branch in ("BRA.U UP0, `(.L_x_0)", "BRA P1, `(.L_x_0)", "@P0 BRA `(.L_x_0)")
}  # fmt: skip


@pytest.mark.parametrize(("body", "loop"), LOOPS.values(), ids=LOOPS)
def test_the_main_loop(body, loop):
    assert [str(one) for one in main_loop(parse(text(*body)))] == loop


def test_a_subroutine_is_left_out():
    lines = text(
        "LDG.E R0, [R2]", "EXIT", "$kernel$__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath:", "MUFU.RCP R0, R0"
    )
    assert len(parse(lines)) == 2


def test_local_memory_is_found_outside_of_the_loop_too():
    counts = count(text("STL.64 [R1], R2", *STREAM), 4)
    assert counts.local == 1
    assert "local" not in counts.classes


@pytest.mark.parametrize(
    ("opcode", "kind", "bits"),
    [
        ("PRMT", "integer", 32), ("LOP3.LUT", "integer", 32), ("SHF.R.U32.HI", "integer", 32),
        ("LEA.HI", "integer", 32), ("IMAD.WIDE.U32", "integer", 32), ("IADD3.X", "integer", 32),
        ("IADD.64", "integer", 64), ("UMOV", "integer", 32), ("ULOP3.LUT", "integer", 32), ("VIADD", "integer", 32),
        ("R2UR", "integer", 32), ("I2FP.F32.U32", "float", 32), ("FMUL", "float", 32), ("FADD2", "float", 32),
        ("HMUL2.BF16_V2", "float", 32), ("HFMA2.BF16", "float", 32), ("F2FP.BF16.F32.PACK_AB", "float", 32),
        ("MUFU.RCP", "float", 32), ("FSETP.GT", "float", 32), ("HGMMA.64x16x16.F32.BF16", "tensor", 32),
        ("HMMA.16816.F32.BF16", "tensor", 32), ("UTCHMMA", "tensor", 32), ("LDG.E.EF.128", "global", 128),
        ("LDG.E.LTC128B.64", "global", 64), ("STG.E.U16", "global", 16), ("LDG.E.U8.CONSTANT", "global", 8),
        ("LDGSTS.E.BYPASS.LTC128B.128", "global", 128), ("UTMALDG.2D", "global", 32), ("LDS.128", "shared", 128),
        ("LDSM.16.M88.4", "shared", 32), ("STS", "shared", 32), ("LDL.LU.64", "local", 64), ("STL", "local", 32),
        ("SHFL.IDX", "shuffle", 32), ("BRA.U", "control", 32), ("WARPGROUP.ARRIVE", "control", 32),
        ("BAR.SYNC.DEFER_BLOCKING", "control", 32), ("LDC.64", "constant", 64), ("S2R", "constant", 32),
        ("SOMETHING.NEW", OTHER, 32),
    ],
)  # fmt: skip
def test_classes(opcode, kind, bits):
    assert an_instruction(opcode).kind == kind
    assert an_instruction(opcode).bits == bits
    assert kind in (*CLASSES, OTHER)


def test_sections():
    head = "\t.target\tsm_90\n"
    one = '\t.section\t.text._Z3oneIfEvv,"ax",@progbits\n' + text("LDG.E R0, [R2]", "EXIT") + "\n"
    two = '\t.section\t.text.two,"ax",@progbits\n' + text("EXIT") + "\n"
    found = sections(head + one + two)
    assert {name: len(parse(sass)) for name, sass in found.items()} == {"_Z3oneIfEvv": 2, "two": 1}
    assert sections(head) == {}


def test_no_instruction():
    with pytest.raises(ValueError, match="no instruction"):
        count("\t.target\tsm_90\n", 1)


def test_loads_of_some_width():
    loop = [an_instruction(opcode) for opcode in ("LDG.E.128", "LDGSTS.E.64", "LDG.E", "LDS.128", "STG.E.128")]
    counts = Counts(loop, True, 2, 0)
    assert [counts.loaded(bits) for bits in (0, 32, 64, 128, 256)] == [14, 14, 12, 8, 0]


def test_what_is_staged_in_shared_memory():
    loop = [an_instruction(opcode) for opcode in ("STS.128", "STS", "STS.U16", "STSM.16.M88.4", "STSM.16.M88", "LDS")]
    assert Counts(loop, True, 1, 0).staged == 16 + 4 + 2 + 16 + 4


def test_no_load():
    counts = Counts([an_instruction("FADD")], False, 1, 0)
    assert (counts.loaded(), counts.widest_load, counts.staged) == (0, 0, 0)
