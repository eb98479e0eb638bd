"""Training and answers by the GPU's operators, compiled and not launched: captured steps ask nothing of Triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# In a process of its own, where kernels are compiled. What no kernel writes is zero, so that losses are finite.
CODE = """
import importlib.util, json, sys
from pathlib import Path
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from qloralab.benchmarks import no_device
from qloralab.data.encoding import NO_LABEL, Encoded
from qloralab.kernels.gpu import choice
from qloralab.lora.config import LoraConfig
from qloralab.lora.inject import inject_
from qloralab.nf4 import operator
from qloralab.nf4.model import quantize_
from qloralab.settings import Settings
from qloralab.train import decoding, graphs
from qloralab.train.trainer import Trainer

class Zeros(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result.zero_() if "empty" in func._schema.name else result

spec = importlib.util.spec_from_file_location("shared", sys.argv[1])
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)

def captured(run, *_):
    with shared.Tape() as tape:
        run()
    tape.end()
    return tape.replay

graphs.captured = captured
config = LlamaConfig(vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
lengths = (20, 25, 30, 40, 45, 60, 61, 62)
examples = [
    Encoded(list(range(1, n + 1)), [NO_LABEL] * (n // 2) + list(range(n // 2 + 1, n + 1)), "made up") for n in lengths
]
settings = Settings(model=Path("none"), out=None, batch_size=4, accumulate=2, lora_dropout=0.05, graph=True)

def losses(capture):
    torch.manual_seed(0)
    model = quantize_(LlamaForCausalLM(config).bfloat16(), compute_dtype=torch.bfloat16)
    inject_(model, LoraConfig(**settings.new_adapters))
    operator._is_watched = bool  # an operator that a mode looks at goes another way
    with no_device.pretend(), choice.use("fused"), Zeros():
        trainer = Trainer(model, examples, examples[:1], settings, torch.bfloat16)
        if capture:
            trainer.capture()
        trainer.train_step()
        no_device.launches()
        found = [trainer.train_step().loss for _ in range(3)]
        return found, [one.name for one in no_device.launches()]

def captured_decoding(step):
    decoder = step.__self__
    state = decoder.token, decoder._positions, *(layer.cumulative_length for layer in decoder._cache.layers)
    before = [part.clone() for part in state]
    replay = captured(step)
    for part, value in zip(state, before, strict=True):  # what is captured does not run
        part.copy_(value)
    return replay

def answers(capture):
    torch.manual_seed(0)
    model = quantize_(LlamaForCausalLM(config).bfloat16(), compute_dtype=torch.bfloat16)
    inject_(model, LoraConfig(**settings.new_adapters))
    model.eval()
    decoding._has_graphs, decoding.captured, launches = lambda decoder: capture, captured_decoding, []
    ids = torch.tensor([[5, 6, 7], [0, 8, 9]])
    with no_device.pretend(), choice.use("fused"), Zeros():
        no_device.launches()
        note = lambda *_: launches.append(len(no_device.launches()))
        tokens = decoding.decode(model, ids, (ids > 0).long(), 8, [], note)
    return tokens, launches

print(json.dumps({"training": [losses(False), losses(True)], "answers": [answers(False), answers(True)]}))
"""
LAYERS = 2 * 7


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    """What the code prints."""
    file = tmp_path_factory.mktemp("without a GPU") / "steps.py"
    file.write_text(CODE)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(file), str(Path(__file__).with_name("conftest.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_step_of_training_from_graphs_launches_nothing_from_python(found):
    (eager, launched), (graphed, replayed) = found["training"]
    parts, steps = 2, 3
    assert graphed == pytest.approx(eager, rel=1e-3)
    assert len(launched) >= 4 * LAYERS * parts * steps
    assert replayed == []


@pytest.mark.slow
def test_a_captured_step_of_decoding_launches_nothing_from_python(found):
    (eager, launched), (graphed, replayed) = found["answers"]
    assert graphed == eager
    assert launched == [2 * LAYERS] * 8  # the adapter's projection, and the product with its term
    # Before the third token: a step, its capture, and the step that the graph is compared with.
    assert replayed == [2 * LAYERS, 2 * LAYERS, 3 * 2 * LAYERS, *[0] * 5]
