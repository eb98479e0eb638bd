"""The benchmark's checkpoint is quantized by the command, its peak is a process's, and a wrong result is no record."""

from __future__ import annotations

import io
import json
import subprocess

import pytest
import torch
from rich.console import Console

from qloralab.benchmarks.case import WrongResultError
from qloralab.benchmarks.quantize import KERNELS, Shape, check, main, make, measure, run, table
from qloralab.benchmarks.record import RECORDS
from qloralab.checkpoint.quantize_checkpoint import quantize_model
from qloralab.display import Display
from qloralab.nf4.files.checkpoint import Checkpoint

SMALL = Shape(hidden=64, intermediate=128, vocabulary=64, layers=2)


@pytest.fixture
def silent() -> Display:
    """A display that nobody sees."""
    return Display(Console(file=io.StringIO()))


def record(kernels: str, peak: float) -> dict:
    return {
        "kernels": kernels, "device": "a processor", "files": 6, "bytes_before": 2e9, "bytes_after": 9e8,
        "seconds": 10.0, "peak_mb": peak, "bound_mb": 1000.0,
    }  # fmt: skip


def test_the_bound_follows_the_largest_tensor():
    assert Shape().bound_mb == pytest.approx(1.5 * 4 * 32000 * 4096 / 1e6 + 300)
    assert Shape(vocabulary=64).bound_mb == pytest.approx(1.5 * 4 * 11008 * 4096 / 1e6 + 300)


def test_the_checkpoint_is_one_that_is_quantized(tmp_path, silent):
    total = make(tmp_path / "dense", SMALL)
    dense = Checkpoint(tmp_path / "dense")
    assert len(dense.files) == SMALL.layers + 2
    assert total == sum(dense.tensor(name).nbytes for name in dense.names())
    assert dense.tensor("lm_head.weight").float().std() == pytest.approx(0.02, rel=0.05)
    quantize_model(tmp_path / "dense", tmp_path / "out", None, silent)
    check(tmp_path / "dense", tmp_path / "out", SMALL)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.self_attn.o_proj.weight"])
def test_a_wrong_result_is_refused(name, tmp_path, silent):
    make(tmp_path / "dense", SMALL)
    quantize_model(tmp_path / "dense", tmp_path / "out", None, silent)
    file = Checkpoint(tmp_path / "out").file_of(name)
    content = bytearray(file.read_bytes())
    tensor = Checkpoint(tmp_path / "out").tensor(name).flatten().view(torch.uint8)
    content[content.index(bytes(tensor.tolist()))] ^= 0x80
    del tensor
    file.write_bytes(content)
    with pytest.raises(WrongResultError, match=name):
        check(tmp_path / "dense", tmp_path / "out", SMALL)
    with pytest.raises(WrongResultError, match="14 weights are in 4 bits"):
        check(tmp_path / "dense", tmp_path / "out", Shape(64, 128, 64, layers=3))


def test_the_table_compares_with_the_bound(capsys, tmp_path):
    records = [record("native", 900.0), record("reference", 1001.0)]
    Console(width=120).print(table(records))
    rows = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if "│" in line}
    assert "kept" in rows["native"]
    assert "200" in rows["native"]
    assert "exceeded" in rows["reference"]
    (tmp_path / "quantize.json").write_text(json.dumps(records))
    main(["--view", "--out", str(tmp_path)])
    assert "exceeded" in capsys.readouterr().out


def test_the_committed_records_keep_the_bound():
    file = RECORDS / "quantize.json"
    if not file.exists():
        pytest.skip("no record is committed")
    records = json.loads(file.read_text())
    assert [one["kernels"] for one in records] == list(KERNELS)
    for one in records:
        assert one["bytes_before"] > 2e9
        assert one["files"] > 2
        assert one["peak_mb"] <= one["bound_mb"] == pytest.approx(Shape().bound_mb)


@pytest.mark.slow
def test_the_command_is_measured_as_a_process(tmp_path):
    ballast = torch.ones(3 * 10**8)  # 1.2 GB, in this process
    records = run(tmp_path, SMALL)
    del ballast
    assert [one["kernels"] for one in records] == list(KERNELS)
    for one in records:
        assert 100 < one["peak_mb"] < 1000
        assert one["seconds"] > 0
        files = (tmp_path / one["kernels"]).glob("*.safetensors")
        assert one["bytes_after"] == sum(file.stat().st_size for file in files) > 0
    with pytest.raises(subprocess.CalledProcessError):
        measure(tmp_path / "nothing", tmp_path / "again", "native")
