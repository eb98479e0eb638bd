"""The comparison's table is a view of its records: what it prints is what was measured."""

from __future__ import annotations

import json

import pytest

from qloralab.benchmarks.finetune import LIBRARIES, main, table
from qloralab.benchmarks.record import RECORDS
from qloralab.kernels.cpu import allocator
from qloralab.kernels.cpu.build import BuildError


def record(library: str, speed: float, memory: float, loss: float = 2.5, kind: str = "avx2") -> dict:
    return {
        "library": library, "steps": 60, "tokens": 29000, "device": "a processor", "class": kind, "dtype": "float32",
        "tokens_per_s": {"p50": speed, "all": speed / 2}, "peak_mb": memory, "val_before": 4.0, "val_after": loss,
    }  # fmt: skip


@pytest.fixture
def rows(lines):
    """The cells of the table by the first."""
    return lambda *records: {name: cells for name, *cells in lines(table(records))}


def test_the_table_divides_ours_by_theirs(rows):
    found = rows(record(LIBRARIES[0], 300, 2000), record(LIBRARIES[1], 100, 5000))
    assert found["tokens/s, median step"] == ["300", "100", "3.00", "≥ 1.8", "yes"]
    assert found["peak memory, MB"] == ["2,000", "5,000", "0.40", "≤ 0.45", "yes"]
    assert found["validation loss after"] == ["2.500", "2.500", "1.00", "within 0.03", "yes"]


def test_a_class_has_its_own_goals_or_none(rows):
    ours, theirs = (300, 2000, 2.54), (160, 5000, 2.5)
    mine = rows(*(record(name, *of, kind="avx512-bf16") for name, of in zip(LIBRARIES, (ours, theirs), strict=True)))
    assert [mine[name][3:] for name in ("tokens/s, median step", "peak memory, MB")] == [
        ["≥ 2", "no"],
        ["≤ 0.33", "no"],
    ]
    assert mine["validation loss after"][3:] == ["within 0.03", "no"]
    other = rows(*(record(name, *of, kind="portable") for name, of in zip(LIBRARIES, (ours, theirs), strict=True)))
    assert other["tokens/s, median step"][3:] == other["peak memory, MB"][3:] == ["", ""]


def test_the_view_shows_every_class_or_the_asked_one(tmp_path, capsys):
    for kind in ("avx2", "avx512-bf16"):
        for library in LIBRARIES:
            made = record(library, 300, 2000, kind=kind)
            (tmp_path / f"finetune-{library}-{kind}.json").write_text(json.dumps(made))
    main(["--view", "--out", str(tmp_path)])
    both = capsys.readouterr().out
    assert "avx2: 60 steps" in both
    assert "avx512-bf16: 60 steps" in both
    main(["--view", "avx2", "--out", str(tmp_path)])
    assert "avx512" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="finetune-qloralab-avx512"):
        main(["--view", "avx512", "--out", str(tmp_path)])


FILES = sorted(RECORDS.glob(f"finetune-{LIBRARIES[0]}-*.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_committed_records_are_of_the_same_job(file):
    paths = [file.with_name(file.name.replace(LIBRARIES[0], library)) for library in LIBRARIES]
    records = [json.loads(path.read_text()) for path in paths]
    assert [r["library"] for r in records] == list(LIBRARIES)
    for field in ("steps", "tokens", "trainable", "device", "class"):
        assert len({r[field] for r in records}) == 1, field
    assert file.stem.endswith(records[0]["class"])
    # the same weights in 4 bits: the two begin at the same loss
    assert records[0]["val_before"] == pytest.approx(records[1]["val_before"], abs=0.02)


def test_without_a_compiler_it_says_so_before_it_begins(monkeypatch):
    def fails() -> None:
        raise BuildError("there is no g++")

    monkeypatch.setattr(allocator, "install", fails)
    with pytest.raises(SystemExit, match=r"needs a C\+\+ compiler, for .*: there is no g\+\+"):
        main([])
