"""Record what an operator launches, and issue all of it by one call the next time.

An implementation of ``operators.py`` decides much before it launches: whether its operands fit, which kernel serves,
the tiles, the splits. All of that is a function of shapes, dtypes and the like, and a model calls its layers with the
same ones again and again. So the second call of a kind is recorded, and the later ones are replayed: look the kind up,
make the results and a workspace, and hand the launches to the driver (``program.py``). The launches are the same, with
the same arguments, in the same order; what is saved is the time of the host.

**The kind** of a call is everything that the implementations look at: the operator; of each tensor its dtype, shape and
whether its address is a multiple of 16; all other arguments as they are; the device; the table of the codebook, which
is among the arguments of the fused kernels; the kernel that ``choice.use`` asks for. All tensors are on the current
device and contiguous. Other calls go the ordinary way, as do those in Triton's interpreter, on GPUs not NVIDIA's, and
while a profiler has hooks on launches. No address is kept from one call to the next, so weights of one shape share what
was recorded, and may be written to, moved or replaced.

**What can be recorded** is a call that makes tensors and launches kernels, and nothing else. A dispatch mode sees
everything that PyTorch is asked for: a product of cuBLAS, a copy or a zero that is filled in, and the kind goes the
ordinary way for good. The address of each argument is traced to an operand, or to a tensor that was made, or to one
that stays (``program.resident``); where two operands are at one address, it tells nothing, and another call is
recorded. A tensor that was made and is a result is made by each replay. All others share one workspace, where they lie
beside each other: a replay has at once what an ordinary call has one after the other.

**Trust.** On a GPU, the first replay of each sequence of kernels runs right after the call that was recorded, on the
same operands, and serves only if no bit of the results differs. If one does, that is reported once, and nothing is
replayed in this process. The comparison waits for the device, so nothing is recorded while a CUDA graph is captured;
what is trusted is replayed into the graph.
"""

from __future__ import annotations

import functools
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..cpu.build import BuildError
from ..dispatch import warn
from . import choice, self_check
from .program import RESIDENT, Launch, NotAProgramError, Program, Slot

MOST = 4096  # kinds that are remembered
ALIGNMENT = 256  # bytes, of what is in the workspace

_Function = Callable[..., Any]
_Kind = tuple[Any, ...]
_aten = torch.ops.aten
_MAKERS = {  # what makes a tensor and writes nothing into it
    _aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default,
    _aten.new_empty.default, _aten.new_empty_strided.default,
}  # fmt: skip

_lock = threading.Lock()
_replays: dict[_Kind, Replay | None] = {}  # None: this kind goes the ordinary way
_NEW: Any = object()
_seen: dict[_Kind, bool] = {}  # kinds that came once
_trusted: set[tuple[int, ...]] = set()  # sequences of kernels
_is_off = False


class Replay:
    """A recorded call.

    Attributes:
        program: its launches. The bases are the operands that are tensors, the results, and the workspace.
        device: of the results.
        results: the shape, strides and dtype of each.
        workspace: bytes.
        is_dependent: whether a launch may start before the kernel in front of it has ended.
    """

    def __init__(self, program: Program, results: Sequence[Tensor], workspace: int, is_one: bool, operands: int):
        self.program, self.workspace = program, workspace
        self.is_dependent = any(one.dependent for one in program.launches)
        self.results = [(one.shape, one.stride(), one.dtype) for one in results]
        self.device, self._is_one = results[0].device, is_one
        self._pack = struct.Struct(f"{operands + len(results) + bool(workspace)}Q").pack

    def __call__(self, operands: Sequence[int], stream: int, depend: bool = False) -> Any:
        """The results, from the addresses of the operands; None where nothing could be launched."""
        device, empty = self.device, torch.empty_strided
        made = [empty(shape, strides, dtype=dtype, device=device) for shape, strides, dtype in self.results]
        bases = [*operands, *[one.data_ptr() for one in made]]
        if self.workspace:
            workspace = empty((self.workspace,), (1,), dtype=torch.uint8, device=device)
            bases.append(workspace.data_ptr())
        if not self.program(self._pack(*bases), stream, depend):
            return None
        return made[0] if self._is_one else tuple(made)


def replayed(name: str, function: _Function, codebook: int = 0) -> _Function:
    """An implementation of an operator that is recorded and replayed.

    Args:
        name: of the operator.
        function: of the arguments of its schema, the first of them a tensor.
        codebook: which argument has the values whose table the kernels take; 0: they read the values.
    """

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        tools = _tools or _find_tools()
        if tools is None or _is_off:
            return function(*arguments)
        table = codebook and tools.table(arguments[codebook])
        if codebook and table is None:
            return function(*arguments)
        device = arguments[0].get_device()
        kind, addresses, all_bits = [name, device, choice.asked, table], list[int](), 0
        for one in arguments:
            if isinstance(one, Tensor):
                if one.get_device() != device or not one.is_contiguous():
                    return function(*arguments)
                address = one.data_ptr()
                addresses.append(address)
                all_bits |= address
                kind.append(one.dtype)
                kind.append(one.shape)
            else:
                kind.append(tuple(one) if type(one) is list else one)
        if all_bits & 15:
            kind += [not address & 15 for address in addresses]
        kind = tuple(kind)
        replay = _replays.get(kind, _NEW)
        if replay is None:
            return function(*arguments)
        stream = tools.stream(device)
        if stream is None:
            return function(*arguments)
        if replay is _NEW:
            return _learn(function, arguments, kind, addresses, stream)
        depend = replay.is_dependent and tools.is_settled(arguments[codebook - 4 : codebook + 1])
        found = replay(addresses, stream, depend)
        return function(*arguments) if found is None else found

    return run


def clear() -> None:
    """Forget all that was recorded, and that it was not to be trusted."""
    global _is_off
    for known in (_replays, _seen, _trusted):
        known.clear()
    _is_off = False


class _Tools(NamedTuple):
    """What there is once Triton was imported: nothing was launched before."""

    stream: Callable[[int], int | None]
    table: Callable[[Tensor], Any]
    noted: Callable[[], Any]
    is_settled: Callable[[Sequence[Tensor | None]], bool]


_tools: _Tools | None = None


def _find_tools() -> _Tools | None:
    global _tools
    if f"{__package__}.launch" in sys.modules:
        from . import few_tokens, launch, lookup

        if not launch.LONG_WAY:
            _tools = _Tools(launch.stream, lookup.known, launch.noted, few_tokens.is_settled)
    return _tools


def _learn(function: _Function, arguments: Sequence[Any], kind: _Kind, addresses: list[int], stream: int) -> Any:
    """Run the ordinary way; the second time, record it."""
    if kind not in _seen:
        _remember(_seen, kind, True)
        return function(*arguments)
    is_traceable = len(set(addresses)) == len(addresses)
    if not is_traceable or _is_capturing(arguments[0].device):
        return function(*arguments)
    assert _tools is not None
    with _tools.noted() as notes, _Made() as made:
        result = function(*arguments)
    try:
        replay = _replay(notes, made, addresses, result)
    except NotAProgramError:
        replay = None
    except (BuildError, OSError) as error:
        _turn_off(f"no launches can be issued together: {error}")
        return result
    if replay is None or _is_trusted(replay, addresses, stream, result):
        _remember(_replays, kind, replay)
    return result


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class _Made(TorchDispatchMode):
    """Notes what PyTorch is asked for.

    Attributes:
        tensors: that were made. They live as long as this, so no two have the same address.
        others: whether anything else was computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []
        self.others = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip it would be to import it: a second

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func in _MAKERS:
            self.tensors.append(made)
        elif not func.is_view:
            self.others = True
        return made


def _replay(notes: Sequence[Launch | None], made: _Made, operands: Sequence[int], result: Any) -> Replay | None:
    """A recorded call; None where it cannot be replayed.

    Raises:
        NotAProgramError, BuildError, OSError: as ``Program`` does.
    """
    launches = [one for one in notes if one is not None]
    results = result if isinstance(result, tuple) else (result,)
    if made.others or not launches or len(launches) < len(notes):
        return None
    new = {one.data_ptr(): one for one in made.tensors if one.numel()}
    slots = {address: Slot(base) for base, address in enumerate(operands)}
    for base, one in enumerate(results, len(operands)):
        whole = new.get(one.data_ptr())
        if one.numel() and (whole is None or whole.nbytes != one.nbytes or not one.is_contiguous()):
            return None
        slots[one.data_ptr()] = Slot(base)
    workspace = 0
    for address, one in new.items():
        if address not in slots:
            slots[address] = Slot(len(operands) + len(results), workspace)
            workspace += -(-one.nbytes // ALIGNMENT) * ALIGNMENT

    def place(tensor: Tensor) -> Slot | int | None:
        address = tensor.data_ptr()
        return slots.get(address) or (address if address in RESIDENT else None)

    program = Program(launches, place)
    return Replay(program, results, workspace, not isinstance(result, tuple), len(operands))


def _is_trusted(replay: Replay, addresses: Sequence[int], stream: int, result: Any) -> bool:
    """Whether the kernels have given the same bits both ways: tried once for each sequence of them."""
    functions = tuple(one.function for one in replay.program.launches)
    if replay.device.type != "cuda" or functions in _trusted:
        return True
    again = replay(addresses, stream, depend=True)
    if again is None:
        return False
    one = (result, again) if isinstance(result, tuple) else ((result,), (again,))
    if self_check.same(*one):
        _trusted.add(functions)
        return True
    names = ", ".join(one.name for one in replay.program.launches)
    _turn_off(f"the launches of {names}, issued together, gave other bits")
    return False


def _remember(known: dict[_Kind, Any], kind: _Kind, what: Any) -> None:
    with _lock:
        if len(known) >= MOST:
            del known[next(iter(known))]
        known[kind] = what


def _turn_off(why: str) -> None:
    global _is_off
    with _lock:
        first, _is_off = not _is_off, True
    if first:
        warn(f"qloralab: {why}\nEach kernel is launched by itself, which costs more time of the processor.")
