"""Training by the GPU's operators, compiled and not launched: a step from graphs asks nothing of Triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
from qloralab.train import graphs
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

(eager, launched), (graphed, replayed) = losses(False), losses(True)
print(json.dumps({"eager": eager, "launched": launched, "graphed": graphed, "replayed": replayed}))
"""


@pytest.mark.slow
def test_a_step_from_graphs_launches_nothing_from_python(tmp_path):
    file = tmp_path / "training.py"
    file.write_text(CODE)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(file), str(Path(__file__).with_name("conftest.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["graphed"] == pytest.approx(found["eager"], rel=1e-3)
    layers, parts, steps = 2 * 7, 2, 3
    assert len(found["launched"]) >= 4 * layers * parts * steps
    assert found["replayed"] == []
