"""The C compiled for 64-bit Arm, under QEMU: the tests of the C functions again, with the bits of the reference.

Python stays on this machine. ``arm_driver.c`` runs on the emulated one and knows none of the functions: a call sends it
the arguments and the memory that they point to, and brings back what that memory holds afterwards. A ``Library`` over
such calls is like any other, so each test that takes a library takes this one. Every buffer ends at a page that may not
be touched.

``make test-arm`` runs all of them. ``make test`` runs the short ones, on the build with NEON.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import inspect
import os
import shutil
import struct
import subprocess
from array import array
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qloralab.kernels.cpu import library as module
from qloralab.kernels.cpu.build import build
from qloralab.kernels.cpu.library import DTYPES, Chunk, Library

COMPILER = "aarch64-linux-gnu-gcc"
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
SYSTEM = "/usr/aarch64-linux-gnu"  # its C library
MISSING = [name for name in (COMPILER, " or ".join(EMULATORS)) if not any(map(shutil.which, name.split(" or ")))]
INSTALL = "apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} (Debian, Ubuntu: {INSTALL})")

ALL = bool(os.environ.get("ARM_TESTS"))
# What the C is compiled for: an instruction set of build.py, and flags. The last is a server's, with SVE and bfloat16.
VARIANTS = {
    "neon": ("native", ["-march=armv8-a"]),
    "portable": ("portable", ["-march=armv8-a"]),
    "sve": ("native", ["-mcpu=neoverse-v1"]),
}
LISTS = ("params", "grads", "moment0", "moment1", "scales0", "scales1")  # of Chunk: arrays of pointers
sizes: dict[int, int] = {}  # bytes at an address, of every tensor and array whose address was asked for


class Request:
    """The arguments of a call, and the memory that they point to, in the form that ``arm_driver.c`` reads."""

    def __init__(self) -> None:
        self.words: list[int] = []
        self.number = 0.0
        self.buffers: list[bytes] = []
        self.pointers: list[tuple[int, int, int]] = []  # in which buffer (-1: in words), at which byte, to which buffer
        self.numbers: dict[int, int] = {}  # address here: number of its buffer

    def add(self, kind: Any, value: Any) -> None:
        """One argument, by its ctypes type."""
        if kind is ctypes.c_float:
            self.number = value
            return
        if hasattr(kind, "contents"):  # a pointer to a structure
            self.pointers.append((-1, 8 * len(self.words), self.structure(value)))
        elif kind is ctypes.c_void_p and value:
            self.pointers.append((-1, 8 * len(self.words), self.buffer(value)))
        self.words.append(value if isinstance(value, int) else 0)

    def new(self, contents: bytes) -> int:
        self.buffers.append(contents)
        return len(self.buffers) - 1

    def buffer(self, address: int) -> int:
        """The memory at an address."""
        if address not in self.numbers:
            self.numbers[address] = self.new(ctypes.string_at(address, sizes[address]))
        return self.numbers[address]

    def structure(self, value: ctypes.Structure) -> int:
        """A structure, and all that it points to."""
        here = self.new(bytes(value))
        for name, kind, *_ in value._fields_:
            if kind is ctypes.c_void_p and (address := getattr(value, name)):
                is_list = isinstance(value, Chunk) and name in LISTS
                there = self.list_of_pointers(address) if is_list else self.buffer(address)
                self.pointers.append((here, getattr(type(value), name).offset, there))
        return here

    def list_of_pointers(self, address: int) -> int:
        contents = ctypes.string_at(address, sizes[address])
        here = self.new(contents)
        for at, (one,) in enumerate(struct.iter_unpack("<q", contents)):
            if one:
                self.pointers.append((here, 8 * at, self.buffer(one)))
        return here

    def message(self, name: str) -> bytes:
        """All of it."""
        counts, words = (len(self.buffers), len(self.pointers)), [*self.words, *[0] * 16][:16]
        numbers = [*map(len, self.buffers), *(number for pointer in self.pointers for number in pointer)]
        head = struct.pack("<64s18qf4x", name.encode(), *counts, *words, self.number)
        return head + struct.pack(f"<{len(numbers)}q", *numbers) + b"".join(self.buffers)


class Machine:
    """A shared library on the emulated machine. Attributes are its functions, as those of a ``ctypes.CDLL`` are."""

    def __init__(self, driver: Path, path: Path):
        emulator = next(filter(None, map(shutil.which, EMULATORS)))
        self.command = [emulator, "-L", SYSTEM, str(driver), str(path)]
        self.process: subprocess.Popen[bytes] | None = None

    def __getattr__(self, name: str) -> Function:
        function = Function(self, name)
        setattr(self, name, function)
        return function

    def call(self, name: str, request: Request) -> tuple[int, list[bytes]]:
        """What a function returns, and what the buffers hold then."""
        if self.process is None:
            environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}  # of this machine
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, env=environment)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        lengths = [8, *map(len, request.buffers)]
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(request.message(name))
            self.process.stdin.flush()
        answer = self.process.stdout.read(sum(lengths))
        if len(answer) < sum(lengths):
            pytest.fail(f"{name} ended the emulated process, status {self.close()}")
        ends = list(accumulate(lengths))
        result, *contents = (answer[end - length : end] for end, length in zip(ends, lengths, strict=True))
        return int.from_bytes(result, "little", signed=True), contents

    def close(self) -> int:
        """End the process; its status."""
        process, self.process = self.process, None
        if process is None:
            return 0
        with process, contextlib.suppress(BrokenPipeError):
            assert process.stdin is not None
            process.stdin.close()
        return process.returncode


class Function:
    """A function on the emulated machine, as ctypes shows one."""

    def __init__(self, machine: Machine, name: str):
        self.machine, self.name = machine, name
        self.argtypes: tuple[Any, ...] = ()
        self.restype: Any = ctypes.c_int

    def __call__(self, *args: Any) -> int | None:
        """What it returns, after the memory here holds what it left there."""
        request = Request()
        for kind, value in zip(self.argtypes, args, strict=True):
            request.add(kind, value)
        result, contents = self.machine.call(self.name, request)
        for address, number in request.numbers.items():
            if contents[number] != request.buffers[number]:
                ctypes.memmove(address, contents[number], len(contents[number]))
        return None if self.restype is None else self.restype(result).value


class RecordedArray(array):
    """An array whose size is known once its address was asked for."""

    def buffer_info(self) -> tuple[int, int]:
        """Its address and its length."""
        address, length = super().buffer_info()
        sizes[address] = length * self.itemsize
        return address, length


@pytest.fixture(autouse=True)
def recorded(monkeypatch) -> None:
    """The size of all memory whose address is asked for."""
    data_ptr = Tensor.data_ptr

    def recording(tensor: Tensor) -> int:
        address = data_ptr(tensor)
        sizes[address] = tensor.nbytes
        return address

    sizes.clear()
    monkeypatch.setattr(Tensor, "data_ptr", recording)
    monkeypatch.setattr(module, "array", RecordedArray)


@pytest.fixture(scope="module", params=VARIANTS if ALL else ["neon"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Library]:
    """The library on the emulated machine, compiled by ``build.py`` with its flags."""
    isa, flags = VARIANTS[request.param]
    driver = tmp_path_factory.mktemp("arm") / "driver"
    source = Path(__file__).with_name("arm_driver.c")
    subprocess.run([COMPILER, "-O1", "-Wall", "-Werror", "-o", str(driver), str(source), "-ldl"], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", COMPILER)
        patch.delenv("QLORALAB_CFLAGS", raising=False)  # sanitizers, whose runtime is this machine's
        machine = Machine(driver, build(module.SOURCES, isa, flags))
        patch.setattr(module, "load", lambda sources, isa, extra: machine)
        patch.setattr(module.pool, "find", lambda: None)
        with contextlib.closing(machine):
            library = Library(isa)
    yield library
    assert machine.close() == 0


@pytest.fixture(scope="module", params=DTYPES, ids=["f32", "bf16", "f16"])
def product(request: pytest.FixtureRequest, library: Library) -> tuple[Library, torch.dtype]:
    """The library, and the dtype to multiply."""
    return library, request.param


@pytest.mark.parametrize("too_far", [1, 32])
def test_a_step_too_far_ends_the_process_and_is_told(library, too_far):
    x, out = torch.randn(1, 64), torch.empty(1, 64)
    for columns, message in [(64, None), (64 + too_far, "qloralab_dropout ended the emulated process, status -11")]:
        told = contextlib.nullcontext() if message is None else pytest.raises(pytest.fail.Exception, match=message)
        with told:
            library._c.qloralab_dropout(x.data_ptr(), 0, 1, columns, 0, 0, 1.0, out.data_ptr(), 1)
    library.dropout(x, 0, 0, 1.0, out)
    assert torch.equal(out, x)


# Those on threads, and the one that loads the library into a process of this machine.
NOT_HERE = (
    "test_the_number_of_threads_changes_no_bit",
    "test_without_a_pool_the_calling_thread_does_it_all",
    "test_nothing_is_touched_beyond_its_ends",
)
LONG = ("few_tokens", "product")
FILES = ("dequantize", "quantize", "dropout", "few_tokens", "product", "library")


def shared_tests() -> Iterator[tuple[str, Callable[..., None]]]:
    """The tests of these files that take a library, by name."""
    for file in FILES:
        spec = importlib.util.spec_from_file_location(f"arm_{file}", Path(__file__).with_name(f"test_{file}.py"))
        assert spec is not None
        assert spec.loader is not None
        tests = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tests)
        for name, test in vars(tests).items():
            if name.startswith("test_") and {"library", "product"} & inspect.signature(test).parameters.keys():
                is_wanted = ALL or not any(word in name for word in LONG)
                if is_wanted and name not in NOT_HERE:
                    yield name, test


if not MISSING:
    globals().update(shared_tests())
