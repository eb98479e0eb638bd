"""State in unified memory: which calls CUDA gets, in version 12 and in 13, what is refused, and that it is freed.

Most of it runs without a GPU: a module that records stands for ``cuda.bindings.runtime``, with the signatures that
cuda-bindings 12.9 and 13 have, where each call returns a tuple that begins with a code. The tests marked ``gpu`` ask
the driver itself.
"""

from __future__ import annotations

import contextlib
import gc
import re
import sys
import types
from collections.abc import Iterator, Sequence
from enum import IntEnum
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import qloralab as ql
from qloralab.optim import unified_memory
from qloralab.optim.arena import ALIGNMENT
from qloralab.optim.layout import lay_out
from qloralab.optim.unified_memory import (
    HOST,
    PRESSURE,
    Allocation,
    Runtime,
    UnifiedMemory,
    check_room,
    load_runtime,
)

from .steps import BUDGET, MIB, bits, make, run, same

GB = 10**9
START = 0x7F00_0000_0000  # where managed memory begins, a multiple of ALIGNMENT
STREAM = 0xABC0
DEVICE = torch.device("cuda", 1)
VERSIONS = [12090, 13000, 13050]


class Error(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInvalidDevice = 101


class Advice(IntEnum):
    cudaMemAdviseSetReadMostly = 1
    cudaMemAdviseSetPreferredLocation = 3
    cudaMemAdviseSetAccessedBy = 5


class Attribute(IntEnum):
    cudaDevAttrPageableMemoryAccess = 88
    cudaDevAttrConcurrentManagedAccess = 89


class LocationType(IntEnum):
    cudaMemLocationTypeInvalid = 0
    cudaMemLocationTypeDevice = 1
    cudaMemLocationTypeHost = 2


class Location:
    """The struct ``cudaMemLocation``."""

    def __init__(self) -> None:
        self.type, self.id = LocationType.cudaMemLocationTypeInvalid, 0


DEVICE_1 = (LocationType.cudaMemLocationTypeDevice, 1)
THE_HOST = (LocationType.cudaMemLocationTypeHost, 0)
PREFER, ACCESSED = Advice.cudaMemAdviseSetPreferredLocation, Advice.cudaMemAdviseSetAccessedBy


class Recorder:
    """What all versions have, and the calls that were made: a name and arguments, a location as a pair.

    Args:
        fails: the codes of calls that fail.
        start: the address that is allocated.
        concurrent: of the device.
    """

    CUDART_VERSION: int = 0
    cudaMemAttachGlobal = 1
    cudaError_t, cudaMemoryAdvise, cudaDeviceAttr = Error, Advice, Attribute
    cudaMemLocation, cudaMemLocationType = Location, LocationType

    def __init__(self, fails: dict[str, Error] | None = None, start: int = START, concurrent: int = 1):
        self.calls: list[tuple[Any, ...]] = []
        self._fails, self._start, self._concurrent = fails or {}, start, concurrent

    def called(self, name: str) -> list[tuple[Any, ...]]:
        """The arguments of each call of this name."""
        return [tuple(arguments) for one, *arguments in self.calls if one == name]

    def __getattr__(self, name: str) -> Any:
        """The calls whose arguments are numbers in all versions."""
        if name not in ("cudaSetDevice", "cudaDeviceSynchronize", "cudaMallocManaged", "cudaFree", "cudaMemsetAsync"):
            raise AttributeError(name)
        return partial(self._note, name, returns=self._start if name == "cudaMallocManaged" else None)

    def cudaDeviceGetAttribute(self, attr: Attribute, device: int) -> tuple[Any, ...]:
        assert isinstance(attr, Attribute)
        return self._note("cudaDeviceGetAttribute", attr, device, returns=self._concurrent)

    def cudaGetErrorName(self, error: Error) -> tuple[Any, ...]:
        assert isinstance(error, Error)
        return Error.cudaSuccess, error.name.encode()

    def cudaGetErrorString(self, error: Error) -> tuple[Any, ...]:
        assert isinstance(error, Error)
        return Error.cudaSuccess, {2: b"out of memory", 1: b"invalid argument", 101: b"invalid device ordinal"}[error]

    def _note(self, name: str, *arguments: Any, returns: Any = None) -> tuple[Any, ...]:
        self.calls.append((name, *arguments))
        code = self._fails.get(name, Error.cudaSuccess)
        if returns is None:
            return (code,)
        return code, None if code else returns


class Version12(Recorder):
    """A location is a number; the calls that take a struct have another name."""

    def cudaMemAdvise(self, devPtr: int, count: int, advice: Advice, device: int) -> tuple[Any, ...]:
        assert isinstance(advice, Advice)
        assert isinstance(device, int)
        return self._note("cudaMemAdvise", devPtr, count, advice, device)

    def cudaMemPrefetchAsync(self, devPtr: int, count: int, dstDevice: int, stream: int) -> tuple[Any, ...]:
        assert isinstance(dstDevice, int)
        return self._note("cudaMemPrefetchAsync", devPtr, count, dstDevice, stream)


class Version13(Recorder):
    """A location is a struct."""

    def cudaMemAdvise(self, devPtr: int, count: int, advice: Advice, location: Location) -> tuple[Any, ...]:
        assert isinstance(advice, Advice)
        return self._note("cudaMemAdvise", devPtr, count, advice, self._pair(location))

    def cudaMemPrefetchAsync(
        self, devPtr: int, count: int, location: Location, flags: int, stream: int
    ) -> tuple[Any, ...]:
        return self._note("cudaMemPrefetchAsync", devPtr, count, self._pair(location), flags, stream)

    @staticmethod
    def _pair(location: Location) -> tuple[LocationType, int]:
        assert isinstance(location, Location)
        assert isinstance(location.type, LocationType)
        return location.type, location.id


def recorder(version: int, **options: Any) -> Any:
    module = (Version12 if version < 13000 else Version13)(**options)
    module.CUDART_VERSION = version
    return module


versions = pytest.mark.parametrize("version", VERSIONS)


# the calls, by version


@pytest.mark.parametrize(("to", "number", "pair"), [(1, 1, DEVICE_1), (HOST, -1, THE_HOST)], ids=["device", "host"])
@versions
def test_a_location_is_named_as_the_version_wants(version, to, number, pair):
    module = recorder(version)
    runtime, where = Runtime(module), number if version < 13000 else pair
    runtime.prefetch(START, 4096, to, STREAM)
    runtime.prefer(START, 4096, to)
    runtime.map_into(START, 4096, to)
    assert module.calls == [
        ("cudaMemPrefetchAsync", START, 4096, *((where,) if version < 13000 else (where, 0)), STREAM),
        ("cudaMemAdvise", START, 4096, PREFER, where),
        ("cudaMemAdvise", START, 4096, ACCESSED, where),
    ]


# errors


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("cudaSetDevice", lambda runtime: runtime.use(7)),
        ("cudaDeviceGetAttribute", lambda runtime: runtime.concurrent(7)),
        ("cudaMallocManaged", lambda runtime: runtime.allocate(1)),
        ("cudaMemsetAsync", lambda runtime: runtime.zero(START, 1, STREAM)),
        ("cudaMemPrefetchAsync", lambda runtime: runtime.prefetch(START, 1, 7, STREAM)),
        ("cudaMemAdvise", lambda runtime: runtime.prefer(START, 1, HOST)),
        ("cudaMemAdvise", lambda runtime: runtime.map_into(START, 1, 7)),
    ],
)
@versions
def test_an_error_is_raised_with_its_name_and_text(version, name, call):
    runtime = Runtime(recorder(version, fails={name: Error.cudaErrorInvalidDevice}))
    with pytest.raises(RuntimeError, match=rf"^{name}: cudaErrorInvalidDevice: invalid device ordinal$"):
        call(runtime)


def test_no_memory_is_a_memory_error():
    runtime = Runtime(recorder(13000, fails={"cudaMallocManaged": Error.cudaErrorMemoryAllocation}))
    with pytest.raises(MemoryError, match=r"^cudaMallocManaged: cudaErrorMemoryAllocation: out of memory$"):
        runtime.allocate(1 << 50)


def test_freeing_raises_nothing():
    names = ("cudaSetDevice", "cudaDeviceSynchronize", "cudaFree")
    module = recorder(13000, fails=dict.fromkeys(names, Error.cudaErrorInvalidValue))
    Runtime(module).use_and_free(1, START)
    assert [name for name, *_ in module.calls] == list(names)


@pytest.mark.parametrize(
    ("version", "wanted"), [("12.9", '"cuda-bindings==12.9.*"'), ("13.0", '"cuda-bindings==13.0.*"'), (None, '"cuda-')]
)
def test_without_the_bindings_it_says_what_to_install(version, wanted, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", version)
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime"):
        monkeypatch.setitem(sys.modules, name, None)
    message = (
        "paging on a GPU needs cuda.bindings, which PyTorch's builds for CUDA 12.9 and later bring along: pip install"
    )
    with pytest.raises(ImportError, match=f"^{re.escape(f'{message} {wanted}')}") as caught:
        load_runtime()
    assert isinstance(caught.value.__cause__, ImportError)


def test_with_the_bindings_their_module_is_loaded(monkeypatch):
    package, bindings, runtime = (types.ModuleType(name) for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime"))
    for module in (package, bindings, runtime):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(bindings, "runtime", runtime, raising=False)
    assert load_runtime() is runtime


# room


@pytest.mark.parametrize(
    ("nbytes", "free", "managed", "on_device"),
    [
        (10 * GB, 10 * GB, 0, 0),
        (10 * GB, 11 * GB, 1 * GB, 0),  # what is away may come
        (10 * GB, 10 * GB, 1 * GB, 1 * GB),  # what is there has been counted
        (4 * GB, 5 * GB, 3 * GB, 2 * GB),
    ],
)
def test_what_fits_to_the_last_byte_is_allowed(nbytes, free, managed, on_device):
    check_room(nbytes, free, 80 * GB, managed, on_device)
    with pytest.raises(MemoryError):
        check_room(nbytes + 1, free, 80 * GB, managed, on_device)


def test_the_message_says_what_there_is_and_what_helps():
    with pytest.raises(MemoryError) as caught:
        check_room(12 * GB, 10 * GB, 80 * GB)
    assert str(caught.value) == (
        "the optimizer's state needs 12.00 GB of managed memory; of the 80.00 GB of the GPU 10.00 GB are free. "
        "state_bits=8 makes it a quarter; fewer parameters, or torch.cuda.empty_cache() before, may make it fit; "
        "oversubscribe=True allocates it all the same, at the risk that the GPU hangs"
    )
    assert not isinstance(caught.value, torch.OutOfMemoryError)


@pytest.mark.parametrize(
    ("wanted", "managed", "on_device", "said"),
    [(12 * GB, 4 * GB, 1 * GB, "7.00 GB are free (4.00 GB"), (1, 20 * GB, 0, "0.00 GB are free (20.00 GB")],
    ids=["some", "more than is free"],
)
def test_managed_memory_that_is_there_already_is_told(wanted, managed, on_device, said):
    message = f"of the 80.00 GB of the GPU {said} of managed memory not among them). state_bits=8"
    with pytest.raises(MemoryError, match=re.escape(message)):
        check_room(wanted, 10 * GB, 80 * GB, managed, on_device)


# the arena, with a driver that records


class Driver:
    """A GPU with the number 1, as far as PyTorch is asked. Managed memory is the host's.

    Attributes:
        module: records the calls.
        free: bytes; total is 80 GB.
        current: the devices that were made the current one, the last one on top.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any):
        self.module, self.free, self.current = recorder(13000, **options), 70 * GB, [0]
        monkeypatch.setattr(unified_memory, "load_runtime", lambda: self.module)
        monkeypatch.setattr(unified_memory, "as_tensor", self._as_tensor)
        monkeypatch.setattr(torch.cuda, "device", self._device)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free, 80 * GB))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=STREAM))

    @contextlib.contextmanager
    def _device(self, device: Any) -> Iterator[None]:
        self.current.append(torch.device("cuda", device).index if isinstance(device, int) else device.index)
        yield
        self.current.pop()

    @staticmethod
    def _as_tensor(allocation: Allocation, device: torch.device) -> Tensor:
        assert device == DEVICE
        tensor = torch.zeros(allocation.nbytes, dtype=torch.uint8)
        tensor.keeps = allocation  # pyright: ignore[reportAttributeAccessIssue]  # as the real one does
        return tensor


@pytest.fixture
def driver(monkeypatch) -> Iterator[Driver]:
    yield Driver(monkeypatch)
    gc.collect()  # nothing is freed behind the recorder


def test_what_is_kept_is_preferred_on_the_device_and_the_rest_on_the_host(driver):
    arena = UnifiedMemory(8 * MIB, DEVICE, [(4 * MIB, 6 * MIB), (2 * MIB, 2 * MIB), (0, MIB)])
    assert arena.resident_bytes() == 3 * MIB
    assert driver.module.called("cudaMemAdvise") == [
        (START, MIB, PREFER, DEVICE_1),
        (START + 4 * MIB, 2 * MIB, PREFER, DEVICE_1),
        (START + MIB, 3 * MIB, PREFER, THE_HOST),
        (START + MIB, 3 * MIB, ACCESSED, DEVICE_1),
        (START + 6 * MIB, 2 * MIB, PREFER, THE_HOST),
        (START + 6 * MIB, 2 * MIB, ACCESSED, DEVICE_1),
    ]
    zeroed = driver.module.called("cudaMemsetAsync")
    assert [(value, stream) for _, value, _, stream in zeroed] == [(0, STREAM)] * 4
    pieces = sorted((at - START, at - START + count) for at, _, count, _ in zeroed)
    assert pieces == [(0, MIB), (MIB, 4 * MIB), (4 * MIB, 6 * MIB), (6 * MIB, 8 * MIB)]
    names = [name for name, *_ in driver.module.calls]
    assert names.index("cudaMemsetAsync") > max(i for i, name in enumerate(names) if name == "cudaMemAdvise")


@pytest.mark.parametrize("device", ["cuda:1", "cuda"], ids=["by its number", "the current one"])
def test_calls_are_made_for_the_device_of_the_arena(driver, device):
    arena = UnifiedMemory(MIB, torch.device(device))
    attribute = Attribute.cudaDevAttrConcurrentManagedAccess
    assert driver.module.calls[:2] == [("cudaSetDevice", 1), ("cudaDeviceGetAttribute", attribute, 1)]
    assert driver.current == [0], "the one before is the current one again"
    assert (arena.where, arena.failure) == ("unified memory of cuda:1", None)


def test_what_is_kept_is_recalled_under_pressure_only(driver):
    arena = UnifiedMemory(8 * MIB, DEVICE, [(4 * MIB, 6 * MIB), (0, MIB)])
    driver.free = PRESSURE
    arena.recall()
    assert driver.module.called("cudaMemPrefetchAsync") == []
    driver.free = PRESSURE - 1
    arena.recall()
    assert driver.module.called("cudaMemPrefetchAsync") == [
        (START, MIB, DEVICE_1, 0, STREAM),
        (START + 4 * MIB, 2 * MIB, DEVICE_1, 0, STREAM),
    ]


def test_where_nothing_is_kept_nothing_is_recalled(driver):
    arena = UnifiedMemory(8 * MIB, DEVICE)
    assert arena.resident_bytes() == 0
    driver.free, before = 0, list(driver.module.calls)
    arena.recall()
    assert driver.module.calls == before


def test_a_driver_without_concurrent_access_gets_no_advice(monkeypatch):
    driver = Driver(monkeypatch, concurrent=0)
    arena = UnifiedMemory(8 * MIB, DEVICE, [(0, MIB)])
    driver.free = 0
    arena.recall()
    assert driver.module.called("cudaMemAdvise") + driver.module.called("cudaMemPrefetchAsync") == []
    assert sum(count for _, _, count, _ in driver.module.called("cudaMemsetAsync")) == 8 * MIB
    assert arena.resident_bytes() == 8 * MIB
    assert arena.where.endswith(", whose driver moves all of it (no concurrent managed access)")
    del arena
    gc.collect()


def test_all_arenas_together_have_to_fit(driver):
    first = UnifiedMemory(8 * MIB, DEVICE, [(0, 2 * MIB)])
    driver.free = 10 * MIB
    second = UnifiedMemory(4 * MIB, DEVICE)  # 10 MiB, without the 6 that are away
    with pytest.raises(MemoryError, match=r"of the GPU 0\.00 GB are free \(0\.01 GB of managed memory not among"):
        UnifiedMemory(1, DEVICE)
    assert len(driver.module.called("cudaMallocManaged")) == 2
    assert len(UnifiedMemory(MIB, DEVICE, oversubscribe=True).bytes) == MIB
    del second
    gc.collect()
    assert len(UnifiedMemory(4 * MIB, DEVICE).bytes) == 4 * MIB
    del first


@pytest.mark.parametrize("nbytes", [0, -1])
def test_an_empty_arena_is_refused(driver, nbytes):
    with pytest.raises(ValueError, match=f"^an arena has 1 byte at least, not {nbytes}$"):
        UnifiedMemory(nbytes, DEVICE)
    assert driver.module.calls == []


def test_where_advice_is_refused_the_memory_is_freed(monkeypatch):
    driver = Driver(monkeypatch, fails={"cudaMemAdvise": Error.cudaErrorInvalidValue})
    with pytest.raises(RuntimeError, match=r"^cudaMemAdvise: cudaErrorInvalidValue: invalid argument$") as caught:
        UnifiedMemory(MIB, DEVICE)
    del caught
    gc.collect()
    assert driver.module.called("cudaFree") == [(START,)]


# what is allocated


@pytest.mark.parametrize("beyond", [0, 1, 4096, ALIGNMENT - 1])
def test_the_address_is_aligned_and_all_bytes_are_in_the_memory(beyond, monkeypatch):
    driver = Driver(monkeypatch, start=START + beyond)
    allocation = Allocation(Runtime(driver.module), 12345, 1)
    ((asked, flags),) = driver.module.called("cudaMallocManaged")
    assert flags == Recorder.cudaMemAttachGlobal
    assert allocation.address == (START if beyond == 0 else START + ALIGNMENT)
    assert allocation.address + allocation.nbytes <= START + beyond + asked
    assert (allocation.nbytes, allocation.device, allocation.on_device) == (12345, 1, 0)
    assert allocation.__cuda_array_interface__ == {
        "shape": (12345,),
        "typestr": "|u1",
        "data": (allocation.address, False),
        "strides": None,
        "version": 3,
    }
    del allocation
    assert driver.module.calls[-3:] == [("cudaSetDevice", 1), ("cudaDeviceSynchronize",), ("cudaFree", START + beyond)]
    assert driver.current == [0]


def test_memory_is_freed_when_the_arena_and_its_tensors_are_gone(driver):
    arena = UnifiedMemory(MIB, DEVICE)
    whole = arena.bytes
    del arena
    gc.collect()
    assert driver.module.called("cudaFree") == []
    del whole
    gc.collect()
    assert driver.module.called("cudaFree") == [(START,)]


# with a GPU

# 40 MiB of float32 moments, or 24 of codes
NUMELS = {32: [1_000_003, 5, 0, 2_600_000, 4_096, 1_400_000], 8: [4_000_003, 5, 0, 4_100_000, 4_096, 4_000_000]}
SLACK = 8 * MIB  # what the driver takes besides


def free() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def use(nbytes: int, keep: Sequence[tuple[int, int]]) -> int:
    """Write and read all of an arena, and return the bytes that were free meanwhile."""
    arena = UnifiedMemory(nbytes, torch.device("cuda"), keep)
    arena.bytes.add_(3)
    meanwhile = free()
    assert int(arena.bytes[-1]) == 3
    return meanwhile


@pytest.mark.gpu
def test_the_arena_is_managed_memory_and_zero_on_a_gpu():
    arena = UnifiedMemory(64 * MIB, torch.device("cuda"), [(0, 16 * MIB), (32 * MIB, 48 * MIB)])
    number = torch.cuda.current_device()
    assert (arena.bytes.dtype, arena.bytes.shape) == (torch.uint8, (64 * MIB,))
    assert arena.bytes.device == torch.device("cuda", number)
    assert arena.bytes.data_ptr() % ALIGNMENT == 0
    for part in (arena.bytes, arena.bytes[20 * MIB :], arena.bytes[-1:]):
        code, found = load_runtime().cudaPointerGetAttributes(part.data_ptr())
        assert (int(code), found.type.name, found.device) == (0, "cudaMemoryTypeManaged", number)
    assert not arena.bytes.any()
    assert arena.resident_bytes() == (64 if "no concurrent managed access" in arena.where else 32) * MIB


@pytest.mark.gpu
@pytest.mark.parametrize("keep", [[], [(8 * MIB, 24 * MIB)], [(0, 64 * MIB)]], ids=["nothing kept", "some", "all"])
def test_a_kernel_reads_and_writes_what_is_kept_and_what_is_away(keep):
    arena = UnifiedMemory(64 * MIB, torch.device("cuda"), keep)
    written = torch.randint(256, (64 * MIB,), dtype=torch.uint8)
    arena.bytes.copy_(written.to("cuda"))
    assert torch.equal(arena.bytes.cpu(), written)
    numbers = arena.bytes.view(torch.int32)
    numbers.bitwise_xor_(0x55AA55AA)
    arena.recall()
    assert torch.equal(numbers.cpu(), written.view(torch.int32) ^ 0x55AA55AA)


@pytest.mark.gpu
def test_memory_of_the_device_is_freed_with_the_last_tensor_each_time():
    nbytes = 256 * MIB
    use(nbytes, [(0, nbytes)])  # what is loaded at the first use
    gc.collect()
    before = free()
    for _ in range(3):
        part = UnifiedMemory(nbytes, torch.device("cuda"), [(0, nbytes)]).bytes[5:]
        part.add_(1)
        gc.collect()
        assert nbytes - SLACK <= before - free() <= nbytes + SLACK
        assert int(part[-1]) == 1
        del part
        gc.collect()
        assert abs(free() - before) <= SLACK


@pytest.mark.gpu
def test_what_is_away_takes_no_memory_of_the_device():
    nbytes = 256 * MIB
    if "no concurrent managed access" in UnifiedMemory(MIB, torch.device("cuda")).where:
        pytest.skip("the driver brings everything to this device")
    use(nbytes, [])
    gc.collect()
    before = free()
    assert before - use(nbytes, []) <= SLACK
    assert before - use(nbytes, [(0, nbytes // 2)]) <= nbytes // 2 + SLACK


@pytest.mark.gpu
def test_more_than_is_free_is_refused_and_takes_nothing():
    nbytes = torch.cuda.mem_get_info()[1] + 1
    before = free()
    with pytest.raises(MemoryError, match="the optimizer's state needs"):
        UnifiedMemory(nbytes, torch.device("cuda"))
    assert before - free() <= SLACK


@pytest.mark.gpu
@pytest.mark.parametrize("state_bits", [32, 8])
def test_a_budget_changes_no_bit_on_a_gpu_and_what_goes_over_the_link_is_counted(state_bits):
    layout = lay_out(NUMELS[state_bits], state_bits // 8, ALIGNMENT, 2)
    kept = BUDGET // (2 * ALIGNMENT)  # chunks
    away = sum(one.end - one.first for segments in layout.segments[kept:] for one in segments) * 2 * state_bits // 8
    assert away > 0
    ends = []
    for budget in (None, BUDGET):
        params = [Parameter(param.detach().cuda()) for param in make(NUMELS[state_bits])]
        optimizer = ql.PagedAdamW(params, lr=0.01, state_bits=state_bits, budget=budget)
        run(optimizer, params)
        paging = optimizer.paging()
        expected = 0 if budget is None else 3 * away
        assert (paging.fetched, paging.evicted, paging.misses) == (expected, expected, 0)
        assert paging.state_bytes >= sum(NUMELS[state_bits]) * 2 * state_bits // 8
        if "no concurrent managed access" not in paging.where:
            assert paging.resident_bytes == (paging.state_bytes if budget is None else BUDGET)
        ends.append(bits(optimizer, params))
    assert same(*ends)
