"""y = x W'^T + bias for 1 to 16 tokens: CUDA C++ (``few_tokens.cu``), with a table of pairs in shared memory.

It multiplies by the bits of ``linear.py``, from the same bytes, and differs in the order of its float32 sums. With few
tokens a weight is read once, and what is done to it has to fit beneath that.

**The table.** A byte holds two codes, neighbours along k, and a tensor core takes two neighbours in a register. So the
256 bytes have an entry each, the pair of their values in bfloat16. An entry is there 32 times, once in each bank of
shared memory, and lane l reads its own: no two lanes meet in a bank. Its address is ``256 byte + 4 l``: one PRMT puts
the byte beside 4 l. The table takes 64 KiB, of which each second 128 bytes are free, and the sums below lie there. Two
weights cost a PRMT, a load and a product with the pair of their scales.

**The lanes.** Lane 4 g + c of a warp loads 16 bytes of rows g and g + 8 for 128 columns, at 16 c. Its bytes 2 j and
2 j + 1 are a0 to a3 of the j-th mma.m16n8k16, x[g, 32 c + 4 j] and the three behind it are b0 and b1: what is loaded is
what is multiplied. A scale belongs to 64 columns, those of two lanes c, and each lane wants those of two rows: of the
four lanes each decodes one, and two shuffles give it to its neighbour. Otherwise each would be decoded twice, 0.14
instructions a weight more.

**The balance.** A CTA for each multiprocessor has an equal range of row tiles of 16 rows, and takes two at a time, for
which x is loaded once. K is split among its 16 warps: a unit is 128 columns of the two row tiles, and the units are
dealt to the warps one after the other, on from one group of rows to the next. So warps differ by one unit in all, and
nothing is left for a second launch: sums meet in shared memory, two barriers a group, and are added in the order of k.
Bits do not depend on the number of multiprocessors. Row tiles of the busiest CTA over the mean, on 132: 4096x4096 and
4096x14336 1.03, 14336x4096 1.03, 11008x4096 1.15; 1024x4096 occupies 64 of them.

**Bytes on their way.** Each warp has asked for the next two units, 4 KiB, before it multiplies: 64 KiB a
multiprocessor, also across groups. Where the grid before still runs (sm_90 and newer), the first of them are asked for
and the table is filled before it is waited for: they depend on nothing that it writes. A weight's first product waits
for what may just have written the weight.

**Counted** for sm_90 (NVRTC 13.0, K = 4096) in instructions a weight: 2.11 for 8 tokens, 2.29 for 16, 1.98 for 8 with
float32 scales; of the first 0.70 are PRMT, LOP3 and others of the integer unit, 0.53 loads from shared memory.
``linear.py`` takes 4.5. No GPU has run this.

**Compiling.** NVRTC, which PyTorch's CUDA wheels bring with ``cuda-bindings``, compiles it at first use, in half a
second for each K, block size, kind of scales and 8 tokens, and each of these passes a check before it serves. Without
them ``linear.py`` serves.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qloralab.nf4 import ops
from qloralab.nf4.packed import Packed

from . import canonical, nvrtc, self_check
from .adapter_operands import LowRank
from .case import PACKED, Budget, CudaCase
from .launch import launch_native
from .lookup import TABLE_ARGUMENTS

SOURCE = Path(__file__).with_suffix(".cu")
NAME = "few_tokens"
MOST = 16  # tokens
THREADS = 512
ROWS = 16  # of a row tile
SHARED = 101376  # bytes that a CTA may have on sm_86, 89 and 120
OLDEST = 80  # of the architectures

_OPERANDS = ("packed", "scales", "absmax2", "offset", "scale_map")
# By the identity of packed codes: the codes, and the versions of the weight's tensors when it was last multiplied.
_settled: dict[int, tuple[weakref.ref[Tensor], list[int]]] = {}


class Constants(NamedTuple):
    """What the kernel is compiled for."""

    TOKEN_TILES: int  # of 8 tokens
    DOUBLE: bool
    BLOCKS: int  # of 64 columns in a row
    SHIFT: int  # log2 of block size / 64

    @classmethod
    def of(cls, M: int, weight: Packed) -> Constants:
        shift = (weight.block_size // canonical.TILE).bit_length() - 1
        return cls(-(-M // 8), weight.absmax2 is not None, weight.shape[1] // canonical.TILE, shift)

    def options(self) -> list[bytes]:
        """For a compiler."""
        return [f"-D{name}={int(value)}".encode() for name, value in self._asdict().items()]


USUAL = Constants(1, True, 64, 0)
_serves: dict[tuple[torch.device, Constants], bool] = {}


def serves(x: Tensor, M: int, weight: Packed) -> bool:
    """Whether it multiplies x by a weight that fits a fused product: found out once for its constants, on a device.

    The first time waits for the device, and is no time to capture a graph.
    """
    if not 0 < M <= MOST or not x.is_cuda or torch.version.hip:
        return False
    constants = Constants.of(M, weight)
    key = x.device, constants
    found = _serves.get(key)
    if found is None:
        if torch.cuda.is_current_stream_capturing():
            return False
        why = reason(x.device, constants)
        if why and not _is_missing(x.device):
            self_check.warn_once(NAME, why, "Triton's kernel multiplies few tokens as well, in more time.")
        found = _serves[key] = not why
    return found and shared_bytes(weight, grid_of(weight.shape[0], _multiprocessors(x.device))) <= SHARED


def reason(device: torch.device, constants: Constants = USUAL) -> str:
    """Why the kernel does not serve on a device, in words; empty where it does. Compiles and checks it, once."""
    return _is_missing(device) or self_check.reason(NAME, device, constants)


def _is_missing(device: torch.device) -> str:
    """What it takes and is not there, in words."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"it needs sm_{OLDEST} or newer" if 10 * major + minor < OLDEST else nvrtc.why_not()


def few_tokens(x: Tensor, weight: Packed, bias: Tensor | None = None, adapter: LowRank | None = None) -> Tensor:
    """x W'^T + bias, plus h B' of an adapter.

    Args:
        x: bfloat16 [..., K], of 1 to 16 tokens, on the weight's device.
        weight: W [N, K].
        bias: bfloat16 [N] or None.
        adapter: what is added before the result is rounded; None: nothing is.

    Returns:
        bfloat16 [..., N].

    Raises:
        ValueError: x, bias or the adapter has another dtype, shape or device; ``canonical.why_not`` has a reason; there
            are no tokens, or more than 16.
    """
    N, K = weight.shape
    canonical.check("x", x, K, weight)
    M = math.prod(x.shape[:-1])
    if not 0 < M <= MOST:
        raise ValueError(f"there must be 1 to {MOST} tokens, not {M}")
    if bias is not None:
        canonical.check("bias", bias, N, weight)
        if bias.dim() != 1:
            raise ValueError(f"bias must have 1 dimension, not {bias.dim()}")
        bias = bias.contiguous()
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    if adapter is not None:
        adapter.check(x, M, N)
        adapter = LowRank(adapter.h.contiguous(), adapter.B.contiguous())
    out = x.new_empty((*x.shape[:-1], N))
    grid = grid_of(N, _multiprocessors(x.device))
    launch_native(
        NAME, _function(x.device, Constants.of(M, weight)), (grid,), THREADS, shared_bytes(weight, grid),
        arguments(x, weight, bias, adapter, out), _can_depend(x.device), is_settled(weight.tensors),
    )  # fmt: skip
    return out


def is_settled(weight: Sequence[Tensor | None]) -> bool:
    """Whether a weight was multiplied before, and not written to since: the kernel may read it while others run.

    Args:
        weight: its tensors, packed codes first.
    """
    packed = weight[0]
    assert packed is not None
    if packed.is_inference():
        return False  # it does not count what is written to it
    now = [-1 if one is None or one.is_inference() else one._version for one in weight]
    key = id(packed)
    known = _settled.get(key)
    if known is None or known[0]() is not packed:
        _settled[key] = weakref.ref(packed, lambda _: _settled.pop(key, None)), now
        return False
    if known[1] == now:
        return True
    known[1][:] = now
    return False


def arguments(
    x: Tensor, weight: Packed, bias: Tensor | None, adapter: LowRank | None, out: Tensor
) -> list[tuple[str, Any]]:
    """The arguments of the kernel, as ``program.Launch`` takes them."""
    found = canonical.arguments(weight)
    h, B = (None, None) if adapter is None else (adapter.h, adapter.B)
    pointers = x, *(found[name] for name in _OPERANDS), bias, out, h, B
    sizes = math.prod(x.shape[:-1]), weight.shape[0], 0 if B is None else B.shape[1]
    return [
        *(("*i8", one) for one in pointers),
        *(("i32", size) for size in sizes),
        ("fp32", found["inverse"]),
        *(("i32", found[name]) for name in TABLE_ARGUMENTS[:8]),
    ]


def grid_of(N: int, multiprocessors: int) -> int:
    """How many CTAs there are."""
    return min(multiprocessors, -(-N // ROWS))


def shared_bytes(weight: Packed, grid: int) -> int:
    """Shared memory of a CTA: the table, the map of the scales' codes, and the second level of its rows' scales."""
    if weight.absmax2 is None:
        return 256 * 256
    N, K = weight.shape
    tiles = -(-N // ROWS)
    # And a row tile before, where the last rows are fewer than one, and one behind, which a group may lack.
    rows = -(-tiles // grid) * ROWS + 2 * ROWS
    return 256 * 256 + 4 * 256 + 4 * (rows * K // (weight.block_size * 256) + 2)


@functools.cache
def _can_depend(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _function(device: torch.device, constants: Constants) -> int:
    """The compiled kernel, loaded on a device: a handle of the driver's."""
    major, minor = torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):
        return nvrtc.load(compiled(constants, f"sm_{major}{minor}"), NAME, SHARED)


@functools.cache
def compiled(constants: Constants, target: str) -> bytes:
    """Machine code (a cubin) for a target such as ``"sm_90"``."""
    return nvrtc.compile_source(SOURCE, target, constants.options())


def _check(launch: Any, device: torch.device, constants: Constants) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Whole numbers, with every part of the kernel's: an odd number of row tiles, bias, adapter."""
    tiles, double, blocks, shift = constants
    M, N, K, block_size = 8 * tiles - 3, 83, 64 * blocks, 64 << shift
    values = torch.tensor([-8.0, -7, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8], device=device)
    packed = (torch.arange(N * K // 2, device=device) * 37 % 251).to(torch.uint8)[:, None]
    some = (torch.arange(-(-N * K // block_size), device=device) ** 2 % 509 % 4).float()
    if double:
        scales = torch.where(some < 2, 127, 255).to(torch.uint8)  # where the map has 0 and 1
        levels = 1 - torch.arange(-(-len(scales) // 256), dtype=torch.float32, device=device) % 3
        weight = Packed(packed, scales, levels, torch.ones((), device=device), values, (N, K), block_size)
    else:
        weight = Packed(packed, some - 1, None, None, values, (N, K), block_size)
    W = ops.dequantize.reference(*weight, torch.float32)
    x, bias, h, B = (self_check.whole(*size, device) for size in ((M, K), (1, N), (M, 3), (N, 3)))
    y = self_check.product(x, W.T)
    found = launch(x.bfloat16(), weight), launch(x.bfloat16(), weight, bias[0].bfloat16(), LowRank(h.bfloat16(), B))
    return found, (y.bfloat16(), (y + bias + self_check.product(h, B.T)).bfloat16())


CHECKS = {NAME: _check}


def _case(name: str, constants: Constants, instructions: float) -> CudaCase:
    budget = Budget(instructions, 128, PACKED, staged=0, needs=("HMMA",), forbids=("BAR",))
    return CudaCase(f"{NAME}, {name}", functools.partial(compiled, constants), 256, SHARED, budget)


CUDA_CASES = (
    _case("8 tokens", Constants(1, True, 64, 0), 2.12),
    _case("8 tokens, float32 scales", Constants(1, False, 64, 0), 2.0),
    _case("16 tokens", Constants(2, True, 64, 0), 2.3),
    _case("8 tokens, K of 64", Constants(1, True, 9, 0), 2.6),
)
