"""Every kernel keeps its budget on sm_90, and compiles without spilled registers for the other targets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from qloralab.benchmarks.sass.budgets import TARGET, exceeded, unsound
from qloralab.benchmarks.sass.compile import (
    KERNEL_FILES,
    TARGETS,
    Compiled,
    compile_cases,
    compile_cuda,
    cuda_cases,
)
from qloralab.benchmarks.sass.reader import Counts, Instruction, count, parse
from qloralab.kernels.gpu import case, few_tokens, nvrtc
from qloralab.kernels.gpu.case import PACKED, Budget

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which has wheels for Linux")
OTHERS = [target for target in TARGETS if target != TARGET]
SHARED = {"sm_80": 163 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}  # bytes of shared memory, of a program


@needs_triton
@pytest.mark.slow
def test_every_kernel_has_a_budget_and_keeps_it():
    for one in compile_cases([TARGET]):
        assert one.budget is not None, one.name
        assert exceeded(one.budget, one, count(one.sass, one.weights_per_thread)) == [], one.name


@needs_triton
@pytest.mark.slow
def test_every_kernel_compiles_for_the_other_targets():
    found = compile_cases(OTHERS, disassemble=False)  # what uses local memory has a stack, which is seen without
    names = {target: {one.name for one in found if one.target == target} for target in OTHERS}
    assert all(any(name.startswith(file) for name in some) for some in names.values() for file in KERNEL_FILES)
    assert [(one.name, one.target, one.spilled) for one in found if one.spilled] == []
    large = [(one.name, one.target, one.shared) for one in found if one.shared > SHARED[one.target]]
    assert [(name, target) for name, target, _ in large] == [
        ("grad_B 512 columns, rank 32", "sm_120")
    ]  # not taken there


needs_nvrtc = pytest.mark.skipif(bool(nvrtc.why_not()), reason=f"needs NVRTC: {nvrtc.why_not()}")


@needs_triton
@needs_nvrtc
@pytest.mark.parametrize("case", cuda_cases(), ids=lambda case: case.name)
@pytest.mark.parametrize("target", TARGETS)
def test_cuda(case, target):
    """A CTA fits; weights are asked for before the grid before is waited for, and nothing else is read or written."""
    one = compile_cuda(case, target)
    counts = count(one.sass, one.weights_per_thread)
    assert (exceeded(case.budget, one, counts) if target == TARGET else unsound(one, counts)) == []
    assert one.registers * few_tokens.THREADS <= 65536
    assert one.shared <= few_tokens.SHARED
    assert counts.opcodes["SHFL"] == 8  # of scales, not of weights
    opcodes = [instruction.opcode for instruction in parse(one.sass)]
    if target == "sm_80":
        assert "ACQBULK" not in opcodes
        return
    waits, lets = opcodes.index("ACQBULK"), opcodes.index("PREEXIT")
    before = [opcode for opcode in opcodes[:waits] if opcode.startswith(("LDG", "STG"))]
    assert sum(".128" in opcode for opcode in before) == 8
    assert all("CONSTANT" in opcode for opcode in before if ".128" in opcode)
    assert not [opcode for opcode in before if opcode.startswith("STG")]
    assert waits < lets


SHUFFLES = """
import json, re
import triton
from qloralab.benchmarks.sass import compile as offline
from qloralab.kernels.gpu import linear, linear_grad_input

def keep(*arguments, **options):
    compiled = compile_(*arguments, **options)
    ttgir.append(compiled.asm["ttgir"])
    return compiled

ttgir = []
compile_, triton.compile = triton.compile, keep
for module in (linear, linear_grad_input):
    for target in offline.TARGETS:
        for case in offline.cases_of(module.__name__, target):
            offline.compile_case(case, target, disassemble=False)
            used = re.findall(r"tt.elementwise_inline_asm .shfl.*? : tensor<(\\d+)xi32, (#\\w+)> ->", ttgir[-1])
            layouts = dict(re.findall(r"^(#\\w+) = #ttg\\.(.*)$", ttgir[-1], re.M))
            print(json.dumps([case.name, target, case.num_warps, [(int(size), layouts[name]) for size, name in used]]))
"""


@needs_triton
@pytest.mark.slow
def test_what_is_shuffled_has_an_element_in_each_thread_in_order():
    """What ``canonical.of_four_lanes`` and ``of_eight_lanes`` ask of the compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SHUFFLES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {target for _, target, _, _ in found} == set(TARGETS)
    for name, target, warps, used in found:
        assert used, (name, target)
        layout = f"blocked<{{sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [{warps}], order = [0]}}>"
        assert all(pair == [32 * warps, layout] for pair in used), (name, target, used)


def test_every_file_with_cases_is_listed():
    files = Path(case.__file__).parent.glob("*.py")
    assert {path.stem for path in files if "\nCASES" in path.read_text()} == set(KERNEL_FILES)


LIMITS = Budget(3, registers=64, loaded=PACKED, width=128, staged=0.5, needs=("HGMMA",), forbids=("SHFL",))
OPCODES = ["LDG.E.128", "PRMT", "HGMMA.64x16x16.F32.BF16", "BRA"]


def kernel(opcodes: list[str] = OPCODES, weights: float = 32, local: int = 0, **changes) -> tuple[Compiled, Counts]:
    """A kernel whose loop has these opcodes, and what is counted in it."""
    loop = [Instruction(16 * n, opcode, "", None, ()) for n, opcode in enumerate(opcodes)]
    one = Compiled("kernel", TARGET, "3.6.0", weights, registers=64, spilled=0, shared=0, sass="")
    return replace(one, **changes), Counts(loop, True, weights, local)


def test_within_the_limits():
    assert exceeded(LIMITS, *kernel()) == []
    assert exceeded(replace(LIMITS, instructions=4 / 32), *kernel()) == []


@pytest.mark.parametrize(
    ("limits", "one", "reason"),
    [
        (replace(LIMITS, instructions=0.12), kernel(), "0.12 instructions per weight, more than 0.12"),
        (LIMITS, kernel(registers=65), "65 registers, more than 64"),
        (LIMITS, kernel(weights=33), "loads 0.485 bytes per weight, 16 at a time or more; they are 0.5"),
        (
            LIMITS,
            kernel(["LDG.E.64", *OPCODES[2:], "LDG.E.64"]),
            "loads 0 bytes per weight, 16 at a time or more; they are 0.5",
        ),
        (LIMITS, kernel(["LDG.E.128", "HMMA.16816.F32.BF16"]), "no HGMMA in the loop"),
        (LIMITS, kernel([*OPCODES, "SHFL.IDX", "SHFL.BFLY"]), "2 SHFL in the loop"),
        (
            LIMITS,
            kernel([*OPCODES, "STS.128", "STS"]),
            "stages 0.625 bytes per weight in shared memory, more than 0.5",
        ),
        (LIMITS, kernel(spilled=8), "8 bytes of stack per thread"),
        (LIMITS, kernel(local=3), "3 accesses to local memory"),
    ],
    ids=["instructions", "registers", "loaded", "width", "needs", "forbids", "staged", "spilled", "local"],
)
def test_each_limit_is_held(limits, one, reason):
    assert exceeded(limits, *one) == [reason]
