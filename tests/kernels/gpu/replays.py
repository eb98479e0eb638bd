"""Calls of the GPU's operators, the ordinary way and replayed, for ``test_replay.py``: in a process that compiles.

Nothing is launched (``benchmarks/no_device.py``). What the driver got is compared: the kernels in their order, grids,
threads, shared memory, and all parameters. An address is named after the tensor that it belongs to; temporary tensors
are numbered in the order in which the kernels see them.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from triton import knobs

import qloralab as ql
from qloralab.benchmarks import no_device
from qloralab.kernels.gpu import choice, few_tokens, launch, lookup, replay
from qloralab.kernels.gpu.program import RESIDENT
from qloralab.kernels.gpu.split import add_parts
from qloralab.lora import ops as lora_ops
from qloralab.nf4 import operator, ops

OPERATORS = {
    "linear": ops.linear,
    "linear_grad_input": ops.linear_grad_input,
    "dequantize": ops.dequantize,
    "adapted_linear": lora_ops.adapted_linear,
    "adapted_linear_backward": lora_ops.adapted_linear_backward,
}


class Call(NamedTuple):
    """A kind of call. The operands are others each time."""

    operator: str
    tokens: tuple[int, ...] = (16,)
    N: int = 256
    K: int = 256
    r: int = 16
    bias: bool = False
    p: float = 0.0
    scaling: float = 2.0
    needs_input: bool = True
    block_size: int = 64
    double: bool = True
    dtype: torch.dtype = torch.bfloat16
    values: float = 1.0  # the codebook is NF4's times this
    offsets: tuple[str, ...] = ()  # tensors that do not begin at a multiple of 16 bytes
    strided: tuple[str, ...] = ()  # tensors that are not contiguous
    use: str = "fused"
    alias: bool = False  # whether h and x are one tensor

    def operands(self) -> dict[str, Any]:
        """By name, in the order of the schema."""
        weight = ql.quantize(torch.randn(self.N, self.K), "nf4", self.block_size, self.double).operands()
        weight = weight._replace(values=weight.values * self.values)
        x, grad = torch.randn(*self.tokens, self.K), torch.randn(*self.tokens, self.N)
        rows = x.numel() // self.K
        named: dict[str, Any] = {"x": x.to(self.dtype), "grad": grad.to(self.dtype)}
        named |= weight._asdict() | {"bias": torch.randn(self.N).to(self.dtype) if self.bias else None}
        named |= {"A": torch.randn(self.r, self.K), "B": torch.randn(self.N, self.r), "scaling": self.scaling}
        named |= {"p": self.p, "seed": torch.tensor(3) if self.p else None, "dtype": self.dtype}
        named |= {"h": torch.randn(rows, self.r).to(self.dtype), "needs_input": self.needs_input}
        if self.alias:
            named["h"] = named["x"]
        named |= {name: moved(named[name]) for name in self.offsets}
        named |= {name: transposed(named[name]) for name in self.strided}
        return {name: named[name] for name in names(self.operator)}


def names(name: str) -> list[str]:
    """Of an operator's arguments."""
    return [argument.name for argument in OPERATORS[name]._opoverload._schema.arguments]


def moved(tensor: Tensor) -> Tensor:
    """The same, two bytes (or what an element takes) behind a multiple of 16."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return memory[1:].view(tensor.shape).copy_(tensor)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


class Kept(TorchDispatchMode):
    """Keeps all tensors that are made, so that no two have one address."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.calls.append(str(func))
        if isinstance(made, Tensor):
            self.tensors.append(made)
        return made


@contextmanager
def ordinary() -> Iterator[None]:
    """Nothing is replayed or recorded inside the body."""
    replay._is_off = True
    try:
        yield
    finally:
        replay._is_off = False


@contextmanager
def counted(count: list[int]) -> Iterator[None]:
    """Adds the calls that are replayed inside the body."""
    right = replay.Replay.__call__

    def call(*arguments: Any) -> Any:
        count[0] += 1
        return right(*arguments)

    replay.Replay.__call__ = call  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        replay.Replay.__call__ = right


class Launched(NamedTuple):
    """What the driver got, with names for addresses; then the results' shapes, strides and dtypes. And the bytes that
    each temporary tensor has for itself."""

    calls: list[Any]
    rooms: dict[str, int]

    def is_like(self, right: Launched) -> bool:
        """Whether it is that of the ordinary way, with as much room or more."""
        return self.calls == right.calls and all(self.rooms[name] >= room for name, room in right.rooms.items())


def launched(call: Callable[[], Any], operands: dict[str, Any]) -> Launched:
    """What a call launches."""
    watched, operator._is_watched = operator._is_watched, bool
    no_device.launches()
    try:
        with Kept() as kept:
            result = call()
    finally:
        operator._is_watched = watched
    results = result if isinstance(result, tuple) else (result,)
    known = {one.data_ptr(): name for name, one in operands.items() if isinstance(one, Tensor)}
    known |= dict.fromkeys(RESIDENT, "the map")
    known |= {one.data_ptr(): f"result {i}" for i, one in enumerate(results) if one.numel()}
    memory = [(one.data_ptr(), one.data_ptr() + one.nbytes) for one in kept.tensors]
    assert all(one.data_ptr() not in map(Tensor.data_ptr, inputs(operands)) for one in results if one.numel())

    temporaries = dict[int, int]()  # their ends

    def named(value: int) -> Any:
        end = next((end for start, end in memory if start <= value < end), None)
        if value not in known and end is not None:
            known[value], temporaries[value] = f"temporary {len(temporaries)}", end
        return known.get(value, value)

    calls: list[Any] = [[*one[:-1], [named(value) for value in one.parameters]] for one in no_device.launches()]
    calls += [[list(one.shape), list(one.stride()), str(one.dtype), str(one.device)] for one in results]
    starts = sorted(temporaries)
    rooms = {at: min([end, *[start for start in starts if start > at]]) - at for at, end in temporaries.items()}
    return Launched(calls, {known[at]: room for at, room in rooms.items()})


def inputs(operands: dict[str, Any]) -> list[Tensor]:
    return [one for one in operands.values() if isinstance(one, Tensor)]


def compare(call: Call) -> dict[str, Any]:
    """A kind of call four times, the ordinary way and through ``replay.py``: where they differ, how many launches
    there are, and how many calls were replayed."""
    run, wrong, launches, count = OPERATORS[call.operator], list[Any](), 0, [0]
    with choice.use(call.use):
        for turn in range(4):
            operands = call.operands()
            one = functools.partial(run, *operands.values())
            with ordinary():
                one()  # what is compiled now is no launch to compare
                lookup.table(operands["values"])  # known since a product with it
                right = launched(one, operands)
            with counted(count):
                found = launched(one, operands)
            launches = sum(isinstance(one[0], str) for one in right.calls)
            if not found.is_like(right):
                different = [pair for pair in zip(found.calls, right.calls, strict=False) if pair[0] != pair[1]]
                wrong.append([turn, different[:2], found.rooms, right.rooms])
    return {"wrong": wrong, "replays": count[0], "launches": launches}


FORWARD, BACKWARD = "adapted_linear", "adapted_linear_backward"
# Each beside one that differs in one thing alone, so that a kind which leaves it out takes one for the other.
REPLAYED = {
    "linear": Call("linear"),
    "linear, bias": Call("linear", bias=True),
    "linear, one token": Call("linear", (1,)),
    "linear, one token, batched": Call("linear", (1, 1)),
    "linear, split": Call("linear", (1,), K=1024),
    "linear, split, bias": Call("linear", (1,), K=1024, bias=True),
    "linear, float32 scales": Call("linear", double=False),
    "linear, blocks of 128": Call("linear", block_size=128),
    "linear, blocks of 4096": Call("linear", block_size=4096),
    "linear, another codebook": Call("linear", values=-1.0),
    "linear, odd rows": Call("linear", N=100),
    "linear_grad_input": Call("linear_grad_input"),
    "linear_grad_input, 5 tokens": Call("linear_grad_input", (5,)),
    "linear_grad_input, split": Call("linear_grad_input", (5,), N=1024),
    "dequantize": Call("dequantize"),
    "dequantize, float32": Call("dequantize", dtype=torch.float32),
    "dequantize, float32 scales": Call("dequantize", double=False),
    "dequantize, another shape": Call("dequantize", N=128, K=512),
    "forward": Call(FORWARD),
    "forward, bias": Call(FORWARD, bias=True),
    "forward, rows of rows": Call(FORWARD, (2, 8)),
    "forward, one token": Call(FORWARD, (1,)),
    "forward, 5 tokens": Call(FORWARD, (5,)),
    "forward, 64 tokens": Call(FORWARD, (64,)),
    "forward, dropout": Call(FORWARD, p=0.25),
    "forward, another dropout": Call(FORWARD, p=0.5),
    "forward, another scaling": Call(FORWARD, scaling=3.0),
    "forward, another rank": Call(FORWARD, r=8),
    "forward, split": Call(FORWARD, (1,), K=1024),
    "forward, x elsewhere": Call(FORWARD, offsets=("x",)),
    "forward, B elsewhere": Call(FORWARD, offsets=("B",)),
    "forward, scales elsewhere": Call(FORWARD, offsets=("scales",)),
    "backward": Call(BACKWARD),
    "backward, no input": Call(BACKWARD, needs_input=False),
    "backward, rows of rows": Call(BACKWARD, (2, 8)),
    "backward, one token": Call(BACKWARD, (1,)),
    "backward, 64 tokens": Call(BACKWARD, (64,)),
    "backward, dropout": Call(BACKWARD, p=0.25),
    "backward, dropout, no input": Call(BACKWARD, p=0.25, needs_input=False),
    "backward, another scaling": Call(BACKWARD, scaling=3.0),
    "backward, split": Call(BACKWARD, (5,), N=1024),
    "backward, h elsewhere": Call(BACKWARD, offsets=("h",)),
    "backward, grad elsewhere": Call(BACKWARD, offsets=("grad",)),
}
# Copies, products of cuBLAS, addresses that tell nothing: the ordinary way for good.
ORDINARY = {
    "x is not contiguous": Call(FORWARD, strided=("x",)),
    "A is not contiguous": Call(FORWARD, strided=("A",)),
    "grad is not contiguous": Call(BACKWARD, strided=("grad",)),
    "two-pass": Call(FORWARD, use="two-pass"),
    "two-pass backward": Call(BACKWARD, use="two-pass"),
    "float16": Call("linear", dtype=torch.float16),
    "a rank of 64": Call(BACKWARD, r=64),
    "rows that are padded": Call("linear_grad_input", N=100),
    "no tokens": Call("linear", (0,)),
    "scaling is 0": Call(FORWARD, scaling=0.0),
    "x and h are one": Call(BACKWARD, r=256, alias=True),
    "the packed codes are elsewhere": Call("linear", offsets=("packed",)),
}


def again(run: Callable[..., Any], operands: dict[str, Any]) -> bool:
    """Whether a call launches what it does the ordinary way."""
    with ordinary():
        right = launched(lambda: run(*operands.values()), operands)
    return launched(lambda: run(*operands.values()), operands).is_like(right)


def in_place() -> dict[str, Any]:
    """A weight that is written to, and one whose memory is replaced, after its call was recorded."""
    found = dict[str, Any]()
    with choice.use("fused"):
        for what in ("the codebook", "the codes", "the memory of the codes", "the memory of A"):
            operands = Call(FORWARD).operands()
            for _ in range(4):
                lora_ops.adapted_linear(*operands.values())
            if what == "the codebook":
                operands["values"].mul_(0.75)
            elif what == "the codes":
                operands["packed"].zero_()
            else:
                one = operands["packed" if what.endswith("codes") else "A"]
                one.data = one.data.clone()
            found[what] = again(lora_ops.adapted_linear, operands)
    return found


def replays(run: Callable[[], Any]) -> int:
    """Calls that are replayed while something runs five times."""
    count = [0]
    with counted(count):
        for _ in range(5):
            run()
    return count[0]


def conditions() -> dict[str, Any]:
    """How many of five calls, of a kind that was recorded, are replayed while something holds."""
    operands = Call(FORWARD).operands()
    found = dict[str, Any]()

    def run() -> Any:
        return lora_ops.adapted_linear(*operands.values())

    with choice.use("fused"):
        replays(run)
        found["nothing"] = replays(run)
        with torch.autocast("cpu", torch.bfloat16):
            found["autocast"] = replays(run)
        with torch.inference_mode():
            found["inference"] = replays(run)
        hook = [].append
        for name in ("launch_enter_hook", "launch_exit_hook"):
            getattr(knobs.runtime, name).add(hook)
            found[name] = replays(run)
            getattr(knobs.runtime, name).remove(hook)
        found["devices"] = [launch.stream(device) for device in (-1, 0, 1)]
        found["nothing again"] = replays(run)
    with choice.use("two-pass"):
        found["two-pass"] = replays(run)
    return found


def native() -> dict[str, Any]:
    """A kernel that is not Triton's, with all that such a launch may have, beside one of Triton's."""
    kinds = ("*bf16", "*fp32", "*i8", "i32", "u32", "i64", "u64", "fp32")
    function = no_device.function("native", [8, 8, 8, 4, 4, 8, 8, 4])

    operands = ql.quantize(torch.randn(64, 64)).operands()
    weight: dict[str, Any] = dict(zip(operands._fields[:5], operands, strict=False))
    lookup.table(operands.values)
    few_tokens.is_settled(operands.tensors)

    def run(x: Tensor, *others: Any) -> Tensor:
        out, between = x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.float32)
        *operands, number = others
        values = x, between, None, -number, number, -(2**40), 2**63, 0.5
        arguments = tuple(zip(kinds, values, strict=True))
        launch.launch_native("native", function, (3,), 512, 65536, arguments, True, few_tokens.is_settled(operands))
        add_parts(between[None].expand(2, *x.shape), out)
        return out

    call = replay.replayed("native", run, 5)
    found = [again(call, {"x": torch.randn(4, 64).bfloat16(), **weight, "number": 3}) for _ in range(4)]
    operands = {"x": torch.randn(4, 64).bfloat16(), **weight, "number": 3}
    seen = launched(lambda: call(*operands.values()), operands).calls
    more = replay.replayed("more", lambda *arguments: run(*arguments).mul_(2), 5)
    depends = list[bool]()
    for written in (None, "packed", None, "scales", None):
        if written:
            weight[written].add_(1)
        no_device.launches()
        call(*operands.values())
        depends.append(no_device.launches()[0].dependent)
    return {
        "same": found,
        "replays": replays(lambda: call(*operands.values())),
        "launches": seen[:2],
        "depends": depends,
        "replays of more": replays(lambda: more(*operands.values())),
    }


def a_step() -> dict[str, Any]:
    """Steps of training with two layers, gradient checkpointing and an optimizer: the first the ordinary way."""
    layers = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False), torch.nn.ReLU(), torch.nn.Linear(256, 256))
    model: Any = torch.nn.Sequential(layers)
    ql.quantize_(model, compute_dtype=torch.bfloat16)
    ql.inject_(model, ql.LoraConfig(r=16, lora_alpha=16, lora_dropout=0.1))
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)

    def step(x: Tensor) -> list[Any]:
        no_device.launches()
        checkpoint(layers, x, use_reentrant=False).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return [one[:7] for one in no_device.launches()]

    xs = [torch.randn(3, 5, 256).bfloat16().requires_grad_() for _ in range(6)]
    with choice.use("fused"):
        with ordinary():
            right = step(xs[0])
        wrong = [turn for turn, x in enumerate(xs) if step(x) != right]
        return {"launches": len(right), "wrong": wrong, "replays": replays(lambda: step(xs[0]))}


def main() -> None:
    torch.manual_seed(0)
    with no_device.pretend():
        found = {
            "replayed": {name: compare(call) for name, call in REPLAYED.items()},
            "ordinary": {name: compare(call) for name, call in ORDINARY.items()},
            "in place": in_place(),
            "conditions": conditions(),
            "native": native(),
            "a step": a_step(),
        }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
