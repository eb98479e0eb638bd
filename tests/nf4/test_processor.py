"""Which processor multiplies what, for processors of every kind: a few lines of /proc/cpuinfo stand for each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qloralab.nf4 import processor
from qloralab.nf4.processor import (
    ComputeDtype,
    compute_dtype,
    distinct_isas,
    emulates,
    isa,
    processor_class,
    supported_isas,
)

BF16, F32 = torch.bfloat16, torch.float32
_SSE = "fpu sse sse2 ssse3 sse4_1 sse4_2 popcnt cx16"
_AVX2 = f"{_SSE} avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
_AVX512 = f"{_AVX2} avx512f avx512bw avx512cd avx512dq avx512vl"
# The architecture, the features: as Linux lists them, shortened.
MACHINES = {
    "old": ("x86_64", _SSE),
    "haswell": ("x86_64", _AVX2),
    "zen3": ("x86_64", f"{_AVX2} vaes sha_ni"),
    "skylake": ("x86_64", _AVX512),
    "zen4": ("x86_64", f"{_AVX512} avx512_bf16"),
    "sapphire": ("x86_64", f"{_AVX512} avx512_bf16 amx_bf16 amx_tile"),
    "graviton2": ("aarch64", "fp asimd evtstrm crc32 asimdhp asimddp"),
    "graviton3": ("aarch64", "fp asimd evtstrm crc32 asimdhp asimddp sve bf16 i8mm"),
    "unknown": ("riscv64", ""),
}
EMULATED = "bfloat16 products would be emulated"
NATIVE = {  # the dtype, the class, the reason
    "old": (F32, "portable", f"the processor has no AVX512-BF16; {EMULATED}"),
    "haswell": (F32, "avx2", f"the processor has no AVX512-BF16; {EMULATED}"),
    "zen3": (F32, "avx2", f"the processor has no AVX512-BF16; {EMULATED}"),
    "skylake": (F32, "avx512", f"the processor has no AVX512-BF16; {EMULATED}"),
    "zen4": (BF16, "avx512-bf16", "the processor has AVX512-BF16"),
    "sapphire": (BF16, "amx-bf16", "the processor has AVX512-BF16"),
    "graviton2": (F32, "aarch64", f"the processor has no Arm's BF16; {EMULATED}"),
    "graviton3": (BF16, "aarch64-bf16", "the processor has Arm's BF16"),
    "unknown": (F32, "riscv64", f"the processor has no AVX512-BF16; {EMULATED}"),
}
VARIABLES = ("QLORALAB_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


@pytest.fixture
def on(monkeypatch):
    """Makes this process believe that it runs on another machine: ``on("zen4", QLORALAB_ISA="avx2")``."""

    def become(machine: str, **variables: str) -> None:
        architecture, features = MACHINES[machine]
        monkeypatch.setattr(processor, "cpu_features", lambda: features)
        monkeypatch.setattr(processor.platform, "machine", lambda: architecture)
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return become


@pytest.mark.parametrize("machine", MACHINES)
def test_a_processor_multiplies_what_it_has_instructions_for(on, machine):
    on(machine)
    dtype, name, why = NATIVE[machine]
    assert compute_dtype() == compute_dtype("cpu") == compute_dtype(torch.device("cpu")) == ComputeDtype(dtype, why)
    assert processor_class() == name


@pytest.mark.parametrize(
    ("machine", "expected", "same_as_native"),
    [
        ("old", ("native", "portable"), None),
        ("haswell", ("native", "avx2", "portable"), "avx2"),
        ("skylake", ("native", "avx512", "avx2", "portable"), "avx512"),
        ("sapphire", ("native", "avx512", "avx2", "portable"), None),
        ("graviton3", ("native", "portable"), None),
        ("unknown", ("native", "portable"), None),
    ],
)
def test_the_instruction_sets_of_a_machine(on, machine, expected, same_as_native):
    on(machine)
    assert supported_isas() == expected
    assert distinct_isas() == tuple(name for name in expected if name != same_as_native)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("asked", ["", *processor.ISAS])
def test_an_instruction_set_is_honoured_or_refused(on, machine, asked):
    on(machine, QLORALAB_ISA=asked)
    if asked and asked not in supported_isas():
        for function in (isa, compute_dtype, processor_class):
            with pytest.raises(ValueError, match=f"^QLORALAB_ISA asks for {asked}; this machine runs native, "):
                function()
        return
    assert isa() == (asked or "native")
    if asked in ("", "native"):
        assert compute_dtype().dtype == NATIVE[machine][0]
        assert processor_class() == NATIVE[machine][1]
    else:
        assert compute_dtype() == (F32, f"QLORALAB_ISA={asked} has no bfloat16 product")
        assert processor_class() == asked


@pytest.mark.parametrize("asked", ["AVX2", "avx", "avx512-bf16", " "])
def test_an_instruction_set_that_is_none(on, asked):
    on("zen4", QLORALAB_ISA=asked)
    with pytest.raises(ValueError, match=f"^QLORALAB_ISA is one of native, avx512, avx2, portable, not '{asked}'$"):
        isa()


LOWERED = {  # what lowers PyTorch, and the class that the machine has then
    "ATEN_CPU_CAPABILITY=avx2": "avx2",
    "ATEN_CPU_CAPABILITY=AVX2": "avx2",
    "ATEN_CPU_CAPABILITY=default": "avx2",
    "ONEDNN_MAX_CPU_ISA=AVX2": "avx2",
    "ONEDNN_MAX_CPU_ISA=sse41": "avx2",
    "ONEDNN_MAX_CPU_ISA=AVX512_CORE": "avx512",
    "DNNL_MAX_CPU_ISA=AVX512_CORE_VNNI": "avx512",
}


@pytest.mark.parametrize("setting", LOWERED)
@pytest.mark.parametrize("machine", ["zen4", "sapphire"])
def test_a_lowered_pytorch_emulates(on, machine, setting):
    name, _, value = setting.partition("=")
    on(machine, **{name: value})
    assert compute_dtype() == (F32, f"{setting} makes PyTorch emulate bfloat16 products")
    assert processor_class() == LOWERED[setting]


@pytest.mark.parametrize(
    "setting", ["ATEN_CPU_CAPABILITY=avx512", "ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16", "DNNL_MAX_CPU_ISA="]
)
def test_a_setting_that_lowers_nothing(on, setting):
    name, _, value = setting.partition("=")
    on("zen4", **{name: value})
    assert compute_dtype().dtype == BF16
    assert processor_class() == "avx512-bf16"


def test_the_two_together_are_the_class_below(on):
    on("sapphire", QLORALAB_ISA="avx2", ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2")
    assert (isa(), compute_dtype().dtype, processor_class()) == ("avx2", F32, "avx2")


@pytest.mark.parametrize(
    ("capability", "dtype", "can"),
    [
        ((7, 0), F32, "does not multiply"),
        ((7, 5), F32, "does not multiply"),
        ((8, 0), BF16, "multiplies"),
        ((9, 0), BF16, "multiplies"),
        ((12, 0), BF16, "multiplies"),
    ],
)
def test_a_gpu_multiplies_bfloat16_from_sm_80_on(on, monkeypatch, capability, dtype, can):
    on("haswell", QLORALAB_ISA="avx513")  # a GPU does not mind
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    name = "".join(map(str, capability))
    assert compute_dtype("cuda:1") == (dtype, f"a GPU of sm_{name} {can} bfloat16 in hardware")


def test_other_devices(on):
    on("haswell")
    assert compute_dtype("meta") == (BF16, "there is no device yet")
    assert compute_dtype("mps") == (F32, "whether mps multiplies bfloat16 in hardware is not known")


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16, torch.float64], ids=str)
def test_products_that_pytorch_emulates(on, machine, dtype):
    on(machine)
    expected = dtype == torch.float16 or (dtype == BF16 and NATIVE[machine][0] == F32)
    assert emulates(torch.empty(2, dtype=dtype)) == expected
    assert not emulates(torch.empty(2, dtype=dtype, device="meta"))


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux: /proc/cpuinfo")
def test_the_features_are_those_of_this_machine():
    """PyTorch finds them out by asking the processor."""
    features = processor.cpu_features().split()
    assert len(features) > 3
    code = "import torch; print(torch.cpu._is_avx2_supported(), torch.cpu._is_avx512_bf16_supported())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str("avx2" in features), str("avx512_bf16" in features)]


def test_no_cpuinfo_is_no_features(monkeypatch):
    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert processor.cpu_features.__wrapped__() == ""
