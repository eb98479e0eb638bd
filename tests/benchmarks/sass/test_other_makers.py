"""The kernels without PTX compile for a GPU of AMD's too; which is never taken for one of NVIDIA's (``choice.py``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from qloralab.benchmarks.sass.compile import KERNEL_FILES

FUSED = {"linear", "linear_grad_input"}  # their look-up is in PTX
LOCAL = 64 << 10  # bytes of local memory that a workgroup may have on gfx942

CODE = """
import importlib, json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
for name in sys.argv[1:]:
    case = importlib.import_module(f"qloralab.kernels.gpu.{name}").CASES[-1]
    names = list(case.kernel.arg_names)
    signature = {one: case.signature.get(one, "constexpr") for one in names}
    constants = {(names.index(one),): value for one, value in case.constexprs.items()}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("hip", "gfx942", 64), options={"num_warps": case.num_warps})
    spills = re.findall("(?:vgpr_spill_count|private_segment_fixed_size): *([0-9]+)", compiled.asm["amdgcn"])
    spilled = [int(number) for number in spills]
    print(json.dumps([name, compiled.metadata.shared, spilled]))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which has wheels for Linux")
@pytest.mark.slow
def test_a_kernel_of_each_file_compiles_for_gfx942_and_spills_no_vector_registers():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    files = [name for name in KERNEL_FILES if name not in FUSED]
    command = [sys.executable, "-c", CODE, *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {name: (shared, spilled) for name, shared, spilled in map(json.loads, done.stdout.splitlines())}
    assert list(found) == files
    for name, (shared, spilled) in found.items():
        assert shared <= LOCAL, name
        assert spilled, name
        assert not any(spilled), name
