"""Parameters that two processes share: PagedAdamW and torch.optim.AdamW on DTensors, side by side."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")

CODE = """
import copy, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
import qloralab as ql
from qloralab.optim.paged_lion import PagedLion

dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
torch.set_num_threads(1)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
values = [torch.randn(7, 3), torch.randn(1, 5), torch.randn(4), torch.randn(600, 3)]  # 7 rows and 1 do not divide by 2
layouts = [[Shard(0)], [Shard(0)], [Replicate()], [Shard(1)]]
grads = [[torch.randn(value.shape) for value in values] for _ in range(4)]

def parameters():
    return [nn.Parameter(distribute_tensor(v.clone(), mesh, layout)) for v, layout in zip(values, layouts)]

def run(optimizer, params, steps):
    for step in steps:
        for param, grad, layout in zip(params, grads[step], layouts):
            param.grad = distribute_tensor(grad, mesh, layout)
        optimizer.step()

def whole(params, optimizer):
    tensors = [tensor for p in params for tensor in (p, *optimizer.state[p].values())]
    return [t.full_tensor().detach() if isinstance(t, DTensor) else t for t in tensors]

def same(found, expected):
    # Both round some operations of a step to float32: relative to the norm, a little more than that.
    return all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(found, expected, strict=True))
"""


MODULES = ["torch.distributed.checkpoint", "qloralab.optim.paged_adamw"]


def test_steps_and_states_are_those_of_torch(two_processes):
    """Steps, a checkpoint by torch.distributed, and what torch's AdamW goes on from."""
    code = """
ours, theirs = parameters(), parameters()
optimizer, peer = ql.PagedAdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
run(optimizer, ours, range(2))
run(peer, theirs, range(2))
answer = {"steps": same(whole(ours, optimizer), whole(theirs, peer))}

dcp.save({"state": optimizer.state_dict()["state"]}, checkpoint_id=f"{folder}/checkpoint")
fresh = parameters()
for param, other in zip(fresh, ours):
    param.data.copy_(other.data)
again = ql.PagedAdamW(fresh, lr=0.1)
run(again, fresh, [0])
for param, other in zip(fresh, ours):
    param.data.copy_(other.data)
loaded = again.state_dict()
dcp.load({"state": loaded["state"]}, checkpoint_id=f"{folder}/checkpoint")
again.load_state_dict(loaded)
peer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch copies nothing
for param, other in zip(theirs, ours):
    param.data.copy_(other.data)
run(optimizer, ours, [3])
run(again, fresh, [3])
run(peer, theirs, [3])
answer["checkpoint"] = same(whole(fresh, again), whole(ours, optimizer))
answer["loaded by torch"] = same(whole(theirs, peer), whole(ours, optimizer))

shared, plain = parameters(), [nn.Parameter(value.clone()) for value in values]
lion, alone = PagedLion(shared, lr=0.1), PagedLion(plain, lr=0.1)
run(lion, shared, range(3))
for step in range(3):
    for param, grad in zip(plain, grads[step]):
        param.grad = grad.clone()
    alone.step()
answer["lion"] = all(torch.equal(a, b) for a, b in zip(whole(shared, lion), whole(plain, alone), strict=True))
"""
    for answer in two_processes(CODE + code, MODULES):
        assert answer == dict.fromkeys(answer, True)
        assert len(answer) == 4


def test_fully_shard_and_what_both_have_to_agree_on(two_processes):
    code = """
def model():
    torch.manual_seed(1)
    made = nn.Sequential(nn.Linear(9, 33), nn.ReLU(), nn.Linear(33, 1))
    for layer in (made[0], made[2], made):
        fully_shard(layer, mesh=mesh)
    return made

ours, theirs = model(), model()
optimizer, peer = ql.PagedAdamW(ours.parameters(), lr=0.1), torch.optim.AdamW(theirs.parameters(), lr=0.1)
for step in range(4):
    x = torch.randn(5, 9, generator=torch.Generator().manual_seed(10 * step + rank))
    for net, one in ((ours, optimizer), (theirs, peer)):
        net(x).square().mean().backward()
        one.step()
        one.zero_grad()
answer = {"fully_shard": same(whole(list(ours.parameters()), optimizer), whole(list(theirs.parameters()), peer))}

grads[0][0][0] = float("nan")  # of the first process
params = parameters()
optimizer = ql.PagedAdamW(params, lr=0.1, nonfinite="skip")
run(optimizer, params, [0, 1])
answer["skipped together"] = optimizer.skipped == 1
other = parameters()
run(torch.optim.AdamW(other, lr=0.1), other, [1])
answer["the rest of both"] = all(torch.allclose(a.full_tensor(), b.full_tensor()) for a, b in zip(params, other))

def caught(call):
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"

before = [p.full_tensor().clone() for p in params]
params[1].grad = distribute_tensor(grads[1][1], mesh, [Replicate()])
answer["refused"] = [caught(lambda: ql.PagedAdamW(params, state_bits=8)), caught(optimizer.step)]
answer["untouched"] = all(torch.equal(p.full_tensor(), b) for p, b in zip(params, before))
"""
    answers = two_processes(CODE + code, MODULES)
    for answer in answers:
        narrow, placed = answer.pop("refused")
        assert narrow == "ValueError: a parameter [7, 3] is a DTensor, which needs state_bits=32"
        assert placed.startswith(
            "ValueError: parameter 1 of group 0 [1, 5] has a gradient that is placed as (Replicate()"
        )
        assert answer == dict.fromkeys(answer, True)
