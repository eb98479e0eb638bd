"""The settings of a run as a file: read, refused, written and read again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from qloralab.run_file import write
from qloralab.settings import Settings
from qloralab.train import finetune as finetune_module

ENOUGH = finetune_module.UserError("enough")


@pytest.fixture
def given(program, monkeypatch, tmp_path, model_dir):
    """The settings that the command comes to: ``given("steps: 3", "--lr", 1)``; or the line that refuses them."""

    def call(text: str | bytes, *words):
        seen: list[Settings] = []

        def stop(settings, processes):
            seen.append(settings)
            raise ENOUGH

        monkeypatch.setattr(finetune_module, "finetune", stop)
        path = tmp_path / "settings.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        status, _, err = program("finetune", "--model", model_dir, "--config", "settings.yaml", *words)
        assert status == 2
        return seen[0] if seen else err.removeprefix("qloralab: error: ").rstrip("\n")

    return call


TEXT = """
data: d.jsonl      # a comment
batch-size: 8
held_out: 3
lr: 1e-4
lora_alpha: 8
double_quant: no
rslora: true
skip: "8, down_proj"
seed: 7
init: null
"""


def test_names_and_values_are_those_of_the_options(given, model_dir):
    expected = Settings(
        model=model_dir, out=None, data="d.jsonl", batch_size=8, held_out=3, lr=1e-4, lora_alpha=8.0,
        double_quant=False, rslora=True, skip="8, down_proj", seed=7,
    )  # fmt: skip
    assert given(TEXT) == expected
    flags = ("--batch-size", 2, "--lr", 0.5, "--double-quant", "--steps", 9)
    changed = dataclasses.replace(expected, batch_size=2, lr=0.5, double_quant=True, steps=9)
    assert given(TEXT, *flags) == changed


def test_what_is_given_on_the_command_line_replaces_the_other_of_steps_and_epochs(given):
    assert (given("steps: 7", "--epochs", 2).epochs, given("steps: 7", "--epochs", 2).steps) == (2, 150)
    assert (given("epochs: 2", "--steps", 150).epochs, given("epochs: 2", "--steps", 7).steps) == (None, 7)
    twice = "--steps and --epochs say the same in two ways; give one"
    assert given("epochs: 2\nsteps: 150") == given("seed: 1", "--steps", 150, "--epochs", 2) == twice


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("batchsize: 8", ", line 1: 'batchsize' is no setting of a run; do you mean batch-size?"),
        ("steps: 1\nxyzzy: 8", ", line 2: 'xyzzy' is no setting of a run; see --help"),
        ("config: a.yaml", ", line 1: 'config' is no setting of a run; "),
        ("steps: 2.5", ", line 1: steps is '2.5': Input should be a valid integer, "),
        ("steps: true", ", line 1: steps is 'true': Input should be a valid integer, "),
        ("lr: fast", ", line 1: lr is 'fast': Input should be a valid number, "),
        ("checkpointing: maybe", ", line 1: checkpointing is 'maybe': Input should be a valid boolean, "),
        ("method: qlora2", ", line 1: method is 'qlora2': Value error, 'qlora2' is not one of "),
        (
            "target-modules: [q_proj, v_proj]",
            ", line 1: target-modules takes one value; names go into one, with commas",
        ),
        ("batch_size: 8\nbatch-size: 4", ", line 2: batch-size is there twice"),
        ("steps: 1\nsteps: 1", ", line 2: steps is there twice"),
        ("- steps", " holds no settings; give it lines like 'batch-size: 8'"),
        ("", " holds no settings; give it lines like 'batch-size: 8'"),
        ("steps: [", " is not YAML: while parsing "),
        ("steps: \tx: y: z", " is not YAML: "),
        (b"\xff\xfe\xff", " is not YAML: "),
        ("[a, b]: 3", ", line 1: "),
    ],
)
def test_what_is_no_settings_is_refused_in_one_line(given, text, why):
    line = given(text)
    assert line.startswith(f"settings.yaml{why}")
    assert line.isprintable()


def test_a_value_out_of_its_range_is_refused_as_on_the_command_line(given):
    assert given("steps: 0") == "--steps is 0; it must be at least 1"


def test_a_file_that_is_not_there(program):
    assert program("finetune", "--config", "no.yaml") == (
        2, "", "qloralab: error: no.yaml cannot be read: No such file or directory\n"
    )  # fmt: skip


CHANGED = Settings(
    model=Path("m: #x"), out=Path("o"), data="null", batch_size=8, lr=1e-5, double_quant=False, skip="8", epochs=2,
    adapter=None, seed=-1, checkpointing=True, target_modules="é,\u2028b", dtype="float32",
)  # fmt: skip


@pytest.mark.parametrize("settings", [CHANGED, Settings(model=Path("m"), out=None)], ids=["changed", "defaults"])
def test_what_is_written_is_read_again(given, tmp_path, settings):
    write(settings, tmp_path / "run.yaml", steps=settings.epochs is not None)
    text = (tmp_path / "run.yaml").read_text(encoding="utf-8")
    assert given(text, "--out", "o", "--model", settings.model) == dataclasses.replace(settings, out=Path("o"))
    assert yaml.safe_load(text)["model"] == str(settings.model)


def test_the_file_of_a_run_repeats_it(program, model_dir, colours, metrics_of, tmp_path):
    words = ("--model", model_dir, "--data", colours, "--held-out", 4, "--epochs", 1, "--batch-size", 8, "--r", 4)
    status, _, err = program("finetune", *words, "--out", "first")
    assert (status, err) == (0, "")
    status, _, err = program("finetune", "--config", "first/run.yaml", "--out", "again")
    assert (status, err) == (0, "")
    first, again = (metrics_of(tmp_path / name) for name in ("first", "again"))
    assert [line["loss"] for line in first] == [line["loss"] for line in again]
    assert len(first) == 3
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["steps"], config["epochs"], config["r"]) == (2, None, 4)  # what it came to
    assert (tmp_path / "first" / "run.yaml").read_text() == (tmp_path / "again" / "run.yaml").read_text()
