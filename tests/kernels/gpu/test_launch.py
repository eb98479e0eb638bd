"""A launch past the compiler runs the kernel that the compiler would have chosen, whatever the arguments are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

# In a process of its own, where kernels are compiled; nothing is launched.
CODE = """
import itertools, json
import torch, triton
import triton.language as tl
from qloralab.benchmarks import no_device
from qloralab.kernels.gpu import launch as module
from triton import knobs

@triton.jit(do_not_specialize=["size"])
def kernel(x, maybe, number, size, factor, LARGE: tl.constexpr, WIDE: tl.constexpr):
    i = tl.arange(0, 16)
    value = tl.load(x + i * number, mask=i < size, other=0.0) * factor
    if maybe is not None:
        value += tl.load(maybe + i)
    tl.store(x + i, value)

def at(offset, dtype):
    memory = torch.zeros(256, dtype=dtype)
    start = -memory.data_ptr() % 64 // memory.element_size() + offset
    return memory[start:start + 64]

choices = {
    "x": [at(0, torch.float32), at(1, torch.float32), at(0, torch.bfloat16), at(4, torch.float32)],
    "maybe": [None, at(0, torch.float32)],
    "number": [1, 16, 17, 2**31 + 16],
    "size": [1, 16, 2**31],
    "factor": [0.5],
    "LARGE": [True, False],
    "WIDE": [8],
}
with no_device.pretend():
    wrong, kernels = [], set()
    combinations = list(itertools.product(*choices.values()))
    for turn in range(2):  # the second time each is known
        known = len(module._compiled)
        for values in combinations:
            named = dict(zip(choices, values))
            positional = [named.pop(name) for name in ("x", "maybe")]
            ran = []
            right = kernel[(1, 1, 1)](*values, num_warps=4, num_stages=3)
            run, right._run = right.run, lambda *a: ran.append(a)
            module.launch(kernel, (1,), *positional, **named)
            right._run = run
            launched = ran and list(ran[0][9:]) == list(values) and ran[0][:3] == (1, 1, 1)
            if not launched:
                wrong.append([turn, str(values)])
            kernels.add(right.hash)
        if turn == 1 and len(module._compiled) != known:
            wrong.append("known ones were compiled again")
    seen = []
    knobs.runtime.launch_enter_hook.add(seen.append)
    before = dict(module._compiled)
    module._compiled.clear()
    module.launch(kernel, (1,), *combinations[0][:2], **dict(list(zip(choices, combinations[0]))[2:]))
    found = {"wrong": wrong[:5], "kernels": len(kernels), "asked": len(combinations), "hooked": len(module._compiled)}
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("launch") / "kernels.py"  # Triton reads the text of a kernel
    file.write_text(CODE)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(file)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_kernel_is_the_compilers(found):
    assert found["wrong"] == []
    assert 10 < found["kernels"] < found["asked"]


class Compiled:
    """What Triton has of a kernel."""

    name, function = "kernel", 5

    def __init__(self, parameters: str = ".u64 .ptr .global, .u32, .f32, .u64, .u64", **metadata: Any):
        signature = {"x": "*bf16", "one": "constexpr", "n": "i32", "factor": "fp32"}
        declared = ", ".join(f".param {kind} kernel_param_{i}" for i, kind in enumerate(parameters.split(", ")))
        usual = {"num_ctas": 1, "num_warps": 4, "shared": 1024, "global_scratch_size": 0, "launch_pdl": False}
        self.src = SimpleNamespace(signature=signature)
        self.asm = {"ptx": f".visible .entry other(.param .u64 a)\n.visible .entry kernel(\n{declared}\n)"}
        self.metadata = SimpleNamespace(**usual | metadata, target=SimpleNamespace(warp_size=32))


def test_a_launch_is_described_as_its_ptx_declares_it():
    from qloralab.kernels.gpu.launch import _described

    arguments = (("*bf16", "x"), ("i32", 3), ("fp32", 0.5), ("*i8", None), ("*i8", None))
    assert _described(Compiled(), (2, 1, 1), ["x", 1, 3, 0.5]) == ("kernel", 5, (2, 1, 1), 128, 1024, arguments, False)


UNKNOWN = {
    "a type": Compiled(".u64, .u64, .f32, .u64, .u64"),
    "a parameter less": Compiled(".u64, .u32, .f32, .u64"),
    "a parameter more": Compiled(".u64, .u32, .f32, .u64, .u64, .u64"),
    "clusters": Compiled(num_ctas=2),
    "scratch memory": Compiled(global_scratch_size=64),
    "a dependent launch": Compiled(launch_pdl=True),
    "nothing of it": object(),
}


@pytest.mark.parametrize("compiled", UNKNOWN.values(), ids=UNKNOWN)
def test_a_launch_of_which_more_is_to_be_known_is_not_described(compiled):
    from qloralab.kernels.gpu.launch import _described

    assert _described(compiled, (2, 1, 1), ["x", 1, 3, 0.5]) is None


def test_nor_is_one_with_other_arguments():
    from qloralab.kernels.gpu.launch import _described

    assert _described(Compiled(), (2, 1, 1), ["x", 3, 0.5]) is None


@pytest.mark.parametrize("contexts", [1, 2, 3])
def test_a_thread_gets_a_context_for_a_kernel_that_is_not_tritons(contexts, monkeypatch):
    """The first launches say that there is none, so many less one."""
    from qloralab.kernels.gpu import launch

    made, asked = list[str](), list[int]()
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 7)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(
        launch, "Program", lambda *_: lambda bases, stream, depend: asked.append(stream) or len(asked) >= contexts
    )
    monkeypatch.setattr(launch.torch, "zeros", lambda *_, device: made.append(device))
    with pytest.raises(RuntimeError, match="no context") if contexts == 3 else nullcontext():
        launch.launch_native("native", 1, (1,), 32, 0, ())
    assert (made, asked) == (["cuda"] * (contexts > 1), [7] * min(contexts, 2))


def test_with_hooks_a_launch_goes_the_long_way(found):
    assert found["hooked"] == 0
