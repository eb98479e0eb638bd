"""4-bit models go to a directory and back, here and through transformers with bitsandbytes, without a bit changed.

bitsandbytes runs in training mode only: in evaluation mode it may rearrange its weights. All shapes are whole blocks,
where its dequantization on CPUs is right.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DeepseekV3Config,
    GPT2Config,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from qloralab import FormatError, LoraConfig, inject_, load_adapter_, load_quantized, quantize_, save_quantized
from qloralab.checkpoint import quantized_model
from qloralab.checkpoint.models import load_model, quiet
from qloralab.checkpoint.quantized_model import parameter_count, quantizable, skeleton
from qloralab.nf4 import linear
from qloralab.nf4.linear import QuantizedLinear
from qloralab.nf4.processor import ComputeDtype

from .four_bits import (
    IDS,
    PROJECTIONS,
    assert_same,
    assert_same_logits,
    assert_same_state,
    edit,
    edit_tensors,
    llama,
    open_with_bitsandbytes,
    quantized_layers,
)


def bitsandbytes_writes(model: Any, folder: Path, max_shard_size: str = "5GB", **options: Any) -> tuple[Any, Path]:
    """The model as transformers and bitsandbytes quantize it, and the directory it is saved in."""
    model.save_pretrained(folder / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, **options)
    theirs = open_with_bitsandbytes(folder / "dense", quantization_config=config, dtype=model.dtype)
    theirs.save_pretrained(folder / "theirs", max_shard_size=max_shard_size)
    return theirs, folder / "theirs"


NF4 = {
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16,
}
WRITTEN = {
    "nf4": (llama, NF4),
    "tied": (lambda: llama(tied=True), NF4),
    "bias": (lambda: llama(bias=True), NF4),
    "fp4, no double quantization": (llama, {**NF4, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}),
    "stored as bfloat16": (llama, {**NF4, "bnb_4bit_quant_storage": torch.bfloat16}),
    "float16": (lambda: llama(dtype=torch.float16), {**NF4, "bnb_4bit_compute_dtype": torch.float16}),
    "float32, the defaults": (lambda: llama(dtype=torch.float32), {}),
    "one layer dense": (llama, {**NF4, "llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp.down_proj"]}),
    "sharded": (lambda: llama(bias=True), {**NF4, "max_shard_size": "20KB"}),
}


@pytest.mark.parametrize(("make", "options"), WRITTEN.values(), ids=WRITTEN)
def test_what_bitsandbytes_wrote_opens_here(make: Callable[[], Any], options, tmp_path):
    theirs, path = bitsandbytes_writes(make(), tmp_path, **options)
    assert (len([*path.glob("*.safetensors")]) > 3) is ("max_shard_size" in options)
    ours = load_quantized(path)
    assert_same(ours, theirs, 2 * PROJECTIONS - ("llm_int8_skip_modules" in options))
    assert_same_logits(ours, theirs)
    assert not ours.training
    assert ours.dtype == theirs.dtype
    tied = ours.lm_head.weight is ours.model.embed_tokens.weight
    assert tied is theirs.config.tie_word_embeddings
    assert not any(t.is_meta for t in (*ours.parameters(), *ours.buffers()))
    for module in ours.modules():
        if isinstance(module, QuantizedLinear):
            assert module.compute_dtype == options.get("bnb_4bit_compute_dtype", torch.float32)
            assert module.bias is None or not module.bias.requires_grad
    assert ours.model.embed_tokens.weight.requires_grad


SAVED = {
    "nf4": (llama, {}),
    "tied": (lambda: llama(tied=True), {}),
    "bias": (lambda: llama(bias=True), {}),
    "fp4, blocks of 32, no double quantization": (
        llama, {"codebook": "fp4", "block_size": 32, "double_quant": False}
    ),
    "float32": (lambda: llama(dtype=torch.float32), {"compute_dtype": torch.float32}),
    "one layer dense": (llama, {"skip": ["model.layers.1.mlp.down_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize(("make", "options"), SAVED.values(), ids=SAVED)
def test_what_is_saved_here_opens_everywhere(make: Callable[[], Any], options, tmp_path):
    model = quantize_(make(), **{"compute_dtype": torch.bfloat16, **options})
    save_quantized(model, tmp_path)
    ours, theirs = load_quantized(tmp_path), open_with_bitsandbytes(tmp_path)
    assert_same_state(ours, model)
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, model(IDS).logits)
    assert_same(ours, theirs, 2 * PROJECTIONS - ("skip" in options))
    assert_same_logits(ours, theirs)


def test_the_files_are_those_of_transformers(tmp_path):
    model = llama(tied=True, bias=True)
    _, path = bitsandbytes_writes(model, tmp_path, **NF4)
    save_quantized(quantize_(model), tmp_path / "ours")
    assert {file.name for file in (tmp_path / "ours").iterdir()} == {file.name for file in path.iterdir()}
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "ours" / name).read_text() == (path / name).read_text()
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "ours", path))
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in expected.items()}


def test_a_generation_config_comes_along(tmp_path):
    model: Any = quantize_(llama())
    model.generation_config.top_k = 17
    model.generation_config.do_sample = True
    save_quantized(model, tmp_path)
    assert load_quantized(tmp_path).generation_config.top_k == 17
    (tmp_path / "generation_config.json").unlink()
    assert load_quantized(tmp_path).generation_config.eos_token_id == 5


def test_a_layer_of_gpt2_opens_though_its_dense_weight_is_transposed(tmp_path):
    config = GPT2Config(
        vocab_size=97, n_positions=64, n_embd=64, n_layer=1, n_head=2, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
    )
    theirs, path = bitsandbytes_writes(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), tmp_path, **NF4)
    ours = load_quantized(path)
    assert_same(ours, theirs, layers=4)
    assert_same_logits(ours, theirs)


def test_experts_stay_dense_and_buffers_come_along(tmp_path):
    sizes: dict[str, Any] = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 64}
    heads |= {"kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    experts: dict[str, Any] = {
        "moe_intermediate_size": 64,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
    }
    config = DeepseekV3Config(**sizes, **heads, **experts, topk_group=1, first_k_dense_replace=1)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias  # a buffer that is saved
    bias.copy_(torch.arange(4))
    save_quantized(quantize_(model, compute_dtype=torch.bfloat16), tmp_path)
    ours, theirs = load_quantized(tmp_path), open_with_bitsandbytes(tmp_path)
    assert torch.equal(ours.model.layers[1].mlp.gate.e_score_correction_bias, bias)
    assert_same(ours, theirs, len(quantized_layers(model)))
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("cpu", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("asked", [None, torch.bfloat16, torch.float32], ids=str)
def test_a_file_does_not_depend_on_the_machine(tmp_path, monkeypatch, asked, cpu):
    """Where the compute dtype was left open it is the paper's there; one that was chosen is written as it is."""
    torch.manual_seed(1)
    dense = llama(bias=True, dtype=torch.float32)
    monkeypatch.setattr(linear, "dtype_of", lambda device: ComputeDtype(cpu, ""))
    save_quantized(quantize_(dense, compute_dtype=asked), tmp_path)
    stated = asked or torch.bfloat16
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_compute_dtype"] == str(stated).removeprefix("torch.")
    tensors = load_file(tmp_path / "model.safetensors")
    torch.manual_seed(1)
    biases = {n: p for n, p in llama(bias=True, dtype=torch.float32).named_parameters() if n.endswith("bias")}
    assert biases
    for name, bias in biases.items():
        assert tensors[name].dtype == stated
        assert torch.equal(tensors[name], bias.to(stated)), name
    layer = load_quantized(tmp_path).model.layers[0].mlp.up_proj
    assert (layer.compute_dtype, layer.follows_device) == (stated, False)


def test_the_config_says_what_dtype_the_rest_has(tmp_path):
    save_quantized(quantize_(llama(bias=True)), tmp_path)
    layer = load_quantized(tmp_path, torch.float32).model.layers[0].mlp.up_proj  # a compute dtype that is chosen
    assert (layer.compute_dtype, layer.bias.dtype) == (torch.float32, torch.float32)
    edit(tmp_path / "config.json", dtype=None)
    assert load_quantized(tmp_path).dtype == torch.bfloat16, "without one the tensors have theirs"
    edit(tmp_path / "config.json", torch_dtype="float32")  # as versions before 5 call it
    model = load_quantized(tmp_path)
    rest = {p.dtype for name, p in model.named_parameters() if not name.endswith("bias")}
    assert rest == {torch.float32}
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_what_transformers_keeps_in_float32_stays_dense_and_in_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", ["o_proj"])
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["norm"])
    model = llama()
    assert not any("o_proj" in name for name in quantizable(model))
    with pytest.raises(
        ValueError, match=r"o_proj: transformers keeps this layer in float32; give quantize_ skip=\['o_proj'\]"
    ):
        save_quantized(quantize_(llama()), tmp_path)
    save_quantized(quantize_(model, skip=["o_proj"]), tmp_path)
    ours, theirs = load_quantized(tmp_path), open_with_bitsandbytes(tmp_path)
    assert_same(ours, theirs, 2 * (PROJECTIONS - 1))
    dtypes = {name: parameter.dtype for name, parameter in ours.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {n for n in dtypes if "norm" in n}


def test_a_skeleton_has_no_memory(tmp_path):
    llama(tied=True).save_pretrained(tmp_path)
    model = skeleton(tmp_path)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(quantizable(model)) == 2 * PROJECTIONS


def test_parameters_in_4_bits_count(tmp_path):
    model = llama(tied=True, bias=True)
    expected = sum(p.numel() for p in model.parameters())
    assert parameter_count(model) == expected
    assert parameter_count(quantize_(model)) == expected


def test_a_model_that_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="the model is a Sequential, not one of transformers, whose files these are"):
        save_quantized(quantize_(nn.Sequential(nn.Linear(64, 64))), tmp_path)
    with pytest.raises(ValueError, match="has no quantized layer; quantize_ it first"):
        save_quantized(llama(), tmp_path)
    with pytest.raises(ValueError, match="has adapters; save_adapter saves them"):
        save_quantized(inject_(quantize_(llama()), LoraConfig(2, 2)), tmp_path)
    with pytest.raises(ValueError, match="are in int4; bitsandbytes knows nf4 and fp4 only"):
        save_quantized(quantize_(llama(), codebook="int4"), tmp_path)
    model = quantize_(llama(), skip=["layers.0"])
    with pytest.raises(ValueError, match=r"layers\.0\.\S+ is in fp4 with double quantization, computed in bfloat16, "):
        save_quantized(quantize_(model, codebook="fp4"), tmp_path)
    assert not [*tmp_path.iterdir()]


def test_no_weights_are_written_over(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_text("precious")
    with pytest.raises(FileExistsError, match="exists; save_quantized writes over no weights"):
        save_quantized(quantize_(llama()), tmp_path)
    assert (tmp_path / "model-00001-of-00002.safetensors").read_text() == "precious"


def test_a_full_disk_leaves_nothing(tmp_path, full_disk):
    with full_disk(10_000), pytest.raises(OSError, match="File too large"):
        save_quantized(quantize_(llama()), tmp_path)
    assert not [*tmp_path.iterdir()]


WEIGHT = "model.layers.1.mlp.up_proj.weight"
EDITS = {
    "a plain tensor missing": (
        lambda t: t.pop("model.norm.weight"), "model.norm.weight", r"is missing: config\.json asks for it$"
    ),
    "a 4-bit weight missing": (
        lambda t: [t.pop(name) for name in [*t] if name.startswith(WEIGHT)], WEIGHT, "is missing: config"
    ),
    "two missing": (
        lambda t: (t.pop("lm_head.weight"), t.pop("model.norm.weight")), "model.norm.weight", "and so are 1 others"
    ),
    "a part missing": (lambda t: t.pop(f"{WEIGHT}.absmax"), f"{WEIGHT}.absmax", "is missing"),
    "one too many": (lambda t: t.update(extra=torch.ones(1)), "extra", "is no tensor of the model"),
    "another shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(65)}), "model.norm.weight", r"is \[65\]; .* makes it \[64\]"
    ),
    "another layer's 4-bit weight": (
        lambda t: t.update({n.replace("layers.0.mlp.up", "layers.0.self_attn.q"): v
                            for n, v in t.items() if "layers.0.mlp.up" in n}),
        "model.layers.0.self_attn.q_proj.weight",
        r"is \[128, 64\]; config\.json makes it \[64, 64\]",
    ),
    "a 4-bit norm": (
        lambda t: t.update({n.replace("model.layers.0.mlp.up_proj", "model.norm"): v
                            for n, v in t.items() if "layers.0.mlp.up" in n}),
        "model.norm.weight",
        "is in 4 bits, but no weight of a linear layer",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "tensor", "message"), EDITS.values(), ids=EDITS)
def test_tensors_that_are_not_the_models(change, tensor, message, tmp_path):
    save_quantized(quantize_(llama()), tmp_path)
    file = tmp_path / "model.safetensors"
    edit_tensors(file, change)
    with pytest.raises(FormatError, match=message) as caught:
        load_quantized(tmp_path)
    assert (caught.value.file, caught.value.tensor) == (str(file), tensor)


def test_tensors_that_old_versions_saved_are_ignored(tmp_path):
    save_quantized(quantize_(llama()), tmp_path)
    edit_tensors(tmp_path / "model.safetensors", lambda t: t.update({"model.rotary_emb.inv_freq": torch.zeros(8)}))
    model = load_quantized(tmp_path)
    assert model.model.rotary_emb.inv_freq.amax() == 1


def test_a_head_that_differs_from_the_embedding_it_is_said_to_be_tied_to(tmp_path):
    model: Any = quantize_(llama(tied=True))
    save_quantized(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    head = torch.randn(97, 64, dtype=torch.bfloat16)
    edit_tensors(tmp_path / "model.safetensors", lambda tensors: tensors.update({"lm_head.weight": head}))
    ours = load_quantized(tmp_path)
    assert torch.equal(ours.lm_head.weight, head)
    assert torch.equal(ours.model.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("text", "field", "message"),
    [
        ("{", None, "is not JSON"),
        ('{"a": "\xff"}', None, "is not JSON"),  # in Latin-1
        ("[]", None, "holds a JSON list, not an object"),
        ("[" * 100_000, None, "is not JSON"),
        ('{"model_type": "llama"}', "quantization_config", "is missing: the weights are not quantized"),
        (
            '{"quantization_config": {"quant_method": "awq"}}',
            "quantization_config.quant_method",
            "is 'awq'; expected one of bitsandbytes",
        ),
    ],
)
def test_a_config_that_does_not_fit(text, field, message, tmp_path):
    with pytest.raises(FileNotFoundError):
        load_quantized(tmp_path)
    (tmp_path / "config.json").write_text(text, "latin-1")
    with pytest.raises(FormatError, match=message) as caught:
        load_quantized(tmp_path)
    assert (caught.value.file, caught.value.field) == (str(tmp_path / "config.json"), field)


@pytest.mark.parametrize("change", [{"rms_norm_eps": 10**299}, {"hidden_size": "64"}], ids=str)
def test_a_config_that_transformers_does_not_take(change, tmp_path, refusal):
    save_quantized(quantize_(llama()), tmp_path)
    edit(tmp_path / "config.json", **change)
    with pytest.raises(FormatError, match=f"none that transformers takes: .*{next(iter(change))}"):
        load_quantized(tmp_path)
    edit(tmp_path / "config.json", quantization_config=None)
    assert refusal(load_model, tmp_path).startswith(f"{tmp_path} cannot be read as a model: Validation error for field")


def test_a_quantized_model_trains_adapters(tmp_path):
    save_quantized(quantize_(llama()), tmp_path)
    model = inject_(load_quantized(tmp_path), LoraConfig(2, 2))
    nn.functional.cross_entropy(model(IDS).logits[0].float(), IDS[0]).backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert len(gradients) == 2 * PROJECTIONS
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_wrappers_leave_no_trace(tmp_path):
    model: Any = quantize_(llama(bias=True))
    save_quantized(model, tmp_path / "bare")
    compiled: Any = torch.compile(model.model.layers[0])
    model.model.layers[0] = checkpoint_wrapper(compiled)
    save_quantized(torch.compile(nn.DataParallel(model)), tmp_path / "wrapped")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "wrapped" / name).read_bytes() == (tmp_path / "bare" / name).read_bytes()


def test_a_config_of_before_is_never_beside_new_weights(tmp_path, monkeypatch):
    """As where the process is killed between the two."""
    (tmp_path / "config.json").write_text("of another model")
    monkeypatch.setattr(quantized_model, "write_config", lambda *_: None)
    save_quantized(quantize_(llama()), tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("options", [{}, {"skip": ["mlp"], "codebook": "fp4"}], ids=["all", "some"])
def test_save_pretrained_writes_what_opens(options, tmp_path):
    model: Any = quantize_(llama(bias=True), compute_dtype=torch.bfloat16, **options)
    model = copy.deepcopy(model)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert not hasattr(model.config, "quantization_config")
    ours = load_quantized(tmp_path)
    assert_same(ours, open_with_bitsandbytes(tmp_path), len(quantized_layers(model)))
    assert_same_state(ours, model)
    ours.save_pretrained(tmp_path / "again")
    assert_same_state(load_quantized(tmp_path / "again"), model)


def test_save_pretrained_refuses_what_it_could_not_open(tmp_path):
    model: Any = quantize_(llama(), codebook="int4")
    with pytest.raises(ValueError, match="are in int4; bitsandbytes knows nf4 and fp4 only"):
        model.save_pretrained(tmp_path)
    model = inject_(quantize_(llama()), LoraConfig(2, 2))
    with pytest.raises(ValueError, match="is not pushed to the hub"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("quantized", [True, False])
def test_a_trainer_of_transformers_writes_the_adapter(quantized, tmp_path):
    def model() -> Any:
        torch.manual_seed(3)
        return quantize_(llama(), compute_dtype=torch.bfloat16) if quantized else llama()

    trained: Any = inject_(model(), LoraConfig(2, 4))
    data: Any = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
    )
    with quiet():
        Trainer(trained, arguments, train_dataset=data).train()
    for step, last in ((1, False), (2, True)):
        saved = tmp_path / f"checkpoint-{step}"
        assert not [*saved.glob("model*.safetensors")]
        loaded = load_adapter_(model(), saved)
        with torch.no_grad():
            assert torch.equal(loaded(IDS).logits, trained.eval()(IDS).logits) == last
