"""A checkpoint of a loop of one's own: what goes on from it takes the same steps, bit for bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from qloralab import FormatError, LoraConfig, PagedAdamW, inject_, load_checkpoint_, quantize_, save_checkpoint
from qloralab.train.checkpoint import read_progress

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "paged": lambda params: PagedAdamW(params, lr=1e-2),
    "paged, 8 bits": lambda params: PagedAdamW(params, lr=1e-2, state_bits=8),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, betas=(0.8, 0.9)),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
}


class Loop:
    """A loop with dropout, whose data come from three generators."""

    def __init__(self, kind: str = "paged", width: int = 300):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(width, 64), nn.Dropout(0.5), nn.Linear(64, 64), nn.Linear(64, 1))
        self.model[2].requires_grad_(False)
        self.optimizer = OPTIMIZERS[kind]([p for p in self.model.parameters() if p.requires_grad])

    def steps(self, count: int) -> None:
        for _ in range(count):
            x = torch.randn(8, 300) * random.random() + np.random.rand()  # noqa: NPY002
            self.model(x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def values(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def reseed() -> None:
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "state.safetensors"


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_steps_behind_it_are_the_same(kind, path):
    one = Loop(kind)
    one.steps(3)
    save_checkpoint(path, one.model, one.optimizer, {"epoch": 1, "lr": 0.1 + 0.2, "names": ["a"]})
    one.steps(3)
    other = Loop(kind)
    reseed()
    assert load_checkpoint_(path, other.model, other.optimizer) == {"epoch": 1, "lr": 0.1 + 0.2, "names": ["a"]}
    other.steps(3)
    assert all(map(torch.equal, other.values(), one.values()))
    assert other.optimizer.param_groups[0].get("betas") == one.optimizer.param_groups[0].get("betas")


def test_adapters_on_packed_weights(path):
    def made() -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        model = inject_(quantize_(model, compute_dtype=torch.float32), LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2))
        return model, PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def steps(model: nn.Module, optimizer: Optimizer) -> list[torch.Tensor]:
        for _ in range(3):
            model(torch.randn(8, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]

    one, other = made(), made()
    steps(*one)
    save_checkpoint(path, *one)
    after = steps(*one)
    load_checkpoint_(path, *other)
    assert all(map(torch.equal, steps(*other), after))
    assert path.stat().st_size < 60_000  # the packed weights are not in it


def test_before_the_first_step_there_is_no_state(path):
    one, other = Loop(), Loop()
    save_checkpoint(path, one.model, one.optimizer)
    assert load_checkpoint_(path, other.model, other.optimizer) == {}


def test_what_does_not_fit_changes_nothing(path):
    one = Loop()
    one.steps(1)
    save_checkpoint(path, one.model, one.optimizer)
    other = Loop()
    other.steps(2)
    before, state = other.values(), copy.deepcopy(other.optimizer.state_dict())

    def refused(model: nn.Module, optimizer: Optimizer) -> str:
        with pytest.raises(ValueError, match=r"trains|is torch|has|not one") as caught:
            load_checkpoint_(path, model, optimizer)
        assert all(map(torch.equal, other.values(), before))
        for number, entry in state["state"].items():
            assert torch.equal(other.optimizer.state_dict()["state"][number]["exp_avg"], entry["exp_avg"])
        return str(caught.value)

    other.model[0].bias.requires_grad_(False)
    assert refused(other.model, other.optimizer) == f"{path} trains 0.bias, the model does not"
    other.model[0].bias.requires_grad_(True)
    other.model[2].requires_grad_(True)
    assert refused(other.model, other.optimizer) == f"the model trains 2.weight, {path} does not"
    other.model[2].requires_grad_(False)
    wide = Loop(width=301)
    assert "0.weight is torch.float32 [64, 301], in " in refused(wide.model, wide.optimizer)
    two = PagedAdamW([{"params": [p]} for p in other.model.parameters() if p.requires_grad])
    assert refused(other.model, two) == f"{path} has 1 groups of parameters, the optimizer 4"
    part = PagedAdamW(list(other.model[0].parameters()))
    assert "which the optimizer does not have" in refused(other.model, part)
    strange = PagedAdamW([nn.Parameter(torch.zeros(3))])
    assert "not one of the model's" in refused(other.model, strange)


def test_other_files_are_refused(path):
    from safetensors.torch import save_file

    one = Loop()
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(FormatError, match="has the format None"):
        load_checkpoint_(path, one.model, one.optimizer)
    with pytest.raises(FileNotFoundError):
        read_progress(path.with_name("none"))


def test_what_is_no_json_is_refused(path):
    one = Loop()
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        save_checkpoint(path, one.model, one.optimizer, {"a": object()})
    assert not path.exists()


def test_what_is_on_the_meta_device_is_refused(path):
    one = Loop()
    one.model[0].weight = nn.Parameter(torch.empty(64, 300, device="meta"))
    with pytest.raises(ValueError, match=r"parameter\.0\.weight is on the meta device"):
        save_checkpoint(path, one.model, PagedAdamW(list(one.model[3].parameters())))
