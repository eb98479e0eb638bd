"""Names without wrappers: told by what wraps, not by the text; each compared with the names of the bare model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from qloralab.nf4.files.module_names import bare_name, without_wrappers


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = nn.Linear(4, 4)  # no wrapper, for all its name
        self.norm = nn.LayerNorm(4)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Sequential(Block()), nn.Linear(4, 4))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What DDP needs."""
    store = tmp_path_factory.mktemp("gloo") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def compiled(module: nn.Module) -> Any:
    return torch.compile(module)


def inner(wrap: Any) -> nn.Module:
    wrapped: Any = model()
    wrapped[0].module, wrapped[1][0] = wrap(wrapped[0].module), wrap(wrapped[1][0])
    return wrapped


WRAPPED = {
    "bare": model,
    "compiled": lambda: compiled(model()),
    "averaged": lambda: AveragedModel(model()),
    "DataParallel": lambda: nn.DataParallel(model()),
    "DDP of a compiled one": lambda: DistributedDataParallel(compiled(model())),
    "parts compiled": lambda: inner(compiled),
    "parts checkpointed": lambda: inner(checkpoint_wrapper),
    "all of it": lambda: torch.compile(inner(lambda m: offload_wrapper(checkpoint_wrapper(compiled(m))))),
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("case", WRAPPED)
def test_the_names_are_those_of_the_bare_model(case):
    wrapped: Any = WRAPPED[case]()
    expected = model()
    assert {bare_name(wrapped, name) for name, _ in wrapped.named_modules()} == {n for n, _ in expected.named_modules()}
    by_name = {bare_name(wrapped, name): p for name, p in wrapped.named_parameters()}
    assert by_name.keys() == dict(expected.named_parameters()).keys()
    state = {bare_name(wrapped, name) for name in wrapped.state_dict()} - {"n_averaged"}
    assert state == expected.state_dict().keys()
    assert type(without_wrappers(wrapped)) is nn.Sequential
