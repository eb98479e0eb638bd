"""``qloralab merge`` writes what base and adapter compute, one tensor at a time, and says what 4 bits leave of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from qloralab import inject_, load_adapter_, load_quantized, quantize, quantize_, save_adapter
from qloralab.benchmarks.quantize import Shape, make
from qloralab.checkpoint.models import load_model, load_tokenizer, quiet
from qloralab.checkpoint.opened import Source
from qloralab.compute import precision, run_device
from qloralab.data_types import named_data_type
from qloralab.display import Display
from qloralab.errors import UserError
from qloralab.export.run import export
from qloralab.export.settings import ExportSettings
from qloralab.lora.config import LoraConfig
from qloralab.lora.inject import adapters, wrap_
from qloralab.lora.merged_weight import merged_quantized
from qloralab.merge import run as module
from qloralab.merge.run import Result, merge
from qloralab.merge.settings import MergeSettings
from qloralab.merge.survival import overall
from qloralab.nf4.files.checkpoint import Checkpoint
from qloralab.nf4.linear import QuantizedLinear
from qloralab.nf4.model import linear_names
from qloralab.train import finetune as finetune_module
from qloralab.train.finetune import finetune

IDS = torch.arange(2, 42).view(2, 20)


def write_adapter(model_dir: Path, path: Path, size: float = 0.05, **fields: Any) -> Path:
    """An adapter that does something, as PEFT's file."""
    model = inject_(quantize_(load_model(model_dir)), LoraConfig(**{"r": 4, "lora_alpha": 8, **fields}))
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.normal_(std=size)
    save_adapter(model, path)
    return path


@pytest.fixture
def adapter(model_dir: Path, tmp_path: Path) -> Path:
    return write_adapter(model_dir, tmp_path / "adapter")


@pytest.fixture
def run(model_dir: Path, adapter: Path, tmp_path: Path, silent: Display) -> Callable[..., Result]:
    """Merges into tmp_path/out, without a word: ``run(into="4bit")``."""
    start = {"model": model_dir, "adapter": adapter, "out": tmp_path / "out"}
    return lambda **options: merge(MergeSettings(**{**start, **options}), silent)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def trained(
    model_dir: Path, adapter: Path, *quantization: Any, skip: Any = (), dtype: torch.dtype | None = None
) -> Any:
    """The model as a run has it."""
    model = load_adapter_(quantize_(load_model(model_dir), *quantization, compute_dtype=dtype, skip=skip), adapter)
    return model if dtype is None else model.to(dtype)


def plain(path: Path, **options: Any) -> Any:
    """What transformers alone opens."""
    with quiet():
        return AutoModelForCausalLM.from_pretrained(path, **options)


def close(found: Tensor, expected: Tensor, base: Tensor) -> bool:
    """Within the rounding of weights to bfloat16, which is small against what the adapter does."""
    return bool((found - expected).norm() < 0.02 * (expected - base).norm())


def test_logits_of_the_dense_model_are_those_of_base_and_adapter(model_dir, adapter, run, tmp_path):
    result = run()
    assert (result.path, result.merged, result.survived) == (tmp_path / "out", 14, [])
    model = plain(tmp_path / "out", dtype=torch.float32)
    assert not [name for name, _ in model.named_modules() if "lora" in name]
    expected = logits(trained(model_dir, adapter, dtype=torch.float32))
    base = logits(quantize_(load_model(model_dir), compute_dtype=torch.float32).float())
    assert close(logits(model), expected, base)
    assert plain(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Hi").input_ids == [39, 72]
    original = logits(load_model(model_dir, torch.float32))
    assert not close(logits(model), expected + original - base, base), "merged onto the original weights"


@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_every_tensor_is_rounded_once(onto, model_dir, tmp_path, run):
    """Also of layers without an adapter, which training saw dequantized."""
    some = write_adapter(model_dir, tmp_path / "some", target_modules=["q_proj", "up_proj"], use_rslora=True)
    run(adapter=some, onto=onto)
    layers = adapters(load_adapter_(load_model(model_dir), some))
    before, after = Checkpoint(model_dir), Checkpoint(tmp_path / "out")
    assert {*after.names()} == {*before.names()}
    for name in before.names():
        exact = before.tensor(name).bfloat16().float()
        if "proj" in name and onto == "dequantized":
            exact = quantize(before.tensor(name).bfloat16()).dequantize(torch.float32)
        elif "proj" in name:
            exact = before.tensor(name).float()
        if (layer := layers.get(name.removesuffix(".weight"))) is not None:
            exact = exact + layer.config.scaling * (layer.lora_B @ layer.lora_A)
        found = after.tensor(name)
        assert found.dtype == torch.bfloat16
        assert ((found.float() - exact).abs() <= exact.abs() / 256 + 1e-7).all(), name
    assert len(layers) == 4


def test_the_run_says_what_it_trained_on(model_dir, settings, tmp_path, run, refusal, watched):
    options = {"data_type": "fp4", "block_size": 32, "double_quant": False, "skip": "down_proj"}
    finetune(settings(steps=1, lr=0.1, **options), Display(watched()[0].console))
    adapter = tmp_path / "run" / "adapter"
    display, printed = watched()
    merge(MergeSettings(model=model_dir, adapter=adapter, out=tmp_path / "out"), display)
    assert "fp4 in blocks of 32, float32 scales, says " in printed()
    before, after = Checkpoint(model_dir), Checkpoint(tmp_path / "out")
    layers = adapters(load_adapter_(load_model(model_dir), adapter))
    for name in ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"):
        exact = before.tensor(f"{name}.weight").bfloat16()
        if "down" not in name:
            exact = quantize(exact, "fp4", 32, False).dequantize(torch.float32)
            assert layers[name].lora_B.any()
        if name in layers:
            exact = exact + layers[name].config.scaling * (layers[name].lora_B @ layers[name].lora_A)
        assert ((after.tensor(f"{name}.weight").float() - exact).abs() <= exact.abs() / 256 + 1e-7).all(), name
    given = {"adapter": adapter, "out": tmp_path / "again"}
    said = f"would be ignored: {tmp_path / 'run' / 'config.json'} says how the run quantized; leave it out"
    for name, value in {"data_type": "nf4", "block_size": 64, "double_quant": False}.items():
        assert refusal(run, **given, **{name: value}) == f"--{name.replace('_', '-')} {said}"


def test_options_say_it_where_there_is_no_run(model_dir, adapter, run, tmp_path):
    run(data_type="nf4", block_size=128, double_quant=False)
    model = trained(model_dir, adapter, "nf4", 128, False, dtype=torch.float32)
    base = logits(quantize_(load_model(model_dir), "nf4", 128, False, compute_dtype=torch.float32).float())
    assert close(logits(plain(tmp_path / "out", dtype=torch.float32)), logits(model), base)


def test_an_adapter_beside_dense_weights(model_dir, settings, tmp_path, silent, refusal):
    finetune(settings(steps=2, lr=0.1, method="lora"), silent)
    adapter = tmp_path / "run" / "adapter"
    options = {"model": model_dir, "adapter": adapter}
    merge(MergeSettings(**options, out=tmp_path / "out"), silent)
    dense = load_model(model_dir, torch.float32)
    base = logits(dense)
    assert close(logits(plain(tmp_path / "out", dtype=torch.float32)), logits(load_adapter_(dense, adapter)), base)
    assert "trained beside dense weights; leave it out" in refusal(
        merge, MergeSettings(**options, out=tmp_path / "again", data_type="nf4"), silent
    )


def test_shards_stay_shards(model_dir, adapter, run, tmp_path):
    with quiet():
        load_model(model_dir).save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    run(model=tmp_path / "shards")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    run(out=tmp_path / "whole")
    one, other = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "whole")
    assert all(torch.equal(one.tensor(name), other.tensor(name)) for name in other.names())


def test_one_tensor_is_in_memory_at_a_time(model_dir, run, monkeypatch):
    """Counted: of the tensors that came of the checkpoint or went to the file, none lives when the next is made."""
    import weakref

    alive: list[weakref.ref[Tensor]] = []
    convert = module._Stream.convert

    def watched(self: Any, name: str) -> dict[str, Tensor]:
        assert not [one for one in alive if one() is not None]
        made = convert(self, name)
        alive.extend(weakref.ref(tensor) for tensor in made.values())
        return made

    monkeypatch.setattr(module._Stream, "convert", watched)
    run()
    assert len(alive) == len(Checkpoint(model_dir).names())


def test_a_4_bit_directory_is_merged_with_its_own_weights(model_dir, adapter, four_bits, run, tmp_path, refusal):
    packed = four_bits(model_dir, tmp_path / "packed", codebook="fp4", block_size=32, skip=["down_proj"])
    run(model=packed)
    expected = trained(model_dir, adapter, "fp4", 32, skip=["down_proj"], dtype=torch.float32)
    base = logits(load_quantized(packed, torch.float32).float())
    assert close(logits(plain(tmp_path / "out", dtype=torch.float32)), logits(expected), base)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    for options, why in (
        ({"data_type": "nf4"}, "--data-type would be ignored: .* holds 4-bit weights; leave it out"),
        ({"onto": "original"}, "--onto original needs the dense model; .* holds 4-bit weights"),
    ):
        assert re.fullmatch(why, refusal(run, model=packed, out=tmp_path / "new", **options))


class TestInto4Bits:
    @pytest.mark.parametrize("from_4bit", [False, True], ids=["dense", "4bit"])
    def test_weights_are_those_of_the_library(self, from_4bit, model_dir, four_bits, run, tmp_path):
        """The merged weight in float32, quantized as the base is; the rest is the base."""
        some = write_adapter(model_dir, tmp_path / "some", 0.5, target_modules=["q_proj", "up_proj"])
        model = four_bits(model_dir, tmp_path / "packed") if from_4bit else model_dir
        result = run(adapter=some, into="4bit", model=model, onto="dequantized")
        memory, file = trained(model_dir, some), load_quantized(tmp_path / "out")
        bitsandbytes: Any = plain(tmp_path / "out")
        for name in linear_names(memory):
            layer, found = memory.get_submodule(name), file.get_submodule(name).weight
            expected = layer.weight if isinstance(layer, QuantizedLinear) else merged_quantized(
                layer.base_layer.weight, layer.lora_A, layer.lora_B, layer.config.scaling
            )  # fmt: skip
            assert found.dtype == torch.bfloat16
            pairs: Any = zip(found.operands().tensors, expected.operands().tensors, strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
            theirs = bitsandbytes.get_submodule(name).weight
            if found.shape[1] % 64:  # where bitsandbytes takes the scales of other blocks
                continue
            assert torch.equal(dequantize_4bit(theirs.data, theirs.quant_state), found.dequantize())
        assert {one.layer.rpartition(".")[2] for one in result.survived} == {"up_proj", "q_proj"}

    def test_too_little_of_it_is_refused_without_force(self, model_dir, run, tmp_path, refusal):
        small = write_adapter(model_dir, tmp_path / "small", 3e-3)
        message = refusal(run, adapter=small, into="4bit", onto="dequantized")
        assert re.fullmatch(
            r"4 bits would keep 0\.\d\d\d of the adapter; merge --into bf16 or --onto original, train with finetune "
            r"--merge-aware, or give --force",
            message,
        )
        assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
        result = run(adapter=small, into="4bit", onto="dequantized", force=True)
        report = json.loads((tmp_path / "out" / "merge.json").read_text())
        assert report["overall"]["kept"] < 0.5
        assert f"{report['overall']['kept']:.3f}" in message
        assert [one["layer"] for one in report["layers"]] == [one.layer for one in result.survived]
        assert len(report["layers"]) == 14
        assert report["overall"]["output_error"] is None
        assert report["trained_on"]["codebook"] == "nf4"

    @pytest.mark.parametrize("onto", [None, "original"])
    def test_nothing_is_advised_that_is_done_or_cannot_be(self, onto, model_dir, four_bits, run, tmp_path, refusal):
        """Of 4-bit weights there is no original; where it is the original, it is no advice."""
        model, options = tmp_path / "model", {} if onto is None else {"double_quant": False}
        if onto is None:
            four_bits(model_dir, model)
        else:
            load_model(model_dir).save_pretrained(model)
        small = write_adapter(model_dir, tmp_path / "small", 3e-3 if onto is None else 1e-9)
        advised = "merge --into bf16, train with finetune --merge-aware, or give --force"
        assert refusal(run, model=model, adapter=small, into="4bit", onto=onto, **options).endswith(advised)

    def test_other_data_types_are_refused(self, run, refusal):
        said = "--into 4bit writes nf4 and fp4 alone, and this is int4 in blocks of 64, double quantization; use bf16"
        assert refusal(run, into="4bit", data_type="int4") == said

    def test_the_original_weights_are_under_it_by_default(self, model_dir, adapter, run, tmp_path):
        kept = overall(run(into="4bit").survived).kept
        assert 0.9 < kept < 1.1  # as a mean over weights that lie anywhere between two values
        name = "model.layers.1.mlp.up_proj"
        layer = adapters(load_adapter_(load_model(model_dir), adapter))[name]
        exact = Checkpoint(model_dir).tensor(f"{name}.weight").float() + 2 * layer.lora_B @ layer.lora_A
        found = Checkpoint(tmp_path / "out").quantized(f"{name}.weight")
        assert (found.codes() != quantize(exact.detach()).codes()).float().mean() < 1e-3

    def test_the_table_and_the_activations(self, model_dir, adapter, tmp_path, watched):
        display, printed = watched()
        options: Any = {"model": model_dir, "adapter": adapter, "out": tmp_path / "out", "into": "4bit", "force": True}
        result = merge(MergeSettings(**options, onto="dequantized", activations=True), display)
        lines = [line.split() for line in printed().splitlines() if re.match(r" *(all layers|model\.)", line)]
        assert len(lines) == 6
        assert lines[-1][:2] == ["all", "layers"]
        assert all(one.outputs is not None for one in result.survived)
        worst = min(result.survived, key=lambda one: one.kept)
        assert lines[0][0] == worst.layer
        assert worst.output_error is not None
        assert lines[0][-4:] == [f"{100 * worst.output_error:.3g}", "%", f"{100 * (worst.update_error or 0):.3g}", "%"]


def test_what_would_be_ignored_is_refused(refusal):
    def settings(**options: Any) -> MergeSettings:
        return MergeSettings(**{"model": Path("m"), "adapter": Path("a"), "out": Path("o"), **options})

    assert refusal(settings, into="8bit") == "--into is '8bit'; it must be one of bf16, 4bit"
    assert refusal(settings, onto="x") == "--onto is 'x'; it must be one of dequantized, original"
    lossless = "would be ignored: --into bf16 loses nothing of the adapter; leave it out"
    assert refusal(settings, force=True) == f"--force {lossless}"
    assert refusal(settings, activations=True) == f"--activations {lossless}"
    for name, value in {"data_type": "nf4", "block_size": 64, "double_quant": False}.items():
        said = f"--{name.replace('_', '-')} would be ignored: --onto original quantizes nothing; leave it out"
        assert refusal(settings, onto="original", **{name: value}) == said
    said = "--activations would be ignored: it goes with --onto dequantized; leave it out"
    assert refusal(settings, into="4bit", onto="original", activations=True) == said


@pytest.mark.parametrize(
    ("kind", "options", "onto"),
    [
        ("none", {}, "dequantized"),
        ("none", {"into": "4bit"}, "original"),
        ("none", {"into": "4bit", "onto": "dequantized", "force": True}, "dequantized"),
        ("lora", {"into": "4bit"}, "original"),
        ("merge-aware", {"into": "4bit"}, "dequantized"),
        ("merge-aware", {"into": "4bit", "onto": "original"}, "original"),
        ("packed", {"into": "4bit"}, "dequantized"),
    ],
)
def test_what_the_update_is_added_to(
    kind, options, onto, model_dir, adapter, settings, four_bits, tmp_path, watched, silent
):
    """By default what training saw; into 4 bits the original weights, but for those that are there in 4 bits alone."""
    if kind in ("lora", "merge-aware"):
        own = {"method": "lora"} if kind == "lora" else {"merge_aware": True, "lora_dropout": None}
        finetune(settings(steps=2, lr=0.1, **own), silent)
        adapter = tmp_path / "run" / "adapter"
    model = four_bits(model_dir, tmp_path / "packed") if kind == "packed" else model_dir
    display, printed = watched()
    merge(MergeSettings(model=model, adapter=adapter, out=tmp_path / "out", **options), display)
    assert re.search(rf"^ +onto  the {onto} weights, ", printed(), re.MULTILINE)
    if options:
        assert json.loads((tmp_path / "out" / "merge.json").read_text())["settings"]["onto"] == onto
        name = "model.layers.1.mlp.up_proj"
        layer, weight = adapters(load_adapter_(load_model(model_dir), adapter))[name], f"{name}.weight"
        start = Checkpoint(model_dir).tensor(weight)
        expected = merged_quantized(
            quantize(start.bfloat16()), layer.lora_A, layer.lora_B, 2.0, start if onto == "original" else None
        )
        assert torch.equal(Checkpoint(tmp_path / "out").quantized(weight).codes(), expected.codes())


def test_activations_of_the_original_weights_are_refused(run, refusal):
    said = "--activations goes with --onto dequantized, and original is the default here; give --onto dequantized"
    assert refusal(run, into="4bit", activations=True) == said


def test_what_does_not_fit_is_refused(model_dir, run, tmp_path, refusal, write_model):
    other = write_adapter(write_model("wide", head_dim=32), tmp_path / "other")
    assert "k_proj is for 64 x 64, the layer is 32 x 64" in refusal(run, adapter=other)
    assert "is not the directory of an adapter" in refusal(run, adapter=tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert "exists and is not empty" in refusal(run, out=tmp_path / "full")
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_the_embedding_is_not_merged(write_model, tmp_path, run, refusal):
    tied = write_model("tied", tie_word_embeddings=True)
    model = wrap_(load_model(tied), ["lm_head"], LoraConfig(2, 4))
    save_adapter(model, tmp_path / "head")
    said = f"{tmp_path / 'head'} adapts lm_head, whose weight another layer shares: merged, both would change"
    assert refusal(run, model=tied, adapter=tmp_path / "head") == said


def test_the_command(program, model_dir, adapter, tmp_path):
    status, out, err = program("merge", "--model", model_dir, "--adapter", adapter, "--out", "merged")
    assert (status, err) == (0, "")
    assert "    saved  merged\n" in out
    assert "nf4 in blocks of 64, double quantization, the default: no run's config.json says more" in out
    status, _, err = program("generate", "Colour?", "--model", "merged", "--dense", "--max-new-tokens", 2)
    assert (status, err) == (0, "")
    assert program("merge", "--out", "again") == (2, "", "qloralab: error: Missing option '--adapter'.\n")


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_merge_aware_run_is_merged_into_the_bits_that_it_trained(
    double_quant, model_dir, settings, tmp_path, silent, monkeypatch
):
    """The packed bytes of its last forward, and its logits, bit for bit."""
    models: list[Any] = []
    prepare = finetune_module.prepare

    def watched(*arguments: Any) -> Any:
        models.append((made := prepare(*arguments)).model)
        return made

    monkeypatch.setattr(finetune_module, "prepare", watched)
    finetune(settings(merge_aware=True, lora_dropout=None, lr=0.05, double_quant=double_quant), silent)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["merge_aware"], config["lora_dropout"]) == (True, 0.0)
    options: Any = {"model": model_dir, "adapter": tmp_path / "run" / "adapter", "out": tmp_path / "out"}
    result = merge(MergeSettings(**options, into="4bit"), silent)
    assert overall(result.survived).codes_changed > 0.01
    (model,) = models
    file = load_model(tmp_path / "out", model.dtype)
    layers = adapters(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        assert isinstance(layer.base_layer, QuantizedLinear)
        expected = merged_quantized(layer.base_layer.weight, layer.lora_A, layer.lora_B, layer.config.scaling)
        pairs: Any = zip(file.get_submodule(name).weight.operands(), expected.operands(), strict=True)
        assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs), name
    assert torch.equal(logits(file), logits(model))
    kind = named_data_type("nf4", None, double_quant)
    opened = Source.of(model_dir, kind, options["adapter"], silent).open(precision("auto", run_device()), silent)
    assert torch.equal(logits(file), logits(opened))  # as eval and generate open it
    with pytest.raises(UserError, match=r"was trained merge-aware, and .* is dense; merge-aware training takes"):
        Source.of(model_dir, None, options["adapter"], silent).open(precision("auto", run_device()), silent)
    assert not torch.equal(logits(file), logits(quantize_(load_model(model_dir), compute_dtype=model.dtype)))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("options", [{}, {"into": "4bit"}], ids=["bf16", "4bit"])
def test_a_gguf_file_is_merged_as_its_directory_is(kind, options, exportable, tmp_path, silent):
    """Loaded whole or streamed: the same tensors, biases among them, and the tokenizer from the file."""
    directory, file = exportable(kind, torch.bfloat16), tmp_path / "model.gguf"
    export(ExportSettings(model=directory, gguf=file), silent)
    adapter = write_adapter(directory, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    for model in (directory, file):
        out = tmp_path / model.name
        merge(MergeSettings(model=model, adapter=adapter, out=out.with_suffix(".out"), **options), silent)
    one, other = (Checkpoint(tmp_path / f"{name}.out") for name in (directory.name, "model"))
    assert {*one.names()} == {*other.names()}
    assert all(torch.equal(one.tensor(name), other.tensor(name)) for name in one.names())
    first, second = (load_tokenizer(path) for path in (directory, tmp_path / "model.out"))
    assert first("It is red").input_ids == second("It is red").input_ids


def test_what_is_no_parameter_or_is_kept_in_float32_keeps_its_dtype(exportable, tmp_path, silent, monkeypatch):
    directory = exportable("llama", torch.bfloat16)
    adapter = write_adapter(directory, tmp_path / "adapter")
    tensors = load_file(directory / "model.safetensors")
    frequencies, positions = "model.layers.0.self_attn.rotary_emb.inv_freq", "model.embeddings.position_ids"
    extra = {frequencies: torch.rand(8), positions: torch.arange(8)}
    norms = {name: tensor.float() for name, tensor in tensors.items() if name.endswith("input_layernorm.weight")}
    save_file(tensors | extra | norms, directory / "model.safetensors")
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["input_layernorm"])
    merge(MergeSettings(model=directory, adapter=adapter, out=tmp_path / "out"), silent)
    after = Checkpoint(tmp_path / "out")
    for name, tensor in (extra | norms).items():
        assert after.tensor(name).dtype == tensor.dtype
        assert torch.equal(after.tensor(name), tensor)
    assert after.tensor("model.norm.weight").dtype == torch.bfloat16
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["dtype"] == "bfloat16"
    assert "torch_dtype" not in fields


def test_the_older_name_of_the_dtype_does_not_stay(model_dir, adapter, run, tmp_path):
    old = shutil.copytree(model_dir, tmp_path / "old")
    fields = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps({**fields, "torch_dtype": "float16"}))
    run(model=old)
    assert "torch_dtype" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_layers_that_transformers_never_quantizes_are_written_dense(model_dir, adapter, run, tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", ["down_proj"])
    result = run(into="4bit")
    packed = {name.split(".")[-2] for name in Checkpoint(tmp_path / "out").quantized_names()}
    assert packed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    assert len(result.survived) == 12
    skipped = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert any("down_proj" in name for name in skipped["llm_int8_skip_modules"])


def test_of_a_merge_aware_run_nothing_is_refused(model_dir, settings, tmp_path, silent, refusal):
    """However little of the update moves a code: it is what was trained."""
    finetune(settings(merge_aware=True, lora_dropout=None, steps=1, lr=1e-4), silent)
    aware = tmp_path / "run" / "adapter"
    result = merge(MergeSettings(model=model_dir, adapter=aware, out=tmp_path / "out", into="4bit"), silent)
    assert overall(result.survived).kept < 0.5
    other = shutil.copytree(aware, tmp_path / "other" / "adapter")  # whose run nobody knows
    options: dict[str, Any] = {"model": model_dir, "adapter": other, "into": "4bit", "onto": "dequantized"}
    assert "4 bits would keep" in refusal(merge, MergeSettings(**options, out=tmp_path / "again"), silent)


_IN_A_PROCESS = """
import io, sys
from pathlib import Path
from rich.console import Console
from qloralab.display import Display
from qloralab.merge.run import merge
from qloralab.merge.settings import MergeSettings

model, adapter, out = map(Path, sys.argv[1:])
for into in ("bf16", "4bit"):
    settings = MergeSettings(model=model, adapter=adapter, out=out / into, into=into)
    peak = merge(settings, Display(Console(file=io.StringIO()))).peak_mb
print(peak)
"""


@pytest.mark.slow
def test_memory_follows_the_largest_tensor_not_the_model(tmp_path):
    """The peak of a process that merges 284 MB in bfloat16, beside that of one that merges 15 MB."""
    sizes, peaks = [], []
    for layers in (1, 20):
        model, adapter = tmp_path / f"model-{layers}", tmp_path / f"adapter-{layers}"
        sizes.append(make(model, Shape(hidden=768, intermediate=2048, vocabulary=256, layers=layers)) / 1e6)
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
        parts = {
            f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_{part}.weight": torch.randn(shape) / 100
            for layer in range(layers)
            for part, shape in (("A", (2, 768)), ("B", (2048, 2)))
        }
        save_file(parts, adapter / "adapter_model.safetensors")
        words = [sys.executable, "-c", _IN_A_PROCESS, model, adapter, tmp_path / f"out-{layers}"]
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(float(done.stdout))
    assert sizes[1] - sizes[0] > 250
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 4
