"""Which implementation serves: what the variable says, what happens without a compiler, and that it happens once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import qloralab as ql
from qloralab.kernels import dispatch, report
from qloralab.kernels.cpu.build import BuildError
from qloralab.kernels.cpu.library import Library
from qloralab.nf4 import processor
from qloralab.nf4.processor import supported_isas

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fresh(monkeypatch) -> None:
    """As if nothing was chosen or loaded yet. What other tests compiled is in the user's cache."""
    for variable in (dispatch.VARIABLE, processor.VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    for name, value in {"_mode": None, "_isa": None, "_opened": {}, "_warned": False}.items():
        monkeypatch.setattr(dispatch, name, value)


@pytest.fixture
def no_compiler(fresh, monkeypatch, tmp_path) -> Path:
    """A compiler that fails and writes down that it ran, by one of the files, and an empty cache; what it writes to."""
    monkeypatch.setenv("QLORALAB_CACHE", str(tmp_path / "cache"))
    script, ran = tmp_path / "cc", tmp_path / "ran"
    script.write_text(f'#!/bin/sh\ncase "$*" in *pool.c.o*) echo ran >> {ran}; sleep 0.2;; esac\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    return ran


@pytest.mark.parametrize(
    ("value", "choice"),
    [(None, "auto"), ("", "auto"), ("auto", "auto"), ("native", "native"), ("reference", "reference")],
)
def test_the_variable_chooses(value, choice, no_compiler, monkeypatch):
    if value is not None:
        monkeypatch.setenv(dispatch.VARIABLE, value)
    assert dispatch.mode() == choice
    assert not no_compiler.exists()


@pytest.mark.parametrize("value", ["Native", "c", "0"])
@pytest.mark.parametrize("function", [dispatch.mode, dispatch.native, report.implementations])
def test_another_word_is_refused(value, function, fresh, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, value)
    with pytest.raises(ValueError, match=f"QLORALAB_CPU is one of auto, native, reference, not '{value}'"):
        function()


@pytest.mark.parametrize("variable", ["QLORALAB_CPU", "QLORALAB_GPU", "QLORALAB_ISA"])
def test_another_word_is_refused_at_the_first_public_name(variable, monkeypatch):
    monkeypatch.setenv(variable, "bogus")
    with pytest.raises(ValueError, match=f"{variable} is one of .*, not 'bogus'"):
        ql.__getattr__("quantize")  # as the first `ql.quantize` does


@pytest.mark.compiler
@pytest.mark.parametrize("choice", ["auto", "native"])
@pytest.mark.parametrize("isa", [None, "", *supported_isas()])
def test_the_library_is_of_the_instruction_set_that_was_asked_for(isa, choice, fresh, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, choice)
    if isa is not None:
        monkeypatch.setenv(processor.VARIABLE, isa)
    library = dispatch.native()
    assert isinstance(library, Library)
    assert library.isa == dispatch.isa() == (isa or "native")
    assert dispatch.native() is library


@pytest.mark.parametrize("choice", ["auto", "native"])
@pytest.mark.parametrize("function", [dispatch.isa, dispatch.native, report.implementations, dispatch.compute_dtype])
def test_an_instruction_set_that_cannot_be_had_is_refused_every_time(function, choice, no_compiler, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, choice)
    monkeypatch.setattr(processor, "cpu_features", lambda: "fpu sse2")
    for value, message in [
        ("avx2", "QLORALAB_ISA asks for avx2; this machine runs native, portable"),
        ("mmx", "QLORALAB_ISA is one of native, avx512, avx2, portable, not 'mmx'"),
    ]:
        monkeypatch.setenv(processor.VARIABLE, value)
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                function()
    assert not no_compiler.exists()


def test_the_compute_dtype_follows_the_instruction_set(fresh, monkeypatch):
    monkeypatch.setenv(processor.VARIABLE, "portable")
    assert dispatch.compute_dtype() == (torch.float32, "QLORALAB_ISA=portable has no bfloat16 product")


def test_the_reference_compiles_nothing(no_compiler, monkeypatch, tmp_path):
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert dispatch.native() is None
    assert not no_compiler.exists()
    assert not (tmp_path / "cache").exists()


def test_auto_without_a_compiler_warns_once(no_compiler):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [dispatch.native() for _ in range(3)] == [None] * 3
    (warning,) = caught
    assert warning.category is RuntimeWarning
    message = str(warning.message)
    shown = warnings.formatwarning(warning.message, warning.category, warning.filename, warning.lineno)
    assert shown == f"qloralab:0: RuntimeWarning: {message}\n"  # and no line of ours
    assert " failed (status 1):" in message
    assert "plain PyTorch" in message
    assert no_compiler.read_text() == "ran\n"  # what failed is not tried again


def test_the_warning_says_what_to_install(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.warns(RuntimeWarning, match=r"no C compiler: none of cc, gcc, clang is on PATH.*apt-get install gcc"):
        assert dispatch.native() is None


def test_a_warning_that_is_an_error_is_raised_once(no_compiler):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match=r"the C compiler .* failed \(status 1\)"):
            dispatch.native()
        assert dispatch.native() is None


def test_native_without_a_compiler_raises_every_time(no_compiler, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "native")
    for _ in range(3):
        with pytest.raises(BuildError, match=r"the C compiler .* failed \(status 1\)"):
            dispatch.native()
    assert no_compiler.read_text() == "ran\n"


def test_threads_that_come_at_once_compile_once_and_warn_once(no_compiler):
    barrier = threading.Barrier(6)

    def first_call(_: int) -> object:
        barrier.wait()
        return dispatch.native()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ThreadPoolExecutor(6) as threads:
            assert list(threads.map(first_call, range(6))) == [None] * 6
    assert len(caught) == 1
    assert no_compiler.read_text() == "ran\n"


def test_use_changes_the_choice_and_gives_it_back(no_compiler):
    with dispatch.use("reference"):
        assert dispatch.mode() == "reference"
        assert dispatch.native() is None
        with ThreadPoolExecutor(1) as threads:
            assert threads.submit(dispatch.mode).result() == "reference"
        with pytest.raises(BuildError), dispatch.use("native"):
            dispatch.native()
        assert dispatch.mode() == "reference"
    assert dispatch.mode() == "auto"


def test_use_refuses_another_word(fresh):
    with pytest.raises(ValueError, match="auto, native, reference, not 'C'"), dispatch.use("C"):
        pass
    assert dispatch.mode() == "auto"


@pytest.mark.compiler
def test_use_changes_the_instruction_set_and_gives_it_back(fresh):
    weight = torch.randn(33, 65)
    own = dispatch.native()
    packed = []
    for isa in supported_isas():
        with dispatch.use("native", isa=isa):
            library = dispatch.native()
            assert library is not None
            assert library.isa == isa
            with dispatch.use("native"):  # without a word about it, it stays
                assert dispatch.native() is library
            with pytest.raises(RuntimeError, match="out of the body"), dispatch.use("reference", isa="portable"):
                raise RuntimeError("out of the body")
            assert dispatch.native() is library
            packed.append(ql.quantize(weight).packed)
    assert dispatch.native() is own
    assert all(torch.equal(one, packed[0]) for one in packed)


def test_each_instruction_set_is_compiled_once(no_compiler):
    for _ in range(2):
        for isa in ("native", "portable"):
            with pytest.raises(BuildError, match="failed"), dispatch.use("native", isa=isa):
                dispatch.native()
    assert no_compiler.read_text() == "ran\n" * 2


@pytest.mark.parametrize("isa", ["avx2", "mmx", ""])
def test_use_refuses_an_instruction_set_that_is_not_here(isa, fresh, monkeypatch):
    monkeypatch.setattr(processor, "cpu_features", lambda: "fpu sse2")
    message = f"the instruction set here is one of native, portable, not '{isa}'"
    with pytest.raises(ValueError, match=message), dispatch.use("reference", isa=isa):
        pass
    assert (dispatch.mode(), dispatch.isa()) == ("auto", "native")


def by_operator() -> dict[str, tuple[str, str]]:
    rows = report.implementations()
    assert all(set(row) == {"operator", "device", "implementation", "why"} and row["device"] == "cpu" for row in rows)
    found = {row["operator"]: (row["implementation"], row["why"]) for row in rows}
    assert len(found) == len(rows)
    return found


def test_the_report_names_every_operator(fresh, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    declared = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("qloralab::")}
    assert {name.removeprefix("qloralab::") for name in declared} | {"adamw", "adamw_8bit"} == set(by_operator())


@pytest.mark.compiler
@pytest.mark.parametrize(("asked", "shown"), [("", "native"), ("portable", "portable (QLORALAB_ISA=portable)")])
def test_the_report_shows_the_instruction_set(asked, shown, fresh, monkeypatch):
    monkeypatch.setenv(processor.VARIABLE, asked)
    for operator, (implementation, why) in by_operator().items():
        assert implementation == "native", operator
        assert why.startswith(f"C compiled for {shown}, on the threads of lib")
    with dispatch.use("native", isa="native"):
        assert all(why.startswith("C compiled for native, on the threads of lib") for _, why in by_operator().values())


@pytest.mark.compiler
def test_the_report_of_an_operator_without_c(fresh, monkeypatch):
    monkeypatch.setattr(report, "_has_cpu_kernel", lambda name: name != "linear")
    found = by_operator()
    assert found["linear"] == ("reference", "there is no C for it")
    assert found["dequantize"][0] == "native"


@pytest.mark.parametrize(
    ("choice", "implementation", "why"),
    [
        ("auto", "reference", "the C compiler "),
        ("native", "none", "the C compiler "),
        ("reference", "reference", "it was asked for (QLORALAB_CPU=reference)"),
    ],
)
def test_the_report_without_a_compiler(choice, implementation, why, no_compiler, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, choice)
    for found in by_operator().values():
        assert found[0] == implementation
        assert found[1].startswith(why)
        assert "\n" not in found[1]


def test_a_kernel_is_seen_where_one_is_registered():
    @torch.library.custom_op("qloralab_test::plain", mutates_args=())
    def plain(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    def has_cpu_kernel() -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key("qloralab_test::plain", "CPU")

    assert not has_cpu_kernel()
    plain.register_kernel("cpu")(lambda x: x.clone())
    assert has_cpu_kernel()


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in the checkout, warnings as Python shows them by default."""
    environment = {**os.environ, "PYTHONWARNINGS": "", **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_importing_compiles_nothing(tmp_path):
    names = [path.stem for path in (ROOT / "kernels" / "cpu").glob("*.py")]
    lines = ["import qloralab", *(f"import qloralab.kernels.cpu.{name}" for name in names)]
    lines += ["import qloralab.kernels.dispatch, qloralab.kernels.adamw"]
    done = run("\n".join(lines), QLORALAB_CACHE=str(tmp_path / "cache"), CC="false", QLORALAB_CPU="native")
    assert done.stderr == ""
    assert not (tmp_path / "cache").exists()


def test_a_program_without_a_compiler_gives_the_same_results_and_one_warning(tmp_path):
    code = """
import torch, qloralab as ql
torch.manual_seed(0)
weight = ql.quantize(torch.randn(8, 64))
print(weight.dequantize().sum().item(), ql.linear(torch.randn(2, 64), weight).shape)
"""
    done = run(code, QLORALAB_CACHE=str(tmp_path / "cache"), CC="false", QLORALAB_CPU="auto")
    assert done.stderr.count("RuntimeWarning: qloralab's CPU kernels are not in use: the C compiler ") == 1
    torch.manual_seed(0)
    with dispatch.use("reference"):
        expected = ql.quantize(torch.randn(8, 64)).dequantize().sum().item()
    assert done.stdout == f"{expected} torch.Size([2, 8])\n"
