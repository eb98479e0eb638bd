"""Answers by the GPU's operators, compiled and not launched: a captured step asks nothing of Triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own, where kernels are compiled. What no kernel writes is zero.
CODE = """
import importlib.util, json, sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from qloralab.benchmarks import no_device
from qloralab.kernels.gpu import choice
from qloralab.lora.config import LoraConfig
from qloralab.lora.inject import inject_
from qloralab.nf4 import operator
from qloralab.nf4.model import quantize_
from qloralab.train import decoding

class Zeros(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result.zero_() if "empty" in func._schema.name else result

spec = importlib.util.spec_from_file_location("shared", sys.argv[1])
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)

def captured(step):
    decoder = step.__self__
    state = decoder.token, decoder._positions, *(layer.cumulative_length for layer in decoder._cache.layers)
    before = [part.clone() for part in state]
    with shared.Tape() as tape:
        step()
    for part, value in zip(state, before, strict=True):  # what is captured does not run
        part.copy_(value)
    return tape.replay

decoding.captured = captured
operator._is_watched = bool  # an operator that a mode looks at goes another way
torch.manual_seed(0)
config = LlamaConfig(vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
model = quantize_(LlamaForCausalLM(config).bfloat16().eval(), compute_dtype=torch.bfloat16)
inject_(model, LoraConfig(r=8, lora_alpha=8))
model.eval()
ids = torch.tensor([[5, 6, 7], [0, 8, 9]])

def answers(has_graphs):
    decoding._has_graphs = lambda decoder: has_graphs
    launches = []
    with no_device.pretend(), choice.use("fused"), Zeros():
        no_device.launches()
        tokens = decoding.decode(
            model, ids, (ids > 0).long(), 8, [], lambda *_: launches.append(len(no_device.launches()))
        )
    return {"tokens": tokens, "launches": launches}

print(json.dumps([answers(False), answers(True)]))
"""


@pytest.mark.slow
def test_a_captured_step_of_decoding_launches_nothing_from_python(tmp_path):
    file = tmp_path / "answers.py"
    file.write_text(CODE)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(file), str(Path(__file__).with_name("conftest.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    eager, graphed = json.loads(done.stdout.splitlines()[-1])
    assert graphed["tokens"] == eager["tokens"]
    layers = 2 * 7
    assert eager["launches"] == [2 * layers] * 8  # the adapter's projection, and the product with its term
    # Before the third token: a step, its capture, and the step that the graph is compared with.
    assert graphed["launches"] == [2 * layers, 2 * layers, 3 * 2 * layers, *[0] * 5]
