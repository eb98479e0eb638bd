"""What the tests of training share: a trainer of the tiny model, and what stands in for a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qloralab.checkpoint.models import load_model, load_tokenizer
from qloralab.data.batches import split
from qloralab.data.encoding import encode_all
from qloralab.data.examples import read_jsonl
from qloralab.lora.config import LoraConfig
from qloralab.lora.inject import inject_
from qloralab.nf4.model import quantize_
from qloralab.settings import Method
from qloralab.train import graphs, prepare
from qloralab.train.trainer import Trainer


@pytest.fixture
def make(settings) -> Callable[..., Trainer]:
    """A trainer: ``make("qlora", steps=3)``."""

    def trainer(method: Method = "qlora", dtype: torch.dtype | None = None, **changes: Any) -> Trainer:
        chosen = settings(method=method, **changes)
        tokenizer = load_tokenizer(chosen.model)
        encoded = encode_all(read_jsonl(chosen.data), tokenizer, chosen.max_length)
        train, held_out = split(encoded, chosen.held_out, chosen.seed)
        torch.manual_seed(chosen.seed)
        dtype = dtype or torch.bfloat16
        model = load_model(chosen.model, torch.float32 if method == "full" else dtype)
        if method == "qlora":
            quantize_(model, compute_dtype=dtype)
        if method != "full":
            inject_(model, LoraConfig(**chosen.new_adapters))
        return Trainer(model, train, held_out, chosen, dtype)

    return trainer


class Tape(TorchDispatchMode):
    """A CUDA graph of operators on a CPU: each with the very tensors of the capture, and its numbers.

    A replay runs them again, into the same memory, and nothing of the Python that called them. What would wait for a
    GPU raises, and what was computed while it was captured is not there afterwards.
    """

    waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[tuple[Tensor, bool]]]] = []
        self.replays = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.waits:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        known = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        outputs = [(leaf, _memory(leaf) not in known) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.calls.append((func, args, kwargs or {}, outputs))
        return result

    @torch.no_grad()
    def end(self) -> None:
        """Forget the values."""
        for *_, outputs in self.calls:
            for output, new in outputs:
                if new and output.is_floating_point():
                    output.fill_(torch.nan)

    @torch.no_grad()
    def replay(self) -> None:
        """Run it."""
        self.replays += 1
        for func, args, kwargs, outputs in self.calls:
            again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for (output, new), values in zip(outputs, again, strict=True):
                if new:
                    output.copy_(values)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Graphs are captured as tapes: those that there are so far."""
    made: list[Tape] = []

    def captured(run: Callable[[], None], *_: Any) -> Callable[[], None]:
        state = torch.get_rng_state()
        with Tape() as tape:
            run()
        tape.end()
        torch.set_rng_state(state)
        made.append(tape)
        return tape.replay

    monkeypatch.setattr(graphs, "captured", captured)
    monkeypatch.setattr(prepare, "has_graphs", lambda device: True)
    return made
