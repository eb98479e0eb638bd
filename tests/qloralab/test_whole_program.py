"""The installed command, as a process of its own: the default job, and Ctrl-C."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from matplotlib import pyplot as plt
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qloralab.nf4.processor import compute_dtype, processor_class

KEYS = ["step", "tokens", "loss", "val_loss", "lr", "grad_norm", "tokens_per_s", "rss_mb"]
# The layers of the default model; adapters do not depend on the vocabulary.
SHAPE = LlamaConfig(
    vocab_size=8,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    bos_token_id=None,
    eos_token_id=None,
)


@pytest.mark.slow
def test_the_default_job(default_gguf, command, metrics_of, tmp_path):
    done = command(
        "finetune", "--steps", 3, "--held-out", 8, "--eval-every", 3, "--out", "run", cwd=tmp_path, timeout=400
    )
    assert (done.returncode, done.stderr) == (0, "")
    run = tmp_path / "run"
    files = {"run.yaml", "config.json", "metrics.jsonl", "loss.png", "samples.md", "adapter", "checkpoints"}
    assert {file.name for file in run.iterdir()} == files
    assert {file.name for file in tmp_path.iterdir()} == {"run"}

    lines = metrics_of(run)
    assert [list(line) for line in lines] == [KEYS] * 4
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    # The model's own loss, far below log(49152) = 10.8 of a model that was read wrongly; then it falls.
    assert 3.5 < lines[0]["val_loss"] < 5.0
    assert lines[3]["val_loss"] < lines[0]["val_loss"] - 0.5
    assert all(0 < line["loss"] < 6 and 0 < line["grad_norm"] < 100 for line in lines[1:])
    assert 500 < lines[3]["rss_mb"] < 2500

    config = json.loads((run / "config.json").read_text())
    assert (config["method"], config["steps"], config["result"]["interrupted"]) == ("qlora", 3, False)
    dtype, why = compute_dtype("cuda" if torch.cuda.is_available() else "cpu")
    assert (config["dtype"], config["dtype_reason"]) == (str(dtype).removeprefix("torch."), why)
    assert f"    dtype  {config['dtype']}: {why}\n" in done.stdout
    assert config["versions"]["processor"] == processor_class()
    assert config["result"]["peak_mb"] < 2500
    assert plt.imread(run / "loss.png")[..., :3].std() > 0.05
    samples = (run / "samples.md").read_text()
    assert [samples.count(f"**{name}**") for name in ("before", "after", "reference")] == [3, 3, 3]
    assert samples.count("Write a docstring for this Python function") == 3
    assert len(re.findall(r"^## .+\.py:\d+", samples, re.MULTILINE)) == 3

    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert len(weights) == 2 * 30 * 7
    assert all(tensor.isfinite().all() and tensor.count_nonzero() for tensor in weights.values())
    opened = peft.PeftModel.from_pretrained(LlamaForCausalLM(SHAPE), run / "adapter")
    found = peft.get_peft_model_state_dict(opened, save_embedding_layers=False)
    assert found.keys() == weights.keys()
    assert all(found[name].float().equal(tensor) for name, tensor in weights.items())

    asked = command(
        "generate", "--adapter", run / "adapter", "--prompt", "Say hello.", "--max-new-tokens", 6, timeout=200
    )
    assert (asked.returncode, asked.stderr) == (0, "")
    assert re.search(r"[A-Za-z]{2}", asked.stdout)


@pytest.fixture
def long_run(launch, model_dir, colours, tmp_path) -> subprocess.Popen[str]:
    """A run into tmp_path/run that only Ctrl-C ends."""
    words = ["--model", model_dir, "--data", colours, "--out", tmp_path / "run", "--held-out", 4, "--steps", 100_000]
    return launch("finetune", *words)


def interrupt(
    process: subprocess.Popen[str], when: Callable[[], object], *numbers: signal.Signals
) -> tuple[int, str, str]:
    """Send signals, by default what Ctrl-C sends, as soon as it is time."""
    try:
        end = time.monotonic() + 90
        while not when():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        for number in numbers or (signal.SIGINT,):
            process.send_signal(number)
            time.sleep(0.05)  # else two of one kind are one
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGHUP] * 2], ids=["SIGINT", "SIGHUP"])
def test_a_signal_keeps_what_was_trained(long_run, model_dir, metrics_of, tmp_path, numbers):
    out = tmp_path / "run"
    metrics = out / "metrics.jsonl"
    trained = lambda: metrics.exists() and metrics.read_text().count("\n") >= 2  # noqa: E731
    status, shown, err = interrupt(long_run, trained, *numbers)
    assert (status, err) == (130, "\nqloralab: stopped\n")
    assert "stopping" in shown
    lines = metrics_of(out)
    assert [line["step"] for line in lines] == list(range(len(lines)))
    result = json.loads((out / "config.json").read_text())["result"]
    assert result["interrupted"] is True
    assert result["steps"] == lines[-1]["step"] < 100000
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "**before**" in (out / "samples.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    opened = peft.get_peft_model_state_dict(peft.PeftModel.from_pretrained(base, out / "adapter"))
    assert all(tensor.count_nonzero() for tensor in opened.values())


def test_ctrl_c_while_loading_leaves_nothing(long_run, tmp_path):
    for line in long_run.stdout:
        if "16 examples + 4 held out" in line:  # the data is read, the model is next
            break
    status, _, err = interrupt(long_run, lambda: True)
    assert (status, err) == (130, "\nqloralab: stopped\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("library", ["numpy", "torch", "transformers"])
def test_ctrl_c_while_a_library_is_imported(long_run, tmp_path, library):
    maps = Path(f"/proc/{long_run.pid}/maps")
    first = {"numpy": "numpy/", "torch": "libtorch_cpu", "transformers": "tokenizers/"}[library]  # a file it maps early
    status, _, err = interrupt(long_run, lambda: first in maps.read_text())
    assert (status, err) == (130, "\nqloralab: stopped\n")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def words(model_dir, colours) -> list[object]:
    """A run of three steps."""
    return ["finetune", "--model", model_dir, "--data", colours, "--held-out", 4, "--steps", 3]


def test_two_runs_into_one_directory(launch, words, metrics_of, tmp_path):
    runs = [launch(*words, "--out", "run", cwd=tmp_path) for _ in range(2)]
    ends = sorted((run.communicate(timeout=120)[1], run.returncode) for run in runs)
    assert ends[0] == ("", 0)
    refusal, status = ends[1]
    assert status == 2
    assert re.fullmatch(r"qloralab: error: run (was taken by another|exists and is not empty).*\n", refusal)
    assert_complete(tmp_path / "run", metrics_of)


def assert_complete(run: Path, metrics_of) -> list[str]:
    """All of a run of three steps is there. Returns its notes."""
    files = {"run.yaml", "config.json", "metrics.jsonl", "loss.png", "samples.md", "adapter", "checkpoints"}
    assert {file.name for file in run.iterdir()} == files
    assert [line["step"] for line in metrics_of(run)] == [0, 1, 2, 3]
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(tensor.count_nonzero() for tensor in weights.values())
    config = json.loads((run / "config.json").read_text())
    assert config["result"]["steps"] == 3
    return config["notes"]


def test_nobody_is_left_to_watch(launch, words, metrics_of, tmp_path):
    """As behind ``|& tee``, which dies: neither stream has a reader."""
    run = launch(*words, "--out", "run", cwd=tmp_path)
    for line in run.stdout:
        if "model" in line:
            break
    run.stdout.close()
    run.stderr.close()
    assert run.wait(timeout=120) == 0
    assert assert_complete(tmp_path / "run", metrics_of) == ["the display could not be written: Broken pipe"]
