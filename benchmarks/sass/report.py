"""``qloralab sass``: what each Triton kernel costs in machine code, beside bitsandbytes' compiled kernels.

No GPU is needed. Ours are compiled in this run (``compile.py``). Theirs come out of the installed wheel: its shared
library holds machine code for each architecture, which the same disassembler reads and the same code counts
(``reader.py`` says how). Weights per thread and iteration are read from their sources, see `PEERS`.

Their dequantization of double quantized weights is two more launches, which are not in the count; ours is one.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .budgets import TARGET, exceeded, unsound
from .compile import (
    TARGETS,
    Compiled,
    NoKernelError,
    OfflineError,
    compile_cases,
    compile_cuda,
    cuda_cases,
    kernel_modules,
    occupied,
    run_tool,
    select,
    triton_version,
)
from .reader import OTHER, Counts, Instruction, count, sections

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
    "BSSY": "names where threads that part meet again",
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


Found = list[tuple[Compiled, Counts]]


class PeerError(Exception):
    """bitsandbytes' kernels cannot be counted; the message says why."""


def sass(target: str, kernel: str | None, json_file: Path | None, explain: str | None) -> bool:
    """Compile, count, print the table or a loop, write the JSON.

    Args:
        target: one of `TARGETS`.
        kernel: shows only this one, or those whose names begin with these words; None: all.
        json_file: to write, or None.
        explain: a kernel whose main loop is printed instead of the table, the first if several names begin so; or None.

    Returns:
        whether every budget is kept.

    Raises:
        OfflineError: no such target or kernel; triton or its tools are missing; a kernel does not compile; the file
            cannot be written.
    """
    if target not in TARGETS:
        raise OfflineError(f"--target is one of {', '.join(TARGETS)}, not {target}")
    console = Console()
    with Console(stderr=True).status("compiling"):
        found, missing = _compile(target, explain or kernel)
    report = make_report(target, found, missing)
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise OfflineError(f"{json_file} cannot be written: {error.strerror}") from error
    if explain is None:
        show(report, console)
    else:
        lines = explained(*found[0])
        if others := [compiled.name for compiled, _ in found[1:]]:
            lines.append(f"also: {'; '.join(others)}")
        _say(console, *lines)
    return not report["fails"]


def _compile(target: str, only: str | None) -> tuple[Found, str | None]:
    """Our kernels and bitsandbytes', and why the latter are missing."""
    theirs, missing = [], None
    is_theirs = only is not None and only.startswith(THEIRS)
    if only is None or is_theirs:
        try:
            theirs = peers(target)
        except PeerError as error:
            missing = str(error)
    if is_theirs:
        if missing:
            raise OfflineError(missing)
        chosen = select([compiled.name for compiled, _ in theirs], only)
        return [pair for pair in theirs if pair[0].name in chosen], None
    cuda = {case.name: case for case in cuda_cases()}
    ours, chosen = list[Compiled](), list[str]()
    with suppress(NoKernelError):  # of ours in Triton, then
        chosen = select(list(cuda), only)
    if only is None or not chosen:
        try:
            ours = compile_cases([target], kernel_modules(), only)
        except NoKernelError as error:
            raise OfflineError(", ".join([str(error), *cuda])) from error
    ours += [compile_cuda(cuda[name], target) for name in chosen]
    return [*map(_counted, ours), *theirs], missing


def _counted(one: Compiled) -> tuple[Compiled, Counts]:
    return one, count(one.sass, one.weights_per_thread)


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
            if cubin := _extract(library, target, Path(temporary)):
                return _peers_in(cubin, target, f"{version}, {library.name}")
    raise PeerError(
        f"bitsandbytes {version} has no code for {target} in {' or '.join(LIBRARIES)}, and is not in the table"
    )


def _extract(library: Path, target: str, folder: Path) -> Path | None:
    if library.is_file():
        with suppress(OfflineError):  # this disassembler is older than the library, or there is nothing for the target
            run_tool("cuobjdump", "-xelf", f".{target}.cubin", library, folder=folder)
            return min(folder.glob(f"*.{target}.cubin"), default=None)
    return None


def _peers_in(cubin: Path, target: str, version: str) -> Found:
    kernels = sections(run_tool("nvdisasm", "-c", cubin))
    found = []
    for name, pattern, weights in PEERS:
        symbol = next((one for one in kernels if re.match(pattern, one)), None)
        usage = symbol and occupied(cubin, symbol)
        if not symbol or not usage:
            raise PeerError(f"bitsandbytes {version}: no kernel {name}, so it is not in the table")
        compiled = Compiled(f"{THEIRS} {name}", target, version, weights, *usage, kernels[symbol])
        found.append((compiled, count(compiled.sass, weights)))
    return found


def make_report(target: str, found: Found, missing: str | None) -> dict[str, Any]:
    """What was compiled and counted, with verdicts, as it is written to JSON.

    Returns:
        target; versions; missing, why bitsandbytes is not in it, or None; fails, whether a budget is exceeded; rows, a
        kernel each: kernel; library; instructions in the main loop, in all where is_loop is false; weights_per_thread
        in them; per_weight, and the same by class in classes; registers and bytes spilled, per thread; bytes of shared
        memory, per program; loaded, bytes per weight; widest_load, bits; budget, instructions per weight, or None;
        verdict, and each limit that is exceeded in reasons.
    """
    theirs = [compiled for compiled, _ in found if compiled.name.startswith(THEIRS)]
    versions = {"triton": triton_version(), **({THEIRS: theirs[0].triton} if theirs else {})}
    rows = [_row(*pair) for pair in found]
    fails = any(row["verdict"] == EXCEEDED for row in rows)
    return {"target": target, "versions": versions, "rows": rows, "missing": missing, "fails": fails}


def _row(compiled: Compiled, counts: Counts) -> dict[str, Any]:
    limits, reasons, verdict = None, [], NONE
    is_theirs = compiled.name.startswith(THEIRS)
    if not is_theirs:
        limits = compiled.budget if compiled.target == TARGET else None
        reasons = exceeded(limits, compiled, counts) if limits else unsound(compiled, counts)
        verdict = EXCEEDED if reasons else KEPT if limits else SOUND
    return {
        "kernel": compiled.name.removeprefix(f"{THEIRS} "),
        "library": THEIRS if is_theirs else "qloralab",
        "instructions": len(counts.loop),
        "is_loop": counts.is_loop,
        "weights_per_thread": counts.weights,
        "per_weight": round(counts.per_weight, 3),
        "classes": {name: round(value, 3) for name, value in counts.classes.items()},
        "registers": compiled.registers,
        "spilled": compiled.spilled,
        "shared": compiled.shared,
        "loaded": round(counts.loaded(), 3),
        "widest_load": counts.widest_load,
        "budget": limits.instructions if limits else None,
        "verdict": verdict,
        "reasons": reasons,
    }


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print the table, what exceeds a budget, and how it was counted."""
    width = max(80, min(console.width, 130)) if console.is_terminal else 130
    console.width = max(console.width, width)
    console.print(table(report, width))
    _say(console, *(f"{row['kernel']}: {reason}" for row in report["rows"] for reason in row["reasons"]))
    _say(console, *filter(None, [report["missing"]]))
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    _say(
        console,
        "Instructions in the main loop, per weight that a thread handles in an iteration; * no loop: in the kernel.",
        f"{report['target']}, counted in the machine code, not measured on a GPU; {versions}",
    )


def table(report: Mapping[str, Any], width: int) -> Table:
    """The report as a table of so many columns of text; below 120 the classes are left out."""
    occurring = {kind for row in report["rows"] for kind in row["classes"]}
    columns = [name for name, kinds in COLUMNS.items() if width >= 120 and occurring.intersection(kinds)]
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)  # the box itself leaves a space between columns
    view.add_column("kernel", no_wrap=True)
    for heading in ("per weight", *columns, "regs", "spill", "shared memory", "load", "budget"):
        view.add_column(heading.replace(" ", "\n"), justify="right")
    view.add_column("verdict", no_wrap=True)
    before = "qloralab"
    for row in report["rows"]:
        if row["library"] != before:
            view.add_section()
            view.add_row(f"{row['library']} {report['versions'][row['library']]}".partition(",")[0])
        before = row["library"]
        parts = [sum(row["classes"].get(kind, 0) for kind in COLUMNS[name]) for name in columns]
        view.add_row(
            row["kernel"],
            f"{row['per_weight']:.2f}{'' if row['is_loop'] else '*'}",
            *(f"{part:.2f}" if part else "" for part in parts),
            *(str(row[name]) for name in ("registers", "spilled", "shared")),
            f"{row['widest_load'] // 8} B",
            "" if row["budget"] is None else f"{row['budget']:g}",
            f"[bold red]{row['verdict']}[/]" if row["verdict"] == EXCEEDED else row["verdict"],
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
