"""State in CUDA's unified memory: more than the GPU is given, and the rest used where it is.

Managed memory has one address on the host and on the device, and each of its pages is in one of them. Each range has
advice from the start:

=======  ==========================================  =================================================================
ranges   advice                                      what follows
=======  ==========================================  =================================================================
kept     preferred location: the device              the first touch, which zeros them, puts them there; the driver
                                                     evicts them when another allocation needs the memory
others   preferred location: the host; accessed by   they never take memory of the device: its kernels read and write
         the device                                  them over the link, both directions at once, without a page fault
=======  ==========================================  =================================================================

**Why nothing is moved.** The other way to use what is away is to move it in before its update, and out behind it, by
``cudaMemPrefetchAsync``. On an H100 with PCIe 5 that moved 45 GB/s in, but 9.4 out, since the driver finds pages of the
host one by one; calls out keep the host busy for as long, and the two directions took turns: 16 GB/s in all. AdamW
touches each byte of state once, reading and writing. Where it is, it does that at 74 GB/s, 88 % of what copies from and
to pinned memory reach together, and it needs no window on the device, no order and no second stream
(``benchmarks/gpu_optimizer.py`` measures both).

**Never more than is free.** A GPU whose managed memory is oversubscribed can hang, for others as well. All arenas
together, with what is away, are to fit into the memory that is free or theirs, or MemoryError is raised. It is not
``torch.OutOfMemoryError``, which programs catch to try again with a smaller batch: that would not help.

**Without concurrent access** (Windows, WSL; cudaDevAttrConcurrentManagedAccess is 0) the driver takes no advice: it
brings everything to the device at each launch.

bitsandbytes' paged optimizers advise nothing, prefetch on stream 0 and synchronize the device after each parameter,
evict nothing, and never free the memory. Calls: CUDA Runtime API, "Memory Management" and "Unified Addressing".
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .arena import ALIGNMENT, Ranges, between

HOST = -1  # cudaCpuDeviceId
PRESSURE = 1 << 30  # bytes free on a device: with more than that nothing has been evicted


class UnifiedMemory:
    """Bytes of managed memory; an arena (``arena.py``).

    They are freed when the arena and all tensors over ``bytes`` are gone, after what runs on the device is over.

    Args:
        nbytes: how many, 1 at least.
        device: a GPU.
        keep: ranges that stay on the device.
        oversubscribe: allocate even if less is free. Other programs on this GPU may hang.

    Raises:
        ImportError: there is no ``cuda.bindings``.
        MemoryError: less than nbytes is free on the device, or the host has no room.
        RuntimeError: CUDA refuses something; the message has the name and the text of its error.
    """

    def __init__(self, nbytes: int, device: torch.device, keep: Ranges = (), oversubscribe: bool = False):
        if nbytes < 1:
            raise ValueError(f"an arena has 1 byte at least, not {nbytes}")
        self.failure: Exception | None = None
        self._runtime = Runtime(load_runtime())
        number = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", number)
        self._keep = [pair for pair in sorted(keep) if pair[0] < pair[1]]
        with self._guard():
            self._concurrent = self._runtime.concurrent(number)
            if not oversubscribe:
                free, total = torch.cuda.mem_get_info(number)
                others = [one for one in _allocations if one.device == number]
                check_room(nbytes, free, total, sum(one.nbytes for one in others), sum(one.on_device for one in others))
            self._allocation = Allocation(self._runtime, nbytes, number)
            self.bytes = as_tensor(self._allocation, self._device)
            self._begin(nbytes)
        self._allocation.on_device = self.resident_bytes()
        paging = "" if self._concurrent else ", whose driver moves all of it (no concurrent managed access)"
        self.where = f"unified memory of {self._device}{paging}"

    def recall(self) -> None:
        """Prefetch what is kept, on the current stream, where the driver may have evicted some of it.

        It does that for an allocation that finds no memory, and tells nobody. PyTorch keeps what it has allocated, so
        after that little is free. With more, nothing is asked: the driver takes 3.6 ms to find 537 MB where they are.
        """
        if not self._concurrent or not self._keep:
            return
        with self._guard():
            if torch.cuda.mem_get_info(self._device.index)[0] < PRESSURE:
                stream = torch.cuda.current_stream().cuda_stream
                for first, end in self._keep:
                    self._runtime.prefetch(self._allocation.address + first, end - first, self._device.index, stream)

    def resident_bytes(self) -> int:
        """The bytes that belong on the device: what is kept. Without concurrent access, all.

        CUDA has no call that tells where pages are (its attribute is the aim of the last prefetch), so what the driver
        has evicted counts on.
        """
        return sum(end - first for first, end in self._keep) if self._concurrent else self._allocation.nbytes

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """The arena's device is the current one, for PyTorch and for ``cuda.bindings``, which keeps its own."""
        with torch.cuda.device(self._device):
            self._runtime.use(self._device.index)
            yield

    def _begin(self, nbytes: int) -> None:
        """Advise, and write zeros."""
        base, number = self._allocation.address, self._device.index
        away = between(nbytes, self._keep)
        current = torch.cuda.current_stream()
        if self._concurrent:
            for first, end in self._keep:
                self._runtime.prefer(base + first, end - first, number)
            for first, end in away:
                self._runtime.prefer(base + first, end - first, HOST)
                self._runtime.map_into(base + first, end - first, number)
        for first, end in [*self._keep, *away]:
            self._runtime.zero(base + first, end - first, current.cuda_stream)


_allocations: weakref.WeakSet[Allocation] = weakref.WeakSet()  # those that are not freed


class Allocation:
    """Managed memory that is freed with this object, which a tensor over it keeps alive.

    At the end of the process it is left to the driver.

    Attributes:
        address: of its first byte, a multiple of `ALIGNMENT`.
        nbytes: of the memory behind the address.
        device: the number of the current GPU, at the time of the allocation.
        on_device: bytes of it that belong there.
    """

    def __init__(self, runtime: Runtime, nbytes: int, device: int):
        # Pages that are never touched, as those before the first multiple, take no memory.
        start = runtime.allocate(nbytes + ALIGNMENT)
        self.address = -(-start // ALIGNMENT) * ALIGNMENT
        self.nbytes, self.device, self.on_device = nbytes, device, 0
        weakref.finalize(self, _free, runtime, start, device).atexit = False
        _allocations.add(self)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3 of the protocol, as Numba documents it: uint8 [nbytes], contiguous."""
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "strides": None, "version": 3}


def as_tensor(allocation: Allocation, device: torch.device) -> Tensor:
    """The memory as a tensor, uint8 [nbytes], without a copy."""
    return torch.as_tensor(allocation, device=device)


def _free(runtime: Runtime, start: int, device: int) -> None:
    with torch.cuda.device(device):
        runtime.use_and_free(device, start)


def check_room(nbytes: int, free: int, total: int, managed: int = 0, managed_on_device: int = 0) -> None:
    """Refuse to oversubscribe a device.

    Args:
        nbytes: of managed memory, wanted.
        free, total: bytes of the device, as ``torch.cuda.mem_get_info`` has them.
        managed: bytes of managed memory that this process has already.
        managed_on_device: those of them that are on the device, and so not free.

    Raises:
        MemoryError: not all of the managed memory could be on the device at once.
    """
    room = max(free + managed_on_device - managed, 0)
    if nbytes > room:
        already = f" ({managed / 1e9:.2f} GB of managed memory not among them)" if managed else ""
        raise MemoryError(
            f"the optimizer's state needs {nbytes / 1e9:.2f} GB of managed memory; of the {total / 1e9:.2f} GB of the "
            f"GPU {room / 1e9:.2f} GB are free{already}. state_bits=8 makes it a quarter; fewer parameters, or "
            "torch.cuda.empty_cache() before, may make it fit; oversubscribe=True allocates it all the same, at the "
            "risk that the GPU hangs"
        )


def load_runtime() -> Any:
    """The module ``cuda.bindings.runtime``.

    Raises:
        ImportError: it is not installed; the message says what to install.
    """
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError as error:
        wanted = f"cuda-bindings=={torch.version.cuda}.*" if torch.version.cuda else "cuda-bindings"
        raise ImportError(
            "paging on a GPU needs cuda.bindings, which PyTorch's builds for CUDA 12.9 and later bring along: "
            f'pip install "{wanted}"'
        ) from error


class Runtime:
    """The calls that are needed of ``cuda.bindings.runtime``, of CUDA 12 and 13, with errors raised.

    CUDA 13 names a location by a struct, and CUDA 12 by a number, -1 for the host; the module has its version.

    Args:
        module: ``cuda.bindings.runtime``, or one that records.
    """

    def __init__(self, module: Any):
        self._module = module
        self._by_struct = module.CUDART_VERSION >= 13000

    def use(self, device: int) -> None:
        """Make a device the current one of this thread."""
        self._call("cudaSetDevice", device)

    def concurrent(self, device: int) -> bool:
        """Whether the host may touch managed memory while kernels run, and ranges can be moved."""
        attribute = self._module.cudaDeviceAttr.cudaDevAttrConcurrentManagedAccess
        return bool(self._call("cudaDeviceGetAttribute", attribute, device))

    def allocate(self, nbytes: int) -> int:
        """The address of managed memory that every stream of every device may touch; MemoryError if there is none."""
        return int(self._call("cudaMallocManaged", nbytes, self._module.cudaMemAttachGlobal))

    def use_and_free(self, device: int, address: int) -> None:
        """Free when the device is idle. Without an error: a context that is lost has lost its memory too."""
        module = self._module
        module.cudaSetDevice(device)
        module.cudaDeviceSynchronize()
        module.cudaFree(address)

    def zero(self, address: int, nbytes: int, stream: int) -> None:
        """Write zeros."""
        self._call("cudaMemsetAsync", address, 0, nbytes, stream)

    def prefetch(self, address: int, nbytes: int, to: int, stream: int) -> None:
        """Move pages to a device or to HOST."""
        flags = (0,) if self._by_struct else ()
        self._call("cudaMemPrefetchAsync", address, nbytes, self._location(to), *flags, stream)

    def prefer(self, address: int, nbytes: int, to: int) -> None:
        """Advise that pages belong to a device or to HOST."""
        self._advise("cudaMemAdviseSetPreferredLocation", address, nbytes, to)

    def map_into(self, address: int, nbytes: int, device: int) -> None:
        """Advise that pages are to be in the page table of a device, wherever they are."""
        self._advise("cudaMemAdviseSetAccessedBy", address, nbytes, device)

    def _advise(self, advice: str, address: int, nbytes: int, to: int) -> None:
        kind = getattr(self._module.cudaMemoryAdvise, advice)
        self._call("cudaMemAdvise", address, nbytes, kind, self._location(to))

    def _location(self, number: int) -> Any:
        if not self._by_struct:
            return number
        location, types = self._module.cudaMemLocation(), self._module.cudaMemLocationType
        host = number == HOST
        location.type = types.cudaMemLocationTypeHost if host else types.cudaMemLocationTypeDevice
        location.id = 0 if host else number
        return location

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call, and return what comes with the code of an error, if that is 0."""
        code, *results = getattr(self._module, name)(*arguments)
        if int(code):
            said, text = (self._module.cudaGetErrorName(code)[1], self._module.cudaGetErrorString(code)[1])
            message = f"{name}: {said.decode()}: {text.decode()}"
            raise MemoryError(message) if said == b"cudaErrorMemoryAllocation" else RuntimeError(message)
        return results[0] if results else None
