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


def loop_of(*lines: str) -> list[str]:
    return [str(one) for one in main_loop(parse(text(*lines)))]


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


def test_a_loop_that_loads_nothing_is_not_the_main_loop():
    body = [".L_x_0:", "FADD R0, R0, R1", "FADD R0, R0, R2", "LDS R3, [R4]", "@P0 BRA `(.L_x_0)"]
    assert loop_of(*body, ".L_x_1:", "LDG.E R0, [R2]", "@P1 BRA `(.L_x_1)", "EXIT") == [
        "LDG.E R0, [R2]", "@P1 BRA `(.L_x_1)"
    ]  # fmt: skip
    assert loop_of(*body, "EXIT") == []


def test_of_nested_loops_the_inner_one_counts():
    inner = [".L_x_1:", "LDGSTS.E.BYPASS.128 [R1], [R2.64]", "@P0 BRA `(.L_x_1)"]
    assert loop_of(".L_x_0:", "LDG.E R9, [R2]", *inner, "FADD R1, R1, R2", "@P1 BRA `(.L_x_0)", "EXIT") == [
        "LDGSTS.E.BYPASS.128 [R1], [R2.64]", "@P0 BRA `(.L_x_1)"
    ]  # fmt: skip


def test_of_loops_side_by_side_the_longest_counts():
    lines = [".L_x_0:", "LDG.E R0, [R2]", "FADD R0, R0, R0", "@P0 BRA `(.L_x_0)"]
    rest = [".L_x_1:", "LDG.E R0, [R2]", "@P0 BRA `(.L_x_1)", "EXIT"]
    assert len(loop_of(*lines, *rest)) == 3


def test_a_block_out_of_line_belongs_to_its_loop():
    """The way back from behind the end goes to the middle of the loop, and closes none."""
    lines = [
        "MOV R0, R1", ".L_x_0:", "LDG.E R0, [R2]", "@P0 BRA `(.L_x_2)", ".L_x_1:", "FADD R0, R0, R0",
        "@P1 BRA `(.L_x_0)", "STG.E [R2], R0", "EXIT", ".L_x_2:", "MUFU.RCP R0, R0", "BRA `(.L_x_1)",
    ]  # fmt: skip
    assert loop_of(*lines) == [
        "LDG.E R0, [R2]", "@P0 BRA `(.L_x_2)", "FADD R0, R0, R0", "@P1 BRA `(.L_x_0)", "MUFU.RCP R0, R0",
        "BRA `(.L_x_1)",
    ]  # fmt: skip


def test_threads_that_part_meet_where_the_barrier_says():
    """BSYNC jumps: the block behind the end reaches the loop by no branch."""
    lines = [
        ".L_x_0:", "BSSY B1, `(.L_x_1)", "LDG.E R0, [R2]", "@P0 BRA `(.L_x_2)", "BSYNC B1", ".L_x_1:",
        "@P1 BRA `(.L_x_0)", "EXIT", ".L_x_2:", "FADD R0, R0, R0", "BSYNC B1", ".L_x_3:", "BRA `(.L_x_3)",
    ]  # fmt: skip
    assert loop_of(*lines) == [
        "BSSY B1, `(.L_x_1)", "LDG.E R0, [R2]", "@P0 BRA `(.L_x_2)", "BSYNC B1", "@P1 BRA `(.L_x_0)",
        "FADD R0, R0, R0", "BSYNC B1",
    ]  # fmt: skip


@pytest.mark.parametrize("branch", ["BRA.U UP0, `(.L_x_0)", "BRA P1, `(.L_x_0)", "@P0 BRA `(.L_x_0)"])
def test_a_branch_with_a_condition_also_falls_through(branch):
    lines = [".L_x_0:", "LDG.E R0, [R2]", branch, ".L_x_1:", "LDG.E R0, [R2]", "FADD R0, R0, R0"]
    assert len(loop_of(*lines, "@P0 BRA `(.L_x_1)", "EXIT")) == 3


def test_code_behind_a_branch_without_condition_is_not_reached_through_it():
    lines = [".L_x_0:", "LDG.E R0, [R2]", "BRA `(.L_x_0)", ".L_x_1:", "LDG.E R0, [R2]", "FADD R0, R0, R0"]
    assert len(loop_of(*lines, "@P0 BRA `(.L_x_1)", "EXIT")) == 2


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
