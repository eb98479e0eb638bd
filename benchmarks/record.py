"""Records: where a figure comes from, in which file it is kept, and the options that every benchmark has.

A figure belongs to a class of processors (``nf4/processor.py``): avx2, avx512-bf16. Where it depends on the class, the
name of the record's file ends in it, so that each class keeps its own. Variables lower the class, to measure what
slower processors do; a record names those that were set::

    QLORALAB_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python -m benchmarks.cpu

They do not reach MKL, which multiplies float32 for PyTorch: ``lower_mkl`` does. Nor do they reach bitsandbytes' own C.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qloralab.nf4.processor import processor_class
from qloralab.train.run_directory import versions

ROOT = Path(__file__).parent.parent
RECORDS = Path(__file__).parent / "records"
TRIALS = ROOT / "runs" / "benchmarks"
PACKAGES = ("torch", "triton", "bitsandbytes", "unsloth", "transformers", "peft")
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


def existing(name: str) -> Path:
    """A file that is there, as the type of an option."""
    if not (path := Path(name)).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {name}")
    return path


def write(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the records as a JSON list, one a line; a process that is killed meanwhile leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
    new.replace(path)


def provenance() -> dict[str, Any]:
    """The fields that a record of a CPU carries: device, class, what torch uses of it, threads, versions, commit."""
    return {
        "device": device(),
        "class": processor_class(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "mkl": torch.backends.mkl.is_available(),
        "lowered": lowered(),
        "threads": torch.get_num_threads(),
        "versions": {**versions(), "bitsandbytes": version("bitsandbytes"), "peft": version("peft")},
        "commit": commit(),
    }


def gpu_provenance(benchmark: str, name: str) -> dict[str, Any]:
    """The fields that every record of a GPU carries: benchmark, device, versions of what is installed, commit."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    more = {"cuda": torch.version.cuda, "driver": driver()}
    found |= {part: number for part, number in more.items() if number}
    return {"benchmark": benchmark, "device": name, "versions": found, "commit": commit()}


def driver() -> str | None:
    """The version of the NVIDIA kernel module, as Linux has it."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", text)
    return found[1] if found else None


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


def gpu_record_file(folder: Path, name: str) -> Path:
    """Where the records of a device go: gpu-nvidia-h100-80gb-hbm3.json."""
    return folder / f"gpu-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def record_files(folder: Path, name: str, asked: str = "all") -> list[Path]:
    """The records of a name that there are: of one class, or of all, in the order of their names.

    Raises:
        SystemExit: there are none.
    """
    pattern = f"{name}-{'*' if asked == 'all' else asked}.json"
    if files := sorted(folder.glob(pattern)):
        return files
    raise SystemExit(f"{folder} has no {pattern}")


def device() -> str:
    """The processor's name and the number of threads."""
    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        found = re.search(r"^model name\s*:\s*(.*)$", info.read_text(), re.MULTILINE)
        name = found[1].strip() if found else name
    return f"{name}, {torch.get_num_threads()} threads"


def commit() -> str:
    """The commit of the checkout, "+" behind it when files differ from it; "unknown" without git."""
    command = ["git", "describe", "--always", "--dirty=+"]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return result.stdout.strip() or "unknown"
