"""Forward and backward of a training step as CUDA graphs: the host launches one of them, not thousands of kernels.

A step of an adapted model with 224 linear layers is thousands of small kernels. The host needs hundreds of microseconds
for each adapted layer, both ways, so that below some thousand tokens a step the GPU waits for it (``kernels.md``). A
CUDA graph is recorded once and launched as one. Gradients are clipped and the optimizer steps outside, as ever.

**What it takes.** A graph replays kernels with the addresses and numbers of its capture, and no Python. So

* its shapes are fixed. A part of a batch is padded to one of at most eight lengths (``data/buckets.py``), to the rows
  of the largest part, and to as many labels as its examples can have at most. Padding has no label; no token sees it;
* its inputs stay where they are and are written over: tokens, the places of the labels, the labels, and the number
  that the loss is divided by, which counts the answer tokens of the whole batch;
* gradients stay where they are, are zeroed at the beginning of a step, and the parts of a batch add up in them;
* what the host decides in a forward pass it decides once. A model that draws random numbers on the host, or that looks
  at a tensor's values, cannot be captured.

**Random numbers.** The seeds of dropout are drawn within the graph, from PyTorch's generator of the GPU, which each
replay moves on as the draws themselves would. So every step has new masks; a checkpoint holds the generator's state as
in any run, and a run that goes on captures anew and draws what it would have drawn.

**Memory.** All graphs share one pool, which holds the activations of the longest length from the first step to the
last, beside the gradients. Validation cannot use it.

**Before the first step** each length runs twice without a graph, on the stream of the capture. The first time kernels
are compiled and checked, and tables made; the second must not wait for the device, and its loss and gradients are kept.
Then all are captured, the longest first, and each is replayed once with the same random numbers and compared. Random
states are restored, so that the run does not depend on any of it. What fails raises RuntimeError, and the trainer goes
on without graphs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batches import collate
from ..data.buckets import buckets
from ..data.encoding import NO_LABEL, Encoded
from .capture import captured
from .checkpoint import random_states, restore_random_states
from .loss import answer_places

# How far a graph's loss and gradients may be from those of the same step without it, relative, as a root mean square.
# Equal kernels give equal bits, but attention's backward on a GPU adds up in any order: bfloat16 rounds to 2**-9, and
# of such errors a few meet. Masks of another seed, or inputs of another step, are off by a tenth and more.
CLOSE = 2**-6
_SAMPLE = 4096  # numbers of each gradient that are compared

LossAt = Callable[[Tensor, Tensor, Tensor], Tensor]
Progress = Callable[[int, int], None]


def has_graphs(device: torch.device) -> bool:
    """Whether a device has CUDA graphs."""
    return device.type == "cuda" and not torch.version.hip


@dataclasses.dataclass
class _Bucket:
    """The inputs of a graph, and what replays it: ids int64 [rows, length], places and targets int64 [labels]."""

    ids: Tensor
    places: Tensor
    targets: Tensor
    replay: Callable[[], None] | None = None

    def fill(self, examples: Sequence[Encoded]) -> None:
        """Copy some examples into the inputs; there are enough rows for them."""
        rows, length = self.ids.shape
        batch = collate(examples, length)
        places, targets = answer_places(batch["labels"])
        left = len(self.places) - len(places)
        self.ids.copy_(F.pad(batch["input_ids"], (0, 0, 0, rows - len(examples))))
        self.places.copy_(F.pad(places, (0, left)))
        self.targets.copy_(F.pad(targets, (0, left), value=NO_LABEL))


class StepGraphs:
    """The loss and the gradients of a batch, by graphs.

    Args:
        loss_at: the summed loss of ids [rows, length], places and targets [labels] (``AnswerLoss.at``).
        parameters: that get gradients.
        examples: all there are to train on.
        rows: of the largest part of a batch.
        multiple, limit: of the lengths; see ``buckets``.

    Attributes:
        lengths: that parts are padded to, ascending.
    """

    def __init__(
        self, loss_at: LossAt, parameters: Sequence[nn.Parameter], examples: Sequence[Encoded], rows: int,
        multiple: int, limit: int | None,
    ):  # fmt: skip
        self._loss_at, self._parameters = loss_at, parameters
        self._examples = sorted(examples, key=lambda example: len(example.input_ids))
        sizes = [len(example.input_ids) for example in self._examples]
        self.lengths = buckets(sizes, multiple=multiple, limit=limit)
        self._device = parameters[0].device
        self._grads = [torch.zeros_like(parameter) for parameter in parameters]
        self._answers = torch.ones((), device=self._device)
        self._total = torch.zeros((), dtype=torch.float64, device=self._device)
        self._buckets = {length: self._bucket(length, rows) for length in self.lengths}

    def _bucket(self, length: int, rows: int) -> _Bucket:
        counts = sorted(_labels(example) for example in self._examples if len(example.input_ids) <= length)
        labels = max(1, sum(counts[-rows:]))
        inputs = (torch.zeros(shape, dtype=torch.int64, device=self._device) for shape in ((rows, length), labels))
        ids, places = inputs
        return _Bucket(ids, places, places + NO_LABEL)

    def backward(self, parts: Sequence[Sequence[Encoded]], answers: int) -> float:
        """The loss of a batch, whose gradients the parameters get.

        Args:
            parts: of the batch, none of them empty, none with more than ``rows`` examples.
            answers: what the summed loss is divided by.
        """
        self._begin(answers)
        for examples in parts:
            bucket = self._buckets[self._length(examples)]
            assert bucket.replay is not None, "capture comes first"
            bucket.fill(examples)
            bucket.replay()
        return self._total.item()

    def capture(self, progress: Progress | None = None) -> None:
        """Record the graphs, and compare each with the step that it is of.

        Args:
            progress: called with how many of how many pieces of this are done.

        Raises:
            RuntimeError: it cannot be captured, or a graph gives another loss or gradient.
        """
        longest_first = [self._buckets[length] for length in reversed(self.lengths)]
        done, stream = 0, torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        before = random_states()

        def advance() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, 3 * len(longest_first))

        try:
            expected = []
            for bucket in longest_first:
                expected.append(self._without(bucket, before, stream))
                advance()
            pool = torch.cuda.graph_pool_handle() if stream else None
            for bucket in longest_first:
                bucket.replay = captured(functools.partial(self._run, bucket), pool, stream)
                advance()
            for bucket, (loss, grads) in zip(longest_first, expected, strict=True):
                assert bucket.replay is not None
                found, found_grads = self._tried(bucket, bucket.replay, before)
                if not (_is_close(found, loss) and _is_close(found_grads, grads)):
                    raise RuntimeError("a captured step gives another loss, or other gradients")
                advance()
        finally:
            restore_random_states(*before)

    def described(self) -> str:
        """The lengths, and what the examples have in padding, in words."""
        sizes = [len(example.input_ids) for example in self._examples]
        padded = sum(next(length for length in self.lengths if length >= size) for size in sizes)
        lengths = ", ".join(map(str, self.lengths))
        return f"steps of {lengths} tokens an example, of which {1 - sum(sizes) / padded:.0%} are padding"

    def _length(self, examples: Sequence[Encoded]) -> int:
        longest = max(len(example.input_ids) for example in examples)
        return next(length for length in self.lengths if length >= longest)

    def _begin(self, answers: int) -> None:
        for parameter, grad in zip(self._parameters, self._grads, strict=True):
            parameter.grad = grad
        for tensor in (*self._grads, self._total):
            tensor.zero_()
        self._answers.fill_(answers)

    def _run(self, bucket: _Bucket) -> None:
        """What is captured."""
        with _one_text_a_row():
            loss = self._loss_at(bucket.ids, bucket.places, bucket.targets) / self._answers
        loss.backward()
        self._total.add_(loss.detach())

    def _without(self, bucket: _Bucket, before: Any, stream: torch.cuda.Stream | None) -> tuple[Tensor, Tensor]:
        """The loss and gradients of some examples without a graph."""
        rows, length = bucket.ids.shape
        bucket.fill([example for example in self._examples if len(example.input_ids) <= length][-rows:])
        with _on(stream):
            self._tried(bucket, functools.partial(self._run, bucket), before)
            found = self._tried(bucket, functools.partial(_without_waiting, self._run, bucket), before)
        if _on_host(random_states(), self._device) != _on_host(before, self._device):
            raise RuntimeError("the model draws random numbers on the host, which a graph would repeat")
        return found

    def _tried(self, bucket: _Bucket, run: Callable[[], None], before: Any) -> tuple[Tensor, Tensor]:
        """The loss and a sample of the gradients of the examples in a bucket, with the random numbers of ``before``."""
        restore_random_states(*before)
        self._begin(int((bucket.targets != NO_LABEL).sum()))
        run()
        # An odd stride, or a matrix of even width would show some of its columns only.
        grads = [grad.flatten()[:: grad.numel() // _SAMPLE | 1] for grad in self._grads]
        return self._total.clone(), torch.cat(grads).double()


@contextmanager
def _on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Run the body on another stream, after what was launched before, and what comes later after it."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def _without_waiting(run: Callable[[_Bucket], None], bucket: _Bucket) -> None:
    """Run, and raise RuntimeError where the host waits for a GPU: a capture that fails leaves more behind."""
    if not bucket.ids.is_cuda:
        run(bucket)
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(bucket)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _one_text_a_row() -> Iterator[None]:
    """Tell transformers that no row holds several texts.

    It looks at the positions of each batch, on the host; within a capture it does not, and masks as if some did, which
    kernels of attention that take no mask are left out for.
    """
    from transformers import masking_utils

    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda *_, **__: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


def _on_host(states: tuple[dict[str, Any], dict[str, Tensor]], device: torch.device) -> list[Any]:
    """Of random states those that a graph on a device does not move."""
    numbers, tensors = states
    return [numbers, [] if device.type == "cpu" else tensors["random.cpu"].tolist()]


def _labels(example: Encoded) -> int:
    return sum(label != NO_LABEL for label in example.labels[1:])


def _is_close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= CLOSE * expected.norm())
