"""A record says which class of processors it is of, and variables lower all that multiplies or nothing."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest
import torch

from qloralab.benchmarks import gpu
from qloralab.benchmarks import record as module
from qloralab.benchmarks.record import (
    LOWERING,
    driver,
    gpu_provenance,
    lower_mkl,
    lowered,
    parse,
    provenance,
    record_file,
    record_files,
    write,
)


@pytest.fixture(autouse=True)
def _none_set(monkeypatch):
    for name in LOWERING:
        monkeypatch.delenv(name, raising=False)


def test_a_record_names_its_class_and_the_variables(monkeypatch):
    monkeypatch.setattr(module, "processor_class", lambda: "avx2")
    assert provenance()["class"] == "avx2"
    assert provenance()["lowered"] == {}
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert provenance()["lowered"] == {"ATEN_CPU_CAPABILITY": "avx2"}
    assert provenance()["capability"] == torch.backends.cpu.get_cpu_capability()


@pytest.mark.parametrize(
    ("asked", "kind", "mkl"),
    [("avx2", "avx2", "AVX2"), ("portable", "portable", "SSE4_2"), ("avx512", "avx512", None), ("", "avx2", None)],
)
def test_mkl_follows_a_lowered_class(monkeypatch, asked, kind, mkl):
    monkeypatch.setattr(module, "processor_class", lambda: kind)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setenv("QLORALAB_ISA", asked)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what is set is gone afterwards
    lower_mkl()
    assert lowered().get("MKL_ENABLE_INSTRUCTIONS") == mkl


def test_a_class_that_pytorch_does_not_follow_is_refused(monkeypatch):
    monkeypatch.setattr(module, "processor_class", lambda: "avx2")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setenv("QLORALAB_ISA", "avx2")
    with pytest.raises(SystemExit, match="set ATEN_CPU_CAPABILITY"):
        lower_mkl()


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ([], module.RECORDS),
        (["--view", "--save", "--steps", "60"], module.RECORDS),
        (["--steps", "2"], module.TRIALS),
        (["--shape", "64", "64"], module.TRIALS),
        (["--steps", "2", "--out", "there"], Path("there")),
    ],
    ids=["all as always", "the default said", "fewer steps", "another shape", "asked for"],
)
def test_a_trial_overwrites_no_record(arguments, folder):
    parser = argparse.ArgumentParser()
    parser.add_argument("--view", action="store_true")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--shape", type=int, nargs=2, action="append")
    assert parse(parser, arguments).out == folder


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    write([{"M": 1}], tmp_path / "gpu.json")

    def killed(self, text):
        with self.open("w") as file:
            file.write(text[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        write([{"M": 1}, {"M": 2}], tmp_path / "gpu.json")
    assert json.loads((tmp_path / "gpu.json").read_text()) == [{"M": 1}]
    assert [file.name for file in tmp_path.glob("*.json")] == ["gpu.json"]


def test_a_class_has_a_file_of_its_own(tmp_path, monkeypatch):
    for kind in ("avx512-bf16", "avx2"):
        monkeypatch.setattr(module, "processor_class", lambda kind=kind: kind)
        record_file(tmp_path, "cpu").touch()
    assert [file.name for file in record_files(tmp_path, "cpu")] == ["cpu-avx2.json", "cpu-avx512-bf16.json"]
    assert [file.name for file in record_files(tmp_path, "cpu", "avx2")] == ["cpu-avx2.json"]
    with pytest.raises(SystemExit, match=r"cpu-portable\.json"):
        record_files(tmp_path, "cpu", "portable")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (root)\n", "580.159.04"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n", "550.54.15"),
        ("something else\n", None),
    ],
)
def test_the_drivers_version(text, expected, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert driver() == expected


def test_versions_of_what_is_installed_only(monkeypatch):
    monkeypatch.setattr(module, "PACKAGES", ("torch", "a-package-that-nobody-has"))
    found = gpu_provenance("gpu", "a GPU")["versions"]
    assert found["torch"].startswith(torch.__version__.partition("+")[0])
    assert "a-package-that-nobody-has" not in found


@pytest.mark.parametrize("option", ["--view", "--model", "--compare"])
def test_a_file_that_is_not_there_is_refused_by_name(option, tmp_path, capsys):
    missing = str(tmp_path / "missing.json")
    with pytest.raises(SystemExit):
        gpu.main([option, missing, *([missing] if option == "--compare" else [])])
    assert capsys.readouterr().err.endswith(f"error: argument {option}: there is no file {missing}\n")
