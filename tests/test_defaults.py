"""``torch.set_default_dtype`` and ``set_default_device`` are a user's; they change no bit of what is made here.

One program goes through the public API on tensors whose dtype and device it states, in processes with other defaults,
set before or after the import of qloralab. Each prints a hash of every result; the hashes are those without any.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = r"""
import hashlib, sys, tempfile
from pathlib import Path
import torch
when, dtype, device = sys.argv[1:]
def set_defaults():
    torch.set_default_dtype(getattr(torch, dtype))
    torch.set_default_device(device)
if when == "before":
    set_defaults()
import qloralab as ql
from qloralab.kernels import dispatch
from qloralab.kernels.gpu import adamw as gpu_adamw, adamw_8bit as gpu_adamw_8bit, dequantize, linear, quantize
from qloralab.kernels.adamw import ADAMW, Rates
from qloralab.kernels.rule import Segments
from qloralab.kernels.update import check, update_
from qloralab.nf4.codebook import codebook_values
from qloralab.nf4.packed import Packed
if when == "after":
    set_defaults()

generator = torch.Generator(device="cpu").manual_seed(1)
def numbers(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

def show(name, *tensors):
    for tensor in tensors:
        assert tensor.device.type == "cpu", (name, tensor.device)
        data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        print(name, tensor.dtype, list(tensor.shape), hashlib.sha256(data).hexdigest()[:16], flush=True)

def parts(q):
    return [part for part in q.operands() if isinstance(part, torch.Tensor)]

for choice in ("auto", "reference"):
    with dispatch.use(choice):
        for name, double_quant, x_dtype in (
            ("nf4", True, torch.float32), ("fp4", False, torch.bfloat16), ("nf3", True, torch.float32)
        ):
            q = ql.quantize(numbers(65, 96, dtype=x_dtype), name, double_quant=double_quant)
            show(name, *parts(q), q.dequantize(), q.absmax())
            for tokens in (1, 20):
                x = numbers(tokens, 96, dtype=x_dtype).requires_grad_()
                y = ql.linear(x, q)
                show("linear", y, *torch.autograd.grad(y, x, numbers(tokens, 65, dtype=x_dtype)))
            again = ql.QuantizedTensor.from_bitsandbytes(q.to_bitsandbytes("weight"), "weight") if name != "nf3" else q
            show("bitsandbytes", *parts(again))

def model():
    found = torch.nn.Sequential(*(torch.nn.Linear(64, 64, dtype=torch.float32, device="cpu") for _ in range(3)))
    for parameter in found.parameters():
        parameter.data.copy_(numbers(*parameter.shape) / 8)
    return found

with tempfile.TemporaryDirectory() as folder:
    for bits in (32, 8):
        net = ql.inject_(ql.quantize_(model(), compute_dtype=torch.float32), ql.LoraConfig(r=4, lora_alpha=8))
        for name, parameter in net.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(numbers(*parameter.shape))
        optimizer = ql.PagedAdamW(ql.trainable(net), lr=1e-2, state_bits=bits)
        for _ in range(3):
            net(numbers(7, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        show("trained", *ql.trainable(net))
        state = optimizer.state_dict()["state"][0]
        show("state", *(t for t in state.values() if isinstance(t, torch.Tensor)))
        ql.save_adapter(net, Path(folder) / str(bits))
        fresh = ql.quantize_(model(), compute_dtype=torch.float32)
        ql.load_adapter_(fresh, Path(folder) / str(bits))
        show("loaded", *ql.trainable(fresh), fresh.eval()(numbers(3, 64)))
    # A counter in bfloat16 would stop at 256.
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.float32, device="cpu"))
    optimizer = ql.PagedAdamW([p], lr=1e-3)
    for _ in range(300):
        p.grad = torch.ones_like(p)
        optimizer.step()
    show("300 steps", p, optimizer.state[p]["step"])
    big = torch.nn.Parameter(numbers(6 << 20))
    optimizer = ql.PagedAdamW([big], lr=1e-3, budget=1 << 24, state_dir=folder)
    for _ in range(2):
        big.grad = torch.ones_like(big)
        optimizer.step()
    assert 0 < optimizer.paging().resident_bytes <= 1 << 24
    show("paged", big)

def segments(bits, n=600):
    zeros = lambda n, dtype: [[torch.zeros(n, dtype=dtype, device="cpu")] for _ in range(2)]
    moments = zeros(n, torch.float32 if bits == 32 else torch.uint8)
    scales = None if bits == 32 else zeros(-(-n // 256), torch.float32)
    return Segments([numbers(n)], [numbers(n)], moments, scales, [1])

rates = Rates(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
for choice in ("auto", "reference"):
    with dispatch.use(choice):
        for bits in (32, 8):
            some = segments(bits)
            check(some)
            update_(ADAMW, some, rates)
            show(f"update, {bits} bits", *(one for (one,) in some.tensors))

# The kernels for GPUs, interpreted.
nf4 = codebook_values("nf4")
packed, absmax = quantize.quantize_blockwise(numbers(64, 64, dtype=torch.bfloat16), nf4, 64)
codes, absmax2, offset = quantize.quantize_scales(absmax)
show("triton", packed, absmax, codes, absmax2, offset)
show("triton", dequantize.dequantize(packed, codes, absmax2, offset, nf4, [64, 64], 64, torch.bfloat16))
for scales in ((absmax, None, None), (codes, absmax2, offset)):
    weight = Packed(packed, *scales, nf4, [64, 64], 64)
    show("triton", linear.linear(numbers(3, 64, dtype=torch.bfloat16), weight, None))
for launch, bits in ((gpu_adamw.adamw, 32), (gpu_adamw_8bit.adamw_8bit, 8)):
    some = segments(bits)
    launch(some, rates)
    show("triton", *(one for (one,) in some.tensors))
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def output(process: subprocess.Popen[str]) -> list[str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out.splitlines()


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """The lines where the defaults are PyTorch's."""
    return output(start("never", "float32", "cpu"))


@pytest.mark.parametrize(
    "defaults",
    [("before", "bfloat16", "meta"), ("after", "float64", "meta"), ("after", "bfloat16", "cpu")],
    ids="-".join,
)
def test_no_bit_depends_on_the_defaults(defaults, expected):
    found = output(start(*defaults))
    assert found == expected
    assert len(found) > 100
