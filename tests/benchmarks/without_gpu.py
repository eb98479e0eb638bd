"""A benchmark of a GPU on a machine without one: ``python without_gpu.py benchmarks.gpu --only linear``.

The program is what it is; the device is the processor, timed by its own clock, weights are small and samples few, and
what only a GPU has is left out.
"""

from __future__ import annotations

import qloralab  # noqa: F401  # isort: skip  # before torch: how OpenMP's threads wait is read when torch is loaded

import importlib
import sys
from typing import Any, cast
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qloralab.benchmarks import generate, gpu, gpu_chain, gpu_optimizer
from qloralab.benchmarks import host as host_calls
from qloralab.benchmarks.clock import host
from qloralab.benchmarks.gpu_canaries import Canary
from qloralab.benchmarks.gpu_device import Device

NAME = "A GPU (80 GB)"
SMALL = {"nbytes": 2**16, "shape": (8, 64, 64), "seconds": 0.0}
RATES = dict.fromkeys(
    ("copy", "to_device", "to_host", "both", "prefetch_to_device", "prefetch_to_host", "prefetch_both"), 10.0
)
MS = {"p20": 1.0, "p50": 1.0, "p80": 1.0}
PAGED = {"bits": 32, "budget": {"state_bytes": 8, "resident_bytes": 4, "given_by_device": 4, "pointers": ["managed"]}}


def device() -> Device:
    """The processor, as a GPU with 16 GB free and a small cache."""
    return Device(torch.device("cpu"), NAME, 2**15, host, lambda: 2**34)


def tiny(path: None) -> Any:
    """A model of two layers."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, **cast(Any, sizes))).bfloat16().eval()


def run(module: str, arguments: list[str]) -> None:
    """``python -m module arguments``."""
    ceilings, contenders = gpu.ceilings, gpu_optimizer.contenders
    host_calls.SECONDS = 0.001
    gpu.SHAPES, gpu.ceilings = ((64, 64),), lambda there: ceilings(there, **SMALL)
    gpu_chain.LINEARS = {name: tuple(width // 32 for width in NK) for name, NK in gpu_chain.LINEARS.items()}
    gpu.POINTS[:] = [(operation, M) for operation, M in gpu.POINTS if (M or 0) <= 4 or "layer" in operation]
    gpu.PROVIDERS[:] = [one for one in gpu.PROVIDERS if not one.needs_gpu]
    gpu.canaries = lambda: iter([Canary("right", lambda guard: None)])
    gpu.cuda_device = gpu_optimizer.cuda_device = device
    gpu_optimizer.ceilings, gpu_optimizer.check_paging = lambda where: RATES, lambda where, bits: PAGED
    gpu_optimizer.overlap = lambda there: {"kind": "overlap", "read": MS, "write": MS, "update": MS}
    gpu_optimizer.contenders = lambda peer: contenders(peer=False, away=False)
    gpu_optimizer.ELEMENTS, gpu_optimizer.SECONDS = 2 * gpu_optimizer.LORA, 0.0
    generate.default_model, generate.load_model = lambda: None, tiny
    generate.load_tokenizer = lambda path: lambda text: {"input_ids": [1, 5, 9]}
    if module == "benchmarks.generate":  # it moves the model
        arguments = [argument for argument in arguments if argument not in ("--device", "cuda")] + ["--tokens", "2"]
    with patch.object(torch.cuda, "is_available", lambda: True):
        importlib.import_module(f"qloralab.{module}").main(arguments)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:])
