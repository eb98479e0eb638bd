"""``qloralab sass``: what each Triton kernel costs in machine code, beside bitsandbytes' compiled kernels.

No GPU is needed. Ours are compiled in this run (``kernels/offline.py``). Theirs come out of the installed wheel: its
shared library holds machine code for each architecture, which the same disassembler reads and the same code counts
(``kernels/sass.py`` says how). Weights per thread and iteration are read from their sources, see `PEERS`.

Their dequantization of double quantized weights is two more launches, which are not in the count; ours is one.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from qloralab.kernels.budgets import TARGET, budget, exceeded, unsound
from qloralab.kernels.offline import (
    TARGETS,
    Compiled,
    OfflineError,
    compile_cases,
    kernel_modules,
    run_tool,
    select,
    triton_version,
)
from qloralab.kernels.sass import OTHER, Counts, Instruction, count, sections

from .errors import UserError

THEIRS = "bitsandbytes"
KEPT, EXCEEDED, SOUND, NONE = "kept", "EXCEEDED", "no spills", ""
LIBRARIES = ("libbitsandbytes_cuda130.so", "libbitsandbytes_cuda128.so")

# Name, mangled name up to the parameters, weights per thread: in an iteration, or in all where there is no loop.
PEERS: Sequence[tuple[str, str, int]] = (
    # 512 packed bytes per 64 threads: 8 bytes, 16 weights.
    ("dequantize", r"_Z\d+kDequantizeBlockwiseI13__nv_bfloat16Li512ELi64ELi8ELi2EE", 16),
    # 32 threads for a block of 64, 2 elements each.
    ("quantize", r"_Z\d+kQuantizeBlockwiseSmallI13__nv_bfloat16Li64ELi2EE", 2),
    # A lane loads 16 bytes of codes.
    ("gemm_4bit_simt, M = 1", r"_Z\d+gemm_4bit_simtI13__nv_bfloat16Li1EE", 32),
    ("gemm_4bit_simt, M = 4", r"_Z\d+gemm_4bit_simtI13__nv_bfloat16Li4EE", 32),
    # A tile of 64 x 128 weights, 256 threads.
    ("gemm_4bit_sm80, 32x64x128", r"_Z\d+gemm_4bit_sm80_m16n8k16I13__nv_bfloat16Li32ELi64ELi128EE", 32),
)

# The columns of the table, and the classes that each sums up.
COLUMNS = {
    "int": ("integer",),
    "float": ("float",),
    "tensor": ("tensor",),
    "global": ("global", "local"),
    "shared": ("shared",),
    "shuffle": ("shuffle",),
    "rest": ("control", "constant", OTHER),
}

# What an instruction is for, by its opcode, else by its class.
NOTES = {
    "PRMT": "picks 4 bytes out of 8: the look-up in a table of 16",
    "LOP3": "any bitwise function of three words",
    "SHF": "shift",
    "IMAD": "integer multiply-add; also how a word is moved",
    "IADD3": "sum of three integers",
    "VIADD": "sum of two integers",
    "CS2R": "sets two registers to zero",
    "LEA": "shift and add: an address",
    "ISETP": "compares integers",
    "SEL": "chooses one of two",
    "MOV": "move",
    "R2UR": "to a uniform register, one for all threads",
    "FMUL": "float32 product",
    "FADD": "float32 sum",
    "FFMA": "float32 multiply-add",
    "FSEL": "chooses one of two floats",
    "FSETP": "compares floats",
    "F2FP": "rounds two float32 to a pair of 16-bit floats",
    "HMUL2": "product of two pairs of 16-bit floats",
    "HFMA2": "multiply-add of pairs of 16-bit floats; also how a constant is made",
    "HADD2": "sum of pairs of 16-bit floats; also a conversion",
    "MUFU": "reciprocal, exponential and their kind, approximately",
    "HGMMA": "matrix product of a warpgroup (Hopper)",
    "HMMA": "matrix product of a warp",
    "LDG": "loads global memory into registers",
    "LDGSTS": "copies global to shared memory, past the registers",
    "STG": "stores to global memory",
    "LDS": "loads shared memory",
    "LDSM": "loads matrix fragments from shared memory",
    "STS": "stores to shared memory",
    "SHFL": "exchanges a word between threads of a warp",
    "BAR": "waits for the other threads of the program",
    "DEPBAR": "waits for copies to arrive",
    "LDGDEPBAR": "marks a group of copies",
    "WARPGROUP": "orders matrix products and registers",
    "SYNCS": "barrier in shared memory",
    "BRA": "branch",
    "BSSY": "names the place where threads that part meet again",
    "BSYNC": "waits there for the others",
    "LDC": "loads a constant: an argument of the kernel",
    "tensor": "tensor core",
    "global": "global memory",
    "shared": "shared memory",
    "local": "local memory: a spilled register",
    "shuffle": "between threads of a warp",
    "float": "floating point",
    "control": "control flow, waiting",
    "constant": "constants, special registers",
    "integer": "integers, bits, moves",
    OTHER: "not classified",
}


@dataclass(frozen=True)
class Row:
    """One kernel.

    Attributes:
        kernel: its name.
        library: whose it is: qloralab or bitsandbytes.
        instructions: in the main loop; in all, where `is_loop` is false.
        is_loop: whether there is a main loop.
        weights_per_thread: that one thread handles in them.
        per_weight: instructions per weight.
        classes: the same by class of instruction.
        registers: per thread.
        spilled: bytes per thread.
        shared: bytes per program.
        loaded: bytes per weight that the counted loads bring.
        widest_load: bits.
        budget: instructions per weight, or None.
        verdict: kept, EXCEEDED, or, without a budget, whether registers spill.
        reasons: each limit that is exceeded.
    """

    kernel: str
    library: str
    instructions: int
    is_loop: bool
    weights_per_thread: float
    per_weight: float
    classes: dict[str, float]
    registers: int
    spilled: int
    shared: int
    loaded: float
    widest_load: int
    budget: float | None
    verdict: str
    reasons: list[str]


@dataclass(frozen=True)
class Report:
    """The rows, ours first; the versions; and in `missing` why bitsandbytes is not in it, if it is not."""

    target: str
    versions: dict[str, str]
    rows: list[Row]
    missing: str | None = None

    @property
    def fails(self) -> bool:
        return any(row.verdict == EXCEEDED for row in self.rows)


def sass(target: str, kernel: str | None, json_file: Path | None, explain: str | None) -> bool:
    """The ``sass`` command: compile, count, print the table or a loop, write the JSON.

    Args:
        target: one of `TARGETS`.
        kernel: shows only this one, or those whose names begin with these words; None: all.
        json_file: to write, or None.
        explain: a kernel whose main loop is printed instead of the table, the first if several names begin so; or None.

    Returns:
        whether every budget is kept.

    Raises:
        UserError: no such target or kernel; triton or its tools are missing; a kernel does not compile; the file
            cannot be written.
    """
    if target not in TARGETS:
        raise UserError(f"--target is one of {', '.join(TARGETS)}, not {target}")
    console = Console()
    try:
        with Console(stderr=True).status("compiling"):
            found, missing = _compile(target, explain or kernel)
    except OfflineError as error:
        raise UserError(" ".join(str(error).split())) from error
    report = make_report(target, found, missing)
    if json_file is not None:
        _write(json_file, to_json(report))
    if explain is None:
        show(report, console)
    else:
        lines = explained(*found[0])
        if others := [compiled.name for compiled, _ in found[1:]]:
            lines.append(f"also: {'; '.join(others)}")
        for line in lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    return not report.fails


Found = list[tuple[Compiled, Counts]]


def _compile(target: str, only: str | None) -> tuple[Found, str | None]:
    """Ours and theirs; and why theirs are missing."""
    theirs, missing = [], None
    if only is None or only.startswith(THEIRS):
        try:
            theirs = peers(target)
        except PeerError as error:
            missing = str(error)
    if only is not None and only.startswith(THEIRS):
        if missing:
            raise OfflineError(missing)
        chosen = select([compiled.name for compiled, _ in theirs], only)
        return [pair for pair in theirs if pair[0].name in chosen], None
    ours = [(one, count(one.sass, one.weights_per_thread)) for one in compile_cases([target], kernel_modules(), only)]
    return [*ours, *theirs], missing


class PeerError(Exception):
    """bitsandbytes' kernels cannot be counted; the message says why."""


def peers(target: str) -> Found:
    """bitsandbytes' kernels for a target, out of the installed wheel. Nothing of it is imported.

    Raises:
        PeerError: it is not installed, or has no such code.
        OfflineError: triton or its tools are missing.
    """
    spec = importlib.util.find_spec(THEIRS)
    if spec is None or not spec.submodule_search_locations:
        raise PeerError("bitsandbytes is not installed, and not in the table")
    version, folder = importlib.metadata.version(THEIRS), Path(spec.submodule_search_locations[0])
    for library in (folder / name for name in LIBRARIES):
        with tempfile.TemporaryDirectory() as temporary:
            cubins = _extract(library, target, Path(temporary)) if library.is_file() else []
            if cubins:
                return _peers_in(cubins[0], target, f"{version}, {library.name}")
    raise PeerError(
        f"bitsandbytes {version} has no code for {target} in {' or '.join(LIBRARIES)}, and is not in the table"
    )


def _extract(library: Path, target: str, folder: Path) -> list[Path]:
    try:
        run_tool("cuobjdump", "-xelf", f".{target}.cubin", library, folder=folder)
    except OfflineError:  # this disassembler is older than the library, or there is nothing for the target
        return []
    return sorted(folder.glob(f"*.{target}.cubin"))


def _peers_in(cubin: Path, target: str, version: str) -> Found:
    kernels = sections(run_tool("nvdisasm", "-c", cubin))
    usage = run_tool("cuobjdump", "-res-usage", cubin)
    found = []
    for name, pattern, weights in PEERS:
        symbol = next((one for one in kernels if re.match(pattern, one)), None)
        resources = symbol and re.search(
            rf"Function {re.escape(symbol)}:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage
        )
        if not symbol or not resources:
            raise PeerError(f"bitsandbytes {version}: no kernel {name}, so it is not in the table")
        registers, stack, shared, local = map(int, resources.groups())
        text = kernels[symbol]
        compiled = Compiled(f"{THEIRS} {name}", target, version, weights, registers, stack + local, shared, text)
        found.append((compiled, count(text, weights)))
    return found


def make_report(target: str, found: Found, missing: str | None) -> Report:
    """Rows with verdicts out of what was compiled and counted."""
    versions = {"triton": triton_version()}
    for compiled, _ in found:
        if compiled.name.startswith(THEIRS):
            versions[THEIRS] = compiled.triton
    return Report(target, versions, [_row(*pair) for pair in found], missing)


def _row(compiled: Compiled, counts: Counts) -> Row:
    limits, reasons, verdict = None, [], NONE
    is_theirs = compiled.name.startswith(THEIRS)
    if not is_theirs:
        limits = budget(compiled) if compiled.target == TARGET else None
        reasons = exceeded(limits, compiled, counts) if limits else unsound(compiled, counts)
        verdict = EXCEEDED if reasons else KEPT if limits else SOUND
    return Row(
        kernel=compiled.name.removeprefix(f"{THEIRS} "),
        library=THEIRS if is_theirs else "qloralab",
        instructions=len(counts.loop),
        is_loop=counts.is_loop,
        weights_per_thread=counts.weights,
        per_weight=round(counts.per_weight, 3),
        classes={name: round(value, 3) for name, value in counts.classes.items()},
        registers=compiled.registers,
        spilled=compiled.spilled,
        shared=compiled.shared,
        loaded=round(counts.loaded(), 3),
        widest_load=counts.widest_load,
        budget=limits.instructions if limits else None,
        verdict=verdict,
        reasons=reasons,
    )


def show(report: Report, console: Console) -> None:
    """Print the table, what exceeds a budget, and how it was counted."""

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    width = max(80, min(console.width, 130)) if console.is_terminal else 130
    console.width = max(console.width, width)
    console.print(table(report, width))
    for row in report.rows:
        for reason in row.reasons:
            say(f"{row.kernel}: {reason}")
    if report.missing:
        say(report.missing)
    say("Instructions in the main loop, per weight that a thread handles in an iteration; * no loop: in the kernel.")
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    say(f"{report.target}, counted in the machine code, not measured on a GPU; {versions}")


def table(report: Report, width: int | None = None) -> Table:
    """The report as a table.

    Args:
        report: to be shown.
        width: in columns; below 120 the classes are left out. None: a Markdown table, as wide as it gets.
    """
    is_markdown = width is None
    has_classes = width is None or width >= 120
    occurring = {kind for row in report.rows for kind in row.classes}
    columns = [name for name, kinds in COLUMNS.items() if has_classes and occurring.intersection(kinds)]
    padding = (0, 1) if is_markdown else 0  # the box itself leaves a space between columns
    view = Table(box=box.MARKDOWN if is_markdown else box.SIMPLE_HEAD, pad_edge=is_markdown, padding=padding)
    view.add_column("kernel", no_wrap=True)
    for heading in ("per weight", *columns, "regs", "spill", "shared memory", "load", "budget"):
        view.add_column(heading if is_markdown else heading.replace(" ", "\n"), justify="right", no_wrap=is_markdown)
    view.add_column("verdict", no_wrap=True)
    before = "qloralab"
    for row in report.rows:
        if row.library != before and not is_markdown:
            view.add_section()
            view.add_row(f"{row.library} {report.versions[row.library]}".partition(",")[0])
        before = row.library
        parts = [sum(row.classes.get(kind, 0) for kind in COLUMNS[name]) for name in columns]
        view.add_row(
            f"{row.library}: {row.kernel}" if is_markdown and row.library != "qloralab" else row.kernel,
            f"{row.per_weight:.2f}{'' if row.is_loop else '*'}",
            *(f"{part:.2f}" if part else "" for part in parts),
            str(row.registers),
            str(row.spilled),
            str(row.shared),
            f"{row.widest_load // 8} B",
            "" if row.budget is None else f"{row.budget:g}",
            f"[bold red]{row.verdict}[/]" if row.verdict == EXCEEDED else row.verdict,
        )
    return view


def explained(compiled: Compiled, counts: Counts) -> list[str]:
    """The main loop line by line, each with its class and what it is for, and a summary."""
    what = "main loop" if counts.is_loop else "no loop over global memory, so all of it"
    lines = [f"{compiled.name}, {compiled.target}: {what}", ""]
    lines += [f"{one.address:06x}  {one.kind:<9}{one!s:<58}  {note(one)}".rstrip() for one in counts.loop]
    lines += [
        "",
        f"{len(counts.loop)} instructions, {counts.weights:g} weights per thread: {counts.per_weight:.2f} each",
    ]
    opcodes = counts.opcodes.most_common()
    for kind, value in counts.classes.items():
        names = [f"{n} {name}" for name, n in opcodes if Instruction(0, name, "", None, ()).kind == kind]
        lines.append(f"{value:8.2f}  {kind:<9}{', '.join(names)}")
    lines.append(f"{compiled.registers} registers, {compiled.spilled} bytes spilled, {compiled.shared} bytes shared")
    return lines


def note(one: Instruction) -> str:
    """What an instruction is for, in a few words."""
    return NOTES.get(one.name) or NOTES.get(one.name.removeprefix("U")) or NOTES[one.kind]


def to_json(report: Report) -> str:
    """The report as JSON; `from_json` reads it."""
    return json.dumps({**asdict(report), "fails": report.fails}, indent=1) + "\n"


def from_json(text: str) -> Report:
    """The report that `to_json` wrote.

    Raises:
        ValueError, KeyError, TypeError: the text is something else.
    """
    facts = json.loads(text)
    return Report(facts["target"], facts["versions"], [Row(**row) for row in facts["rows"]], facts["missing"])


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from error
