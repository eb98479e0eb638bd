"""Every kind of model that is held in 4 bits is opened as what it was: the class, the names, the numbers.

The oracle is transformers with bitsandbytes, which reads what is written here, and writes what is read here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, BitsAndBytesConfig

from qloralab import FormatError, load_quantized, quantize_, save_quantized
from qloralab.checkpoint.models import load_model, quiet

from .checkpoint.four_bits import assert_same, assert_same_state, edit_tensors, open_with_bitsandbytes

HIDDEN = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {"vocab_size": 97, **HIDDEN}
HEADS = {"num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"moe_intermediate_size": 64, "num_experts_per_tok": 2, "num_experts": 12, "num_local_experts": 12}
IMAGES = {"image_size": 28, "patch_size": 14}


def config(kind: str, *fields: dict[str, Any], **more: Any) -> Any:
    merged: dict[str, Any] = {}
    for part in (*fields, more):
        merged |= part
    return AutoConfig.for_model(kind, **merged)


MODELS: dict[str, Callable[[], Any]] = {
    "LlamaForSequenceClassification": lambda: config("llama", SMALL, HEADS, num_labels=3, pad_token_id=0),
    "BertModel": lambda: config("bert", SMALL),
    "BertForMaskedLM": lambda: config("bert", SMALL),
    "BertForSequenceClassification": lambda: config("bert", SMALL),
    "ViTForImageClassification": lambda: config("vit", HIDDEN, IMAGES),
    "T5ForConditionalGeneration": lambda: config(
        "t5", vocab_size=97, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4
    ),
    "LlavaForConditionalGeneration": lambda: transformers.LlavaConfig(
        text_config=config("llama", SMALL, HEADS), vision_config=config("clip_vision_model", HIDDEN, IMAGES),
        image_token_index=96,
    ),
    "Gemma3ForConditionalGeneration": lambda: transformers.Gemma3Config(
        text_config=config("gemma3_text", SMALL, HEADS), vision_config=config("siglip_vision_model", HIDDEN, IMAGES),
        mm_tokens_per_image=4, image_token_index=96, boi_token_index=95, eoi_token_index=94,
    ),
    "GPTNeoXForCausalLM": lambda: config("gpt_neox", SMALL),
    "MixtralForCausalLM": lambda: config("mixtral", SMALL, HEADS, EXPERTS),
    "Qwen3MoeForCausalLM": lambda: config("qwen3_moe", SMALL, HEADS, EXPERTS),
    "GptOssForCausalLM": lambda: config("gpt_oss", SMALL, HEADS, EXPERTS),
}  # fmt: skip
RENAMED = ("Gemma3ForConditionalGeneration", "GPTNeoXForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM")


def make(name: str) -> Any:
    torch.manual_seed(0)
    fields = MODELS[name]()
    fields.dtype = torch.bfloat16
    return getattr(transformers, name)(fields).to(torch.bfloat16).eval()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_here_opens_everywhere(name, tmp_path):
    model = make(name)
    quantize_(model, skip=[*(model._keep_in_fp32_modules or ())])
    save_quantized(model, tmp_path)
    ours = load_quantized(tmp_path)
    assert_same_state(ours, model, dtypes=False)  # biases are in the compute dtype that the file states
    assert_same(ours, open_with_bitsandbytes(tmp_path, type(model)), None)


def written_by_bitsandbytes(name: str, folder: Any, **options: Any) -> Any:
    model = make(name)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    with quiet():
        model.save_pretrained(folder / "dense")
        theirs = type(model).from_pretrained(folder / "dense", dtype=torch.bfloat16, quantization_config=four_bits)
        theirs.save_pretrained(folder / "theirs", **options)
    return theirs


@pytest.mark.parametrize("name", MODELS)
def test_what_bitsandbytes_wrote_opens_here(name, tmp_path):
    theirs = written_by_bitsandbytes(name, tmp_path, **({"max_shard_size": "60KB"} if name in RENAMED else {}))
    assert_same(load_quantized(tmp_path / "theirs"), theirs, None)


GATE = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(GATE.format(3)), r"experts\.0\.w1\.weight.*do not make"),
        (lambda t: t.update({GATE.format(1): torch.ones(3, 64)}), r"experts\.0\.w1\.weight.*do not make"),
        (lambda t: t.update({"lm_head.bias": torch.ones(3)}), "lm_head.bias': is no tensor of the model"),
        (
            lambda t: t.update({"model.layers.0.mlp.gate.weight": torch.ones(4, 64)}),
            "has the place of another tensor, model.layers.0.mlp.gate.weight",
        ),
    ],
    ids=["an expert is missing", "an expert of another shape", "one too many", "a place taken twice"],
)
def test_tensors_that_do_not_make_the_model(edit, message, tmp_path):
    written_by_bitsandbytes("MixtralForCausalLM", tmp_path)
    edit_tensors(tmp_path / "theirs" / "model.safetensors", edit)
    with pytest.raises(FormatError, match=message):
        load_quantized(tmp_path / "theirs")


def test_the_program_takes_models_that_continue_a_text(tmp_path, refusal):
    save_quantized(quantize_(make("BertForSequenceClassification")), tmp_path)
    assert refusal(load_model, tmp_path) == (
        f"{tmp_path} holds a BertForSequenceClassification; --model takes a causal language model"
    )
