"""The compiled library for each instruction set, and memory that tells who wrote past it.

**AVX512 on a machine without it** is emulated: ``avx512/immintrin.h`` has its instructions in plain C, for AVX2.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qloralab.kernels.cpu.library import DTYPES, Library
from qloralab.nf4.processor import cpu_features, distinct_isas, supported_isas

sys.path.insert(0, str(Path(__file__).parent))  # where cases.py is, also for the tests of this folder
import cases

Allocate = Callable[..., Tensor]

MARGIN = 4096  # bytes

EMULATION = Path(__file__).with_name("avx512")
EMULATED = {"emulated-avx512": "avx512bw", "emulated-avx512_bf16": "avx512_bf16"}  # and the feature of the real one


def libraries() -> list[str]:
    """The instruction sets of this machine, and those of AVX512 that it lacks, emulated where there is AVX2."""
    lacks = [name for name, feature in EMULATED.items() if feature not in cpu_features().split()]
    return [*distinct_isas(), *(lacks if "avx2" in supported_isas() else [])]


def open_library(name: str) -> Library:
    """One of `libraries`, from the user's cache."""
    if name not in EMULATED:
        return Library(name)
    digest = hashlib.sha256((EMULATION / "immintrin.h").read_bytes()).hexdigest()  # the cache goes by flags
    extra = ["-Og", f"-I{EMULATION}", f"-DQLORALAB_EMULATION=0x{digest[:8]}"]  # -O3 would compile for a minute
    return Library("avx2", [*extra, *(["-DQLORALAB_EMULATE_BF16"] if name.endswith("_bf16") else [])])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests of the emulated libraries, which are slow."""
    here = [item for item in items if isinstance(item, pytest.Function) and item.path.parent == EMULATION.parent]
    left_out = {item for item in here if is_left_out(item)}
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


def is_left_out(test: pytest.Function) -> bool:
    """Whether it is one of an emulated library for what others show too: other instructions, or more of the same."""
    name = test.originalname
    given: dict[str, Any] = test.callspec.params if hasattr(test, "callspec") else {}
    if (product := given.get("product")) in products() and product[0] in EMULATED:
        if product[1] == torch.float16:
            return name != "test_adapted_products_on_any_numbers"
        if name == "test_adapted_products_of_any_rank":
            return given["r"] not in (1, 16, 33) or not given["threshold"]
        return name == "test_adapted_products_of_any_weight" and (not given["double_quant"] or given["shape"][0] > 5000)
    if given.get("library") not in EMULATED:
        return False
    if "thread" in name or "adamw" in name:  # no 512-bit instruction in there
        return True
    if name == "test_few_tokens" and (given["shape"][0] > 4000 or given["shape"] == (16, 4096)):
        return True
    if given["library"] == "emulated-avx512":
        return "beyond_its_ends" in name  # the other one runs the same functions, and its own
    return given.get("dtype") != torch.bfloat16 and "beyond_its_ends" not in name


@pytest.fixture(scope="session", params=libraries())
def library(request: pytest.FixtureRequest) -> Library:
    """The library for each instruction set of this machine, and for AVX512."""
    return open_library(request.param)


def products() -> list[tuple[str, torch.dtype]]:
    """The arithmetic of products, float32 of each library and bfloat16 where it has it, from what dtype.

    The emulated float32 product with bfloat16 instructions at hand is the one without.
    """
    of_float16 = ("native", "emulated-avx512")
    every = [(name, dtype) for name in libraries() for dtype in DTYPES if name in of_float16 or dtype != torch.float16]
    return [one for one in every if one[0] != "emulated-avx512_bf16" or one[1] == torch.bfloat16]


@pytest.fixture(scope="session", params=products(), ids=lambda one: f"{one[0]}-{str(one[1])[6:]}")
def product(request: pytest.FixtureRequest) -> tuple[Library, torch.dtype]:
    """The library of an instruction set, and the dtype to multiply."""
    name, dtype = request.param
    return open_library(name), dtype


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads``, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def whole_weight() -> Callable[..., cases.Packed]:
    """Makes a weight of whole numbers: (shape, block_size=64, double_quant=True) -> its operands."""
    return cases.whole_weight


@pytest.fixture
def empty(monkeypatch) -> Iterator[Allocate]:
    """Allocates like ``torch.empty(*shape, dtype=…)``, in the middle of more memory.

    After the test the memory on both sides is as it was. The library's workspace is allocated so too.
    """
    margins: list[Tensor] = []

    def allocate(*shape: int, dtype: torch.dtype = torch.float32, align: bool = False) -> Tensor:
        # No more than the alignment of an element, unless asked for: nobody promises more.
        before = MARGIN if align else MARGIN + dtype.itemsize
        size = math.prod(shape) * dtype.itemsize
        memory = torch.full((before + size + MARGIN,), 0xA5, dtype=torch.uint8)
        margins.extend([memory[:before], memory[before + size :]])
        return memory[before : before + size].fill_(0xFF).view(dtype).view(shape)  # NaN, until it is written

    make = Library._workspace

    def workspace(self: Library, *problem: Any) -> Tensor:
        return allocate(len(make(self, *problem)), dtype=torch.uint8, align=True)

    monkeypatch.setattr(Library, "_workspace", workspace)
    yield allocate
    assert all((margin == 0xA5).all() for margin in margins), "something wrote past its memory"
