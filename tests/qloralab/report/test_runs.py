"""Run directories, whole and spoiled."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file

from qloralab.nf4.files.errors import FormatError
from qloralab.report.runs import read_runs, read_seeds


def test_a_run_is_what_its_directory_holds(trained, metrics_of):
    first, second = read_runs([trained / "first", trained / "second"])
    assert (first.name, second.name) == ("first", "second")
    assert [line.loss for line in first.metrics] == [line["loss"] for line in metrics_of(trained / "first")]
    assert first.config["lr"] == 1e-3
    assert first.state == second.state == "complete"
    assert first.seconds == pytest.approx(first.config["result"]["seconds"], rel=1e-6)
    assert first.peak_mb == first.config["result"]["peak_mb"]
    assert [set(texts) for _, texts in first.samples] == [{"prompt", "before", "after", "reference"}] * 3
    assert first.notes == []


def test_the_norm_of_an_adapter_is_that_of_its_product(trained):
    for name, scaling in (("first", 2.0), ("second", 8.0)):
        (run,) = read_runs([trained / name])
        tensors = load_file(trained / name / "adapter" / "adapter_model.safetensors")
        assert len(run.updates) == 14
        for one in run.updates:
            A, B = (tensors[f"base_model.model.{one.layer}.lora_{x}.weight"] for x in "AB")
            assert one.norm == pytest.approx(float((scaling * B @ A).norm()), rel=1e-4)
            assert one.norm > 0


def test_a_last_line_that_a_kill_has_cut_is_left_out(runs):
    path = runs / "first" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    (run,) = read_runs([runs / "first"])
    assert [line.step for line in run.metrics] == [0, 1, 2, 3, 4, 5]
    assert run.notes == ["the last line of metrics.jsonl is cut, and left out"]


def test_a_run_that_was_killed_is_not_finished(runs):
    config = json.loads((runs / "first" / "config.json").read_text())
    del config["result"], config["notes"]
    (runs / "first" / "config.json").write_text(json.dumps(config))
    shutil.rmtree(runs / "first" / "adapter")
    (runs / "first" / "samples.md").unlink()
    (run,) = read_runs([runs / "first"])
    assert run.state == "running or killed"
    assert (run.samples, run.updates, run.notes) == ([], [], ["there are no samples"])
    assert run.peak_mb == max(line.rss_mb for line in run.metrics)


def test_an_interrupted_run_says_so(runs):
    config = json.loads((runs / "first" / "config.json").read_text())
    config["result"]["interrupted"] = True
    (runs / "first" / "config.json").write_text(json.dumps(config))
    assert read_runs([runs / "first"])[0].state == "interrupted"


def test_an_adapter_that_cannot_be_read_is_a_note(runs):
    (runs / "first" / "adapter" / "adapter_model.safetensors").write_bytes(b"no")
    (run,) = read_runs([runs / "first"])
    assert run.updates == []
    assert "the adapter cannot be read: " in run.notes[0]


def test_a_directory_of_seeds_stands_for_its_runs_in_order(runs):
    for seed in (10, 9):
        shutil.copytree(runs / "first", runs / "seeds" / f"seed-{seed}")
    assert [run.name for run in read_runs([runs / "seeds", runs / "second"])] == ["seed-9", "seed-10", "second"]
    assert read_seeds([runs / "seeds"]) == []
    (runs / "seeds" / "seeds.json").write_text('{"a": 1}')
    assert read_seeds([runs / "seeds", runs / "first"]) == [(runs / "seeds", {"a": 1})]


def test_runs_of_one_name_have_their_paths(runs):
    shutil.copytree(runs / "first", runs / "later" / "first")
    paths = [runs / "first", runs / "later" / "first"]
    assert [run.name for run in read_runs(paths)] == [str(path) for path in paths]


def test_what_is_no_run_is_refused(runs, refusal):
    for name in ("metrics.jsonl", "config.json"):
        shutil.copytree(runs / "first", runs / f"without-{name}")
        (runs / f"without-{name}" / name).unlink()
    for path, why in (
        ("nowhere", "nowhere does not exist; give the directory of a run"),
        ("first/config.json", "config.json is a file; give the directory of a run"),
        ("first/adapter", "adapter holds no metrics.jsonl: it is not the directory of a run"),
        ("without-metrics.jsonl", "holds no metrics.jsonl: it is not the directory of a run"),
        ("without-config.json", "holds no config.json: it is not the directory of a run"),
    ):
        assert refusal(read_runs, [runs / path]).endswith(why)
    assert refusal(read_runs, [runs / "first", runs / "second" / ".." / "first"]).endswith("give each run once")


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ("", " is empty: the run has no step yet"),
        ('{"step": 0, "tok', " is empty: the run has no step yet"),
        ("nonsense\n", ", line 1: is not JSON: Expecting value: line 1 column 1 (char 0)"),
        ('{"step": 0, "tokens": 0}\n', ", line 1: rss_mb is null, not a number"),
        ('{"step": 0, "tokens": 0, "rss_mb": 1, "loss": NaN}\n', ", line 1: loss is NaN, not a number"),
        ('{"step": 0, "tokens": 0, "rss_mb": 1, "lr": "x"}\n', ', line 1: lr is "x", not a number'),
    ],
)
def test_metrics_that_cannot_be_read_are_refused(runs, refusal, lines, why):
    (runs / "first" / "metrics.jsonl").write_text(lines)
    assert refusal(read_runs, [runs / "first"]) == f"{runs / 'first' / 'metrics.jsonl'}{why}"


def test_a_config_that_is_not_json_is_refused(runs):
    (runs / "first" / "config.json").write_text("{")
    with pytest.raises(FormatError, match="is not JSON"):
        read_runs([runs / "first"])
