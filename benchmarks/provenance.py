"""Where a record comes from: the processor, the versions, the commit. Every benchmark writes these into its records."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qloralab.run_directory import versions

ROOT = Path(__file__).parent.parent
RECORDS = Path(__file__).parent / "records"


def provenance() -> dict[str, Any]:
    """The fields that every record carries: device, threads, versions, commit."""
    return {
        "device": device(),
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
        "commit": commit(),
    }


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
