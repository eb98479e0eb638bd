"""What this machine's processors can do, and so in which dtype a layer multiplies.

The paper multiplies in bfloat16, because its GPUs do so in hardware. A processor that does not emulates it: a product
of PyTorch's then takes 10 to 70 times as long as the same one in float32. So the compute dtype follows the device:

=====================================================  ==========
NVIDIA GPUs from sm_80 on                              bfloat16
CPUs with AVX512-BF16, AMX-BF16 or Arm's BF16          bfloat16
CPUs without them, older GPUs                          float32
=====================================================  ==========

The class of a CPU can be lowered below what it has, to test and to measure the slower classes on any machine::

    QLORALAB_ISA=avx512|avx2|portable                    this library's C; the compute dtype follows
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2     PyTorch's own operators; the compute dtype follows too
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import NamedTuple

import torch

VARIABLE = "QLORALAB_ISA"
# The features of x86-64-v3 and -v4 by their names in /proc/cpuinfo (System V ABI, table 3.1); abm is lzcnt.
AVX2 = frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"])
AVX512 = AVX2 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
# Of what multiplies bfloat16.
_BFLOAT16 = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16", "bf16": "Arm's BF16"}
# From the smallest; native is whatever the processor has.
ISAS = ("portable", "avx2", "avx512", "native")
# Settings with which PyTorch emulates bfloat16: values of ATEN_CPU_CAPABILITY, and prefixes that end before
# AVX512_CORE_BF16 in oneDNN's order.
_LOW_ATEN = ("default", "avx2")
_LOW_ONEDNN = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


class ComputeDtype(NamedTuple):
    """The dtype in which a device multiplies in hardware, and why it is that one."""

    dtype: torch.dtype
    why: str  # a phrase for a person: "the processor has AVX512-BF16"


@functools.cache
def cpu_features() -> str:
    """The features of the first processor, as Linux lists them in /proc/cpuinfo; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(("flags", "Features"))), "")


def supported_isas() -> tuple[str, ...]:
    """The instruction sets that this machine can run, by name; the first, native, is the one to use."""
    features = set(cpu_features().split())
    have = {"avx512": features >= AVX512, "avx2": features >= AVX2}
    return tuple(isa for isa in reversed(ISAS) if have.get(isa, True))


def distinct_isas() -> tuple[str, ...]:
    """`supported_isas` without the one whose code is native's too: what a test has to run."""
    names = supported_isas()
    widest = names[1] if len(names) > 2 else None
    own = "avx512_bf16" in cpu_features().split()  # native has more than avx512
    return tuple(name for name in names if name != widest or own)


def isa() -> str:
    """The instruction set that the C is compiled for: native, or the lower one that QLORALAB_ISA asks for.

    Raises:
        ValueError: QLORALAB_ISA is none of native, avx512, avx2 and portable, or this machine lacks it.
    """
    asked = os.environ.get(VARIABLE) or "native"
    if asked not in ISAS:
        raise ValueError(f"{VARIABLE} is one of {', '.join(reversed(ISAS))}, not {asked!r}")
    if asked not in supported_isas():
        raise ValueError(f"{VARIABLE} asks for {asked}; this machine runs {', '.join(supported_isas())}")
    return asked


def compute_dtype(device: torch.device | str = "cpu") -> ComputeDtype:
    """The dtype in which a device multiplies in hardware: bfloat16 where it can, as in the paper, otherwise float32.

    On "meta", where nothing is multiplied, it is the paper's bfloat16. Raises ValueError as ``isa`` does.
    """
    device = torch.device(device)
    if device.type == "meta":
        return ComputeDtype(torch.bfloat16, "there is no device yet")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        can = "multiplies" if major >= 8 else "does not multiply"
        dtype = torch.bfloat16 if major >= 8 else torch.float32
        return ComputeDtype(dtype, f"a GPU of sm_{major}{minor} {can} bfloat16 in hardware")
    if device.type != "cpu":
        return ComputeDtype(torch.float32, f"whether {device.type} multiplies bfloat16 in hardware is not known")
    return _of_the_cpu(isa(), _lowered(), cpu_features(), platform.machine())


def emulates(x: torch.Tensor) -> bool:
    """Whether a product of PyTorch's in the dtype of x, on its device, is emulated: 16 bits on a CPU without bfloat16
    products. float16 always is one of these on a CPU: few have such products. Not while torch.compile traces."""
    if x.dtype not in (torch.bfloat16, torch.float16) or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return x.dtype == torch.float16 or compute_dtype("cpu").dtype == torch.float32


def processor_class() -> str:
    """The class of the CPU, lowered as asked for, that a measured figure is filed under: amx-bf16, avx512-bf16, avx512,
    avx2 or portable on x86-64; elsewhere the architecture, with bf16 after it where that is multiplied."""
    features, chosen = set(cpu_features().split()), isa()
    multiplies = compute_dtype("cpu").dtype == torch.bfloat16
    if platform.machine() != "x86_64":
        return "portable" if chosen == "portable" else f"{platform.machine()}{'-bf16' if multiplies else ''}"
    if multiplies:
        return "amx-bf16" if "amx_bf16" in features else "avx512-bf16"
    widest = next(name for name in supported_isas() if name != "native") if chosen == "native" else chosen
    lowered = (_lowered() or "").upper()
    return "avx2" if widest == "avx512" and lowered and "AVX512" not in lowered else widest


@functools.cache
def _of_the_cpu(chosen: str, lowered: str | None, features: str, architecture: str) -> ComputeDtype:
    if chosen != "native":
        return ComputeDtype(torch.float32, f"{VARIABLE}={chosen} has no bfloat16 product")
    has = next((name for feature, name in _BFLOAT16.items() if feature in features.split()), None)
    if has is None:
        wanted = "Arm's BF16" if architecture == "aarch64" else "AVX512-BF16"
        return ComputeDtype(torch.float32, f"the processor has no {wanted}; bfloat16 products would be emulated")
    if lowered:
        return ComputeDtype(torch.float32, f"{lowered} makes PyTorch emulate bfloat16 products")
    return ComputeDtype(torch.bfloat16, f"the processor has {has}")


def _lowered() -> str | None:
    """The setting that keeps PyTorch from the processor's bfloat16 products, as name=value, or None."""
    if (value := os.environ.get("ATEN_CPU_CAPABILITY", "")).lower() in _LOW_ATEN:
        return f"ATEN_CPU_CAPABILITY={value}"
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        if (value := os.environ.get(name, "")).upper() in _LOW_ONEDNN:
            return f"{name}={value}"
    return None
