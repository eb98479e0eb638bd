"""The dtype of a run is that of its device, or the one asked for; what cannot be had is refused in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from qloralab import compute
from qloralab.compute import Precision, check_environment, precision, prepare_kernels, prepare_memory
from qloralab.kernels import dispatch
from qloralab.kernels.cpu.build import BuildError
from qloralab.nf4 import processor

CPU = torch.device("cpu")


def test_auto_is_what_the_machine_multiplies(machine):
    found = precision("auto", CPU)
    assert found == Precision(machine, "the processor is made up", slow=False)
    assert found.name == str(machine).removeprefix("torch.")


@pytest.mark.parametrize("asked", ["bfloat16", "float32"])
def test_what_is_asked_for_is_honoured_and_said_to_be_slow_where_it_is(machine, asked):
    found = precision(asked, CPU)
    assert (found.name, found.dtype) == (asked, getattr(torch, asked))
    assert found.slow == ((asked, machine) == ("bfloat16", torch.float32))
    assert found.why == f"asked for{', but slow' if found.slow else ''}; the processor is made up"


def test_one_line_says_the_dtype_and_why():
    """Full fine-tuning has weights of its own."""
    found = [Precision(torch.float32, "it is so", False).described(method) for method in ("qlora", "lora", None)]
    assert found == ["float32: it is so"] * 3
    two = [Precision(dtype, "it is so", False).described("full") for dtype in (torch.bfloat16, torch.float32)]
    assert two == [
        "float32 weights, bfloat16 products (autocast): it is so", "float32, weights and products: it is so"
    ]  # fmt: skip


LOWERED = [
    {"QLORALAB_ISA": "portable"},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "QLORALAB_ISA": "portable"},
]


@pytest.mark.parametrize("lowered", LOWERED, ids=" ".join)
def test_it_follows_a_processor_that_was_lowered(lowered):
    """In a process of its own: torch reads these variables when it is loaded."""
    code = (
        "import json, torch; from qloralab.compute import precision\n"
        "from qloralab.train.run_directory import versions\n"
        "found = precision('auto', torch.device('cpu'))\n"
        "print(json.dumps([found.name, found.why, versions()['processor']]))"
    )
    hidden = ("QLORALAB_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment, **lowered}, capture_output=True, text=True, check=True
    )
    name, why, where = json.loads(done.stdout)
    assert name == "float32"
    assert re.search("has no|emulate|is not known", why)
    assert "bf16" not in where
    assert where == "portable" or "QLORALAB_ISA" not in lowered


@pytest.mark.parametrize("asked", ["auto", "bfloat16", "float32"])
def test_an_instruction_set_that_is_none_is_refused(refusal, monkeypatch, asked):
    monkeypatch.setenv(processor.VARIABLE, "sse9")
    expected = "QLORALAB_ISA is one of native, avx512, avx2, portable, not 'sse9'"
    assert refusal(precision, asked, CPU) == refusal(check_environment) == expected
    assert refusal(precision, asked, torch.device("meta")) == expected, "the C also updates weights on a GPU's machine"


@pytest.mark.parametrize("error", ["no C compiler", "cc failed (status 1):\nx.c:1: error: it is wrong\n$ cc x.c"])
def test_kernels_that_cannot_be_had_are_one_line(refusal, monkeypatch, silent, error):
    def fail():
        raise BuildError(error)

    monkeypatch.setattr(dispatch, "native", fail)
    reason = " ".join(error.splitlines()[:2])
    assert refusal(prepare_kernels, silent) == f"QLORALAB_CPU=native, but there are no CPU kernels: {reason}"


def test_kernels_are_opened_under_a_word_of_it(monkeypatch, watched):
    calls, (display, printed) = [], watched(0.0)
    monkeypatch.setattr(dispatch, "native", lambda: calls.append(1))
    prepare_kernels(display)
    assert printed().strip() == "…  preparing the CPU kernels"
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("mode", "device", "installs"), [("auto", "cpu", 1), ("reference", "cpu", 0), ("auto", "cuda", 0)]
)
def test_memory_is_prepared_where_c_runs_on_a_cpu(monkeypatch, silent, mode, device, installs):
    calls = []
    monkeypatch.setattr(compute.allocator, "install", lambda: calls.append(1))
    monkeypatch.setattr(compute, "run_device", lambda: torch.device(device))
    with dispatch.use(mode):
        prepare_memory(silent)
    assert len(calls) == installs


def test_memory_without_a_cpp_compiler_is_a_note(monkeypatch, watched):
    def fail():
        raise BuildError("no C++ compiler")

    display, printed = watched()
    monkeypatch.setattr(compute.allocator, "install", fail)
    monkeypatch.setattr(compute, "run_device", lambda: CPU)
    with dispatch.use("auto"):
        prepare_memory(display)
    said = " ".join(printed().split())
    assert said == "note training takes up to a quarter more memory without a C++ compiler (g++)"
