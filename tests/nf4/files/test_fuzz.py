"""Spoiled checkpoints: whatever the bytes, reading succeeds or raises ``FormatError``, in little memory.

``FUZZ_CASES`` is the number of cases, 500 unless it is set. Case n is made from the seed n alone, so a failure is
reproduced by ``FUZZ_SEED=n``.
"""

from __future__ import annotations

import os
import random
import resource
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

import psutil
import pytest
import torch

from qloralab.nf4.files.checkpoint import Checkpoint
from qloralab.nf4.files.errors import FormatError

from .fuzzing import MUTATIONS, Made, make, spoil

CASES = int(os.environ.get("FUZZ_CASES", "500"))
SEED = os.environ.get("FUZZ_SEED")
ROOM = 64 << 20  # bytes of address space that reading may take at once, and of memory that it may keep

# What may well be read: bytes that are codes, another dtype to decode to, a shard that the index no longer names, ...
MAY_PASS = {
    "flip_bytes", "flip_bytes_of_the_header", "header_dtype", "header_name", "overwrite", "payload_dtype",
    "payload_nested_offset", "payload_shape", "swap_tensors",
}  # fmt: skip


def kinds_of(seed: int) -> list[str]:
    """One to three mutations; each takes its turn as the first, and is alone in every other of its turns."""
    rng, every = random.Random(seed), sorted(MUTATIONS)
    turn, first = divmod(seed, len(every))
    others = rng.sample(every, (0, 1, 0, 2)[turn % 4])
    return list(dict.fromkeys([every[first], *others]))


def read_everything(path: Path) -> list[FormatError]:
    """Read and decode all that a checkpoint holds; what was refused."""
    refused: list[FormatError] = []
    checkpoint = Checkpoint(path)
    for name in checkpoint.quantized_names():
        try:
            weight = checkpoint.quantized(name)
        except FormatError as error:
            refused.append(error)
            continue
        values = weight.dequantize()
        assert values.shape == weight.shape
        assert values.dtype == weight.dtype
        assert not values.isnan().any(), name
        repr(weight)
    for name in checkpoint.plain_names():
        tensor = checkpoint.tensor(name)
        assert (tensor.dtype, tuple(tensor.shape)) == checkpoint.describe(name)
        tensor.clone()
    return refused


def outcome(seed: int, folder: Path) -> tuple[list[str], list[FormatError | FileNotFoundError]]:
    """The mutations of a case, and what was refused of it. Leaves the folder empty."""
    kinds = make(seed, kinds_of(seed), folder / "model")
    try:
        return kinds, [*read_everything(folder / "model")]
    except (FormatError, FileNotFoundError) as error:
        return kinds, [error]
    finally:
        rmtree(folder)


@contextmanager
def little_memory() -> Iterator[None]:
    """An allocation of more than ``ROOM`` fails, touched or not. Where the system cannot do that, it does nothing."""
    if not sys.platform.startswith("linux"):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The tensors are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(seed: int, folder: Path) -> tuple[list[str], bool]:
    """Run a case; its mutations, and whether anything was refused."""
    (folder / "case").mkdir()
    try:
        kinds, errors = outcome(seed, folder / "case")
        for error in errors:
            str(error).encode()  # can be printed
            if isinstance(error, FileNotFoundError):
                assert "missing_file" in kinds
            else:
                assert error.file is not None
                assert len(str(error)) < 1500
    except Exception as error:
        raise AssertionError(f"FUZZ_SEED={seed} with {kinds_of(seed)} ends in {error!r:.1000}") from error
    return kinds, bool(errors)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_not_spoiled_is_read(seed, tmp_path):
    made = Made(seed)
    assert spoil(random.Random(seed), made, []) == []
    made.write(tmp_path / "model")
    assert read_everything(tmp_path / "model") == []
    checkpoint = Checkpoint(tmp_path / "model")
    assert set(checkpoint.quantized_names()) == set(made.weights)
    for name, weight in made.weights.items():
        assert torch.equal(checkpoint.quantized(name).dequantize(), weight.dequantize())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is one of Linux")
def test_the_limit_holds(tmp_path):
    size = psutil.Process().memory_info().vms + 2 * ROOM  # what was freed before, by other tests, cannot serve it
    with little_memory(), pytest.raises(RuntimeError, match="allocate memory"):
        torch.empty(size, dtype=torch.uint8)


@pytest.mark.skipif(SEED is not None, reason="FUZZ_SEED asks for one case")
def test_what_is_spoiled_is_read_or_refused(tmp_path, one_thread):
    process = psutil.Process()
    for seed in range(len(MUTATIONS)):  # each path once, so that what is imported and kept on first use is there
        check(seed, tmp_path)
    before = process.memory_info().rss
    alone: dict[str, Counter[bool]] = {kind: Counter() for kind in MUTATIONS}
    refused = 0
    with little_memory():
        for seed in range(CASES):
            kinds, was_refused = check(seed, tmp_path)
            refused += was_refused
            if len(kinds) == 1:
                alone[kinds[0]][was_refused] += 1
                assert was_refused or kinds[0] in MAY_PASS, f"FUZZ_SEED={seed}: {kinds[0]} was read"
    assert process.memory_info().rss - before < ROOM
    if CASES >= 500:
        assert refused > 0.9 * CASES, refused
        assert [kind for kind, count in alone.items() if not count[True]] == []


@pytest.mark.skipif(SEED is None, reason="FUZZ_SEED does not ask for a case")
def test_the_case_that_is_asked_for(tmp_path, one_thread):
    kinds, was_refused = check(int(SEED or 0), tmp_path)
    print(kinds, was_refused)
