"""What the options say is what runs; what needs no torch loads none."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qloralab import __version__
from qloralab.settings import Settings
from qloralab.train import finetune as finetune_module
from qloralab.train import generate as generate_module
from qloralab.train.processes import ALONE


def test_every_setting_is_an_option_with_its_default(program, model_dir, monkeypatch):
    seen: list[Settings] = []
    stopped = finetune_module.UserError("enough")

    def stop(settings, processes):
        seen.append(settings)
        assert processes is ALONE
        raise stopped

    monkeypatch.setattr(finetune_module, "finetune", stop)
    changed = {
        "model": model_dir, "data": "d", "format": "chat", "method": "lora", "dtype": "float32", "out": Path("o"),
        "steps": 7, "batch_size": 6, "accumulate": 3, "max_length": 99, "too_long": "cut", "lr": 0.5, "r": 3,
        "lora_alpha": 5.0, "lora_dropout": 0.25, "max_grad_norm": 0.75, "held_out": 11, "eval_every": 13, "seed": 17,
    }  # fmt: skip
    words = [word for name, value in changed.items() for word in ("--" + name.replace("_", "-"), value)]
    program("finetune", *words, "--checkpointing")
    program("finetune", "--model", model_dir, "--out", "o")
    program("finetune", "--model", model_dir, "--adapter", "a", "--state-bits", 8, "--state-budget", 20)
    assert seen == [
        Settings(**changed, checkpointing=True),
        Settings(out=Path("o"), model=model_dir),
        Settings(out=None, model=model_dir, adapter=Path("a"), state_bits=8, state_budget=20),
    ]


def test_generate_hands_on_its_options(program, model_dir, monkeypatch):
    calls = []
    monkeypatch.setattr(
        generate_module, "answer", lambda *values, **named: calls.append((*values, *named.values())) or "the answer"
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("from\na file: Ω\n".encode()), "ascii"))
    start = ["generate", "--model", model_dir]
    assert program(*start, "--prompt", "Hi") == program(*start, "Hi") == (0, "the answer\n", "")
    more = ["--adapter", "a", "--dense", "--max-new-tokens", 5, "--dtype", "bfloat16"]
    assert program(*start, "--prompt", "-", *more)[0] == 0
    assert calls == [
        *[(model_dir, None, "Hi", 96, True, "auto", None)] * 2,
        (model_dir, Path("a"), "from\na file: Ω\n", 5, False, "bfloat16", None),
    ]


def test_help(program):
    status, out, err = program()
    assert (status, err) == (0, "")
    commands = out.partition("Commands:")[2]
    assert re.findall(r"^  (\w+)  +[A-Z].*\.$", commands, re.MULTILINE) == [
        "finetune", "generate", "report", "eval", "inspect", "quantize", "merge", "export", "memory", "parity",
        "doctor", "sass",
    ]  # fmt: skip
    assert program("--help") == (0, out, "")
    status, out, _ = program("finetune", "--help")
    assert status == 0
    for field in Settings.__dataclass_fields__:
        assert f"--{field.replace('_', '-')} " in out


def test_version(program):
    assert program("--version") == (0, f"qloralab {__version__}\n", "")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--help",
        "--version",
        "finetune --help",
        "finetune --steps x",
        "generate",
        "eval --help",
        "inspect --help",
        "merge --help",
        "export --help",
    ],
)
def test_what_needs_no_torch_loads_none(line):
    code = (
        "import sys\nfrom qloralab.cli import main\ntry: main()\n"
        "finally: print({'torch', 'transformers'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *line.split()], capture_output=True, text=True)
    assert done.stderr.endswith("set()\n")
    assert "Traceback" not in done.stderr
