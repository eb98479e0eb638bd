"""Several processes that train one model: what each does alone, and what they do together.

``torchrun`` starts the same command N times. Every process reads the model and the examples, and knows the order of all
batches, which does not depend on N. Of the B examples of a batch, process i takes i, i + N, i + 2 N, ...; its loss is
the sum over its answer tokens, divided by the number of those of the *whole* batch. The sum of the gradients over the
processes is then that of one process with the same batch, but for the order in which numbers are added.

=========  ==============================================  =====================  ===================================
parallel   each process holds                              they exchange          engine
=========  ==============================================  =====================  ===================================
ddp        the whole model, and the optimizer's state      gradients              DistributedDataParallel
fsdp       an N-th of everything; one layer is whole       packed bytes, before   fully_shard (FSDP2), each item of a
           while it computes                               a layer computes;      ModuleList by itself
                                                           gradients
=========  ==============================================  =====================  ===================================

Dropout draws from a generator that is seeded anew in each step, by the seed of the run, the step and the process: a run
on N processes is repeatable and resumable, and has other masks than one on another number of processes.

The first process writes and shows, all others are silent. A process that fails says why and ends; the others lose it in
their next exchange, and end without a word.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch import distributed as dist

from qloralab.kernels.cpu.allocator import give_back
from qloralab.nf4.dense_shares import LOGGER
from qloralab.nf4.distributed import local_bytes
from qloralab.nf4.linear import QuantizedLinear
from qloralab.nf4.sharded import shardable_

from .. import one_voice
from ..data.encoding import NO_LABEL
from ..errors import UserError
from ..settings import Parallel

HOW = "torchrun --nproc-per-node N -m qloralab finetune --parallel …"
_PATIENCE = datetime.timedelta(minutes=30)  # for a process that is behind: reading a model, writing one
_LOST = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "ncclRemoteError",
    "NCCL communicator was aborted",
)
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of a run, and which of them this is.

    Attributes:
        parallel: how they share a model; None: there is one.
        rank, count: this process, from 0, and how many there are.
    """

    parallel: Parallel | None = None
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and shows."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the model, so that all take part where it is read."""
        return self.parallel == "fsdp"

    def share(self, examples: Sequence[T]) -> list[T]:
        """Of a batch, which all processes know, the examples of this one; none where there are more processes."""
        return list(examples[self.rank :: self.count])

    def total(self, *numbers: float) -> list[float]:
        """The sums of numbers over all processes, in float64."""
        if self.parallel is None:
            return list(numbers)
        summed = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        dist.all_reduce(summed)
        return summed.tolist()

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in any process."""
        return self.total(float(flag))[0] > 0

    def from_first(self, value: T) -> T:
        """What the first process has."""
        return self.from_all(value)[0]

    def from_all(self, value: T) -> list[T]:
        """What each process has."""
        if self.parallel is None:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def check_same(self, facts: Mapping[str, str]) -> None:
        """Raise a UserError where a fact is not the same in all processes: they would train different models."""
        for number, theirs in enumerate(self.from_all(dict(facts))):
            for name, value in facts.items():
                if theirs[name] != value and number != self.rank:
                    raise UserError(f"its {name} is not that of rank {number}; give all the same files")

    def seed(self, seed: int, step: int) -> None:
        """Seed PyTorch's generators for a step of this process. In a run of one process they go on as they were."""
        if self.parallel is not None:
            text = f"{seed} {step} {self.rank}".encode()
            torch.manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:8], "big", signed=True))

    def spread(self, loss: nn.Module) -> nn.Module:
        """A module that computes a loss, as all processes compute it together.

        Args:
            loss: whose forward takes input_ids and labels, int64 [batch, length]. With "fsdp" its parameters become
                DTensors, in place.
        """
        if self.parallel == "ddp":
            # Every process has read the same files, which check_same has compared.
            engine = nn.parallel.DistributedDataParallel
            renamed = "forward_sync_buffers" in inspect.signature(engine).parameters  # in PyTorch 2.13
            no_buffers: Any = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
            spread = engine(loss, init_sync=False, **no_buffers)
            # After its first backward it groups gradients anew, in the order in which they came, and adds them up in
            # another order from then on. So that a run that goes on does as it did, that is done before the first step.
            _nothing(spread).backward()
            loss.zero_grad(set_to_none=True)
            return spread
        if self.parallel == "fsdp":
            _shard_(loss)
            give_back()  # the parts of the others
        return loss

    @contextlib.contextmanager
    def whole(self, loss: nn.Module) -> Iterator[None]:
        """While it is entered, the model inside of a sharded loss can be called by itself, by all processes."""
        if not self.sharded:
            yield
            return
        root: Any = loss
        root.unshard()
        try:
            yield
        finally:
            root.reshard()

    def exchanging(self, loss: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of a part of a batch: "ddp" exchanges the gradients of all parts in the last."""
        if self.parallel == "ddp" and not last:
            spread: Any = loss
            return spread.no_sync()
        return contextlib.nullcontext()


ALONE = Processes()


def held_bytes(model: nn.Module) -> int:
    """Bytes of a model that this process holds: parameters, buffers and weights in 4 bits, of what is sharded its
    part."""
    packed = {id(m.weight): m.weight for m in model.modules() if type(m) is QuantizedLinear}
    return sum(map(local_bytes, [*model.parameters(), *model.buffers()])) + sum(w.nbytes for w in packed.values())


def _shard_(loss: nn.Module) -> None:
    """FSDP2 on each item of the outermost ModuleLists (a decoder's layers), and on what is left."""
    from torch.distributed.fsdp import fully_shard

    shardable_(loss)
    inside: set[nn.Module] = set()
    for module in loss.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            for item in module:
                inside.update(item.modules())
                if next(item.parameters(), None) is not None:
                    fully_shard(item)
    fully_shard(loss)
    with torch.no_grad():  # the first forward makes the outermost module the one that the others follow
        _nothing(loss)
    loss.reshard()  # pyright: ignore[reportCallIssue]  now it is an FSDPModule


def _nothing(loss: nn.Module) -> Tensor:
    """The loss of two tokens without a label: 0."""
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=next(loss.parameters()).device)
    return loss(tokens, tokens + NO_LABEL)[0]


@contextlib.contextmanager
def processes(parallel: Parallel | None) -> Iterator[Processes]:
    """The processes that a launcher has started for this run; they know each other while it is entered.

    Args:
        parallel: how they share the model; None: there must be one.

    Raises:
        UserError: there are several and parallel is None, or there is no launcher; another process was lost; or what
            is raised inside, with the number of this process.
    """
    if parallel is None:
        if (count := one_voice.started()) > 1:
            raise UserError(f"{count} processes were started for one run; say --parallel ddp or fsdp")
        yield ALONE
        return
    if parallel not in get_args(Parallel):
        raise UserError(f"--parallel is {parallel!r}; it must be one of {', '.join(get_args(Parallel))}")
    if not dist.is_available():
        raise UserError("--parallel needs a PyTorch with torch.distributed")
    ours = not dist.is_initialized()  # Ray Train has done it
    if ours and "RANK" not in os.environ:
        raise UserError(f"--parallel {parallel} takes several processes: {HOW}")
    try:
        store = _start() if ours else None
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"the processes did not find each other: {' '.join(str(error).split())}") from error
    group = Processes(parallel, dist.get_rank(), dist.get_world_size())
    if not group.first:
        LOGGER.setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
    if store is not None:
        one_voice.ask(lambda: _asks_first(store, group.first))
    try:
        yield group
    except Exception as error:
        if _is_lost(error):
            raise UserError("another process of this run was lost; its own message, or torchrun's, says why") from error
        if isinstance(error, UserError) and not group.first:
            raise UserError(f"rank {group.rank} of {group.count}: {error}") from error
        raise  # the others see the connection close when this process ends
    if ours:
        dist.destroy_process_group()


def _start() -> Any:
    """Join the processes of this run. Returns the ``Store`` that the launcher lets them leave notes in."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, count = next(iter(rendezvous("env://", timeout=_PATIENCE)))
    store.set_timeout(_PATIENCE)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=PrefixStore("qloralab", store),
        rank=rank,
        world_size=count,
        timeout=_PATIENCE,
    )
    return store


def _asks_first(store: Any, otherwise: bool) -> bool:
    try:
        return store.add("qloralab ends", 1) == 1
    except RuntimeError:  # it went with the process that held it
        return otherwise


def _is_lost(error: BaseException) -> bool:
    """Whether an error is that of an exchange with a process that is gone. PyTorch has no class for it."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST)
