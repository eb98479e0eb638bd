"""Architectures of transformers at tiny size, each through quantize_, inject_, two steps, save_adapter, load_adapter_.

What came of each is the table of ``docs/architectures.md``, which is compared here, line by line. To write it anew:
``python tests/lora/test_architectures.py``.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import qloralab as ql
from qloralab.lora.inject import adapters
from qloralab.nf4.dense_shares import dense_shares
from qloralab.nf4.linear import QuantizedLinear
from qloralab.nf4.model import left_out

TABLE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
H, V, IMAGE = 32, 96, 90  # hidden size, vocabulary, the token that stands for a patch
IDS = {"input_ids": torch.arange(2 * 8).view(2, 8)}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)}
BOTH = {"input_ids": torch.tensor([[IMAGE] * 4 + [1, 2, 3]]), **PIXELS}

BLOCK = {"hidden_size": H, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {
    **BLOCK, "vocab_size": V, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WIDE = {**TEXT, "head_dim": 16}
GPT = {**TEXT, "n_embd": H, "n_head": 2, "n_layer": 1, "n_positions": 64}
MOE = {**TEXT, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
PATCHES = {**BLOCK, "image_size": 16, "patch_size": 8}
PAIR = {
    "vocab_size": V, "d_model": H, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
    # T5
    "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2,
    # BART
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "forced_eos_token_id": None,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 2, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
EVERY_SECOND = {
    "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
    "expert_layer_offset": 1, "mamba_d_state": 8,
}  # fmt: skip

# By class: the fields of its config, and inputs.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "LlamaForCausalLM": (TEXT, IDS),
    "MistralForCausalLM": (TEXT, IDS),
    "Qwen2ForCausalLM": (TEXT, IDS),
    "Qwen3ForCausalLM": (WIDE, IDS),
    "Gemma2ForCausalLM": (WIDE, IDS),
    "Gemma3ForCausalLM": (WIDE, IDS),
    "Phi3ForCausalLM": (TEXT, IDS),
    "Olmo2ForCausalLM": (TEXT, IDS),
    "GPTNeoXForCausalLM": (TEXT, IDS),
    "OPTForCausalLM": ({**TEXT, "ffn_dim": 48, "word_embed_proj_dim": H}, IDS),
    "BloomForCausalLM": (GPT, IDS),
    "GPT2LMHeadModel": (GPT, IDS),
    "FalconForCausalLM": (TEXT, IDS),
    "MixtralForCausalLM": (MOE, IDS),
    "Qwen2MoeForCausalLM": ({**MOE, "num_experts": 4, "shared_expert_intermediate_size": 48}, IDS),
    "DeepseekV3ForCausalLM": ({**MOE, **LATENT}, IDS),
    "Llama4ForCausalLM": ({**MOE, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "head_dim": 16}, IDS),
    "GptOssForCausalLM": ({**MOE, "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, IDS),
    "MambaForCausalLM": ({**TEXT, "state_size": 8}, IDS),
    "JambaForCausalLM": ({**MOE, **EVERY_SECOND}, IDS),
    "RwkvForCausalLM": ({**TEXT, "num_hidden_layers": 2, "attention_hidden_size": H, "context_length": 64}, IDS),
    "BertForMaskedLM": (TEXT, IDS),
    "DebertaForMaskedLM": ({**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, IDS),
    "T5ForConditionalGeneration": (PAIR, {**IDS, "decoder_input_ids": IDS["input_ids"]}),
    "BartForConditionalGeneration": (PAIR, IDS),
    "ViTForImageClassification": (PATCHES, PIXELS),
    "LlavaForConditionalGeneration": (
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": H, **PATCHES},
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,  # its own -2 leaves the last layer of the vision model without a use
        },
        BOTH,
    ),
}  # fmt: skip


def build(name: str) -> Any:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**MODELS[name][0]))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)  # some start at zero, where gradients end
    return model


def quantized(name: str) -> Any:
    return ql.quantize_(build(name), compute_dtype=torch.float32)


def kinds(names: Iterable[str]) -> str:
    """The last components of paths that are no numbers."""
    return ", ".join(dict.fromkeys(re.sub(r"(\.\d+)+$", "", name).rpartition(".")[2] for name in names))


def row(name: str, folder: Path) -> str:
    """What comes of an architecture, as a line of the table."""
    title, inputs = re.sub(r"(For[A-Z]|LMHead)\w+$", "", name), MODELS[name][1]
    try:
        model = quantized(name)
    except ValueError as error:
        return f"| {title} | refused | | {str(error).partition('left out: ')[2]} |"
    shares = dense_shares(model)
    in_4_bits = {key for key, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    ql.inject_(model, ql.LoraConfig(r=16, lora_alpha=32)).train()
    assert adapters(model).keys() == in_4_bits

    optimizer = torch.optim.SGD(ql.trainable(model), lr=0.1)
    for _ in range(2):  # A has a gradient as soon as B is no longer zero
        optimizer.zero_grad()
        model(**inputs).logits.float().square().mean().backward()
        optimizer.step()
    assert [
        key for key, p in model.named_parameters() if p.requires_grad and not (p.grad is not None and p.grad.any())
    ] == []

    ql.save_adapter(model, folder)
    fresh = ql.load_adapter_(quantized(name), folder)
    with torch.no_grad():
        trained, loaded = (one.eval()(**inputs).logits for one in (model, fresh))
    assert trained.isfinite().all()
    assert torch.equal(trained, loaded)

    reasons: dict[str, list[str]] = {}
    for key, reason in left_out(model).items():
        if isinstance(model.get_submodule(key), nn.Linear) and reason != "the output head":
            reasons.setdefault(reason, []).append(key)
    dense = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in shares.items() if share > 0.02)
    why = "; ".join(f"{kinds(names)}: {reason}" for reason, names in reasons.items())
    return f"| {title} | {kinds(adapters(model))} | {100 * sum(shares.values()):.0f} %: {dense} | {why} |"


def rows_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ")][2:]


@pytest.mark.filterwarnings("ignore:save_adapter:UserWarning")  # PEFT leaves some out, which is not asked here
@pytest.mark.parametrize("name", MODELS)
def test_the_table_says_what_comes_of_an_architecture(name, tmp_path):
    assert row(name, tmp_path) == rows_of(TABLE.read_text(encoding="utf-8"))[list(MODELS).index(name)]


def test_the_table_has_a_line_for_each():
    assert len(rows_of(TABLE.read_text(encoding="utf-8"))) == len(MODELS) >= 22


def write() -> None:
    """Compute the table anew; the text above it stays."""
    head = TABLE.read_text(encoding="utf-8").partition("| --- |")[0]
    with tempfile.TemporaryDirectory() as folder:
        lines = [row(name, Path(folder, name)) for name in MODELS]
    TABLE.write_text(head + "\n".join(["| --- | --- | --- | --- |", *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
