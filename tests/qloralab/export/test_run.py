"""A GGUF file holds the model that was exported, as transformers reads it; an adapter's holds what llama.cpp's does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qloralab import LoraConfig, inject_, load_adapter_, load_quantized, save_adapter
from qloralab.checkpoint.models import load_model, load_tokenizer, quiet
from qloralab.display import Display
from qloralab.export.run import export
from qloralab.export.settings import ExportSettings
from qloralab.lora.files import read_adapter
from qloralab.lora.inject import adapters, wrap_
from qloralab.merge.run import merge
from qloralab.merge.settings import MergeSettings
from qloralab.nf4.files.errors import FormatError
from qloralab.train.finetune import finetune

IDS = torch.arange(2, 42).view(2, 20)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@pytest.fixture(scope="module")
def llama_dir(exportable: Callable[..., Path]) -> Path:
    return exportable("llama")


@pytest.fixture
def run(llama_dir: Path, tmp_path: Path, silent: Display) -> Callable[..., Path]:
    """Exports to tmp_path/out.gguf, without a word: ``run(dtype="f16")``; returns the path."""

    def made(**options: Any) -> Path:
        settings = ExportSettings(**{"model": llama_dir, "gguf": tmp_path / "out.gguf", **options})
        assert export(settings, silent) == settings.gguf.stat().st_size
        return settings.gguf

    return made


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def reopened(path: Path) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def rounded(model: Any, dtype: torch.dtype) -> Any:
    """The matrices of a model through a dtype."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(parameter.to(dtype))
    return model


def write_adapter(model_dir: Path, path: Path, **fields: Any) -> Path:
    config = AutoConfig.from_pretrained(model_dir)
    model = inject_(AutoModelForCausalLM.from_config(config), LoraConfig(**{"r": 4, "lora_alpha": 8, **fields}))
    for layer in adapters(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    save_adapter(model, path)
    return path


class TestModel:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_logits_are_those_of_the_weights_in_the_dtype(self, dtype, llama_dir, run):
        """Bit for bit: the same weights, in the same model, in float32."""
        found = reopened(run(dtype=dtype))
        expected = rounded(load_model(llama_dir, torch.float32), DTYPES[dtype])
        assert torch.equal(logits(found), logits(expected))
        assert found.config.max_position_embeddings == 512

    @pytest.mark.parametrize(
        ("kind", "changes"),
        [
            ("llama", {"tie_word_embeddings": True}),
            ("llama", {"head_dim": 32}),
            ("llama", {"num_key_value_heads": 4}),
            ("mistral", {"sliding_window": None}),
            ("qwen2", {"use_sliding_window": False}),
            ("qwen3", {"head_dim": 128}),
        ],
        ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()),
    )
    def test_architectures(self, kind, changes, exportable, run):
        model = exportable(kind, **changes)
        found = reopened(run(model=model, dtype="f32"))
        assert torch.equal(logits(found), logits(load_model(model, torch.float32)))
        assert found.config.tie_word_embeddings == changes.get("tie_word_embeddings", False)

    def test_what_the_file_says(self, run):
        reader = gguf.GGUFReader(run())
        fields = {name: field.contents() for name, field in reader.fields.items()}
        expected = {
            "general.architecture": "llama", "general.type": "model", "general.name": "tiny-llama",
            "general.file_type": 32, "llama.block_count": 2, "llama.context_length": 512, "llama.embedding_length": 64,
            "llama.feed_forward_length": 96, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
            "llama.rope.freq_base": 1e5, "llama.rope.dimension_count": 16, "llama.vocab_size": 300,
            "llama.attention.key_length": 16, "llama.attention.value_length": 16, "tokenizer.ggml.model": "gpt2",
        }  # fmt: skip
        assert {name: fields[name] for name in expected} == expected
        assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
        types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        assert types.pop("token_embd.weight") == types.pop("output.weight") == "BF16"
        assert types.pop("output_norm.weight") == "F32"
        layer = {"attn_norm": "F32", "ffn_norm": "F32"}
        layer |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), "BF16")
        assert types == {f"blk.{number}.{name}.weight": kind for number in (0, 1) for name, kind in layer.items()}

    def test_weights_in_4_bits_are_dequantized(self, llama_dir, four_bits, tmp_path, run):
        packed = four_bits(llama_dir, tmp_path / "packed")
        found = reopened(run(model=packed, dtype="f32"))
        weights = found.state_dict()
        model = load_quantized(packed)
        for name in ("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
            assert torch.equal(weights[f"{name}.weight"], model.get_submodule(name).weight.dequantize(torch.float32))
        assert torch.equal(weights["lm_head.weight"], model.lm_head.weight.float())

    def test_shards_and_the_program_itself(self, llama_dir, tmp_path, run, program):
        with quiet():
            load_model(llama_dir, torch.float32).save_pretrained(tmp_path / "shards", max_shard_size="40KB")
        load_tokenizer(llama_dir).save_pretrained(tmp_path / "shards")
        assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 2
        status, out, err = program("export", "--model", tmp_path / "shards", "--gguf", "new/a.gguf", "--dtype", "f32")
        assert (status, err) == (0, "")
        assert "    model  shards, llama, 21 tensors\n" in out
        assert torch.equal(
            logits(load_model(tmp_path / "new" / "a.gguf", torch.float32)), logits(reopened(run(dtype="f32")))
        )
        assert program("export") == (2, "", "qloralab: error: Missing option '--gguf'.\n")

    def test_what_is_not_written_is_refused_by_name(self, exportable, model_dir, run, refusal, tmp_path):
        rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
        for kind, changes, why in (
            ("gpt2", {}, "a GPT2LMHeadModel is not written as GGUF; LlamaForCausalLM, MistralForCausalLM, "),
            ("llama", {"attention_bias": True}, "biases in the attention: a GGUF file of llama could not say so"),
            ("llama", {"mlp_bias": True}, "biases in the MLP: "),
            ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu': "),
            ("llama", {"rope_parameters": rope}, "rope_type 'linear': "),
            ("mistral", {"sliding_window": 64}, "a sliding window: "),
        ):
            assert refusal(run, model=exportable(kind, **changes)).startswith(why)
        assert refusal(run, model=model_dir).startswith("how the tokenizer splits text is not recognized; ")
        large = exportable("llama")
        tensors = load_file(large / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e5
        save_file(tensors, large / "model.safetensors")
        said = "blk.1.ffn_up.weight has values that float16 cannot hold; export --dtype bf16 or f32"
        assert refusal(run, model=large, dtype="f16") == said
        assert [path.name for path in tmp_path.iterdir()] == [], "a part of a file is left"

    def test_a_checkpoint_that_is_not_the_models_is_refused(self, exportable, run):
        model = exportable("llama")
        whole = load_file(model / "model.safetensors")
        name = "model.layers.1.mlp.up_proj.weight"
        for tensors, wrong, why in (
            ({key: t for key, t in whole.items() if key != name}, name, "is not in the checkpoint"),
            (whole | {"extra.weight": torch.ones(1)}, "extra.weight", "is no tensor of the model"),
            (whole | {name: torch.ones(64, 96)}, name, r"is \[64, 96\]; config.json makes it \[96, 64\]"),
        ):
            save_file(tensors, model / "model.safetensors")
            with pytest.raises(FormatError, match=rf"{wrong}.*{why}"):
                run(model=model)
        save_file(whole | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, model / "model.safetensors")
        run(model=model)

    def test_what_is_there_stays(self, run, refusal, tmp_path):
        (tmp_path / "out.gguf").write_text("mine")
        assert refusal(run) == f"{tmp_path / 'out.gguf'} exists; give --gguf the name of a new file"
        assert (tmp_path / "out.gguf").read_text() == "mine"

    def test_a_full_disk_is_one_line(self, run, refusal, full_disk, tmp_path):
        with full_disk(4000):
            assert refusal(run) == f"{tmp_path / 'out.gguf'} cannot be written: File too large"
        assert [*tmp_path.iterdir()] == []

    def test_one_tensor_is_in_memory_at_a_time(self, run, monkeypatch):
        import weakref

        from qloralab.export import run as module

        alive: list[weakref.ref[Any]] = []
        rounded = module._rounded

        def watched(part: Any) -> np.ndarray:
            assert not [one for one in alive if one() is not None]
            made = rounded(part)
            alive.append(weakref.ref(made))
            return made

        monkeypatch.setattr(module, "_rounded", watched)
        run()
        assert len(alive) == 21


class TestAdapter:
    @pytest.mark.parametrize("use_rslora", [False, True])
    def test_a_reader_finds_the_adapter(self, use_rslora, llama_dir, tmp_path, run):
        """alpha / r * B A, with rows where GGUF has them, is what the layer adds."""
        path = write_adapter(llama_dir, tmp_path / "adapter", use_rslora=use_rslora)
        reader = gguf.GGUFReader(run(adapter=path))
        fields = {name: field.contents() for name, field in reader.fields.items()}
        assert fields["general.type"] == "adapter"
        assert fields["general.architecture"] == "llama"
        assert fields["adapter.type"] == "lora"
        assert fields["adapter.lora.alpha"] == (16 if use_rslora else 8)
        assert not [name for name in fields if name.startswith(("tokenizer", "llama"))]
        tensors = {one.name: torch.from_numpy(one.data.copy()) for one in reader.tensors}
        config, layers = read_adapter(None, path)
        assert len(tensors) == 2 * len(layers) == 28
        names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
        names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.down_proj": "ffn_down"}
        for layer, (A, B) in layers.items():
            number, kind = layer.removeprefix("model.layers.").split(".", 1)
            name = f"blk.{number}.{names.get(kind, 'ffn_up')}.weight"
            a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
            assert torch.equal(a, A)
            heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(kind)
            if heads:  # back: pairs lie side by side in the file
                assert not torch.equal(b, B)
                b = b.view(heads, 8, 2, 4).transpose(1, 2).reshape(B.shape)
            assert torch.equal(b, B)
            assert fields["adapter.lora.alpha"] / config.r == config.scaling

    def test_added_to_the_exported_model_it_is_the_merged_one(self, llama_dir, tmp_path, run, silent):
        """In the file's own order of rows, without what this library knows of it."""
        path = write_adapter(llama_dir, tmp_path / "adapter")
        model, adapter = run(dtype="f32"), run(adapter=path, gguf=tmp_path / "adapter.gguf")
        weights = {one.name: one.data.copy() for one in gguf.GGUFReader(model).tensors}
        parts = {one.name: one.data for one in gguf.GGUFReader(adapter).tensors}
        dense = load_adapter_(load_model(llama_dir, torch.float32), path)
        for name in [name for name in weights if f"{name}.lora_a" in parts]:
            weights[name] += 8 / 4 * parts[f"{name}.lora_b"] @ parts[f"{name}.lora_a"]
        other = gguf.GGUFWriter(tmp_path / "sum.gguf", "llama")
        for key, field in gguf.GGUFReader(model).fields.items():
            if key.startswith(("llama.", "general.name", "tokenizer")):
                kind = field.types[0]
                other.add_key_value(key, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
        for name, weight in weights.items():
            other.add_tensor(name, weight)
        other.write_header_to_file()
        other.write_kv_data_to_file()
        other.write_tensors_to_file()
        other.close()
        expected = logits(dense)
        assert (logits(reopened(tmp_path / "sum.gguf")) - expected).abs().max() < 1e-4 * expected.abs().max()

    def test_its_dtype(self, llama_dir, tmp_path, run):
        path = write_adapter(llama_dir, tmp_path / "adapter", target_modules=["v_proj"])
        types = {one.tensor_type.name for one in gguf.GGUFReader(run(adapter=path, dtype="f16")).tensors}
        assert types == {"F16"}

    def test_beside_the_default_model(self, default_gguf, tmp_path, run):
        path = tmp_path / "adapter"
        config = LoraConfig(r=2, lora_alpha=4, target_modules=["k_proj"])
        model = inject_(AutoModelForCausalLM.from_config(_config(default_gguf)), config)
        save_adapter(model, path)
        file = gguf.GGUFReader(run(model=default_gguf, adapter=path))
        base = {one.name: list(one.shape) for one in gguf.GGUFReader(default_gguf).tensors}
        assert len(file.tensors) == 60
        for one in file.tensors:
            name, _, part = one.name.rpartition(".")
            columns, rows = base[name]
            assert list(one.shape) == ([columns, 2] if part == "lora_a" else [2, rows])  # the fastest first

    def test_what_would_be_another_model_is_refused(
        self, llama_dir, exportable, settings, silent, tmp_path, run, refusal
    ):
        options = {"model": llama_dir, "merge_aware": True, "lora_dropout": None, "steps": 1}
        finetune(settings(**options), silent)
        aware = tmp_path / "run" / "adapter"
        said = (
            "was trained merge-aware: beside its base it is another model; qloralab merge --into 4bit, and export that"
        )
        assert refusal(run, adapter=aware) == f"{aware} {said}"
        tied = exportable("llama", tie_word_embeddings=True)
        save_adapter(wrap_(load_model(tied), ["lm_head"], LoraConfig(2, 4)), tmp_path / "head")
        said = f"{tmp_path / 'head'} adapts lm_head, whose weight is that of the embedding: GGUF has no such tensor"
        assert refusal(run, model=tied, adapter=tmp_path / "head") == said
        assert "is not the directory of an adapter" in refusal(run, adapter=tmp_path)

    def test_an_adapter_of_the_head(self, llama_dir, tmp_path, run):
        save_adapter(wrap_(load_model(llama_dir), ["lm_head"], LoraConfig(2, 4)), tmp_path / "head")
        file = gguf.GGUFReader(run(adapter=tmp_path / "head"))
        assert [one.name for one in file.tensors] == ["output.weight.lora_a", "output.weight.lora_b"]


def _config(path: Path) -> Any:
    with quiet():
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.slow
def test_the_default_model_merged_and_exported(default_gguf, tmp_path, run, silent, refusal):
    model = inject_(AutoModelForCausalLM.from_config(_config(default_gguf)), LoraConfig(r=2, lora_alpha=4))
    for layer in adapters(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    save_adapter(model, tmp_path / "adapter")
    said = f"{default_gguf} is a GGUF file already; give --adapter, or --model a directory"
    assert refusal(run, model=default_gguf) == said
    merge(MergeSettings(model=default_gguf, adapter=tmp_path / "adapter", out=tmp_path / "merged"), silent)
    path = run(model=tmp_path / "merged")
    assert torch.equal(logits(reopened(path)), logits(load_model(tmp_path / "merged", torch.float32)))
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    trained = load_tokenizer(tmp_path / "merged")
    text = "def f(x):\n    return 12345 + x  # \u2028 naïve, '日本' don't\n\n"
    messages = [{"role": "user", "content": text}]
    assert tokenizer(text).input_ids == trained(text).input_ids
    for render in (True, False):
        assert tokenizer.apply_chat_template(messages, tokenize=not render) == trained.apply_chat_template(
            messages, tokenize=not render
        )


def test_settings(refusal):
    def settings(**options: Any) -> ExportSettings:
        return ExportSettings(**{"model": Path("m"), "gguf": Path("g"), **options})

    assert refusal(settings, dtype="q4_0") == "--dtype is 'q4_0'; it must be one of bf16, f16, f32"
    said = "--pre-tokenizer would be ignored: an adapter has no tokenizer; leave it out"
    assert refusal(settings, adapter=Path("a"), pre_tokenizer="gpt-2") == said
