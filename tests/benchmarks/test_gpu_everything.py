"""Parts that do as they should, fail, die or hang, one after the other; and a rehearsal of all, without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from qloralab.benchmarks import gpu
from qloralab.benchmarks.case import OPERATIONS
from qloralab.benchmarks.gpu_everything import STARTING, Part, everything, join, parts
from qloralab.benchmarks.record import record_file, write

STUB = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
what, *rest, out = sys.argv[1:]
Path(out, "gpu-a.json").write_text(json.dumps([{"part": what, "arguments": rest}]))
if what == "benchmarks.fails":
    raise SystemExit("CUDA error: an illegal memory access was encountered")
if what == "benchmarks.dies":
    os.kill(os.getpid(), signal.SIGSEGV)
if what == "benchmarks.hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(out, "child").write_text(str(child.pid))
    time.sleep(60)
"""


def alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def stub(tmp_path: Path) -> list[str]:
    (tmp_path / "stub.py").write_text(STUB)
    return [sys.executable, str(tmp_path / "stub.py")]


def test_a_part_that_fails_dies_or_hangs_takes_no_other_along(tmp_path):
    which = [Part(name, 1.0, name) for name in ("fails", "dies", "well")]
    which[1:1] = [Part("hangs", 0.1, "hangs")]
    out = tmp_path / "out"
    verdicts = everything(out, time.monotonic() + 62, which, stub(tmp_path))
    assert verdicts == {
        "fails": "ended with code 1: CUDA error: an illegal memory access was encountered",
        "hangs": "killed, it was late",
        "dies": "ended with code -11: ",
        "well": "done",
    }
    found = json.loads((out / "gpu-a.json").read_text())
    assert [record["part"] for record in found] == [f"benchmarks.{part.module}" for part in which]
    assert not alive(int((out / "parts" / "hangs" / "child").read_text()))


def test_the_time_that_is_left_is_divided(tmp_path):
    which = [Part(name, seconds, name, ["{budget}"]) for name, seconds in (("a", 30.0), ("b", 60.0), ("c", 10.0))]
    everything(tmp_path / "out", time.monotonic() + 1000, which, stub(tmp_path))
    found = json.loads((tmp_path / "out" / "gpu-a.json").read_text())
    budgets = [float(record["arguments"][0]) for record in found]
    assert budgets == pytest.approx([part - STARTING for part in (300, 857, 1000)], abs=10)  # nothing was used


def test_after_the_deadline_nothing_begins(tmp_path):
    verdicts = everything(tmp_path, time.monotonic() - 1, [Part("well", 1.0, "well")], stub(tmp_path))
    assert verdicts == {"well": "the time was up"}
    assert not (tmp_path / "parts").exists()


def test_files_of_one_name_are_joined_in_order(tmp_path):
    for name, records in (("b", [{"M": 1}]), ("a", [{"M": 2}, {"M": 3}])):
        write(records, tmp_path / "parts" / name / "gpu-a.json")
    write([{"M": 4}], tmp_path / "parts" / "a" / "other.json")
    join(tmp_path, ["b", "absent", "a"])
    assert [record["M"] for record in json.loads((tmp_path / "gpu-a.json").read_text())] == [1, 2, 3]
    assert [record["M"] for record in json.loads((tmp_path / "other.json").read_text())] == [4]


def test_all_points_and_canaries_have_a_part():
    asked = [name for part in parts() if part.module == "gpu" for name in part.arguments[3:]]

    assert sorted(asked) == sorted(["canaries", *OPERATIONS, "chain"])
    assert sum(part.seconds for part in parts()) <= 570


@pytest.mark.parametrize("verdict", ["done", "killed, it was late"])
def test_the_command_fails_where_a_part_does(verdict, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "everything", lambda *given: asked.append(given) or {"a": "done", "b": verdict})
    with pytest.raises(SystemExit) if verdict != "done" else nullcontext():
        gpu.main(["--everything", "--out", str(tmp_path)])
    ((out, deadline),) = asked
    assert out == tmp_path
    assert 500 < deadline - time.monotonic() < 600


@pytest.mark.slow
def test_a_model_from_its_config_to_the_table(tmp_path):
    LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2).save_pretrained(
        tmp_path / "Some-8B"
    )
    command = [sys.executable, str(Path(__file__).with_name("without_gpu.py")), "benchmarks.gpu"]
    command += ["--model", str(tmp_path / "Some-8B" / "config.json"), "--out", str(tmp_path)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    records = json.loads((tmp_path / "gpu-some-8b-a-gpu-80-gb.json").read_text())
    points = [record for record in records if record["kind"] == "point" and record["provider"] == "ours"]
    assert [(tuple(record["shape"]), record["count"]) for record in points[::4]] == [
        ((64, 64), 12), ((96, 64), 6), ((64, 96), 3)
    ]  # fmt: skip
    assert "Some-8B: all linear layers" in out
    assert "12 of 64x64, 6 of 96x64, 3 of 64x96" in out
    assert "q, k, v, o, gate, up, down in a chain, of widths 64, 96" in out


@pytest.mark.slow
def test_a_rehearsal(tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("without_gpu.py"))]
    verdicts = everything(tmp_path, time.monotonic() + 600, python=command)
    assert verdicts == {part.name: "done" for part in parts()}
    files = {file.name: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    of_the_host = {record_file(tmp_path, name).name for name in ("generate", "host")}
    assert set(files) == {"gpu-a-gpu-80-gb.json", "gpu-optimizer-a-gpu-80-gb.json", *of_the_host}
    records = files["gpu-a-gpu-80-gb.json"]
    assert records[0]["kind"] == "canary"
    points = [record for record in records if record["kind"] == "point"]
    assert len({(record["operation"], record["M"]) for record in points}) == 10
    chains = [record for record in records if record["kind"] == "chain"]
    assert [(record["operation"], record["M"]) for record in chains[::3]] == [
        ("chain", 1), ("chain, eager", 1), ("chain", 16), ("chain, eager", 16)
    ]  # fmt: skip
    assert {record["status"] for record in points + chains if record["provider"] in ("ours", "bf16")} == {"ok"}
