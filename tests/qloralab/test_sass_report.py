"""The table, the loop line by line, the exit status; and bitsandbytes' kernels, counted out of the installed wheel."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
from rich.console import Console

from qloralab.benchmarks.sass import report as sass_report
from qloralab.benchmarks.sass.compile import Compiled, OfflineError
from qloralab.benchmarks.sass.reader import Counts, Instruction
from qloralab.benchmarks.sass.report import (
    EXCEEDED,
    KEPT,
    NOTES,
    SOUND,
    PeerError,
    explained,
    make_report,
    note,
    peers,
    show,
    table,
)
from qloralab.kernels.gpu import nvrtc
from qloralab.kernels.gpu.case import Budget

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which has wheels for Linux")

# Instructions per weight, as counted in several releases; the code changes little between them.
COUNTED = {"dequantize": 24, "quantize": 99, "gemm_4bit_simt, M = 1": 8.7, "gemm_4bit_simt, M = 4": 20.3,
           "gemm_4bit_sm80, 32x64x128": 8.1}  # fmt: skip

BUDGETS = {"one": Budget(0.125), "two": Budget(0.1)}


def found(name: str = "one", opcodes: tuple[str, ...] = ("LDG.E.128", "PRMT"), weights: float = 16, **changes):
    """A kernel whose loop has these opcodes, and its counts."""
    loop = [Instruction(16 * n, opcode, "R0, R1", None, ()) for n, opcode in enumerate(opcodes)]
    one = Compiled(
        name, "sm_90", "3.6.0", weights, registers=40, spilled=0, shared=1024, sass="", budget=BUDGETS.get(name)
    )
    return replace(one, **changes), Counts(loop, True, weights, 0)


def lines_of(report, width=130) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    show(report, console)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # pyright: ignore[reportAttributeAccessIssue]


def test_verdicts():
    pairs = [found("one"), found("two"), found("three"), found("four", spilled=4), found("bitsandbytes x", spilled=4)]
    report = make_report("sm_90", pairs, None)
    assert [(row["verdict"], row["budget"]) for row in report["rows"]] == [
        (KEPT, 0.125), (EXCEEDED, 0.1), (SOUND, None), (EXCEEDED, None), ("", None)
    ]  # fmt: skip
    assert report["fails"]
    assert not make_report("sm_90", [*pairs[:1], *pairs[2:3], *pairs[4:]], None)["fails"]


def test_budgets_are_for_one_target():
    assert not make_report("sm_80", [found("two", target="sm_80")], None)["fails"]
    assert make_report("sm_80", [found("two", target="sm_80", spilled=4)], None)["fails"]


def test_show():
    report = make_report("sm_90", [found("one"), found("two"), found("bitsandbytes x")], None)
    lines = lines_of(report)
    (row,) = (line for line in lines if line.startswith(" one "))
    assert row.split() == ["one", "0.12", "0.06", "0.06", "40", "0", "1024", "16", "B", "0.125", "kept"]
    rows = [line.split()[0] for line in lines if line.startswith(" ") and line.strip()]
    assert rows[-4:] == ["one", "two", "bitsandbytes", "x"]
    assert "two: 0.12 instructions per weight, more than 0.1" in lines
    assert any("sm_90, counted in the machine code, not measured on a GPU; triton" in line for line in lines)


def test_show_what_is_missing():
    assert "no peer today" in lines_of(make_report("sm_90", [found()], "no peer today"))


@pytest.mark.parametrize("width", [80, 130])
def test_every_figure_of_the_table_is_legible(width):
    names = ("gemm_4bit_sm80, 32x64x128", "linear_grad_input, 128 tokens")
    opcodes = ("LDG.E.128", "PRMT", "FMUL", "HGMMA", "STS", "SHFL", "BRA")
    pairs = [found(name, opcodes * 40, registers=255, spilled=5712, shared=222222) for name in names]
    console = Console(file=io.StringIO(), width=width)
    console.print(table(make_report("sm_90", pairs, None), width))
    shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width


def test_a_kernel_without_a_loop_is_marked():
    compiled, counts = found()
    report = make_report("sm_90", [(compiled, replace(counts, is_loop=False))], None)
    assert any(" 0.12* " in line for line in lines_of(report))


def test_explained():
    first, _, *lines = explained(*found(opcodes=("LDG.E.128", "PRMT", "PRMT", "BRA")))
    assert first == "one, sm_90: main loop"
    assert lines[0].split() == ["000000", "global", "LDG.E.128", "R0,", "R1", *NOTES["LDG"].split()]
    assert lines[1].endswith(NOTES["PRMT"])
    assert "4 instructions, 16 weights per thread: 0.25 each" in lines
    assert "    0.12  integer  2 PRMT" in lines


@pytest.mark.parametrize(
    ("opcode", "key"),
    [
        ("PRMT", "PRMT"),
        ("USHF.L", "SHF"),
        ("HGMMA.64x8", "HGMMA"),
        ("POPC", "integer"),
        ("STL", "local"),
        ("X", "other"),
    ],
)
def test_every_instruction_has_a_note(opcode, key):
    assert note(Instruction(0, opcode, "", None, ())) == NOTES[key]


@pytest.fixture(scope="module")
def theirs():
    if find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes, whose compiled kernels are counted")
    try:
        return {compiled.name.removeprefix("bitsandbytes "): (compiled, counts) for compiled, counts in peers("sm_90")}
    except PeerError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", COUNTED)
def test_bitsandbytes_is_counted_as_published(theirs, name):
    compiled, counts = theirs[name]
    assert counts.per_weight == pytest.approx(COUNTED[name], rel=0.1)
    assert counts.is_loop == (name != "quantize")
    assert compiled.spilled == counts.local == 0
    assert counts.loaded() >= (2 if name == "quantize" else 0.5)


def test_bitsandbytes_look_ups(theirs):
    """One exchange between threads for each weight, where the table lies in the registers of a warp."""
    for name in ("gemm_4bit_simt, M = 1", "gemm_4bit_simt, M = 4", "gemm_4bit_sm80, 32x64x128"):
        _, counts = theirs[name]
        assert counts.opcodes["SHFL"] == counts.weights
    assert theirs["gemm_4bit_sm80, 32x64x128"][1].opcodes["HMMA"] == 16


def test_no_bitsandbytes(monkeypatch, tmp_path):
    monkeypatch.setattr(sass_report, "LIBRARIES", ("libnone.so",))
    if find_spec("bitsandbytes") is not None:
        with pytest.raises(PeerError, match=r"has no code for sm_90 in libnone.so, and is not in the table"):
            peers("sm_90")
    monkeypatch.setattr(sass_report, "THEIRS", "bitsandbytes_of_nobody")
    with pytest.raises(PeerError, match="is not installed"):
        peers("sm_90")


@pytest.fixture
def _quick(monkeypatch):
    """The command with two small kernels in place of ours, and without bitsandbytes."""

    def compile_cases(targets, modules, only):
        pairs = [found("one", target=targets[0]), found("two", target=targets[0])]
        if only not in (None, "one", "both"):
            raise OfflineError(f"no kernel is called {only!r}\n  at all")
        return [compiled for compiled, _ in pairs if only in (None, "both", compiled.name)]

    def no_peers(target):
        raise PeerError("no peer")

    monkeypatch.setattr(sass_report, "compile_cases", compile_cases)
    monkeypatch.setattr(sass_report, "cuda_cases", list)
    monkeypatch.setattr(sass_report, "count", lambda sass, weights: found()[1])
    monkeypatch.setattr(sass_report, "peers", no_peers)


@pytest.mark.usefixtures("_quick")
def test_the_exit_status_tells(program):
    status, out, err = program("sass")
    assert (status, err) == (1, "")
    assert "two: 0.12 instructions per weight" in out
    assert "no peer" in out
    assert program("sass", "--target", "sm_80")[0] == 0
    status, out, err = program("sass", "--kernel", "one", "--json", "out.json")
    assert (status, err) == (0, "")
    assert "no peer" not in out


@pytest.mark.usefixtures("_quick")
def test_json_is_written(program, tmp_path):
    program("sass", "--json", "out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    assert [(row["kernel"], row["per_weight"]) for row in report["rows"]] == [("one", 0.125), ("two", 0.125)]
    assert (report["missing"], report["fails"]) == ("no peer", True)


@pytest.mark.usefixtures("_quick")
def test_explain(program):
    status, out, err = program("sass", "--explain", "one")
    assert (status, err) == (0, "")
    assert out.startswith("one, sm_90: main loop\n")
    assert "kept" not in out
    assert "also" not in out
    first, _, rest = program("sass", "--explain", "both")[1].partition("\n")
    assert first == "one, sm_90: main loop"
    assert rest.endswith("1024 bytes shared\nalso: two\n")


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "sm_75"], "--target is one of sm_80, sm_90, sm_100, sm_120, not sm_75"),
        (["--kernel", "nobody"], "no kernel is called 'nobody' at all"),
        (["--explain", "nobody"], "no kernel is called 'nobody' at all"),
        (["--explain", "bitsandbytes quantize"], "no peer"),
        (["--json", "no/such/folder.json"], "no/such/folder.json cannot be written: No such file or directory"),
    ],
)
def test_mistakes(program, options, message):
    assert program("sass", *options) == (2, "", f"qloralab: error: {message}\n")


def test_a_kernel_of_theirs_is_explained(theirs, program):
    status, out, err = program("sass", "--explain", "bitsandbytes quantize")
    assert (status, err) == (0, "")
    assert out.startswith("bitsandbytes quantize, sm_90: no loop over global memory, so all of it\n")
    assert out.count("STG.E.U8") == 1


@pytest.mark.slow
def test_the_whole_command(program):
    status, out, err = program("sass", "--kernel", "dequantize")
    assert (status, err) == (0, "")
    assert out.count(" kept") == 1
    assert "bitsandbytes" not in out


@pytest.mark.skipif(bool(nvrtc.why_not()), reason=f"needs NVRTC: {nvrtc.why_not()}")
def test_a_kernel_in_cuda(program):
    status, out, err = program("sass", "--kernel", "few_tokens, 8 tokens")
    assert (status, err) == (0, "")
    assert "few_tokens, 8 tokens" in out
    assert "kept" in out


@pytest.mark.skipif(bool(nvrtc.why_not()), reason=f"needs NVRTC: {nvrtc.why_not()}")
def test_of_a_name_that_no_kernel_has_all_names_are_listed(program):
    status, _, err = program("sass", "--kernel", "dequantise")
    assert status == 2
    assert "no kernel is called 'dequantise'; there are: quantize, " in err
    assert ", few_tokens, 8 tokens" in err
