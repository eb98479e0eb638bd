"""How much memory a run takes, without a weight: the model is built and run on the meta device.

A tensor on PyTorch's meta device has a shape and a dtype and no memory. So the model of a config.json, at any size, is
built there, its linear layers are quantized and get adapters by the functions that do it in a run, and its forward
pass runs on the shapes of a batch. What a part takes is counted, not estimated from a formula for one architecture:

=============  =========================================================================================================
part           bytes
=============  =========================================================================================================
weights        the packed weights and their scales, or the dense weights of the linear layers
dense          what stays dense beside them: embeddings, norms, the head
adapters       float32
gradients      float32, of what trains
optimizer      AdamW's two moments of what trains: 4 bytes each, or one byte and a scale for 256; no more than the
               budget, where one is set
activations    the tensors that autograd saves in the forward pass for the backward pass. With checkpointing the input
               of each block, and what one block saves when it is computed again
working        the logits of a chunk of positions in float32, their gradient, one weight in full, and the gradient of a
               head that trains
constants      the interpreter and the libraries: what this process holds
=============  =========================================================================================================

The parts are not all there at the same time. While the forward pass runs there is no gradient; what the backward pass
adds to the gradients, it takes from the activations. The peak is the larger of the two moments::

    peak = constants + weights + dense + adapters + optimizer + max(activations + working, gradients + one block)

For QLoRA, gradients are small and the first is larger; for full fine-tuning it is the second. (QLoRA, arXiv 2305.14314,
section 2 and figures 1 and 6 have such sums for LLaMA.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qloralab.lora.config import ALL_LINEAR, LoraConfig
from qloralab.lora.inject import inject_, trainable
from qloralab.nf4.data_type import DataType
from qloralab.nf4.linear import QuantizedLinear
from qloralab.nf4.model import linear_names, quantize_

from ..errors import UserError
from ..resident import resident_mb
from ..train.loss import CHUNK_BYTES

PARTS = ("weights", "dense", "adapters", "gradients", "optimizer", "activations", "working", "constants")
_STATE_BYTES = {32: 8.0, 8: 2 + 2 * 4 / 256}  # of AdamW, a parameter


@dataclasses.dataclass(frozen=True)
class Job:
    """What of a run decides its memory; the fields are those of ``Settings``.

    Attributes:
        method: "qlora", "lora" or "full".
        dtype: that is computed in.
        data_type: of the 4-bit weights.
        r: rank of the adapters.
        target_modules: of ``LoraConfig``: the layers with adapters.
        skip: layers whose weights stay dense.
        batch_size, max_length: of the largest batch that is computed at once, padding included.
        labelled: positions of it that have a label; None: all.
        checkpointing: whether activations are recomputed.
        state_bits: of AdamW's moments.
        state_budget: bytes of them that stay in memory, or None.
    """

    method: str
    dtype: torch.dtype
    data_type: DataType
    r: int = 16
    batch_size: int = 4
    max_length: int = 256
    labelled: int | None = None
    checkpointing: bool = False
    state_bits: int = 32
    state_budget: int | None = None
    target_modules: str | Sequence[str] = ALL_LINEAR
    skip: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Memory:
    """The parts of the table above, in bytes; ``block`` is what one block of the model saves for backward.

    Attributes:
        parameters, trained: how many there are, and how many of them train.
    """

    weights: float
    dense: float
    adapters: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    constants: float
    block: float
    parameters: int
    trained: int

    @property
    def peak(self) -> float:
        """The most that is there at one moment, in bytes."""
        held = self.constants + self.weights + self.dense + self.adapters + self.optimizer
        return held + max(self.activations + self.working, self.gradients + self.block)


def predict(config: Any, job: Job, constants: float | None = None) -> Memory:
    """The memory of a run.

    Args:
        config: of a causal language model of transformers.
        job: the run.
        constants: bytes that are there before the model; None: what this process holds now.

    Raises:
        UserError: the model cannot be built or run on the meta device, or has no linear layer.
    """
    from transformers import AutoModelForCausalLM

    constants = resident_mb() * 1e6 if constants is None else constants
    with _telling(config):
        with torch.device("meta"):
            dtype = torch.float32 if job.method == "full" else job.dtype
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        linear = [model.get_parameter(f"{name}.weight") for name in linear_names(model)]
        weights, largest = sum(one.nbytes for one in linear), max(one.numel() for one in linear)
        if job.method == "qlora":
            quantize_(model, job.data_type, compute_dtype=job.dtype, skip=job.skip)
            packed = {id(one.weight): one.weight for one in model.modules() if isinstance(one, QuantizedLinear)}
            weights = sum(one.nbytes for one in packed.values())
        if job.method != "full":
            inject_(model, LoraConfig(job.r, 2 * job.r, 0.05, target_modules=job.target_modules))
        trains = trainable(model)
        adapters = 0 if job.method == "full" else sum(one.nbytes for one in trains)
        everything = sum(one.nbytes for one in [*model.parameters(), *model.buffers()])
        saved, hidden = _saved_for_backward(model, job)
        blocks, words = _sizes(config)
    trained = sum(one.numel() for one in trains)
    state = _STATE_BYTES[job.state_bits] * trained
    head = 4 * words * config.get_text_config().hidden_size if job.method == "full" else 0
    chunk = min(CHUNK_BYTES, 4 * words * (job.labelled or job.batch_size * job.max_length))
    return Memory(
        weights=weights,
        dense=everything - adapters - (0 if job.method == "qlora" else weights),
        adapters=adapters,
        gradients=4 * trained,
        optimizer=state if job.state_budget is None else min(state, job.state_budget),
        activations=blocks * hidden + saved / blocks if job.checkpointing else saved,
        working=3 * chunk + (largest * job.dtype.itemsize if job.method == "qlora" else 0) + head,
        constants=constants,
        block=saved / blocks,
        parameters=parameters,
        trained=trained,
    )


def _saved_for_backward(model: Any, job: Job) -> tuple[int, int]:
    """The bytes that a forward pass saves for backward, parameters left out, and those of the hidden states."""
    shape = job.batch_size, job.max_length
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.int64, device="meta"),
        "position_ids": torch.arange(job.max_length, device="meta")[None],
        # a mask for each pair of positions, because a mask for each position would be looked into
        "attention_mask": torch.ones(shape[0], 1, shape[1], shape[1], dtype=torch.bool, device="meta"),
    }
    kept = [*model.parameters(), *model.buffers()]
    for one in model.modules():
        kept += one.weight.operands().tensors if isinstance(one, QuantizedLinear) else ()
    own = {one.untyped_storage()._cdata for one in kept if isinstance(one, Tensor)}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage  # held, so that no other one gets its address
        return tensor

    model.train()
    with _fused_attention(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.base_model(**batch, use_cache=False).last_hidden_state
    return sum(storage.nbytes() for storage in saved.values()), hidden.nbytes


class _Attention(torch.autograd.Function):
    """What the fused attention of CPUs and GPUs saves; on the meta device PyTorch would lay out all the scores."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        result = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)  # heads lie side by side
        ctx.save_for_backward(query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return result


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention as it is without a mask, which a run has none of: fused, and keys are not repeated for their group."""
    from transformers.integrations import sdpa_attention

    functional: Any = torch.nn.functional
    grouped = "use_gqa_in_sdpa"
    theirs, asked = functional.scaled_dot_product_attention, getattr(sdpa_attention, grouped, None)
    functional.scaled_dot_product_attention = lambda query, key, value, *_, **__: _Attention.apply(query, key, value)
    if asked:
        setattr(sdpa_attention, grouped, lambda *_, **__: True)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = theirs
        if asked:
            setattr(sdpa_attention, grouped, asked)


def _sizes(config: Any) -> tuple[int, int]:
    """How many blocks and words a model has."""
    text = config.get_text_config()
    return text.num_hidden_layers, text.vocab_size


@contextmanager
def _telling(config: Any) -> Iterator[None]:
    """Tell in one line what a model's own code, which knows nothing of the meta device, makes of it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        what = " ".join(str(error).split())[:160]
        raise UserError(f"a {config.model_type} model cannot be laid out without its weights: {what}") from error
