"""What a GGUF file says of an architecture, and what it calls the tensors.

The names are those of the ``gguf`` package's table (``model.layers.0.self_attn.q_proj`` is ``blk.0.attn_q``), and so
are the keys. In Llama's architecture, which is Mistral's too, more differs from Hugging Face's files than names. Its
rotary embedding turns pairs of dimensions, and the two of a pair lie d/2 apart in Hugging Face's files, side by side in
a GGUF file. So the rows of the query and key projections, and those of B of an adapter beside them, move::

    W  [heads, 2, d/2, in]  ->  [heads, d/2, 2, in]              of each head of d rows

Whatever the file could not say, and a reader would so compute without, is refused: other frequencies, biases where the
architecture has none, sliding windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import UserError


@dataclass(frozen=True)
class _Kind:
    """How GGUF knows a class of transformers.

    Attributes:
        name: of the architecture.
        pairs: whether a rotary pair lies side by side.
    """

    name: str
    pairs: bool = False


_KINDS = {
    "LlamaForCausalLM": _Kind("llama", pairs=True),
    "MistralForCausalLM": _Kind("llama", pairs=True),
    "Qwen2ForCausalLM": _Kind("qwen2"),
    "Qwen3ForCausalLM": _Kind("qwen3"),
}


class Architecture:
    """The architecture of a model.

    Args:
        model: of transformers; its parameters may be on the meta device.

    Attributes:
        name: that GGUF has for it.

    Raises:
        UserError: GGUF has no name for it here, or the file could not say all of it.
    """

    def __init__(self, model: Any):
        import gguf

        kind = _KINDS.get(type(model).__name__)
        if kind is None:
            known = ", ".join(_KINDS)
            raise UserError(f"a {type(model).__name__} is not written as GGUF; {known} are")
        self.config, self.name, self._pairs = model.config, kind.name, kind.pairs
        self._check()
        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind.name)
        self._names = gguf.get_tensor_name_map(arch, self.config.num_hidden_layers)

    @property
    def head_dim(self) -> int:
        """Rows of one attention head."""
        config = self.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def _check(self) -> None:
        config = self.config
        rope = getattr(config, "rope_parameters", None) or {}
        found = {
            f"rope_type {rope.get('rope_type')!r}": rope.get("rope_type", "default") != "default",
            "rotary embeddings of a part of the head": rope.get("partial_rotary_factor", 1) not in (None, 1),
            "a sliding window": bool(getattr(config, "sliding_window", None)),
            "biases in the attention": bool(getattr(config, "attention_bias", False)),
            "biases in the MLP": bool(getattr(config, "mlp_bias", False)),
            f"hidden_act {config.hidden_act!r}": config.hidden_act != "silu",
        }
        for what in (what for what, is_there in found.items() if is_there):
            raise UserError(f"{what}: a GGUF file of {self.name} could not say so")

    def tensor(self, name: str) -> str:
        """What GGUF calls a tensor of the model.

        Raises:
            UserError: it has no name for it.
        """
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"GGUF has no name for the tensor {name} of a {self.name}")
        return found

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the model, or B of an adapter beside it, with its rows where GGUF has them.

        Args:
            name: of the tensor in the model.
            tensor: [out, ...].
        """
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        count = heads.get(name.split(".")[-2]) if self._pairs else None
        if count is None:
            return tensor
        return tensor.reshape(count, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    def describe(self, writer: Any) -> None:
        """Write the keys of the architecture.

        Args:
            writer: a ``gguf.GGUFWriter``.
        """
        config = self.config
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_freq_base(float((getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)))
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
