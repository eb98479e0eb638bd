"""Launches by one call of C: what the driver gets, and what becomes of its errors. The driver is written in Python."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import pytest
import torch

from qloralab.kernels.gpu import program
from qloralab.kernels.gpu.program import MOST_PARAMETERS, Launch, NotAProgramError, Program, Slot, resident

pytestmark = pytest.mark.compiler
STREAM = 0x1234_5678_9ABC
BASES = (0x7F00_0000_0000, 0x7F00_0000_1000)


class Config(ctypes.Structure):
    """CUlaunchConfig, up to the number of attributes."""

    _fields_ = (
        *((name, ctypes.c_uint32 * 3) for name in ("grid", "block")),
        ("shared", ctypes.c_uint32),
        *((name, ctypes.c_void_p) for name in ("stream", "attributes")),
        ("count", ctypes.c_uint32),
    )


class Driver:
    """Notes launches; gives the results that it is told to."""

    def __init__(self, *results: int):
        self.results, self.launches, self.sizes = list(results), list[Any](), list[list[int]]()
        kinds = ctypes.POINTER(Config), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
        self.function = ctypes.CFUNCTYPE(ctypes.c_int, *kinds)(self._launch)
        self.address = ctypes.cast(self.function, ctypes.c_void_p).value

    def _launch(self, config: Any, function: int, parameters: Any, extra: Any) -> int:
        one = config.contents
        values = [ctypes.string_at(parameters[i], size) for i, size in enumerate(self.sizes[len(self.launches)])]
        attribute = ctypes.string_at(one.attributes, 12) if one.count else b""
        self.launches.append(
            (function, *one.grid, *one.block, one.shared, one.stream, one.count, attribute, values, extra)
        )
        return self.results.pop(0) if self.results else 0


@pytest.fixture
def driver(monkeypatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(program, "driver", lambda: made.address)
    return made


def launch(name: str = "kernel", *arguments: tuple[str, Any], **others: Any) -> Launch:
    return Launch(name, others.pop("function", 5), (2, 3, 4), 128, 4096, arguments, **others)


def test_the_driver_gets_what_the_launch_says(driver):
    x, y = torch.zeros(2), torch.zeros(3)
    places = {x.data_ptr(): Slot(1, 512), y.data_ptr(): Slot(0)}
    arguments = [("*fp32", x), ("i32", -7), ("*bf16", y), ("u32", 2**32 - 1), ("i64", -(2**40)), ("u64", 2**64 - 1),
                 ("fp32", 0.1), ("*i8", None), ("i32", 0)]  # fmt: skip
    driver.sizes = [[8, 4, 8, 4, 8, 8, 4, 8, 4], []]
    launches = [launch("first", *arguments, function=2**47), launch("second", function=6, dependent=True)]
    run = Program(launches, lambda tensor: places[tensor.data_ptr()])
    assert run(struct.pack("2Q", *BASES), STREAM, depend=True)
    values = (
        struct.pack("<Qi4x", BASES[1] + 512, -7)[:12],
        struct.pack("<QIqQf", BASES[0], 2**32 - 1, -(2**40), 2**64 - 1, 0.1),
    )
    first, second = driver.launches
    assert first[:8] == (2**47, 2, 3, 4, 128, 1, 1, 4096)
    assert first[8:11] == (STREAM, 0, b"")
    assert b"".join(first[11]) == b"".join(values) + bytes(12)
    assert first[12] is second[12] is None
    assert second[0] == 6
    assert second[9:12] == (1, struct.pack("<i4xi", 6, 1), [])  # programmatic stream serialization, allowed


def test_launches_wait_unless_the_call_says_otherwise(driver):
    driver.sizes = [[]]
    run = Program([launch(dependent=True)], lambda _: None)
    assert run(b"", STREAM)
    assert [one[9] for one in driver.launches] == [0]


def test_bases_are_those_of_the_call(driver):
    x = torch.zeros(2)
    driver.sizes = [[8]] * 2
    run = Program([launch("kernel", ("*fp32", x))], lambda _: Slot(0, 8))
    for base in BASES:
        assert run(struct.pack("Q", base), STREAM)
    assert [one[11] for one in driver.launches] == [[struct.pack("Q", base + 8)] for base in BASES]


def test_an_error_names_the_kernel_and_ends_the_launches(driver):
    driver.sizes, driver.results = [[], [], []], [0, 719, 0]
    run = Program([launch("first"), launch("second"), launch("third")], lambda _: None)
    with pytest.raises(RuntimeError, match=r"the launch of second failed: .*719"):
        run(b"", STREAM)
    assert len(driver.launches) == 2


def test_a_thread_without_a_context_is_told_before_anything_ran(driver):
    driver.sizes, driver.results = [[]] * 5, [201, 0, 201]
    run = Program([launch("first"), launch("second")], lambda _: None)
    assert not run(b"", STREAM)
    with pytest.raises(RuntimeError, match="the launch of second failed"):
        run(b"", STREAM)
    assert run(b"", STREAM)


def test_what_stays_is_a_constant(driver):
    stays = resident(torch.zeros(4))
    run = Program([launch("kernel", ("*fp32", stays))], lambda tensor: tensor.data_ptr())
    driver.sizes = [[8]]
    assert run(b"", STREAM)
    assert driver.launches[0][11] == [struct.pack("Q", stays.data_ptr())]
    assert program.RESIDENT.pop(stays.data_ptr()) is stays


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([("*fp32", torch.zeros(1))], "a tensor of unknown origin"),
        ([("i8", 1)], "1 as i8"),
        ([("fp32", -0.0)], "-0.0 as fp32"),
        ([("fp32", 1e39)], "1e\\+39 as fp32"),
        ([("i32", 1)] * (MOST_PARAMETERS + 1), "65 parameters, of at most 64"),
    ],
    ids=["a tensor", "a type", "a zero", "an infinity", "too many"],
)
def test_what_cannot_be_kept_is_refused(driver, arguments, why):
    with pytest.raises(NotAProgramError, match=f"kernel .*{why}"):
        Program([launch("kernel", *arguments)], lambda _: None)


def test_as_many_parameters_as_there_may_be(driver):
    driver.sizes = [[4] * MOST_PARAMETERS]
    run = Program([launch("kernel", *[("i32", i) for i in range(MOST_PARAMETERS)])], lambda _: None)
    assert run(b"", STREAM)
    assert driver.launches[0][11] == [struct.pack("<i", i) for i in range(MOST_PARAMETERS)]


def test_without_a_driver_there_is_no_program(monkeypatch):
    def none(_: str) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    program.driver.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", none)
    with pytest.raises(OSError, match="libcuda"):
        program.driver()
