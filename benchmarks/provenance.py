"""Where a record comes from: the processor, its class, the versions, the commit. Every benchmark writes these into its
records.

A figure belongs to a class of processors (``nf4/processor.py``): avx2, avx512-bf16. Where it depends on the class, the
name of the record's file ends in it, so that each class keeps its own. Variables lower the class, to measure what
slower processors do; a record names those that were set::

    QLORALAB_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python -m benchmarks.cpu

They do not reach MKL, which multiplies float32 for PyTorch: ``lower_mkl`` does. Nor do they reach bitsandbytes' own C.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qloralab.nf4.processor import processor_class
from qloralab.train.run_directory import versions

ROOT = Path(__file__).parent.parent
RECORDS = Path(__file__).parent / "records"
TRIALS = ROOT / "runs" / "benchmarks"
LOWERING = ("QLORALAB_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
_MKL = {"avx2": "AVX2", "portable": "SSE4_2"}  # what it calls the classes below AVX512


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a benchmark, and where its records go: ``out``.

    That is ``RECORDS``, which is committed, only where everything is measured as it always is. With another option it
    is ``TRIALS``, so that a trial overwrites no record. ``--out`` has the last word.
    """
    parser.add_argument(
        "--out", type=Path, help="folder of the records; by default benchmarks/records, of a trial runs/benchmarks"
    )
    args = parser.parse_args(arguments)
    if args.out is None:
        measured = vars(args).keys() - {"out", "view", "save"}
        args.out = TRIALS if any(getattr(args, name) != parser.get_default(name) for name in measured) else RECORDS
    return args


def provenance() -> dict[str, Any]:
    """The fields that every record carries: device, class, what torch uses of it, threads, versions, commit."""
    return {
        "device": device(),
        "class": processor_class(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "mkl": torch.backends.mkl.is_available(),
        "lowered": lowered(),
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
        "commit": commit(),
    }


def lowered() -> dict[str, str]:
    """The variables that may have lowered the class, and what they are set to."""
    return {name: value for name in LOWERING if (value := os.environ.get(name))}


def lower_mkl() -> None:
    """Hold MKL to the class that variables ask for, where it is not told otherwise; before its first product.

    Raises:
        SystemExit: only the C of this library was lowered. Beside a PyTorch that uses more it is of no class.
    """
    asked, capability = lowered(), torch.backends.cpu.get_cpu_capability()
    if asked and (name := _MKL.get(processor_class())):
        if capability == "AVX512":
            raise SystemExit(
                f"{asked} leaves PyTorch at {capability}: set ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA too"
            )
        os.environ.setdefault("MKL_ENABLE_INSTRUCTIONS", name)


def record_file(folder: Path, name: str) -> Path:
    """Where the record of a name goes on this machine: its class is in the name of the file."""
    return folder / f"{name}-{processor_class()}.json"


def record_files(folder: Path, name: str, asked: str = "all") -> list[Path]:
    """The records of a name that there are: of one class, or of all, in the order of their names.

    Raises:
        SystemExit: there are none.
    """
    files = sorted(folder.glob(f"{name}-{'*' if asked == 'all' else asked}.json"))
    if not files:
        raise SystemExit(f"{folder} has no {name}-{asked}.json" if asked != "all" else f"{folder} has no {name}-*.json")
    return files


def library_versions() -> dict[str, str]:
    """The versions of this library, of its peers, and of what is under them."""
    return {**versions(), "bitsandbytes": version("bitsandbytes"), "peft": version("peft")}


def device() -> str:
    """The processor's name and the number of threads."""
    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {torch.get_num_threads()} threads"


def commit() -> str:
    """The commit of the checkout, "+" behind it when files differ from it; "unknown" without git."""
    command = ["git", "describe", "--always", "--dirty=+"]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return result.stdout.strip() or "unknown"
