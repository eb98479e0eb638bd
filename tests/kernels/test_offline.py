"""Small kernels, compiled for each target in processes of their own."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec

import pytest

from qloralab.kernels import offline
from qloralab.kernels.offline import TARGETS, Case, Compiled, OfflineError, compile_case, compile_cases, select, tool
from qloralab.kernels.sass import count

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which has wheels for Linux")

SMALL = """
import triton
import triton.language as tl
from qloralab.kernels.offline import Case

@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, at < n) * 2.0, at < n)

TYPES = {"x": "*fp32", "y": "*fp32"}
CASES = (
    Case("double", double, TYPES | {"n": "i32"}, {"BLOCK": 1024}, 1024),
    Case("double unaligned", double, TYPES | {"n": "i32"}, {"BLOCK": 1024}, 1024, divisible=()),
    Case("double of 2 warps", double, TYPES | {"n": "i32"}, {"BLOCK": 1024}, 1024, num_warps=2),
)
CASES_SM_80 = (Case("double on sm_80", double, TYPES | {"n": "i32"}, {"BLOCK": 512}, 512),)
"""
SPILLING = """
import triton
import triton.language as tl
from qloralab.kernels.offline import Case

@triton.jit
def total(x, y, BLOCK: tl.constexpr):
    values = tl.load(x + tl.arange(0, BLOCK))
    tl.store(y + tl.arange(0, BLOCK), values / tl.sum(values))

CASES = (Case("total", total, {"x": "*fp32", "y": "*fp32"}, {"BLOCK": 16384}, 16384, num_warps=2),)
"""
WRONG = """
import triton
import triton.language as tl
from qloralab.kernels.offline import Case

@triton.jit
def wrong(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), no_such_name)

CASES = (Case("wrong", wrong, {"x": "*fp32"}, {"BLOCK": 64}, 64),)
"""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The modules small_kernels, more_kernels, …, and no_cases, which every process can import."""
    path = tmp_path_factory.mktemp("modules")
    modules = {"small": SMALL, "more": SMALL.replace('Case("', 'Case("more '), "spilling": SPILLING, "wrong": WRONG}
    for name, text in modules.items():
        (path / f"{name}_kernels.py").write_text(text)
    (path / "no_cases.py").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path)
        yield


@pytest.fixture(scope="module")
def compiled(folder) -> dict[tuple[str, str], Compiled]:
    """Every small case, by name and target; this process interprets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        found = compile_cases(TARGETS, ["small_kernels"])
    return {(one.name, one.target): one for one in found}


@pytest.mark.parametrize("target", TARGETS)
def test_the_machine_code_is_what_the_kernel_says(compiled, target):
    one = compiled["double", target]
    counts = count(one.sass, one.weights_per_thread)
    assert re.search(rf"(?i)[\t_]{target.replace('_', '_?')}a?\b", one.sass)  # in the header, in one of two forms
    assert one.weights_per_thread == 8
    assert (one.spilled, one.shared, counts.local) == (0, 0, 0)
    assert 8 < one.registers < 64
    assert counts.opcodes["FADD"] + counts.opcodes["FMUL"] + 2 * counts.opcodes["FADD2"] == 8
    assert counts.opcodes["LDG"] == counts.opcodes["STG"] == 2
    assert (counts.loaded(), counts.widest_load) == (4, 128)


def test_what_is_not_said_to_be_aligned_is_loaded_word_by_word(compiled):
    one = compiled["double unaligned", "sm_90"]
    counts = count(one.sass, one.weights_per_thread)
    assert (counts.opcodes["LDG"], counts.loaded(), counts.widest_load) == (8, 4, 32)


def test_the_number_of_warps_is_the_cases(compiled):
    one = compiled["double of 2 warps", "sm_90"]
    assert one.weights_per_thread == 16
    assert count(one.sass, one.weights_per_thread).opcodes["LDG"] == 4


def test_spilled_registers_and_shared_memory_show():
    (one,) = compile_cases(["sm_90"], ["spilling_kernels"])
    assert one.registers == 255
    assert one.spilled > 0
    assert one.shared >= 2 * 4  # a sum of each of 2 warps
    assert count(one.sass, one.weights_per_thread).local > 0


def test_every_entry_names_the_triton_that_compiled_it(compiled):
    assert {one.triton for one in compiled.values()} == {offline.triton_version()}


def test_the_order_is_by_target_then_as_listed():
    found = compile_cases(["sm_90", "sm_80"], ["more_kernels", "small_kernels"])
    names = ["double", "double unaligned", "double of 2 warps"]
    listed = [*(f"more {name}" for name in names), *names]
    with_sm_80 = [*(f"more {name}" for name in [*names, "double on sm_80"]), *names, "double on sm_80"]
    expected = [*(("sm_90", name) for name in listed), *(("sm_80", name) for name in with_sm_80)]
    assert [(one.target, one.name) for one in found] == expected


def test_only():
    found = compile_cases(["sm_90"], ["more_kernels", "small_kernels"], "more double of")
    assert [one.name for one in found] == ["more double of 2 warps"]


def test_select():
    names = ["linear", "linear 16", "linear_grad", "tile, 1", "tile, 2"]
    assert select(names, None) == names
    assert select(names, "linear") == ["linear"]
    assert select(names, "tile") == ["tile, 1", "tile, 2"]
    with pytest.raises(OfflineError, match=r"no kernel is called 'til'; there are: linear, linear 16"):
        select(names, "til")
    with pytest.raises(OfflineError, match="two cases have one name: tile, 2"):
        select([*names, "tile, 2"], None)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("wrong_kernels", "wrong does not compile for sm_90: .*no_such_name"),
        ("no_cases", "no_cases: .*CASES"),
        ("no_such_module", "no_such_module: No module named"),
    ],
)
def test_what_cannot_be_compiled(module, message):
    with pytest.raises(OfflineError, match=f"(?s){message}"):
        compile_cases(["sm_90"], [module])


def test_a_target_is_one_of_four():
    with pytest.raises(ValueError, match="one of sm_80, sm_90, sm_100, sm_120, not 'sm_75'"):
        compile_cases(["sm_90", "sm_75"], ["small_kernels"])


def test_an_interpreted_function_is_no_kernel():
    with pytest.raises(OfflineError, match="is TRITON_INTERPRET set"):
        compile_case(Case("plain", len, {}, {}, 1))


WRONG_PARAMETERS = """
from qloralab.kernels.offline import Case
from small_kernels import double
CASES = (Case("few", double, {"x": "*fp32", "y": "*fp32", "BLOC": "i32"}, {"BLOCK": 64}, 64),)
"""


def test_every_parameter_is_named_once(tmp_path, monkeypatch):
    (tmp_path / "few_kernels.py").write_text(WRONG_PARAMETERS)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(OfflineError, match=r"few: .*\['BLOC', 'n'\]"):
        compile_cases(["sm_90"], ["few_kernels"])


def test_no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for call in (offline.triton_version, lambda: tool("nvdisasm"), compile_cases):
        with pytest.raises(OfflineError, match="needs triton"):
            call()


def test_no_tool(monkeypatch):
    assert tool("nvdisasm").is_file()
    with pytest.raises(OfflineError, match="has no nvfoo"):
        tool("nvfoo")
    with pytest.raises(OfflineError, match=r"nvdisasm: .*no_such_file"):
        offline.run_tool("nvdisasm", "no_such_file.cubin")
