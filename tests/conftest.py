"""What every test runs under: no network, one seed, poisoned memory, as many threads as the machine has processors.

Poison: ``torch.empty`` and its kind return memory that happens to be zero often enough to hide a kernel that never
writes part of its output. Torch fills such memory with NaN (floats) or the largest value (integers) while deterministic
algorithms are on, so every test runs with them on. That also turns an operation that is not reproducible into an error.
"""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

# Read by the libraries when they are imported, hence before them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as qloralab sets it, see qloralab/__init__.py
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic

import hypothesis
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which transformers does

SEED = 20230523  # the day of arXiv 2305.14314
torch.set_num_threads(min(torch.get_num_threads(), len(os.sched_getaffinity(0))))

# The same examples in every run. No deadline: the first call of an operator includes its compilation.
hypothesis.settings.register_profile("reproducible", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("reproducible")


def seed_torch(value: int) -> None:
    """``torch.manual_seed``, which without a GPU notes the stack for each kind of device: a millisecond a test."""
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(value)


class TorchRandom:
    """Lets hypothesis reset torch's generator before each example, as it does for ``random`` and NumPy."""

    def seed(self, value: int) -> None:
        """Start torch's default generator from `value`."""
        seed_torch(value)

    def getstate(self) -> torch.Tensor:
        """The state of torch's default generator: uint8 [bytes]."""
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        """Continue from what `getstate` returned."""
        torch.set_rng_state(state)


TORCH_RANDOM = TorchRandom()  # hypothesis holds a weak reference
hypothesis.register_random(TORCH_RANDOM)  # pyright: ignore[reportArgumentType]


def pytest_configure(config: pytest.Config) -> None:
    """Compile the C code before the first test, once for all processes: the line about it is no test's output."""
    if not hasattr(config, "workerinput"):
        from qloralab.kernels.cpu import allocator, build, library

        with suppress(build.BuildError):  # the tests that need it say so
            library.Library()
            allocator._load()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: a process that takes one of them last would let the others wait."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` run where there is one."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws from the same state, whatever ran before it."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002
    seed_torch(SEED)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory reads as NaN in the test."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def two_processes(tmp_path: Path) -> Callable[[str, Sequence[str]], list[Any]]:
    """Runs code in two processes that share a gloo group: ``two_processes(code, modules)``; what each called `answer`.

    The code finds its ``rank``, and a ``folder``. The modules are imported before it runs.
    """

    def run(code: str, modules: Sequence[str]) -> list[Any]:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*modules, "torch.distributed.fsdp", "qloralab.kernels.cpu.library"])
        processes = []
        for rank in range(2):
            tail = f"\ntorch.save(answer, '{tmp_path}/answer-{rank}')\ndist.barrier()\ndist.destroy_process_group()\n"
            processes.append(context.Process(target=exec, args=(code + tail, {"folder": tmp_path, "rank": rank})))
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            assert process.exitcode == 0, "what it wrote to stderr is above"
        return [torch.load(tmp_path / f"answer-{rank}") for rank in range(2)]

    return run
