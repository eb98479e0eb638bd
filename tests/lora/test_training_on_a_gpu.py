"""A small model is quantized, adapted and trained on a GPU, and goes where it goes on the CPU."""

from __future__ import annotations

import pytest
import torch

import qloralab as ql

STEPS = 8

pytestmark = pytest.mark.gpu


def losses(device: str, budget: int | None) -> list[float]:
    """Of the steps of a small model in 4 bits, which begins the same on each device."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256)).to(device)
    ql.quantize_(model)
    ql.inject_(model, ql.LoraConfig(r=8, lora_alpha=16))
    optimizer = ql.PagedAdamW(ql.trainable(model), lr=1e-2, budget=budget)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 256, generator=generator).to(device)
    goal = torch.randn(64, 256, generator=generator).to(device)
    found = []
    for _ in range(STEPS):
        loss = torch.nn.functional.mse_loss(model(x), goal)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_training_goes_where_it_goes_on_the_cpu():
    on_cpu = losses("cpu", None)
    on_gpu = losses("cuda", None)
    assert on_cpu[-1] < 0.8 * on_cpu[0]
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0.01, atol=0.0)
    assert losses("cuda", 16 << 20) == on_gpu
