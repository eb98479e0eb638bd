"""``qloralab quantize`` writes what bitsandbytes would, tensor by tensor, and leaves nothing when it cannot."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
)

from qloralab import (
    FormatError,
    LoraConfig,
    inject_,
    load_quantized,
    quantize,
    quantize_,
    save_adapter,
    save_quantized,
)
from qloralab.checkpoint import quantize_checkpoint as command_module
from qloralab.checkpoint import rewrite
from qloralab.checkpoint.models import load_model, quiet
from qloralab.checkpoint.quantize_checkpoint import Options, Result, quantize_model, storage_dtype
from qloralab.display import Display
from qloralab.nf4.files.checkpoint import Checkpoint

from .four_bits import (
    PROJECTIONS,
    assert_same,
    assert_same_logits,
    edit,
    edit_tensors,
    open_with_bitsandbytes,
    quantized_layers,
    write_llama,
)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A directory of one file, bfloat16."""
    write_llama(tmp_path / "dense", vocab_size=260, num_key_value_heads=4, eos_token_id=257)
    return tmp_path / "dense"


@pytest.fixture
def run(tmp_path: Path, silent: Display) -> Callable[..., Result]:
    """Quantizes into tmp_path/out, without a word: ``run(dense, codebook="fp4")``."""
    return lambda model, **options: quantize_model(model, tmp_path / "out", Options(**options), silent)


@pytest.fixture
def nothing_left(tmp_path: Path) -> Any:
    """At the end of the test nothing is in tmp_path that was not there in its course, the temporary names included."""
    yield
    assert not [path.name for path in tmp_path.iterdir() if path.name == "out" or path.name.startswith(".out")]


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(path)
    return {name: checkpoint.tensor(name).clone() for name in checkpoint.names()}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


CASES = {
    "nf4": ({}, {}),
    "tied, sharded": ({"tied": True, "shards": "20KB"}, {}),
    "bias, fp4 in blocks of 32": ({"bias": True}, {"codebook": "fp4", "block_size": 32, "double_quant": False}),
    "float32, stored as bfloat16": ({"dtype": torch.float32}, {"storage": torch.bfloat16}),
}


@pytest.mark.parametrize(("model", "options"), CASES.values(), ids=CASES)
def test_every_linear_layer_is_quantized_the_rest_is_copied_and_it_opens_everywhere(model, options, tmp_path, run):
    write_llama(tmp_path / "dense", **model)
    result = run(tmp_path / "dense", **options)
    before, checkpoint = tensors_of(tmp_path / "dense"), Checkpoint(tmp_path / "out")
    weights = [name for name in before if "proj.weight" in name]
    assert set(checkpoint.quantized_names()) == set(weights)
    assert set(checkpoint.plain_names()) == set(before) - set(weights)
    for name in checkpoint.plain_names():
        assert same_bytes(checkpoint.tensor(name), before[name]), name
    for name in weights:
        expected = quantize(before[name], **{key: v for key, v in options.items() if key != "storage"})
        found = checkpoint.quantized(name)
        assert (found.codebook, found.block_size, found.dtype) == (
            expected.codebook, expected.block_size, expected.dtype,
        )  # fmt: skip
        assert torch.equal(found.packed, expected.packed)
        assert torch.equal(found.absmax(), expected.absmax())
        assert checkpoint.describe(name)[0] == options.get("storage", torch.uint8)
    assert len(checkpoint.files) == len([*(tmp_path / "dense").glob("*.safetensors")])
    after = [checkpoint.describe(name) for name in checkpoint.names()]
    assert result == Result(
        path=tmp_path / "out",
        layers=2 * PROJECTIONS,
        weights=sum(before[name].numel() for name in weights),
        bits=8 * sum(checkpoint.quantized(n).nbytes for n in weights) / sum(before[n].numel() for n in weights),
        bytes_before=sum(tensor.nbytes for tensor in before.values()),
        bytes_after=sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in after),
        seconds=result.seconds,
        peak_mb=result.peak_mb,
    )
    ours, theirs = load_quantized(tmp_path / "out"), open_with_bitsandbytes(tmp_path / "out")
    assert_same(ours, theirs)
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("storage", [torch.uint8, torch.float16])
def test_the_config_is_the_one_that_transformers_writes(storage, dense, tmp_path, run):
    run(dense, codebook="fp4", double_quant=False, storage=storage)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=storage,
    )
    theirs = open_with_bitsandbytes(dense, quantization_config=config)
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "out" / "config.json").read_text() == (tmp_path / "theirs" / "config.json").read_text()


def test_the_same_as_in_memory(dense, tmp_path, run):
    run(dense)
    save_quantized(quantize_(load_model(dense)), tmp_path / "memory")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "memory" / name).read_text()
    found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "memory")
    assert found.keys() == expected.keys()
    assert all(same_bytes(tensor, expected[name]) for name, tensor in found.items())


def test_shards_have_the_names_and_the_index_of_transformers(tmp_path, run):
    write_llama(tmp_path / "dense", shards="20KB")
    run(tmp_path / "dense")
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert count > 2
    assert files == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {name: file for file in files for name in load_file(tmp_path / "out" / file)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(tmp_path / "out").values())


def test_layers_that_share_a_weight_stay_dense_as_in_transformers(tmp_path, run, monkeypatch):
    shared = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(2)]
    monkeypatch.setattr(LlamaForCausalLM, "_tied_weights_keys", {shared[1]: shared[0]})
    write_llama(tmp_path / "dense", tied=True)
    assert shared[1] not in tensors_of(tmp_path / "dense")
    assert run(tmp_path / "dense").layers == 2 * PROJECTIONS - 2
    ours = load_quantized(tmp_path / "out")
    assert ours.get_parameter(shared[1]) is ours.get_parameter(shared[0])
    theirs = open_with_bitsandbytes(tmp_path / "out")
    assert torch.equal(theirs.get_parameter(shared[1]), ours.get_parameter(shared[1]))
    assert sum(isinstance(module, Linear4bit) for module in theirs.modules()) == 2 * PROJECTIONS - 2


def test_layers_whose_weight_is_read_stay_dense(tmp_path, run):
    """As in a Mamba, whose mixer multiplies by the weights of three of its layers itself."""
    config = MambaConfig(vocab_size=97, hidden_size=64, state_size=16, num_hidden_layers=2, time_step_rank=64)
    with quiet():
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    assert run(tmp_path / "dense").layers == 2
    theirs = open_with_bitsandbytes(tmp_path / "out").train()
    ours, ids = load_quantized(tmp_path / "out"), torch.arange(20)[None]
    assert {name.rpartition(".")[2] for name in quantized_layers(ours)} == {"in_proj"}
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_small_files_come_along_and_nothing_else(dense, tmp_path, run):
    kept = {"tokenizer.json": "{}", "chat_template.jinja": "{{ x }}", "LICENSE": "free", "README.md": "# Ω"}
    for name, text in kept.items():
        (dense / name).write_text(text)
    left = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.onnx", "model.gguf", ".gitattributes")
    for name in (*left, "pytorch_model.bin.index.json"):
        (dense / name).write_text("x")
    (dense / "model.safetensors").rename(dense / "weights.safetensors")
    (dense / "original").mkdir()
    (dense / "original" / "params.json").write_text("{}")
    run(dense)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {*kept, "config.json", "generation_config.json", "model.safetensors"}
    assert {name: (tmp_path / "out" / name).read_text() for name in kept} == kept


def test_the_cache_of_the_hub_is_a_directory_like_any_other(dense, tmp_path, run):
    """Its files are symbolic links to blobs, which are copied."""
    blobs, snapshot = (tmp_path / "models--x--y" / name for name in ("blobs", "snapshots/0123"))
    dense.rename(tmp_path / "was")
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "was").iterdir():
        file.rename(blobs / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    run(snapshot)
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    assert len(Checkpoint(tmp_path / "out").quantized_names()) == 2 * PROJECTIONS


def test_a_config_without_a_dtype_gets_that_of_the_tensors(dense, tmp_path, run):
    edit(dense / "config.json", dtype=None)
    run(dense, storage=torch.float32)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_quantized(tmp_path / "out").dtype == torch.bfloat16


def test_an_empty_directory_is_a_place(dense, tmp_path, run):
    (tmp_path / "out").mkdir()
    run(dense)
    assert (tmp_path / "out" / "config.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "out"}


def poison(path: Path, name: str) -> None:
    """Put a NaN into a tensor of a one-file checkpoint."""
    edit_tensors(path / "model.safetensors", lambda tensors: tensors[name][5, 7].fill_(float("nan")))


def renamed(rename: Callable[[str], str]) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [*tensors]:
            tensors[rename(name)] = tensors.pop(name)

    return lambda dense: edit_tensors(dense / "model.safetensors", change)


def become_an_adapter(dense: Path) -> None:
    model = load_model(dense)
    shutil.rmtree(dense)
    save_adapter(inject_(model, LoraConfig(2, 2)), dense)


def become_a_run(dense: Path) -> None:
    (dense / "model.safetensors").unlink()
    (dense / "metrics.jsonl").write_text("")


def become_gpt2(dense: Path) -> None:
    """Made of Conv1D."""
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=64, n_layer=1, n_head=2)
    with quiet():
        AutoModelForCausalLM.from_config(config).save_pretrained(dense)


UP = "model.layers.1.mlp.up_proj.weight"
IN_MEMORY = r" has no tensor \S+; .* load it with transformers, then quantize_ and save_quantized$"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "NaN": (lambda dense: poison(dense, UP), rf"^\S+/dense/model\.safetensors: {UP}\[5, 7\] is nan; "),
    "float64": (
        lambda dense: write_llama(dense, dtype=torch.float64), "is torch.float64; only float32, bfloat16 and float16"
    ),
    "no weights": (lambda dense: (dense / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    "an adapter": (
        become_an_adapter, "is the directory of an adapter, not of a model; give --model the model it is for$"
    ),
    "a run": (become_a_run, "is the directory of a run, not of a model"),
    "an unknown model": (
        lambda dense: (dense / "config.json").write_text('{"model_type": "no-such-model"}'),
        "cannot be read as a model: ",
    ),
    "quantized by another": (
        lambda dense: edit(dense / "config.json", quantization_config={"quant_method": "gptq"}),
        "is quantized already, by gptq; give --model the dense model$",
    ),
    "quantized somehow": (
        lambda dense: edit(dense / "config.json", quantization_config="gptq"), "is quantized already, by unknown; give"
    ),
    "other names": (renamed(lambda name: name.removeprefix("model.")), IN_MEMORY),
    "another name": (renamed(lambda name: name.replace("lm_head", "head")), IN_MEMORY),
    "no linear layers": (become_gpt2, "dense has no linear layer to quantize$"),
}  # fmt: skip


@pytest.mark.usefixtures("nothing_left")
class TestRefused:
    @pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED)
    def test_models_that_are_not_quantized(self, spoil, message, dense, run, refusal):
        spoil(dense)
        assert re.search(message, refusal(run, dense))

    def test_quantized_already(self, dense, run, tmp_path, refusal):
        run(dense)
        made = (tmp_path / "out").rename(tmp_path / "4bit")
        expected = "4bit is quantized already, by bitsandbytes; give --model the dense model"
        assert refusal(run, made).endswith(expected)
        edit(made / "config.json", quantization_config=None)
        assert "holds 4-bit weights already" in refusal(run, made)

    def test_only_pickles(self, dense, run):
        (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
        with pytest.raises(FormatError, match="is a pickle, which can run code"):
            run(dense)

    def test_a_broken_file(self, dense, run):
        file = dense / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(FormatError) as caught:
            run(dense)
        assert caught.value.file == str(file)

    def test_a_file_that_cannot_be_read(self, dense, run, refusal, monkeypatch):
        def denied(source: Path, target: Path) -> None:
            raise PermissionError(13, "Permission denied", str(source))

        monkeypatch.setattr(rewrite.shutil, "copyfile", denied)
        assert refusal(run, dense) == f"{dense / 'generation_config.json'} cannot be read: Permission denied"

    @pytest.mark.parametrize("link", ["../secret", "{}/secret", "inside/../../secret", "inside/up/secret"])
    def test_a_link_that_leads_out_of_the_directory(self, link, dense, tmp_path, run, refusal):
        (tmp_path / "secret").write_text("x")
        (dense / "inside").mkdir()
        (dense / "inside" / "up").symlink_to("../..")
        (dense / "NOTICE").symlink_to("generation_config.json")
        (dense / "LICENSE").symlink_to(link.format(tmp_path))
        leads = f"{dense}/LICENSE leads out of the directory, to {tmp_path}/secret"
        assert refusal(run, dense) == f"{leads}; put a copy in its place, or remove it"

    def test_names_that_are_too_long(self, dense, tmp_path, silent, refusal):
        long = tmp_path / ("x" * 300)
        for out in (long, long / "out", tmp_path / ("x" * 250)):
            assert refusal(quantize_model, dense, out, None, silent) == f"{out} cannot be written: File name too long"
        assert f"{long} does not exist; --model takes" in refusal(quantize_model, long, tmp_path / "out", None, silent)

    def test_another_shape(self, dense, run):
        edit(dense / "config.json", intermediate_size=192)
        with pytest.raises(FormatError, match=r"is \[128, 64\]; config\.json makes it \[192, 64\]") as caught:
            run(dense)
        assert caught.value.tensor == "model.layers.0.mlp.gate_proj.weight"

    def test_a_disk_that_is_too_small(self, dense, run, refusal, monkeypatch):
        asked = []
        free = lambda path: asked.append(path) or SimpleNamespace(free=12_345)  # noqa: E731
        monkeypatch.setattr(rewrite.shutil, "disk_usage", free)
        assert re.search(r"out needs 137\.\d kB, and 12\.3 kB are free on its disk$", refusal(run, dense))
        assert asked == [dense.parent]

    def test_codes_that_do_not_fill_the_storage(self, dense, run, refusal, monkeypatch):
        def odd(*arguments):
            raise ValueError("odd")

        monkeypatch.setattr(command_module.bitsandbytes_layout, "describe", odd)
        assert refusal(run, dense) == f"{dense}: odd"

    def test_a_disk_that_is_full(self, dense, run, refusal, full_disk):
        with full_disk(10_000):
            assert refusal(run, dense).endswith("out cannot be written: File too large")

    def test_a_path_that_cannot_be_written(self, dense, tmp_path, silent, refusal):
        (tmp_path / "file").write_text("")
        assert "is not a directory; give --out" in refusal(quantize_model, dense, tmp_path / "file", None, silent)
        inside = tmp_path / "file" / "out"
        assert refusal(quantize_model, dense, inside, None, silent).endswith(f"{tmp_path / 'file'} is not a directory")

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal(self, number, dense, run, monkeypatch):
        seen = []

        def interrupted(*arguments: Any, **options: Any) -> Any:
            seen.append(options["name"])
            os.kill(os.getpid(), number)
            return quantize(*arguments, **options)

        monkeypatch.setattr(command_module, "quantize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(dense)
        assert len(seen) == 1


def test_a_directory_with_something_in_it_is_left_alone(dense, tmp_path, run, refusal):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    assert refusal(run, dense).endswith("out exists and is not empty; give --out the name of a new directory")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_what_the_options_may_be(refusal):
    assert storage_dtype("bfloat16") == torch.bfloat16
    assert refusal(storage_dtype, "int4").startswith("--storage is 'int4'; it must be one of uint8, int8, ")
    assert refusal(Options, block_size=48).startswith("--block-size is 48; it must be one of 32, 64, ")


def test_facts_and_a_bar(dense, tmp_path, watched):
    display, printed = watched()
    quantize_model(dense, tmp_path / "a" / "out", None, display)
    facts = dict(re.findall(r"^ *(\w[\w ]*?)  +(.*)$", printed(), re.MULTILINE))
    assert list(facts) == ["model", "4 bits", "size", "speed", "saved", "try it"]
    assert facts["model"] == "dense, 115.5 k parameters in 1 file"
    assert re.match(r"14 linear layers, 81.9 k weights at 4\.\d\d\d bits: 42\.\d kB$", facts["4 bits"])
    assert re.match(r"231\.0 kB -> 127\.\d kB$", facts["size"])
    assert facts["try it"] == f'qloralab generate --model {tmp_path / "a" / "out"} --prompt "…"'
    text = io.StringIO()
    quantize_model(dense, tmp_path / "out", None, Display(Console(file=text, width=100, force_terminal=True)))
    assert re.search(r"\d+/21 +\S*tensors", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.getvalue()))


def test_the_command(program, dense, tmp_path):
    options = ["--codebook", "fp4", "--block-size", 128, "--no-double-quant", "--storage", "bfloat16"]
    status, out, err = program("quantize", "--model", dense, "--out", "new", *options)
    assert (status, err) == (0, "")
    assert "    saved  new\n" in out
    weight = Checkpoint(tmp_path / "new").quantized("model.layers.0.mlp.up_proj.weight")
    assert (weight.codebook, weight.block_size, weight.double_quant) == ("fp4", 128, False)
    status, out, err = program("quantize", "--model", dense, "--out", "new")
    assert (status, out) == (2, "")
    assert err == "qloralab: error: new exists and is not empty; give --out the name of a new directory\n"


def test_the_command_has_the_defaults_of_the_library(program, dense, monkeypatch):
    seen: list[Any] = []
    monkeypatch.setattr(command_module, "quantize_model", lambda *arguments: seen.append(arguments))
    assert program("quantize", "--model", dense, "--out", "new")[0] == 0
    assert seen == [(dense, Path("new"), Options())]


@pytest.mark.slow
def test_a_gguf_file_is_loaded_and_saved_with_its_tokenizer(program, default_gguf, tmp_path):
    status, out, err = program("quantize", "--out", "new")
    assert (status, err) == (0, "")
    assert "134.5 M parameters in bfloat16" in out
    assert "210 linear layers, 106.2 M weights at 4.127 bits: 54.8 MB" in out
    assert (tmp_path / "new" / "tokenizer.json").is_file()
    status, out, err = program("generate", "--model", "new", "--prompt", "Say hello.", "--max-new-tokens", 8)
    assert (status, err) == (0, "")
    assert out.strip()
    message = program("quantize", "--out", "other", "--storage", "bfloat16")[2]
    assert message.endswith("--storage bfloat16 goes with a directory; a GGUF file is written with uint8\n")
    assert not [path for path in tmp_path.iterdir() if "other" in path.name]


def test_finetune_and_generate_take_the_directory(program, model_dir, colours, tmp_path):
    shutil.copytree(model_dir, tmp_path / "bf16")
    with quiet():
        load_model(model_dir, torch.bfloat16).save_pretrained(tmp_path / "bf16")
    assert program("quantize", "--model", "bf16", "--out", "4bit")[0] == 0
    start = ["--data", colours, "--steps", 1, "--held-out", 4]
    status, out, err = program("finetune", "--model", "4bit", "--out", "run", *start)
    assert (status, err) == (0, "")
    dense = program("finetune", "--model", "bf16", "--out", "dense", *start)[1]

    def facts(text: str) -> list[str]:
        return [
            re.sub(r"bf16|4bit", "", line)
            for line in text.splitlines()
            if re.match(r" *(model|quantized|val loss)", line)
        ]

    assert facts(out) == facts(dense)  # the same weights, hence the same losses
    assert len(facts(out)) == 3
    assert program("generate", "--model", "4bit", "--prompt", "Hi", "--adapter", "run/adapter")[::2] == (0, "")
    for method in ("lora", "full"):
        status, _, err = program("finetune", "--model", "4bit", "--out", method, "--method", method, *start)
        assert status == 2
        assert re.match(rf"qloralab: error: 4bit holds 4-bit weights and --method {method} trains .*dense model", err)
    assert program("generate", "--model", "4bit", "--prompt", "Hi", "--dense")[2] == (
        "qloralab: error: 4bit holds 4-bit weights; --dense needs the dense model\n"
    )


def test_layers_that_are_dense_in_a_4_bit_model_stay_dense(tmp_path, model_dir, four_bits, colours, program):
    path = four_bits(model_dir, tmp_path / "mixed", skip=["down_proj"])
    start = ["--data", colours, "--steps", 1, "--held-out", 4]
    status, out, err = program("finetune", "--model", path, "--out", "run", *start)
    assert (status, err) == (0, "")
    assert "12 linear layers" in out


@pytest.mark.slow
def test_memory_follows_the_largest_tensor_not_the_model(command, tmp_path):
    def peak(layers: int) -> float:
        config = LlamaConfig(
            vocab_size=64, hidden_size=1024, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=16
        )
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / f"dense{layers}")
        done = command("quantize", "--model", tmp_path / f"dense{layers}", "--out", tmp_path / f"out{layers}")
        assert done.returncode == 0, done.stderr
        match = re.search(r", (\d\.\d\d) GB of memory", done.stdout)
        assert match
        return 1000 * float(match[1])

    assert peak(20) - peak(1) < 60  # MB; the nineteen layers more are 400 MB
