"""Weights in 4 bits whose bytes two processes share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qloralab import LoraConfig, inject_, quantize_
from qloralab.nf4.linear import QuantizedLinear
from qloralab.nf4.sharded import ShardableLinear, shardable_

SETTINGS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "float32 scales": {"double_quant": False, "block_size": 128},
    "a byte a code": {"codebook": "nf3"},
    "signed scales": {"codebook": "bof4-s"},
}

CODE = """
import copy, os, psutil, torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
import qloralab as ql
from qloralab.kernels.cpu.allocator import give_back
from qloralab.nf4.distributed import local_bytes, part_of, whole, writes
from qloralab.nf4.sharded import ShardableLinear, shardable_

dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
torch.set_num_threads(1)

def layers(**options):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(65, 7), nn.Linear(7, 33), nn.Linear(33, 1, bias=False))  # none divides by 2
    ql.quantize_(made, compute_dtype=torch.float32, **options)
    ql.inject_(made, ql.LoraConfig(r=3, lora_alpha=6))
    for parameter in ql.trainable(made):
        nn.init.normal_(parameter, std=0.1)
    return made
"""


MODULES = ["qloralab.lora.inject"]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize("name", SETTINGS)
def test_the_bits_of_one_process(name, two_processes):
    """Forward, both gradients, and the bytes themselves, after they were split, gathered and let go."""
    code = f"""
options = {SETTINGS[name]!r}
one, shared = layers(**options), layers(**options)
shardable_(shared)
for layer in shared:
    fully_shard(layer)
fully_shard(shared)
answer = []
for step in range(2):
    x = torch.randn(5, 65, requires_grad=True)
    its_x = x.detach().clone().requires_grad_()
    y, its_y = one(x), shared(its_x)
    y.square().sum().backward()
    its_y.square().sum().backward()
    answer += [torch.equal(y, its_y), torch.equal(x.grad, its_x.grad)]
    for mine, its in zip(ql.trainable(one), ql.trainable(shared), strict=True):
        answer.append(torch.equal(mine.grad, whole(its.grad)))
for mine, its in zip(one, shared, strict=True):
    weight, base = mine.base_layer.weight, its.base_layer
    for part in ("packed", "scales", "absmax2"):
        tensor = getattr(weight, part)
        if tensor is not None:
            found = getattr(base, part)
            answer += [isinstance(found, DTensor), found.dtype == tensor.dtype, torch.equal(whole(found), tensor)]
            answer.append(local_bytes(found) < tensor.nbytes or rank == 0)
"""
    for found in two_processes(CODE + code, MODULES):
        assert len(found) > 20
        assert all(found)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_files_and_processes(two_processes):
    """What processes share is read by part_of without a word to each other, is whole again, and one process writes."""
    code = """
one, shared = layers(), layers()
fully_shard(shared)
parameter, values = ql.trainable(shared)[0], torch.randn(3, 65)
part = part_of(values, parameter)
answer = [writes([values, parameter]) == (rank == 0), writes([values]), torch.equal(whole(part), values)]
answer += [part.placements == parameter.placements, part_of(values[:2], parameter).shape == (2, 65)]
ql.save_adapter(shared, f"{folder}/adapter-of-{rank}")
if rank == 0:
    ql.save_adapter(one, f"{folder}/adapter")
    read = [open(f"{folder}/{name}/adapter_model.safetensors", "rb").read() for name in ("adapter", "adapter-of-0")]
    answer.append(read[0] == read[1])
answer.append(os.path.exists(f"{folder}/adapter-of-1") is False)
"""
    assert all(all(found) for found in two_processes(CODE + code, MODULES))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.slow
def test_a_process_lets_go_of_what_the_other_has(two_processes):
    """Resident memory, 100 MB of packed weights: half of them are given back to the system."""
    code = """
def resident():
    give_back()
    return psutil.Process().memory_info().rss

fully_shard(layers()[0])  # what that imports
before = resident()
large = nn.Sequential(*(nn.Linear(2048, 2048, bias=False, dtype=torch.bfloat16) for _ in range(48)))
ql.quantize_(large, compute_dtype=torch.float32)
held, full = sum(layer.weight.nbytes for layer in large), resident()
shardable_(large)
for layer in large:
    fully_shard(layer)
answer = [held, full - before, resident() - before, sum(map(local_bytes, large.parameters()))]
"""
    for held, full, after, local in two_processes(CODE + code, MODULES):
        assert local == pytest.approx(held / 2, rel=0.001)
        assert full > 0.95 * held
        assert after < 0.65 * held


def test_layers_that_share_a_weight_go_on_sharing_it():
    model: Any = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64, bias=False)})
    model["b"].weight = model["a"].weight
    quantize_(model, compute_dtype=torch.float32)
    inject_(model, LoraConfig(r=2, lora_alpha=4, target_modules=["a"]))
    x = torch.randn(3, 64)
    before = [model[name](x) for name in "ab"]
    weight = model["b"].weight
    shardable_(model)
    a, b = model["a"].base_layer, model["b"]
    assert isinstance(a, ShardableLinear)
    assert isinstance(b, ShardableLinear)
    assert a.packed is b.packed
    assert b.packed.data_ptr() == weight.packed.data_ptr()
    assert all(torch.equal(model[name](x), y) for name, y in zip("ab", before, strict=True))
    assert not a.packed.requires_grad
    assert b.follows_device is False


def test_what_a_sharded_layer_does_not_do():
    model = nn.Sequential(nn.Linear(64, 64))
    shardable_(quantize_(model))
    layer: Any = model[0]
    assert isinstance(layer, QuantizedLinear)
    with pytest.raises(RuntimeError, match="0 is sharded: save its adapters"):
        model.state_dict()
    with pytest.raises(RuntimeError, match="cannot be moved or replaced"):
        layer._set_weight(layer.weight)
    assert not layer.eval().training
